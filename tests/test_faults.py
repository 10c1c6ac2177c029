"""Broken files of every kind, bombs, and kills at random moments: an error that explains itself, nothing half done.

``EFFDEPLOY_FAULTS=1000 EFFDEPLOY_KILLS=50 pytest tests/test_faults.py`` gives the figures of docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import mutate, mutate_json
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from deploy.artifacts import artifacts_of, open_artifact, read_manifest
from deploy.errors import BundleError
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.records import Stage, Target
from deploy.resolve import resolve_recipe

COUNT = int(os.environ.get("EFFDEPLOY_FAULTS", "15"))
KILLS = int(os.environ.get("EFFDEPLOY_KILLS", "2"))
SECONDS = 60  # a run that takes longer hangs: whole files take two
ROOM = 3 << 30  # bytes that a run may take beyond what the server has
TINY = ("export", "riformer", "--variant", "tiny", "--size", "32")


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Return a folder of whole files: a bundle, its graph and recipe, checkpoints, a photo."""
    folder = tmp_path_factory.mktemp("whole")
    request = {"cache": str(folder / "cache"), "output": str(folder / "log")}
    answer = server.ask({"arguments": [*TINY, "--until", "parity", "--out", str(folder / "b")], **request})
    assert answer["code"] == 0, answer["output"]
    for name in ("20-patched.onnx", "recipe.yaml", "manifest.json"):
        shutil.copy(folder / "b" / name, folder)
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny"), "size": ("", 32)})
    state = load_model(find_system("riformer"), recipe, Target.ONNXRUNTIME).reference.state_dict()
    torch.save({"state_dict": state}, folder / "w.pth")
    save_file(state, folder / "w.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)).save(folder / "photo.png")
    return folder


@pytest.fixture
def run(server, tmp_path):
    """Run a command with little time and memory; return its exit code and output."""

    def run(*arguments, **request):
        limits = {"seconds": SECONDS, "room": ROOM, "cache": str(tmp_path / "cache"), "output": str(tmp_path / "log")}
        answer = server.ask({"arguments": list(map(str, arguments)), **limits, **request})
        for log in tmp_path.glob("log.*"):
            log.unlink()
        return answer["code"], answer["output"]

    return run


def complaint(code: int, output: str) -> str:
    """Say what is wrong with how a run ended; a refusal with its own code is fine, and so is success."""
    if code == -signal.SIGALRM:
        return f"took more than {SECONDS} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code in (1, 99) or "Traceback (most recent call last)" in output:
        return f"ended in a traceback: {output[-600:]}"
    if code and not re.search(r"error|refused|Usage|FAIL", output):
        return f"ended with {code} and no reason: {output[-600:]}"
    return ""


@dataclass(frozen=True)
class Kind:
    """A kind of file: which whole one is broken, how, and the commands that then read it."""

    file: str
    commands: tuple[tuple[str, ...], ...]
    change: Callable[[bytes, int], bytes] = mutate


EXPORT = (*TINY, "--until", "model", "--out", "{place}/b")
KINDS = {
    "graph": Kind("20-patched.onnx", (("lint", "{file}"), ("inspect", "{file}"))),
    "checkpoint .pth": Kind("w.pth", ((*EXPORT, "--weights", "{file}"),)),
    "checkpoint .safetensors": Kind("w.safetensors", ((*EXPORT, "--weights", "{file}"),)),
    "recipe": Kind("recipe.yaml", (("export", "{file}", "--dry-run"),)),
    "photo": Kind("photo.png", (("run", "{whole}/b", "{file}"),)),
    "manifest": Kind(
        "manifest.json",
        (
            ("inspect", "{place}/m"), ("report", "{place}/m"), ("diff", "{place}/m", "{whole}/b"),
            ("run", "{place}/m", "{whole}/photo.png"),
        ),
        mutate_json,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(0 if COUNT > 100 else 600)
def test_broken_files(kind, whole, run, tmp_path):
    """None ends in a traceback, a hang, a crash or a half bundle."""
    about, ends, complaints = KINDS[kind], Counter[int](), []
    data = (whole / about.file).read_bytes()
    for seed in range(COUNT):
        place = tmp_path / str(seed)
        place.mkdir()
        file = place / about.file
        file.write_bytes(about.change(data, seed))
        if kind == "manifest":
            shutil.copytree(whole / "b", place / "m")
            shutil.copy(file, place / "m")
        names = {"file": file, "place": place, "whole": whole}
        command = [part.format(**names) for part in about.commands[seed % len(about.commands)]]
        code, output = run(*command)
        ends[code] += 1
        if wrong := complaint(code, output) or half_done(place, code):
            complaints.append(f"seed {seed}: {' '.join(command)}: {wrong}")
        shutil.rmtree(place)
    print(f"{kind}: {COUNT} files, exit codes {dict(sorted(ends.items()))}")
    assert not complaints, "\n\n".join(complaints)
    assert set(ends) != {0}, "the changes change nothing"


def half_done(place: Path, code: int) -> str:
    """Say what a run left behind that is neither whole nor gone."""
    left = sorted(p.name for p in place.glob("*b*") if p.name.startswith((".b.", "b")))
    if code:
        return f"left {left} behind" if left else ""
    if left == ["b"]:
        read_manifest(place / "b")
    return "" if left in ([], ["b"]) else f"left {left} behind"


def test_what_is_wrong_is_seen(run, whole, tmp_path):
    """The negative control: a traceback, a hang, a crash and a half bundle are complained of."""
    assert "traceback" in complaint(*run("list", defect=True))
    assert "took more" in complaint(*run("list", sleep=30, seconds=1))
    assert "SIGSEGV" in complaint(-signal.SIGSEGV, "")
    assert complaint(*run("list")) == ""
    (tmp_path / ".b.partial-abcdefgh").mkdir()
    assert half_done(tmp_path, 0)
    assert half_done(tmp_path, 6)
    assert len({mutate(b"abc" * 100, seed) for seed in range(50)}) > 40


def test_bombs_in_checkpoints(run, whole, tmp_path):
    """Files that promise more than they hold end as broken files, within a bound of memory and time."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "dims.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "header.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    (tmp_path / "deep.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"[" * 10**6)
    numbers, marked = torch.zeros(54321), tmp_path / "dims.pth"
    torch.save({"state_dict": {"w": numbers}}, marked)
    with zipfile.ZipFile(marked) as old, zipfile.ZipFile(tmp_path / "storage.pth", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            counted = data.replace(b"M1\xd4", b"J\xff\xff\xff\x7f") if item.filename.endswith("data.pkl") else data
            new.writestr(item, counted)
    with zipfile.ZipFile(marked) as old, zipfile.ZipFile(tmp_path / "zip.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            data = bytes(1 << 30) if item.filename.endswith("data/0") else old.read(item)
            new.writestr(item.filename, data)
    marked.unlink()
    for bomb in sorted(tmp_path.glob("*.pth")) + sorted(tmp_path.glob("*.safetensors")):
        code, output = run(*TINY, "--until", "model", "--out", tmp_path / "b", "--weights", bomb, room=1 << 30)
        assert not complaint(code, output), (bomb.name, complaint(code, output))
        assert code in (6, 7), (bomb.name, output)
        assert not half_done(tmp_path, code)


def graph(nodes=(), weights=()):
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y"))
    nodes = list(nodes) or [helper.make_node("Relu", ["x"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", [given], [made], list(weights)), ir_version=10)


def nested(depth):
    """Return a node with branches in branches."""
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(depth):
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
        branch = helper.make_graph([node], "branch", [], [out])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        if depth > 20:
            node.attribute.pop()
    return node


def outside(location):
    """Return a model whose weights lie in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", str(location)), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    return graph([helper.make_node("Add", ["x", "w"], ["y"])], [weight])


@pytest.fixture
def hostile(tmp_path):
    """Write graphs that promise more than they hold, or ask for files that are not theirs."""
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    place = tmp_path / "graphs"
    place.mkdir()
    (place / "link.bin").symlink_to(tmp_path / "secret.bin")
    huge = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40, 2**20], raw_data=bytes(16))
    negative = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4], raw_data=bytes(16))
    add = helper.make_node("Add", ["x", "w"], ["y"])
    shape = helper.make_tensor("w", TensorProto.INT64, [2], [2**40, 2**20])
    filled = [helper.make_node("ConstantOfShape", ["w"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])]
    models = {
        "dims": graph([add], [huge]), "negative": graph([add], [negative]),
        "filled": graph(filled, [shape]), "nested": graph([nested(30)]),
        "wide": graph([helper.make_node("Relu", ["x"], ["y"]) for _ in range(20_000)]),
        "parent": outside("../secret.bin"), "absolute": outside(tmp_path / "secret.bin"), "link": outside("link.bin"),
    }  # fmt: skip
    for name, model in models.items():
        (place / f"{name}.onnx").write_bytes(model.SerializeToString())
    (place / "deep.onnx").write_bytes(deep(5000))
    return place


