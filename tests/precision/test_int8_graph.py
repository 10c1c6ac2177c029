"""INT8 as it is written into a graph: which products, in which style, with which corrections, and the lint of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantised_cases import images, network, quantised

from deploy.errors import PrecisionError
from deploy.graph import pipeline
from deploy.graph.base import parse_example
from deploy.graph.io import graph_of, save_model
from deploy.graph.passes import LIFT_BIAS
from deploy.precision import write_qdq
from deploy.precision.cpu import dot_product, saturates
from deploy.precision.qdq import lint, quantised_products
from deploy.precision.quantize import QuantizationRequest, quantize
from deploy.records import Precision, Target

ORT, RTX = Target.ONNXRUNTIME, Target.TENSORRT
INTEGER = ("QLinearConv", "QGemm", "MatMulIntegerToFloat")


def kernels(model: onnx.ModelProto, tmp_path: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs: those of its optimised graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)


def logits(model: onnx.ModelProto, *, integer: bool = True) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not integer:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (feeds,) = [f for i, f in enumerate(images(4, seed=7).batches()) if i == 0]
    return session.run(["logits"], dict(feeds))[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def readers(model: onnx.ModelProto, tensor: str) -> set[str]:
    return {n.op_type for n in model.graph.node if tensor in n.input}


def test_every_product_but_the_first_and_the_heads_runs_in_integers(tmp_path: Path) -> None:
    found = quantised(network(batch=4), ORT, bits=7, kept={"^head/": "head"})
    assert found.record.nodes == 3
    assert found.record.products == 5
    assert {k.reason.split(":")[0]: k.examples for k in found.record.kept} == {
        "head": ("head/Gemm",), "reads the image": ("stem/Conv",),
    }  # fmt: skip
    ran = kernels(found.model, tmp_path)
    assert sum(ran[op] for op in INTEGER) == 3
    assert cosine(logits(found.model), logits(network())) > 0.999
    assert cosine(logits(found.model), logits(found.model, integer=False)) > 0.99999  # 7 bits: nothing overflows


def test_without_the_lifted_bias_a_linear_layer_runs_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_qdq, "AFTER_QUANTIZATION", {ORT: (), RTX: ()})
    assert pipeline.AFTER_QUANTIZATION[ORT]
    ran = kernels(quantised(network(batch=4), ORT, bits=7).model, tmp_path)
    assert ran["MatMulIntegerToFloat"] == 0
    assert ran["Gemm"] + ran["MatMul"] == 1


def test_a_product_of_two_axes_keeps_its_bias_and_says_so() -> None:
    matrix = parse_example("""
        net (float[2,4] x) => (float[2,2] y)
        <float step = {0.1}, int8 zero = {0}, int8[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] bias = {1, 2}>
        { q = QuantizeLinear(x, step, zero) d = DequantizeLinear(q, step, zero) v = DequantizeLinear(w, step, zero)
          m = MatMul(d, v) y = Add(m, bias) }
    """)
    result = LIFT_BIAS.apply(graph_of(matrix))
    assert result.sites == 0
    assert "2 axes" in result.declined[0]


def test_float_readers_keep_the_tensor_itself() -> None:
    for_ort = quantised(network(residual=False), ORT).model
    assert "Add" in readers(for_ort, "s")  # the residual; the convolution reads the rounded copy
    assert "Conv" not in readers(for_ort, "s")


def test_shapes_are_never_read_from_a_rounded_copy() -> None:
    model = quantised(network(shape=True), RTX).model
    assert "Shape" in readers(model, "r")
    lint(model, RTX)


def test_a_residual_around_a_convolution_is_shared_for_tensorrt_and_a_relu_is_inside_for_onnxruntime() -> None:
    for_rtx = quantised(network(), RTX).model
    add = next(n for n in for_rtx.graph.node if n.name == "blocks.0/Add")
    made = {n.output[0]: n for n in for_rtx.graph.node}
    assert {made[name].op_type for name in add.input} == {"Conv", "DequantizeLinear"}
    pairs = [n for n in for_rtx.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r"]
    assert len(pairs) == 1  # one pair for the residual and the convolution
    for_ort = quantised(network(), ORT).model
    assert not any(n.op_type == "Relu" for n in for_ort.graph.node)


def test_for_tensorrt_all_is_symmetric_int8_with_scales_by_output_channel_and_float_biases() -> None:
    model = quantised(network(), RTX).model
    held = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = held[node.input[2]]
            assert zero.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()
    assert held["b.b"].data_type == TensorProto.FLOAT
    weight = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("b.w"))
    assert list(held[weight.input[1]].dims) == [16]
    assert held[weight.input[0]].data_type == TensorProto.INT8  # stored in 8 bits: a quarter of the file
    assert {TensorProto.DataType.Name(k) for k in quantised_products(model).values()} == {"INT8"}
    assert cosine(logits(model, integer=False), logits(network())) > 0.999


def test_a_bias_that_two_layers_share_is_quantised_for_each() -> None:
    shared, apart = network(), network()
    own = onnx.TensorProto()
    own.CopyFrom(next(t for t in apart.graph.initializer if t.name == "a.b"))
    own.name = "own"
    apart.graph.initializer.append(own)
    for model, name in ((shared, "a.b"), (apart, "own")):
        next(n for n in model.graph.node if n.name == "blocks.0.b/Conv").input[2] = name
    found = [logits(quantised(m, ORT, bits=7, digest=d).model) for m, d in ((shared, "shared"), (apart, "apart"))]
    assert (found[0] == found[1]).all()


def test_nodes_are_named_after_the_modules_that_they_serve() -> None:
    names = [n.name for n in quantised(network(), RTX).model.graph.node if n.op_type == "QuantizeLinear"]
    assert "blocks.0.a/QuantizeLinear" in names
    assert len(set(names)) == len(names)


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (quantised(network(), RTX).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_what_the_user_keeps_out_stays_out_and_a_pattern_without_a_product_is_refused() -> None:
    found = quantised(network(), ORT, asked=(r"^blocks\.0\.",))
    assert found.record.nodes == 2
    assert any("keep_high" in k.reason for k in found.record.kept)
    with pytest.raises(PrecisionError, match="matches no product") as caught:
        quantised(network(), ORT, asked=("nowhere",))
    assert "20-patched" in caught.value.hint
    with pytest.raises(PrecisionError, match="not a regular expression"):
        quantised(network(), ORT, asked=("(",))


def test_a_graph_without_a_product_to_quantise_is_refused() -> None:
    with pytest.raises(PrecisionError, match="nothing in this graph can be quantised"):
        quantised(network(), ORT, asked=(".",))


def test_narrow_layers_are_left_to_16_bits_for_tensorrt_alone() -> None:
    thin = network()
    for tensor in thin.graph.initializer:
        if tensor.name in ("a.w", "b.w", "a.b", "b.b", "stem.w", "stem.b"):
            values = numpy_helper.to_array(tensor)[:8]
            values = values[:, :8] if tensor.name in ("a.w", "b.w") else values
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
        if tensor.name == "flat":
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, 8, -1], np.int64), "flat"))
        if tensor.name == "head.w":
            tensor.CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor)[:, :8]), "head.w")
            )
    assert quantised(thin, ORT, digest="thin").record.nodes == 4
    found = quantised(thin, RTX, digest="thin").record
    assert found.nodes == 1
    assert any("fewer than 16 channels" in k.reason for k in found.kept)


def test_images_of_one_colour_and_dead_ranges_are_reported() -> None:
    request = QuantizationRequest(images=images())
    request.images.read = lambda index: np.full((3, 8, 8), index % 2, np.float32)
    found = quantize(network(), Precision.INT8, ORT, request, digest="flat")
    assert any("8 of 8 calibration images are of one colour" in w for w in found.warnings)
    black = QuantizationRequest(images=images(seed=3))
    black.images.read = lambda index: np.zeros((3, 8, 8), np.float32)
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".b"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    found = quantize(model, Precision.INT8, ORT, black, digest="black")
    assert all(t.dead for t in found.record.calibration.tensors)
    assert any("dead ranges" in w for w in found.warnings)
    lint(found.model, ORT)  # a range of nothing still has a positive scale


def test_generated_images_are_warned_of() -> None:
    assert any("--calib DIR" in w for w in quantised(network(), ORT).warnings)


def test_seven_bits_are_written_where_eight_overflow() -> None:
    for bits, largest in ((7, 64), (8, 127)):
        model = quantised(network(), ORT, bits=bits).model
        weights = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_quantized")]
        assert max(int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8) == largest


@pytest.mark.parametrize(
    ("flags", "machine", "overflows"),
    [({"avx2"}, "x86_64", True), ({"avx2", "avx512_vnni"}, "x86_64", False), ({"asimddp"}, "aarch64", False),
     (set(), "AMD64", True)],
)  # fmt: skip
def test_cpus_without_an_8_bit_dot_product_overflow(flags: set[str], machine: str, overflows: bool) -> None:
    assert saturates(flags, machine) is overflows
    assert bool(dot_product(flags)) is not (overflows or not flags)


def _zero_point(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "r_zero_point":
            tensor.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), tensor.name))


def _zero_scale(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "r_scale":
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), tensor.name))


def _int32_bias(model: onnx.ModelProto) -> None:
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.int32), "bias_int32"))
    graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "bias_step"))
    node = helper.make_node("DequantizeLinear", ["bias_int32", "bias_step"], ["bias_float"], "blocks.0.b/bias")
    place = next(i for i, n in enumerate(graph.node) if n.name == "blocks.0.b/Conv")
    graph.node[place].input[2] = "bias_float"
    graph.node.insert(place, node)


def _wrong_axis(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].startswith("b.w"):
            next(a for a in node.attribute if a.name == "axis").i = 1


def _by_channel(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "r_scale":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, 0.1, np.float32), tensor.name))


def _shape_of_rounded(model: onnx.ModelProto) -> None:
    read = next(n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear")
    model.graph.node.append(helper.make_node("Shape", [read], ["size"], "blocks.0/Shape"))


FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "zero point": (_zero_point, "zero point 3, expected 0"),
    "zero scale": (_zero_scale, "scale 0, expected a positive"),
    "int32 bias": (_int32_bias, "INT32.*a quantised bias"),
    "wrong axis": (_wrong_axis, "along axis 1, expected 0"),
    "scale by channel": (_by_channel, "by channel, expected one scale"),
    "shape": (_shape_of_rounded, "reads the shape of a dequantised tensor"),
}
REFUSED_BY_BUILDER = ("zero point", "zero scale", "int32 bias")  # it takes the others, and is wrong or slow


def rtx_graph() -> onnx.ModelProto:
    """The network for TensorRT, its tensors' own names for the one activation that the faults are put into."""
    model = quantised(network(), RTX).model
    names = {n.input[1]: "r_scale" for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r"}
    names |= {
        n.input[2]: "r_zero_point" for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r"
    }
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = names.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return model


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lint_refuses_what_tensorrt_cannot_run(fault: str) -> None:
    spoil, words = FAULTS[fault]
    model = rtx_graph()
    lint(model, RTX)
    spoil(model)
    with pytest.raises(PrecisionError, match=words):
        lint(model, RTX)


@pytest.mark.parametrize("fault", [None, *REFUSED_BY_BUILDER])
def test_the_parser_of_tensorrt_rtx_refuses_the_same(fault: str | None, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = rtx_graph()
    if fault is not None:
        FAULTS[fault][0](model)
    save_model(model, tmp_path / "net.onnx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network_ = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network_, logger)
    assert parser.parse_from_file(str(tmp_path / "net.onnx")) is (fault is None)


def test_the_style_of_onnxruntime_is_refused_for_tensorrt() -> None:
    with pytest.raises(PrecisionError, match="tensorrt cannot run"):
        lint(quantised(network(), ORT).model, RTX)
