"""Finished bundles: checked against their weights, named apart, reused only where nothing changed."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from support import effdeploy

from deploy.artifacts import artifact_of, read_manifest, sha256_of
from deploy.bundles import _names
from deploy.errors import BenchmarkError
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.records import Target
from deploy.report.page import failures_of
from deploy.resolve import resolve_recipe
from deploy.summary import timed_and_compared

TINY = ("export", "riformer", "--variant", "tiny", "--size", "64", "--seconds", "0.1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny")}, ["weights=random:5"])
    torch.save(load_model(find_system("riformer"), recipe, Target.ONNXRUNTIME).reference.state_dict(), path)
    return path


def test_verify_and_bench_take_the_original_weights_from_anywhere(weights, tmp_path):
    first = shutil.copy(weights, tmp_path / "here.pth")
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--weights", first, "--until", "engine", "--out", out).exit_code == 0
    moved = shutil.move(first, tmp_path / "there.pth")
    assert effdeploy("verify", out).exit_code == 6
    result = effdeploy("verify", out, "--weights", moved)
    assert result.exit_code == 0, result.stderr
    result = effdeploy("bench", out, "--weights", moved, "--baseline", "eager", "--seconds", "0.1")
    assert result.exit_code == 0, result.stderr
    torch.save({k: v + 1 for k, v in torch.load(moved, weights_only=True).items()}, tmp_path / "other.pth")  # noqa: TID251
    result = effdeploy("verify", out, "--weights", tmp_path / "other.pth")
    assert result.exit_code == 6
    assert "not what the bundle was made from" in result.stderr


def test_random_weights_of_another_seed_are_other_weights(tmp_path):
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--weights", "random:3", "--until", "engine", "--out", out).exit_code == 0
    assert effdeploy("verify", out).exit_code == 0
    assert effdeploy("verify", out, "--weights", "random:4").exit_code == 6


@pytest.mark.rtx
def test_a_graph_lowered_for_another_target_is_not_reused(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install -e '.[tensorrt-rtx]'")
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--until", "trace", "--out", out).exit_code == 0
    before = read_manifest(out)
    rtx = ("--backend", "tensorrt_rtx", "--sm", "89")
    result = effdeploy(*TINY, *rtx, "--out", out)
    assert result.exit_code == 0, result.stderr
    run = read_manifest(out)
    assert run.trace.artifact != before.trace.artifact
    assert not any(origin.reused for origin in run.origins.values())
    assert "target changed: onnxruntime -> tensorrt" in run.origins["trace"].why
    assert effdeploy(*TINY, *rtx, "--out", out).exit_code == 0
    run = read_manifest(out)
    assert run.bench is None
    assert run.origins["latency"].reused  # that no engine can be timed here is known by now


def test_what_the_range_check_consumes_is_not_reused(tmp_path):
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--fp16", "--until", "precision", "--out", out).exit_code == 0
    result = effdeploy(*TINY, "--fp16", "--set", "parity.seed=1", "--until", "precision", "--out", out)
    assert result.exit_code == 0, result.stderr
    made = {stage: origin.why for stage, origin in read_manifest(out).origins.items() if not origin.reused}
    assert made == {"precision": "parity.seed changed: 0 -> 1"}
    result = effdeploy(*TINY, "--fp16", "--set", "preprocess.crop=0.5", "--until", "precision", "--out", out)
    assert result.exit_code == 0, result.stderr
    made = {stage: origin.why for stage, origin in read_manifest(out).origins.items() if not origin.reused}
    assert made.keys() == {"model", "trace", "passes", "precision"}  # every file says how images become its input
    assert made["trace"] == "preprocess.crop changed: 0.9 -> 0.5"


def test_bundles_of_one_name_are_told_apart(tmp_path):
    a, b = tmp_path / "x" / "m", tmp_path / "y" / "m"
    assert _names([a, b]) == ["x/m", "y/m"]
    assert _names([a, tmp_path / "z"]) == ["m", "z"]
    with pytest.raises(BenchmarkError, match="twice"):
        _names([a, a])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--baseline", "eager,eager"), "each baseline once"),
        (("--sm", "89"), "--backend tensorrt_rtx"),
        (("--backend", "tensorrt_rtx", "--sm", "89,89"), "each capability once"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, words, tmp_path):
    result = effdeploy(*TINY, *options, "--out", tmp_path / "b")
    assert result.exit_code == 3
    assert words in result.stderr


def test_a_wrong_photo_folder_is_refused_before_the_work(tmp_path):
    result = effdeploy(*TINY, "--images", tmp_path / "none", "--out", tmp_path / "b")
    assert result.exit_code == 18
    assert "trace" not in result.stdout


def test_memory_covers_the_first_call(tiny_bundle):
    latency = {c.name: c for c in read_manifest(tiny_bundle).bench.latencies}["engine"]
    assert latency.peak_memory > 2**20 or latency.peak_memory == 0


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    """A bundle for batches of 1 to 3, as exported; tests must not change it."""
    out = tmp_path_factory.mktemp("batched") / "b"
    result = effdeploy(*TINY, "--batch", "1:2:3", "--until", "parity", "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


def test_export_checks_the_rows_of_what_ships_and_verify_those_of_every_file(batched):
    exported = read_manifest(batched).parity.batches
    assert exported.ok
    assert {c.stage for c in exported.checks} == {"engine"}
    assert exported.sizes == (1, 2, 3)
    result = effdeploy("verify", batched, "--json")
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (parity,) = (e["record"] for e in events if e.get("type") == "ParityRecord")
    assert {c["stage"] for c in parity["batches"]["checks"]} == {"traced", "engine"}
    assert "rows of a batch, largest difference by check" in result.stderr


def test_a_leak_between_rows_that_parity_cannot_see_fails_verify(batched, tmp_path):
    """A hundred-thousandth of the batch's mean: a tenth of the tolerance against PyTorch, and a leak all the same."""
    bundle = shutil.copytree(batched, tmp_path / "leaking")
    manifest = json.loads((bundle / "manifest.json").read_text())
    name = manifest["engines"][0]["artifact"]["name"]
    model = onnx.load(bundle / name)
    last = next(n for n in model.graph.node if "logits" in n.output)
    last.output[0] = "clean"
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array([0]), "leak/axes"), numpy_helper.from_array(np.float32(1e-5), "leak/share")]
    )
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["clean", "leak/axes"], ["leak/mean"], name="leak/mean"),
            helper.make_node("Mul", ["leak/mean", "leak/share"], ["leak/part"], name="leak/part"),
            helper.make_node("Add", ["clean", "leak/part"], ["logits"], name="leak/add"),
        ]
    )
    (bundle / name).write_bytes(model.SerializeToString())
    text = (bundle / "manifest.json").read_text()
    before = manifest["engines"][0]["artifact"]
    after = artifact_of(bundle / name, bundle)
    text = text.replace(before["sha256"], after.sha256).replace(f'"size": {before["size"]}', f'"size": {after.size}')
    (bundle / "manifest.json").write_text(text)
    result = effdeploy("verify", bundle)
    assert result.exit_code == 15, result.stdout + result.stderr
    found = "neighbour at batch 2 where row 0 is extreme values: row 1 of output 'logits' is off by"
    assert f"error: batch check fails at 'engine': {found}" in result.stderr
    assert "FAIL: neighbour at batch 2" in result.stdout


def test_accuracy_and_latency_are_of_the_same_file(tiny_bundle):
    run = read_manifest(tiny_bundle)
    (engine,) = run.engines
    digest = sha256_of(tiny_bundle / engine.artifact.name)
    assert {c.sha256 for c in run.parity.comparisons if c.stage == "engine"} == {digest}
    assert {c.sha256 for c in run.bench.latencies if c.name == "engine"} == {digest}
    same, told = timed_and_compared(run)
    assert same
    assert told == f"compared with PyTorch and timed: the same file (20-patched.onnx, sha256 {digest[:12]})"
    assert told in (tiny_bundle / "report.md").read_text()
    other = tuple(dataclasses.replace(c, sha256="0" * 64) for c in run.bench.latencies)
    apart = dataclasses.replace(run, bench=dataclasses.replace(run.bench, latencies=other))
    same, told = timed_and_compared(apart)
    assert not same
    assert "accuracy and latency are of other files" in told
    assert told in failures_of(apart)
