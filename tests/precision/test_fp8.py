"""FP8: E4M3 Q/DQ that TensorRT-RTX builds for Ada and Blackwell, and what refuses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from quantised_cases import images, network, quantised

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.errors import BackendUnavailableError, PrecisionError
from deploy.graph.io import save_model
from deploy.precision.convert import convert_precision
from deploy.precision.qdq import lint, quantised_products
from deploy.precision.quantize import QuantizationRequest
from deploy.records import Batch, Precision, PrecisionRecord, Target, TensorSpec

RTX = Target.TENSORRT
INPUTS = (TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),)


def written(folder: Path, precision: Precision, model: onnx.ModelProto | None = None) -> PrecisionRecord:
    save_model(model or network(), folder / "20-patched.onnx")
    request = QuantizationRequest(images=images())
    return convert_precision(folder / "20-patched.onnx", precision, folder, target=RTX, quantization=request)


def options(precision: Precision, *sm: int) -> BuildOptions:
    return BuildOptions(precision=precision, batch=Batch(), inputs=INPUTS, sm=sm)


def test_every_scale_and_weight_is_that_of_e4m3() -> None:
    eight = quantised(network(), RTX).model
    model = quantised(network(), RTX, precision=Precision.FP8).model
    lint(model, RTX)
    held = {t.name: t for t in model.graph.initializer}
    before = {t.name: t for t in eight.graph.initializer}
    assert set(quantised_products(model).values()) == {TensorProto.FLOAT8E4M3FN}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            step, was = (float(numpy_helper.to_array(side[node.input[1]])) for side in (held, before))
            assert step == pytest.approx(was * 127 / 448)
    floats = {t.name: numpy_helper.to_array(t) for t in network().graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            stored = numpy_helper.to_array(held[node.input[0]]).astype(np.float32)
            read = stored * numpy_helper.to_array(held[node.input[1]])
            original = floats[node.input[0].removesuffix("_quantized")]
            error = np.abs(read - original)
            assert (error <= np.maximum(2.0**-4 * np.abs(original), 2.0**-9 * np.abs(original).max())).all()


def test_it_is_written_beside_fp16_and_builds_for_ada_and_blackwell(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = written(tmp_path, Precision.FP8)
    assert record.dtype_counts["fp8"] == 3
    assert record.dtype_counts["fp16"] > 0
    for engine in load_backend("tensorrt_rtx").build(
        tmp_path / "30-fp8.onnx", tmp_path, options(Precision.FP8, 89, 120)
    ):
        assert engine.audit.ok
        assert "3 of them run in FP8 kernels" in engine.audit.statement


def test_older_gpus_are_refused_with_the_reason(tmp_path: Path) -> None:
    backend = load_backend("tensorrt_rtx")
    for sm in ((80,), (89, 80)):
        with pytest.raises(BackendUnavailableError, match=r"FP8 runs on SM 89 and newer, and SM 80"):
            backend.check(options(Precision.FP8, *sm))
    backend.check(options(Precision.FP8, 89, 120))
    backend.check(options(Precision.INT8, 80))


def test_onnxruntime_refuses_it_before_and_after_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="no FP8 kernels"):
        quantised(network(), Target.ONNXRUNTIME, precision=Precision.FP8)
    written(tmp_path, Precision.FP8)
    with pytest.raises(BackendUnavailableError, match="no FP8 kernels"):
        load_backend("onnxruntime").build(tmp_path / "30-fp8.onnx", tmp_path, options(Precision.FP8))


def test_int8_beside_fp16_builds_for_ampere_and_ada(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = written(tmp_path, Precision.INT8)
    assert record.quantization is not None
    assert record.dtype_counts["int8"] == record.quantization.nodes == 3
    for engine in load_backend("tensorrt_rtx").build(
        tmp_path / "30-int8.onnx", tmp_path, options(Precision.INT8, 80, 89)
    ):
        assert engine.audit.ok
        assert engine.audit.kernels["int8"] >= 2


def test_opsets_without_16_bit_q_dq_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="needs opset 19, the graph has 18"):
        written(tmp_path, Precision.INT8, network(opset=18))
