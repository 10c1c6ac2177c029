"""The command line: what users type, and what they get wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from support import effdeploy

from deploy.artifacts import read_manifest
from deploy.cli import app
from deploy.records import Stage

TINY = ("export", "riformer", "--variant", "tiny", "--seconds", "0.1")


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_help_is_shown_as_it_was_written(command):
    result = effdeploy(command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_brackets_in_help_are_no_markup():
    shown = re.sub(r"[\s│]+", " ", effdeploy("export", "--help").stdout)
    assert "hf://OWNER/REPO[/FILE][@REVISION], https://...[#sha256=HEX], random or random:SEED." in shown


def test_list_shows_systems_variants_and_figures():
    result = effdeploy("list")
    assert result.exit_code == 0
    for words in ("riformer", "s12", "m48", "11.9", "1.81", "arXiv 2304.05659"):
        assert words in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["m48"] in [row[:1] for row in rows]
    assert ["tiny"] not in [row[:1] for row in rows]


def test_a_bundle_is_whole(tiny_bundle):
    run = read_manifest(tiny_bundle)
    assert run.ok
    assert run.until is Stage.REPORT
    for name in ("10-traced.onnx", "20-patched.onnx", "manifest.json", "recipe.yaml", "report.html", "report.md"):
        assert (tiny_bundle / name).is_file(), name
    assert run.model.weights.statement == "weights: random (seed 0): latency and numerics only, not accuracy"
    assert run.model.drift.fp64_relative < 1e-10
    assert [c.stage for c in run.parity.comparisons] == ["deploy form", "traced", "engine"]
    assert {c.name for c in run.bench.latencies} == {"engine", "naive"}
    assert not [p for p in tiny_bundle.parent.iterdir() if p.name.startswith(".")]
    onnx.checker.check_model(tiny_bundle / "20-patched.onnx", full_check=True)


def test_every_output_says_that_the_weights_are_random(tiny_bundle):
    for name in ("report.html", "report.md", "manifest.json"):
        assert "random (seed 0): latency and numerics only, not accuracy" in (tiny_bundle / name).read_text()


def test_the_last_lines_are_verdict_and_numbers(tmp_path):
    result = effdeploy(*TINY, "--until", "parity", "--out", tmp_path / "b")
    tail = result.stdout[result.stdout.index("[6/6]") :]
    for words in ("PASSED", "weights: random", "parity", "engine", str(tmp_path / "b")):
        assert words in tail


@pytest.mark.parametrize("stage", ["model", "trace", "passes", "precision", "engine"])
def test_until_stops_there(stage, tmp_path):
    result = effdeploy(*TINY, "--fp16", "--until", stage, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    files = set(left_behind(tmp_path / "b"))
    order = ["10-traced.onnx", "20-patched.onnx", "30-fp16.onnx"]
    expected = {"model": 0, "trace": 1, "passes": 2, "precision": 3, "engine": 3}[stage]
    assert files & set(order) == set(order[:expected])
    assert "nothing was compared" in read_manifest(tmp_path / "b").verdict


def test_from_makes_a_stage_and_the_later_ones_again(tmp_path):
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--until", "passes", "--out", out).exit_code == 0
    before = read_manifest(out)
    result = effdeploy(*TINY, "--from", "passes", "--until", "engine", "--fp16", "--out", out)
    assert result.exit_code == 0, result.stderr
    after = read_manifest(out)
    assert (after.model, after.trace) == (before.model, before.trace)
    assert [s for s in after.origins if after.origins[s].reused] == ["model", "trace"]
    assert after.origins["passes"].why == "asked for"
    assert after.precision.precision.value == "fp16"


def test_precisions_are_exclusive(tmp_path):
    result = effdeploy(*TINY, "--fp16", "--bf16", "--out", tmp_path / "b")
    assert result.exit_code == 2
    assert "choose one" in result.stderr


def test_photos_join_the_parity_inputs(tmp_path):
    import skimage

    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "camera.png"):
        shutil.copy(Path(skimage.__file__).parent / "data" / name, photos)
    result = effdeploy(*TINY, "--fp16", "--images", photos, "--until", "parity", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(tmp_path / "b")
    assert run.parity.inputs["photos"] == 4
    assert all(c.top1 == 1.0 for c in run.parity.comparisons)


def test_verify_passes_and_fails_on_a_changed_file(tiny_bundle, tmp_path):
    assert effdeploy("verify", tiny_bundle).exit_code == 0
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    data = bytearray((copy / "20-patched.onnx").read_bytes())
    data[-20] ^= 1
    (copy / "20-patched.onnx").write_bytes(bytes(data))
    result = effdeploy("verify", copy)
    assert result.exit_code == 17
    assert "was changed" in result.stderr


def test_verify_catches_a_wrong_engine_with_a_matching_hash(tiny_bundle, tmp_path):
    """Someone rewrote the manifest too: only parity can tell."""
    from deploy.artifacts import artifact_of, write_manifest

    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    model = onnx.load(copy / "20-patched.onnx")
    weight = next(i for i in model.graph.initializer if i.name == "head.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + np.float32(0.5), weight.name))
    (copy / "20-patched.onnx").write_bytes(model.SerializeToString())
    text = (copy / "manifest.json").read_text()
    run = read_manifest(copy)
    new = artifact_of(copy / "20-patched.onnx", copy)
    (copy / "manifest.json").write_text(
        text.replace(run.passes.artifact.sha256, new.sha256).replace(
            f'"size": {run.passes.artifact.size}', f'"size": {new.size}'
        )
    )
    assert write_manifest is not None
    result = effdeploy("verify", copy)
    assert result.exit_code == 15, result.stdout + result.stderr
    assert "FAILED" in result.stdout


def test_bench_of_two_bundles_and_report_of_both(tiny_bundle, tmp_path):
    fp16 = tmp_path / "half"
    assert effdeploy(*TINY, "--fp16", "--until", "engine", "--out", fp16).exit_code == 0
    result = effdeploy("bench", tiny_bundle, fp16, "--seconds", "0.1", "--baseline", "eager")
    assert result.exit_code == 0, result.stdout + result.stderr
    for words in ("tiny", "half", "eager", "p99", "images/s"):
        assert words in result.stdout
    result = effdeploy("report", tiny_bundle, fp16, "--out", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "comparison.html").is_file()


def test_report_renders_the_same_bytes_from_the_manifest(tiny_bundle, tmp_path):
    result = effdeploy("report", tiny_bundle, "--out", tmp_path)
    assert result.exit_code == 0
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == (tiny_bundle / name).read_bytes()


def test_json_lines(tmp_path):
    result = effdeploy(*TINY, "--until", "trace", "--json", "--out", tmp_path / "b")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[-1]["event"] == "result"
    assert events[-1]["record"]["model"]["system"] == "riformer"


def test_parity_failure_is_an_exit_code_and_does_not_replace_a_good_bundle(tmp_path):
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--until", "parity", "--out", out).exit_code == 0
    good = (out / "manifest.json").read_bytes()
    strict = ("--set", "parity.tolerances.fp32.max_relative=1e-12")
    result = effdeploy(*TINY, *strict, "--until", "parity", "--out", out)
    assert result.exit_code == 15
    assert "FAILED" in result.stdout
    assert (out / "manifest.json").read_bytes() == good
    assert not read_manifest(tmp_path / "b.failed").ok
    assert left_behind(tmp_path) == ["b", "b.failed"]


def bad_checkpoint(tmp_path, content):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


BAD_INPUT = {
    "unknown system": (["riformr"], 4, "did you mean 'riformer'"),
    "unknown variant": (["riformer", "--variant", "s121"], 4, "did you mean 's12'"),
    "size not a multiple": (["riformer", "--size", "225"], 5, "--size 224"),
    "size not a size": (["riformer", "--size", "big"], 5, "expected a side"),
    "batch": (["riformer", "--batch", "4:2"], 3, "expected one number or min:opt:max"),
    "opset": (["riformer", "--set", "trace.opset=23"], 3, "expected 18 to 22"),
    "set": (["riformer", "--set", "bench.thread=1"], 3, "did you mean 'threads'"),
    "baseline": (["riformer", "--baseline", "egaer"], 3, "egaer"),
    "stage": (["riformer", "--until", "prity"], 4, "did you mean 'parity'"),
    "backend": (["riformer", "--backend", "onnxrt"], 4, "did you mean 'onnxruntime'"),
    "target": (["riformer", "--target", "coreml"], 3, "target"),
    "weights missing": (["riformer", "--weights", "none.pth"], 6, "not a file"),
    "weights seed": (["riformer", "--weights", "random:x"], 3, "random:SEED"),
    "images missing": (["riformer", "--images", "nowhere"], 18, "nowhere"),
    "recipe missing": (["nothing.yaml"], 3, "nothing.yaml"),
    "architecture option": (["riformer", "--set", "options.depth=3"], 3, "depths"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_a_clear_error_with_its_own_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, code, words = BAD_INPUT[name]
    tiny = [] if "--variant" in arguments or arguments[0] != "riformer" else ["--variant", "tiny"]
    result = effdeploy("export", *arguments, *tiny)
    text = result.stderr
    assert result.exit_code == code, text
    assert words in text
    assert "Traceback" not in text
    assert f"exit code {code}" in text
    assert left_behind(tmp_path) in ([], ["engines"])
    assert not (tmp_path / "engines").exists() or left_behind(tmp_path / "engines") == []


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"PK\x03\x04 truncated", 6),
        ({"a": torch.ones(2), "b": torch.ones(3)}, 6),
        ({"a": torch.tensor([float("nan")]), "b": torch.ones(1)}, 8),
    ],
)
def test_bad_checkpoints(content, code, tmp_path):
    path = bad_checkpoint(tmp_path, content)
    result = effdeploy(*TINY, "--weights", path, "--out", tmp_path / "b")
    assert result.exit_code == code
    assert left_behind(tmp_path) == ["w.pth"]


def test_a_backend_that_is_not_there(tmp_path, monkeypatch):
    from deploy.backends import load_backend

    reason = load_backend("tensorrt").available()
    if reason is None:
        pytest.skip("TensorRT and a GPU are here")
    result = effdeploy(*TINY, "--backend", "tensorrt", "--out", tmp_path / "b")
    assert result.exit_code == 12
    assert reason.split(";")[0] in result.stderr
    assert left_behind(tmp_path) == []


def test_something_else_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    result = effdeploy(*TINY, "--until", "model", "--out", tmp_path / "b")
    assert result.exit_code == 19
    assert left_behind(tmp_path / "b") == ["thesis.txt"]
    assert left_behind(tmp_path) == ["b"]


def test_a_shorter_run_does_not_replace_a_finished_bundle(tiny_bundle):
    before = left_behind(tiny_bundle)
    result = effdeploy(*TINY, "--until", "model", "--out", tiny_bundle)
    assert result.exit_code == 19
    assert "went on to report" in result.stderr
    assert left_behind(tiny_bundle) == before


def test_verify_of_a_bundle_without_an_engine_is_no_pass(tmp_path):
    assert effdeploy(*TINY, "--until", "model", "--out", tmp_path / "b").exit_code == 0
    result = effdeploy("verify", tmp_path / "b")
    assert result.exit_code == 17
    assert "has no engine" in result.stderr


def test_a_bundle_that_is_none(tmp_path):
    for command in ("verify", "bench", "report"):
        result = effdeploy(command, tmp_path)
        assert result.exit_code == 17
        assert "not a bundle" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(number, code, tmp_path):
    command = [sys.executable, "-m", "deploy", *TINY, "--seconds", "60", "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".b.partial-*/10-traced.onnx")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert left_behind(tmp_path) == []


def test_python_m_deploy():
    out = subprocess.run([sys.executable, "-m", "deploy", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout.strip()


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tensorrt_rtx_engines(precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install -e '.[tensorrt-rtx]'")
    out = tmp_path / "b"
    options = ("--backend", "tensorrt_rtx", "--sm", "80,89,120")
    result = effdeploy(*TINY, f"--{precision}", *options, "--batch", "1:2:4", "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(out)
    assert [e.device for e in run.engines] == ["sm80", "sm89", "sm120"]
    assert all(e.audit.ok and not e.runnable and "GPU" in e.reason for e in run.engines)
    assert run.trace.op_counts["GroupNormalization"] == 9
    assert run.bench is None
    assert "not run" in (out / "report.md").read_text().lower()


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_s12(precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install -e '.[tensorrt-rtx]'")
    out = tmp_path / "b"
    command = ("export", "riformer", f"--{precision}", "--backend", "tensorrt_rtx", "--until", "engine", "--out", out)
    result = effdeploy(*command)
    assert result.exit_code == 0, result.stdout + result.stderr
    for engine in read_manifest(out).engines:
        kernels = engine.audit.kernels
        assert sum(kernels.values()) <= 100
        assert max(kernels, key=kernels.get) == precision


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s24", "s36", "m36", "m48"])
def test_every_variant_exports(variant, tmp_path):
    out = tmp_path / "b"
    result = effdeploy("export", "riformer", "--variant", variant, "--fp16", "--until", "engine", "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_s12_at_384(tmp_path):
    result = effdeploy("export", "riformer", "--size", "384", "--fp16", "--until", "parity", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stdout + result.stderr
