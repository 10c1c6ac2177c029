"""Every system's tiny variant in INT8: on ONNX Runtime's integer kernels, and in TensorRT-RTX for Ampere and Ada."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import effdeploy

from deploy import api
from deploy.artifacts import read_manifest
from deploy.errors import PrecisionAuditError
from deploy.models import SYSTEMS
from deploy.records import Precision, RunRecord

SIZES = {"rtdetr": "96"}  # what its tiny variant is built for by default, 640, takes a minute more and proves no more


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("traces"))


@pytest.fixture(autouse=True)
def _traced_once(cache: Path, traces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share one cache in this module: its tests differ behind the trace, which takes most of the time."""
    monkeypatch.setenv("EFFDEPLOY_CACHE", traces)


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_runs_in_integer_kernels_on_onnxruntime_and_its_products_have_reasons(system: str, tmp_path: Path) -> None:
    run = api.export(
        system, variant="tiny", size=SIZES.get(system), precision="int8", until="engine", out=tmp_path / "bundle"
    )
    assert run.precision is not None
    found = run.precision.quantization
    assert found is not None
    assert found.nodes >= 3
    assert found.nodes + sum(kept.nodes for kept in found.kept) == found.products
    assert run.precision.dtype_counts["int8"] == found.nodes
    (engine,) = run.engines
    assert engine.audit.ok
    assert engine.audit.fused["integer"] >= found.nodes
    assert found.calibration.images == 16
    assert {t.tensor for t in found.calibration.tensors}


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_builds_in_tensorrt_rtx_for_ampere_and_ada(system: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = api.export(
        system, variant="tiny", size=SIZES.get(system), precision="int8", backend="tensorrt_rtx", sm="80,89",
        until="engine", out=tmp_path / "b",
    )  # fmt: skip
    assert run.precision is not None
    assert run.precision.dtype_counts["fp16"] > 0
    assert [engine.device for engine in run.engines] == ["sm80", "sm89"]
    for engine in run.engines:
        assert engine.audit.ok
        assert engine.audit.kernels["int8"] >= 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (60 + 20 * index, 90, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def test_the_whole_road_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    done = effdeploy(
        "export", "riformer", "--variant", "tiny", "--int8", "--calib", photos, "--calib-method", "percentile",
        "--out", tmp_path / "bundle", "--seconds", "0.05", "--set", "parity.tolerances.int8.cosine=0.9",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    run = read_manifest(tmp_path / "bundle")
    assert run.precision is not None
    assert run.precision.quantization is not None
    calibration = run.precision.quantization.calibration
    assert (calibration.images, calibration.method) == (4, "percentile")
    assert "generated" not in calibration.source
    assert str(photos) not in json.dumps(run.precision.quantization.calibration.source)
    assert "integer kernels" in done.output
    report = (tmp_path / "bundle" / "report.md").read_text()
    assert "Kept out of INT8" in report
    assert "4 images of --calib" in report


def test_another_method_measures_nothing_again(photos: Path, tmp_path: Path) -> None:
    runs = [
        api.export("riformer", variant="tiny", precision="int8", calib=photos, calib_method=method, until="precision",
                   out=tmp_path / method)
        for method in ("minmax", "mse")
    ]  # fmt: skip
    assert all(run.precision and run.precision.quantization for run in runs)
    assert _calibrated(runs[1])
    assert runs[0].precision != runs[1].precision


def _calibrated(run: RunRecord) -> bool:
    assert run.precision is not None
    assert run.precision.quantization is not None
    return run.precision.quantization.calibration.cached


def test_a_new_calibration_image_redoes_the_precision_stage_alone(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        Image.fromarray(np.full((40, 40, 3), 90 * index + 40, np.uint8)).save(folder / f"{index}.png")

    def export() -> RunRecord:
        out = tmp_path / "bundle"
        return api.export("riformer", variant="tiny", precision="int8", calib=folder, until="precision", out=out)

    export()
    assert all(origin.reused for origin in export().origins.values())
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "2.png")
    again = export().origins
    assert not again["precision"].reused
    assert again["passes"].reused


def test_a_quantised_graph_that_runs_in_float_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.backends import onnxruntime

    session = onnxruntime._session

    def without_integers(
        runtime: object, model: Path, options: onnxruntime.BuildOptions, *rest: object, **more: object
    ):
        import dataclasses

        return session(runtime, model, dataclasses.replace(options, integer_kernels=False), *rest, **more)

    monkeypatch.setattr(onnxruntime, "_session", without_integers)
    with pytest.raises(PrecisionAuditError, match="quantised and yet in float"):
        api.export("riformer", variant="tiny", precision="int8", until="engine", out=tmp_path / "b", reuse=False)


def test_fp8_for_onnxruntime_is_refused_before_any_work(tmp_path: Path) -> None:
    done = effdeploy("export", "riformer", "--variant", "tiny", "--fp8", "--out", tmp_path / "b")
    assert done.exit_code == 12
    assert "FP8" in done.stderr
    assert "tensorrt_rtx" in done.stderr


def test_every_precision_has_limits_in_every_shipped_recipe() -> None:
    from deploy.resolve import resolve_recipe

    for system in SYSTEMS:
        assert set(resolve_recipe(system).parity.tolerances) == set(Precision)
