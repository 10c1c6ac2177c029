"""What a run takes from earlier ones: everything that would consume the same, nothing that would not."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import effdeploy

from deploy import reuse
from deploy.artifacts import artifact_of, environment, read_manifest
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.recipe import Recipe
from deploy.records import Stage, Target
from deploy.resolve import resolve_recipe
from deploy.reuse import CONSUMES, Reuse, weights_identity
from deploy.store import ENTRY, Entry, Store, code_version, key_of

STAGES = tuple(stage.value for stage in Stage if stage is not Stage.REPORT)
TINY = (
    "export", "riformer", "--variant", "tiny", "--size", "32", "--set", "bench.seconds=0.05",
    "--set", "bench.warmup_seconds=0.05", "--set", "bench.rounds=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Return a folder with a bundle and the cache that its export left."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFDEPLOY_CACHE", str(folder / "cache"))
        result = effdeploy(*TINY, "--out", folder / "b")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "this run" not in result.stdout  # nothing was reused, so there is nothing to say
    return folder


@pytest.fixture
def bundle(first, cache, tmp_path):
    """Return a copy of that bundle; this test's cache is a copy of its cache."""
    shutil.copytree(first / "cache", cache, dirs_exist_ok=True)
    shutil.copytree(first / "b", tmp_path / "b")
    return tmp_path / "b"


def export(bundle, *options):
    result = effdeploy(*TINY, *options, "--out", bundle)
    assert result.exit_code == 0, result.stdout + result.stderr
    return result, read_manifest(bundle)


def made(run):
    return [stage for stage in STAGES if stage in run.origins and not run.origins[stage].reused]


def kept(cache, stage):
    """Return the folder of the one kept stage of this name."""
    (found,) = (cache / "stages").glob(f"{stage}-*")
    return found


def test_an_unchanged_export_makes_nothing_again(bundle):
    before = read_manifest(bundle)
    result, after = export(bundle)
    assert made(after) == []
    for stage in STAGES:
        assert (
            dataclasses.replace(after.origins[stage], reused=False, why=before.origins[stage].why)
            == (before.origins[stage])
        )
    same = ("model", "trace", "passes", "precision", "engines", "parity", "bench", "environment", "recipe", "ok")
    assert [name for name in same if getattr(after, name) != getattr(before, name)] == []
    assert f"latency    reused    measured {before.origins['latency'].made}" in result.stdout
    report = (bundle / "report.md").read_text()
    assert f"Not measured in this run: measured {before.origins['latency'].made}" in report
    assert "Where each stage comes from" in report


