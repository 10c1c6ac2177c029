"""``--dry-run``: the same refusals as the run, facts or "unknown", and nothing written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import effdeploy
from test_cli import BAD_INPUT

import deploy
from deploy.answers import PlanRecord
from deploy.artifacts import read_manifest, write_manifest
from deploy.errors import RecipeError
from deploy.planning import earlier_runs
from deploy.records import Stage, from_json, to_json

TINY = ("export", "riformer", "--variant", "tiny", "--seconds", "0.2", "--baseline", "naive")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_has_the_code_of_the_real_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, code, words = BAD_INPUT[name]
    variant = [] if "--variant" in arguments or arguments[0] != "riformer" else ["--variant", "tiny"]
    result = effdeploy("export", *arguments, *variant, "--dry-run")
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_and_files_have_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = deploy.plan("riformer", variant="tiny", precision="fp16", reuse=False)
    assert list(tmp_path.iterdir()) == []
    files = {file.name: file.size for stage in plan.stages for file in stage.files}
    weights = plan.model.deploy_parameters
    assert {k: v for k, v in files.items() if v} == {
        "10-traced.onnx": 4 * weights, "20-patched.onnx": 4 * weights, "30-fp16.onnx": 2 * weights,
    }  # fmt: skip
    assert plan.needed == 10 * weights < plan.free
    assert [stage.stage for stage in plan.stages] == list(Stage)
    assert [stage.seconds for stage in plan.stages] == [None] * len(Stage)  # no earlier run: nothing is invented
    assert from_json(PlanRecord, to_json(plan)) == plan


def test_sizes_are_near_those_of_the_run(tiny_bundle):
    run = read_manifest(tiny_bundle)
    plan = deploy.plan("riformer", variant="tiny", out=tiny_bundle)
    files = {file.name: file.size for stage in plan.stages for file in stage.files}
    for artifact in (run.trace.artifact, run.passes.artifact):
        # A graph has a few ten kilobytes of nodes besides its weights; more is a wrong estimate.
        assert 0 <= artifact.size - files[artifact.name] < 100_000
    assert f"{tiny_bundle} holds a bundle" in plan.warnings[0]


def seconds_of(bundle: Path, **options):
    plan = deploy.plan("riformer", variant="tiny", seconds=0.2, baseline="naive", reuse=False, out=bundle, **options)
    return {stage.stage: (stage.seconds, stage.evidence) for stage in plan.stages}


def test_seconds_come_from_an_earlier_run_of_the_same(tiny_bundle):
    run = read_manifest(tiny_bundle)
    found = seconds_of(tiny_bundle)
    for stage in (Stage.TRACE, Stage.PARITY, Stage.LATENCY):
        assert found[stage] == (run.stage_seconds[stage.value], f"measured in {tiny_bundle.name}")
    half = seconds_of(tiny_bundle, precision="fp16")
    assert half[Stage.PASSES] == found[Stage.PASSES]  # the same up to there
    assert half[Stage.ENGINE][0] is None
    assert seconds_of(tiny_bundle, size=64)[Stage.TRACE][0] is None


def test_another_machine_and_damaged_manifests_are_no_evidence(tiny_bundle, tmp_path):
    run = read_manifest(tiny_bundle)
    for name, cpu in (("here", run.environment.cpu), ("elsewhere", "another CPU")):
        (tmp_path / name).mkdir()
        moved = dataclasses.replace(run, name=name, environment=dataclasses.replace(run.environment, cpu=cpu))
        write_manifest(moved, tmp_path / name)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    assert [found.name for found in earlier_runs(tmp_path)] == ["here"]


def test_the_table(tiny_bundle):
    before = tree(tiny_bundle)
    result = effdeploy(*TINY, "--dry-run", "--no-reuse", "--out", tiny_bundle)
    assert result.exit_code == 0, result.stderr
    for words in ("10-traced.onnx ~", "measured in tiny", "free", "onnxruntime: can build here", "nothing was written"):
        assert words in result.stdout
    assert tree(tiny_bundle) == before


def test_what_is_in_the_way_is_said(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    assert effdeploy(*TINY, "--dry-run", "--out", tmp_path / "b").exit_code == 19
    (tmp_path / "file").write_text("")
    assert effdeploy(*TINY, "--dry-run", "--out", tmp_path / "file" / "b").exit_code == 19


def test_a_backend_that_cannot_build_here(tmp_path):
    from deploy.backends import load_backend

    if load_backend("tensorrt").available() is None:
        pytest.skip("TensorRT and a GPU are here")
    command = (*TINY, "--dry-run", "--backend", "tensorrt", "--out", tmp_path / "b")
    assert effdeploy(*command).exit_code == 12
    until = effdeploy(*command, "--until", "precision")
    assert until.exit_code == 0, until.stderr
    assert "tensorrt: " in until.stdout
    assert "can build here" not in until.stdout


def test_weights_are_not_downloaded(tmp_path):
    """Port 9 answers nobody: whatever asked there would fail."""
    far = "http://127.0.0.1:9/w.pth#sha256=" + "0" * 64
    for weights in (far, "hf://nobody/nothing", "hf://nobody/nothing/w.bin@" + "0" * 40):
        plan = deploy.plan("riformer", variant="tiny", weights=weights, out=tmp_path / "b")
        assert plan.model.weights.statement == f"weights: {weights} would be downloaded, size unknown"
        assert plan.needed > 0
        with pytest.raises(RecipeError, match="expected 64"):
            deploy.plan("riformer", variant="tiny", weights="w.pth#sha256=1", out=tmp_path / "b")


def test_what_lies_where_a_failed_run_goes_is_said(tmp_path):
    (tmp_path / "b.failed").mkdir()
    (tmp_path / "b.failed" / "thesis.txt").write_text("mine")
    for more in ((), ("--dry-run",)):
        result = effdeploy(*TINY, *more, "--out", tmp_path / "b")
        assert (result.exit_code, "b.failed exists and is not a bundle" in result.stderr) == (19, True)
