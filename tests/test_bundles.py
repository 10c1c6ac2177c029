"""Finished bundles: checked against their weights, named apart, reused only where nothing changed."""

from __future__ import annotations

import shutil

import pytest
import torch
from support import effdeploy

from deploy.artifacts import read_manifest
from deploy.bundles import _names
from deploy.errors import BenchmarkError
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

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
    rtx = ("--backend", "tensorrt_rtx", "--sm", "89")
    result = effdeploy(*TINY, *rtx, "--from", "passes", "--until", "engine", "--out", out)
    assert result.exit_code == 3
    assert "target or device (needs --from trace)" in result.stderr
    assert effdeploy(*TINY, *rtx, "--out", out).exit_code == 0
    result = effdeploy(*TINY, *rtx, "--from", "report", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert read_manifest(out).bench is None


def test_what_the_range_check_consumes_is_not_reused(tmp_path):
    out = tmp_path / "b"
    assert effdeploy(*TINY, "--fp16", "--until", "precision", "--out", out).exit_code == 0
    changed = ("--set", "preprocess.crop=0.5")
    result = effdeploy(*TINY, "--fp16", *changed, "--from", "engine", "--until", "engine", "--out", out)
    assert result.exit_code == 3
    assert "preprocess (needs --from precision)" in result.stderr


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