def test_an_unchanged_export_loads_no_pytorch(bundle):
    code = (
        "import sys\nfrom deploy.cli import app\n"
        f"app({[*TINY, '--out', str(bundle)]!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'onnxscript', 'onnx_graphsurgeon'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert made(read_manifest(bundle)) == []


@pytest.mark.parametrize(
    ("options", "redone", "why"),
    [
        (("--set", "bench.seconds=0.06"), ["latency"], "bench.seconds changed: 0.05 -> 0.06"),
        (("--set", "parity.tolerances.fp32.cosine=0.99999"), ["parity"], "parity.tolerances.fp32.cosine changed: "),
        (("--set", "parity.seed=1"), ["parity", "latency"], "parity.seed changed: 0 -> 1"),
        # the passes run again, make the same file, and what follows is kept
        (("--set", "passes.verify_each=true"), ["passes"], "passes.verify_each changed: False -> True"),
        (("--fp16",), ["precision", "engine", "parity", "latency"], "precision changed: fp32 -> fp16"),
        (("--from", "parity"), ["parity", "latency"], "asked for"),
    ],
)
def test_a_change_redoes_what_follows_from_it(options, redone, why, bundle):
    result, run = export(bundle, *options)
    assert made(run) == redone
    assert why in run.origins[redone[0]].why
    assert f"run       {run.origins[redone[0]].why}" in result.stdout
    assert made(export(bundle, *(o for o in options if o not in ("--from", "parity")))[1]) == []


def test_no_reuse_makes_everything_again(bundle, tmp_path):
    assert made(export(tmp_path / "c", "--no-reuse", "--until", "model")[1]) == ["model"]
    assert made(export(tmp_path / "d", "--until", "model")[1]) == []


def test_other_weights_are_said_to_be_others(bundle, tmp_path):
    _, run = export(tmp_path / "c", "--weights", "random:1", "--until", "model")
    assert run.origins["model"].why == "weights changed: random 0 -> random 1"


def damage_file(place, name):
    data = bytearray((place / name).read_bytes())
    data[len(data) // 2] ^= 1
    (place / name).write_bytes(data)


def truncate(place, name):
    (place / name).write_bytes((place / name).read_bytes()[:100])


def lie(place, name):
    (place / name).write_text((place / name).read_text().replace('"sites": ', '"sites": 1', 1))


@pytest.mark.parametrize(
    ("harm", "name", "words"),
    [
        (damage_file, "20-patched.onnx", "was changed"),
        (truncate, "20-patched.onnx", "was changed"),
        (truncate, ENTRY, "cannot be read"),
        (lie, ENTRY, "was changed"),
        (lambda place, name: (place / name).unlink(), "20-patched.onnx", "is missing"),
        (lambda place, name: (place / name).unlink(), ENTRY, "is missing"),
    ],
)
def test_a_damaged_stage_is_noticed_and_made_again(harm, name, words, bundle, cache):
    before = read_manifest(bundle)
    harm(kept(cache, "passes"), name)
    result, run = export(bundle)
    assert made(run) == ["passes"]
    assert words in run.origins["passes"].why
    assert "warning: passes: what was kept of it is damaged" in result.stderr
    assert run.passes.artifact == before.passes.artifact
    assert artifact_of(bundle / "20-patched.onnx", bundle) == before.passes.artifact
    assert made(export(bundle)[1]) == []


def test_a_changed_file_of_the_bundle_is_noticed_and_replaced(bundle):
    before = read_manifest(bundle)
    damage_file(bundle, "10-traced.onnx")
    result, _ = export(bundle)
    assert "10-traced.onnx was changed" in result.stderr
    assert artifact_of(bundle / "10-traced.onnx", bundle) == before.trace.artifact


def test_a_cache_that_cannot_be_written_costs_the_reuse_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFDEPLOY_CACHE", str(tmp_path / "file" / "cache"))
    result, run = export(tmp_path / "b", "--until", "model")
    assert made(run) == ["model"]
    assert "finished stages cannot be kept for the next run" in result.stderr
    assert "Not a directory" in result.stderr


def test_a_dry_run_says_what_would_be_reused(bundle):
    result = effdeploy(*TINY, "--set", "bench.seconds=0.07", "--dry-run", "--out", bundle)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(" reuse ") == 6


# What is in a key


def recipe(**over) -> Recipe:
    return resolve_recipe("riformer", {k: ("", v) for k, v in {"variant": "tiny", "size": 32, **over}.items()})


def reuse_with(run, folder=None, **over) -> Reuse:
    """Return a reuse that stands where the run of the module's bundle stood at its end."""
    found = Reuse(recipe=recipe(**over), target=Target.ONNXRUNTIME, folder=folder)
    records = (run.model, run.trace, run.passes, run.precision, run.engines, (run.parity, run.model.drift), run.bench)
    found.records = dict(zip(reuse.KINDS, records, strict=True))
    return found


@pytest.mark.parametrize("ok", [True, False])
def test_a_verdict_that_failed_is_not_kept(ok, first, tmp_path):
    run = read_manifest(first / "b")
    found = reuse_with(run, folder=tmp_path)
    _, origin, _ = found.take(Stage.PARITY)
    parity = dataclasses.replace(run.parity, ok=ok)
    assert found.keep(Stage.PARITY, (parity, run.model.drift), origin) == ""
    assert found.take(Stage.PARITY)[1].reused is ok


def keys(found: Reuse) -> dict[str, str]:
    return {stage.value: key_of(stage.value, found.consumed(stage)) for stage in reuse.KINDS}


def changed(first, monkeypatch, change) -> list[str]:
    """Return the stages whose keys are others after ``change``."""
    run = read_manifest(first / "b")
    before = keys(reuse_with(run))
    over = change(monkeypatch) or {}
    after = keys(reuse_with(run, **over))
    return [stage for stage in STAGES if before[stage] != after[stage]]


def with_package(name):
    def change(monkeypatch):
        here = environment()
        other = dataclasses.replace(here, packages={**here.packages, name: "99.0"})
        monkeypatch.setattr(reuse, "environment", lambda: other)

    return change


def with_cpu(monkeypatch):
    other = dataclasses.replace(environment(), cpu="another one")
    monkeypatch.setattr(reuse, "environment", lambda: other)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (lambda patch: None, []),
        (with_package("torch"), ["model", "trace", "parity", "latency"]),
        (with_package("onnxruntime"), ["passes", "precision", "engine", "parity", "latency"]),
        (with_package("tensorrt"), ["engine", "parity", "latency"]),
        (with_package("onnx"), [s for s in STAGES if s != "model"]),
        (with_cpu, ["precision", "engine", "parity", "latency"]),
        (lambda patch: patch.setenv("CUDA_VISIBLE_DEVICES", "7"), ["precision", "engine", "parity", "latency"]),
        (lambda patch: patch.setattr(reuse, "code_version", lambda: "other"), list(STAGES)),
        (lambda patch: {"weights": "random:7"}, ["model"]),  # later stages consume what the model stage loads
        (lambda patch: {"classes": 10}, ["model", "trace", "parity"]),
        (lambda patch: {"batch": 2}, ["trace", "engine", "parity", "latency"]),
        (lambda patch: {"bench.baselines": ["eager"]}, ["latency"]),
        (lambda patch: {"engine.tf32": True}, ["engine", "parity", "latency"]),
    ],
)
def test_what_changes_which_keys(change, stages, first, monkeypatch):
    assert changed(first, monkeypatch, change) == stages