def deep(depth):
    """Return a message in a message in a message, deeper than any reader goes: graph -> node -> attribute -> graph."""
    data = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            data = tag + varint(len(data)) + data
    return b"\x3a" + varint(len(data)) + data  # ModelProto.graph


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("command", ["lint", "inspect"])
def test_bombs_in_graphs(command, hostile, run):
    for file in sorted(hostile.glob("*.onnx")):
        code, output = run(command, file, room=1 << 30)
        assert not complaint(code, output), (file.name, complaint(code, output))
        if file.stem in ("parent", "absolute", "link", "deep"):
            assert code, (file.name, output)


SMALL = {  # system -> variant and size of an export of seconds
    "riformer": ("tiny", 32), "tome": ("tiny", 224), "rtdetr": ("tiny", 128), "convmixer": ("tiny", 64),
    "alternet": ("18_cifar", 32), "castling": ("tiny", 64), "sparseformer": ("tiny", 224),
}  # fmt: skip


@pytest.mark.parametrize("system", SMALL if KILLS > 2 else ["riformer"])
@pytest.mark.timeout(0 if KILLS > 2 else 600)
def test_killed_at_any_moment(system, run, tmp_path):
    """What was there before stays, nothing looks finished that is not, and the next run goes on."""
    variant, size = SMALL[system]
    command = (
        "export", system, "--variant", variant, "--size", size, "--fp16", "--seconds", "0.05",
        "--set", "bench.rounds=3", "--out", tmp_path / "b",
    )  # fmt: skip
    asked = {"cache": str(tmp_path / "cache"), "seconds": 10 * SECONDS}
    draw, during, took = random.Random(system), Counter[str](), 60.0
    while during.total() < KILLS:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        if during.total() % 2:  # else what the run before has made is there, and stays or is replaced as a whole
            for bundle in bundles(tmp_path):
                shutil.rmtree(bundle)
        moment, start = draw.uniform(0.02, took), time.monotonic()
        code, output = run(*command, kill_after=moment, **asked)
        if code in (0, 15):  # it was done before its moment came
            took = min(took, 0.98 * (time.monotonic() - start))
            continue
        assert code == -signal.SIGKILL, output
        during[stage_after(output)] += 1
        for bundle in bundles(tmp_path):
            require_whole(bundle)
        code, output = run(*command, **asked)
        assert code in (0, 15), f"after a kill at {moment:.2f} of {took:.2f} s: {output}"
        assert bundles(tmp_path)
        assert not list(tmp_path.glob(".b.partial*"))
    print(f"{system}: {KILLS} kills within {took:.1f} s, by stage {dict(during)}")


def bundles(folder: Path) -> list[Path]:
    """Return what looks finished: a run whose parity fails, as it may with random weights, has another name."""
    return [path for name in ("b", "b.failed") if (path := folder / name).exists()]


def require_whole(bundle: Path) -> None:
    for artifact in artifacts_of(read_manifest(bundle)):
        open_artifact(artifact, bundle)


def stage_after(output: str) -> str:
    """Name the stage that runs after the last one that was finished."""
    finished = re.findall(r"^\[\d/\d\] (\w+)", output, re.M)
    road = [stage.value for stage in Stage]
    return road[min(road.index(finished[-1]) + 1, len(road) - 1)] if finished else road[0]


def test_a_bundle_that_is_not_whole_is_seen(whole, tmp_path):
    """The negative control of the kills: a file that is cut, and one that is not there."""
    shutil.copytree(whole / "b", tmp_path / "b")
    (path,) = bundles(tmp_path)
    require_whole(path)
    for change in (lambda file: file.write_bytes(file.read_bytes()[:-1]), Path.unlink):
        change(path / "20-patched.onnx")
        with pytest.raises(BundleError):
            require_whole(path)
