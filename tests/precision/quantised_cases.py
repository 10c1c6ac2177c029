"""Small networks for the tests of INT8 and FP8: one block of each kind that quantisation treats differently."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.precision.images import CalibrationImages, generated_images
from deploy.precision.quantize import Quantised, QuantizationRequest, quantize
from deploy.records import Precision, Target, TensorSpec

CHANNELS, SIDE = 16, 8


def network(*, opset: int = 21, residual: bool = True, shape: bool = False, batch: int | str = "N") -> onnx.ModelProto:
    """A stem, two convolutions with a residual around the second, a token linear layer with a bias, and a head."""
    rng = np.random.default_rng(0)
    weights = {
        "stem.w": (CHANNELS, 3, 3, 3), "stem.b": (CHANNELS,), "a.w": (CHANNELS, CHANNELS, 1, 1), "a.b": (CHANNELS,),
        "b.w": (CHANNELS, CHANNELS, 3, 3), "b.b": (CHANNELS,), "mlp.w": (SIDE * SIDE, SIDE * SIDE),
        "mlp.b": (SIDE * SIDE,), "head.w": (10, CHANNELS), "head.b": (10,),
    }  # fmt: skip
    tensors = [
        numpy_helper.from_array((rng.standard_normal(s) / np.sqrt(np.prod(s[1:]) or 1)).astype(np.float32), name)
        for name, s in weights.items()
    ]
    tensors += [numpy_helper.from_array(np.array([0, CHANNELS, -1], np.int64), "flat")]
    nodes = [
        helper.make_node("Conv", ["images", "stem.w", "stem.b"], ["s"], "stem/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["s", "a.w", "a.b"], ["a"], "blocks.0.a/Conv"),
        helper.make_node("Relu", ["a"], ["r"], "blocks.0.act/Relu"),
        helper.make_node("Conv", ["r", "b.w", "b.b"], ["b"], "blocks.0.b/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "r" if residual else "s"], ["c"], "blocks.0/Add"),
        helper.make_node("Reshape", ["c", "flat"], ["t"], "blocks.1/Reshape"),
        helper.make_node("MatMul", ["t", "mlp.w"], ["m"], "blocks.1.mlp/MatMul"),
        helper.make_node("Add", ["m", "mlp.b"], ["n"], "blocks.1.mlp/Add"),
        helper.make_node("ReduceMean", ["n", "axes"], ["p"], "pool/ReduceMean", keepdims=0),
        helper.make_node("Gemm", ["p", "head.w", "head.b"], ["logits"], "head/Gemm", transB=1),
    ]
    tensors.append(numpy_helper.from_array(np.array([2], np.int64), "axes"))
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])]
    if shape:
        nodes.append(helper.make_node("Shape", ["r"], ["size"], "blocks.0/Shape"))
        outputs.append(helper.make_tensor_value_info("size", TensorProto.INT64, [4]))
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def images(count: int = 8, *, seed: int = 0) -> CalibrationImages:
    """Noise images for ``network``."""
    return generated_images(
        lambda index: np.random.default_rng([seed, index]).standard_normal((3, SIDE, SIDE)).astype(np.float32),
        count, identity=f"noise {seed}", batch=4,
        inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, SIDE, SIDE)),), makers={},
    )  # fmt: skip


def quantised(
    model: onnx.ModelProto, target: Target, *, precision: Precision = Precision.INT8, bits: int | str = 8,
    asked: tuple[str, ...] = (), kept: dict[str, str] | None = None, digest: str = "net",
) -> Quantised:  # fmt: skip
    """Quantise a network on noise."""
    request = QuantizationRequest(images=images(), weight_bits=bits, asked=asked, kept=kept or {})
    return quantize(model, precision, target, request, digest=digest)