def test_every_key_of_a_recipe_is_consumed_by_a_stage():
    """A key that no stage consumed could change without any effect on what is reused."""
    elsewhere = {"weights", "pretrained", "target"}  # by content, or as resolved
    names = {name for consumed in CONSUMES.values() for name in consumed} | set(reuse._INPUTS) | elsewhere
    keys = reuse._flat(recipe().to_data())
    assert [key for key in keys if not reuse._chosen(key, tuple(names))] == []
    assert not reuse._chosen("quantisation.bits", tuple(names))


def test_changed_sources_are_another_version(tmp_path):
    package = tmp_path / "deploy"
    shutil.copytree(Path(reuse.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_version(package)
    assert before == code_version(Path(str(package)))
    with (package / "cli" / "app.py").open("a") as stream:
        stream.write("# how results are shown changes no stage\n")
    code_version.cache_clear()
    assert code_version(package) == before
    with (package / "graph" / "passes" / "fuse_gelu.py").open("a") as stream:
        stream.write("# another pass\n")
    code_version.cache_clear()
    changed = code_version(package)
    assert changed != before
    with (package / "data" / "lint_rules.yaml").open("a") as stream:
        stream.write("# another rule\n")
    code_version.cache_clear()
    assert code_version(package) != changed
    code_version.cache_clear()


def test_weights_are_known_by_their_content(tmp_path, cache):
    path = tmp_path / "w.pth"
    weights = load_model(find_system("riformer"), recipe(weights="random:5"), Target.ONNXRUNTIME).reference
    torch.save(weights.state_dict(), path)
    options = ("--weights", path, "--until", "model")
    assert made(export(tmp_path / "b", *options)[1]) == ["model"]
    assert made(export(tmp_path / "b", *options)[1]) == []
    torch.save({name: tensor * 1.5 for name, tensor in weights.state_dict().items()}, path)
    _, run = export(tmp_path / "b", *options)
    assert run.origins["model"].why == "weights changed"


def test_weights_on_a_server_are_known_by_their_whole_hash_only():
    pinned = recipe(weights="https://example.org/w.pth#sha256=" + "a" * 64)
    assert weights_identity(pinned) == weights_identity(pinned)
    for text in ("https://example.org/w.pth", "https://example.org/w.pth#sha256=" + "a" * 8, "hf://owner/repo@main"):
        loose = recipe(weights=text)
        assert weights_identity(loose) != weights_identity(loose)


def test_photos_are_known_by_their_content(tmp_path):
    from PIL import Image

    def identity():
        return reuse._photos(recipe(**{"parity.images": str(tmp_path)}))

    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    before = identity()
    assert identity() == before
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "a.png")
    assert identity() != before


# The store


def put(store, folder, key, size=1000):
    (folder / "file").write_bytes(key.encode() * (size // len(key)))
    files = (artifact_of(folder / "file", folder),)
    entry = Entry(stage="s", key=key, made="", seconds=0.0, consumed={}, files=files, record=None)
    assert store.put(entry, folder) == ""


def test_the_store_drops_what_was_not_used_for_longest(tmp_path):
    import os

    store = Store(tmp_path / "store", limit=3000)
    for age, key in enumerate(("a" * 24, "b" * 24)):
        put(store, tmp_path, key)
        os.utime(store.folder / f"s-{key}", (age, age))
    assert store.take("s", "a" * 24)[0] is not None  # used just now
    put(store, tmp_path, "c" * 24)
    assert sorted(p.name[2] for p in store.folder.iterdir()) == ["a", "c"]
    put(store, tmp_path, "d" * 24, size=9000)  # more than the limit: it is kept alone
    assert [p.name[2] for p in store.folder.iterdir()] == ["d"]


def test_the_store_removes_what_a_killed_run_left_half_written(tmp_path):
    import os

    store = Store(tmp_path / "store")
    for name, age in ((".partial-old", 0), (".partial-new", None)):
        (store.folder / name).mkdir(parents=True)
        if age is not None:
            os.utime(store.folder / name, (age, age))
    put(store, tmp_path, "a" * 24)
    assert sorted(p.name for p in store.folder.iterdir()) == [".partial-new", "s-" + "a" * 24]


def test_a_short_key_that_collides_is_no_hit(tmp_path):
    store = Store(tmp_path / "store")
    put(store, tmp_path, "a" * 24 + "1")
    assert store.take("s", "a" * 24 + "2") == (None, "")
