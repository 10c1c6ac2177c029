"""Small ONNX graphs that every backend can take, typed like the precision stage does, and some that none may take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
Make = Callable[..., Path]


def _tensor(name: str, shape: tuple[int, ...], kind: int, seed: int) -> onnx.TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1
    return helper.make_tensor(name, kind, shape, values.ravel())


def _model(nodes, inputs, outputs, weights=(), opset=20) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def network_model(precision: str = "fp32", batch: int | str = "batch") -> onnx.ModelProto:
    """Conv, Relu, mean, LayerNormalization, MatMul, Gelu, MatMul; float32 at both ends, ``precision`` between."""
    kind = TYPES[precision]
    shapes = {
        "w0": (8, 3, 3, 3),
        "b0": (8,),
        "g": (8,),
        "b": (8,),
        "w1": (8, 64),
        "b1": (64,),
        "w2": (64, 10),
        "b2": (10,),
    }
    weights = [_tensor(name, shape, kind, seed) for seed, (name, shape) in enumerate(shapes.items())]
    weights.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], name="in.cast", to=kind),
        helper.make_node("Conv", ["x", "w0", "b0"], ["c"], name="stem.conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="stem.act"),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], name="pool", keepdims=0),
        helper.make_node("LayerNormalization", ["m", "g", "b"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "w1"], ["h"], name="mlp.fc1"),
        helper.make_node("Add", ["h", "b1"], ["a"], name="mlp.fc1.bias"),
        helper.make_node("Gelu", ["a"], ["u"], name="mlp.act"),
        helper.make_node("MatMul", ["u", "w2"], ["o"], name="mlp.fc2"),
        helper.make_node("Add", ["o", "b2"], ["y"], name="mlp.fc2.bias"),
        helper.make_node("Cast", ["y"], ["logits"], name="out.cast", to=TensorProto.FLOAT),
    ]
    images, logits = ("images", TensorProto.FLOAT, [batch, 3, 16, 16]), ("logits", TensorProto.FLOAT, [batch, 10])
    return _model(nodes, [images], [logits], weights, opset=22 if precision == "bf16" else 20)


def attention_model(precision: str) -> onnx.ModelProto:
    """One head of 64 tokens and 32 channels: MatMul, Softmax, MatMul."""
    kind, shape = TYPES[precision], [1, 4, 64, 32]
    scale = _tensor("scale", (1,), kind, 0)
    nodes = [
        *(helper.make_node("Cast", [f"{n}_in"], [n], name=f"{n}.cast", to=kind) for n in "qkv"),
        helper.make_node("Mul", ["q", "scale"], ["qs"], name="attn.scale"),
        helper.make_node("Transpose", ["k"], ["kt"], name="attn.kt", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["qs", "kt"], ["s"], name="attn.scores"),
        helper.make_node("Softmax", ["s"], ["p"], name="attn.softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["o"], name="attn.values"),
        helper.make_node("Cast", ["o"], ["y"], name="out.cast", to=TensorProto.FLOAT),
    ]
    inputs = [(f"{n}_in", TensorProto.FLOAT, shape) for n in "qkv"]
    return _model(nodes, inputs, [("y", TensorProto.FLOAT, shape)], [scale])


def mixed_add_model() -> onnx.ModelProto:
    """float32 + float16: not allowed by ONNX, nor by a strongly typed network."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], name="half", to=TensorProto.FLOAT16),
        helper.make_node("Add", ["x", "h"], ["y"], name="block.add"),
    ]
    return _model(nodes, [("x", TensorProto.FLOAT, [1, 4])], [("y", TensorProto.FLOAT, [1, 4])])


def wide_topk_model(k: int) -> onnx.ModelProto:
    """TopK of 5000 values."""
    return _model(
        [helper.make_node("TopK", ["x", "k"], ["y", "i"], name="head.topk")],
        [("x", TensorProto.FLOAT, [1, 5000])],
        [("y", TensorProto.FLOAT, [1, k]), ("i", TensorProto.INT64, [1, k])],
        [numpy_helper.from_array(np.array([k], np.int64), "k")],
    )


def failing_reshape_model() -> onnx.ModelProto:
    """Loads, and fails in its first run: 4 values do not make 5."""
    return _model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="head.reshape")],
        [("x", TensorProto.FLOAT, ["n", 4])],
        [("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([5], np.int64), "shape")],
    )


MODELS = {
    "network": network_model,
    "attention": attention_model,
    "mixed_add": mixed_add_model,
    "wide_topk": wide_topk_model,
    "failing_reshape": failing_reshape_model,
}


@pytest.fixture
def graph(tmp_path: Path) -> Make:
    """Write one of MODELS into the test's folder and return its path."""

    def make(kind: str, *arguments: object, **options: object) -> Path:
        path = tmp_path / f"{kind}.onnx"
        path.write_bytes(MODELS[kind](*arguments, **options).SerializeToString())
        return path

    return make
