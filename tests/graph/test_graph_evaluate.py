"""Folding computes what ONNX Runtime computes, for every operator that it is allowed to fold."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph_cases import build, draw, outputs_of

from deploy.graph.evaluate import FOLDABLE, known_value, node_value
from deploy.graph.io import graph_of
from deploy.graph.matching import DeclinedError

F = draw(2, 3)
P = np.abs(F) + 0.5
G = draw(3, seed=1)
INTEGERS = np.array([-7, -3, 5, 7], np.int64)
DIVISORS = np.array([2, -2, -3, 3], np.int64)
FLAGS = np.array([True, False, True])
OTHERS = np.array([True, True, False])

CASES: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("Abs", "Abs(a)", {"a": INTEGERS}),
    ("Add", "Add(a, b)", {"a": F, "b": G}),
    ("And", "And(a, b)", {"a": FLAGS, "b": OTHERS}),
    ("Cast", "Cast<to = 7>(a)", {"a": 3 * F}),
    ("Cast", "Cast<to = 10>(a)", {"a": F}),
    ("Ceil", "Ceil(a)", {"a": F}),
    ("Concat", "Concat<axis = -1>(a, b)", {"a": F, "b": P}),
    ("ConstantOfShape", "ConstantOfShape<value = int64[1] {3}>(a)", {"a": [2, 3]}),
    ("ConstantOfShape", "ConstantOfShape(a)", {"a": [2, 3]}),
    ("Div", "Div(a, b)", {"a": F, "b": G}),
    ("Div", "Div(a, b)", {"a": INTEGERS, "b": DIVISORS}),  # rounds towards zero, Python rounds down
    ("Equal", "Equal(a, b)", {"a": INTEGERS, "b": np.array([-7, 3, 5, 0], np.int64)}),
    ("Expand", "Expand(a, b)", {"a": G, "b": [2, 1]}),
    ("Flatten", "Flatten<axis = 2>(a)", {"a": draw(2, 3, 4)}),
    ("Floor", "Floor(a)", {"a": F}),
    ("Gather", "Gather<axis = 1>(a, b)", {"a": F, "b": [-1, 0]}),
    ("Greater", "Greater(a, b)", {"a": F, "b": G}),
    ("Less", "Less(a, b)", {"a": F, "b": G}),
    ("Max", "Max(a, b)", {"a": F, "b": G}),
    ("Min", "Min(a, b)", {"a": F, "b": G}),
    ("Mul", "Mul(a, b)", {"a": F, "b": G}),
    ("Neg", "Neg(a)", {"a": INTEGERS}),
    ("Not", "Not(a)", {"a": FLAGS}),
    ("Or", "Or(a, b)", {"a": FLAGS, "b": OTHERS}),
    ("Pow", "Pow(a, b)", {"a": P, "b": np.float32(3.0)}),
    ("Range", "Range(a, b, c)", {"a": np.int64(9), "b": np.int64(-1), "c": np.int64(-3)}),
    ("Reciprocal", "Reciprocal(a)", {"a": P}),
    ("ReduceMax", "ReduceMax(a, b)", {"a": F, "b": [1]}),
    ("ReduceMean", "ReduceMean<keepdims = 0>(a, b)", {"a": F, "b": [-1]}),
    ("ReduceMin", "ReduceMin(a)", {"a": F}),
    ("ReduceProd", "ReduceProd(a, b)", {"a": INTEGERS, "b": [0]}),
    ("ReduceSum", "ReduceSum(a, b)", {"a": F, "b": [0, 1]}),
    ("Reshape", "Reshape(a, b)", {"a": F, "b": [0, -1, 1]}),
    ("Slice", "Slice(a, b, c, d, e)", {"a": F, "b": [-1], "c": [-9], "d": [1], "e": [-2]}),
    ("Sqrt", "Sqrt(a)", {"a": P}),
    ("Squeeze", "Squeeze(a, b)", {"a": draw(2, 1, 3), "b": [-2]}),
    ("Sub", "Sub(a, b)", {"a": INTEGERS, "b": DIVISORS}),
    ("Tile", "Tile(a, b)", {"a": F, "b": [2, 1]}),
    ("Transpose", "Transpose(a)", {"a": F}),
    ("Trilu", "Trilu<upper = 0>(a)", {"a": F}),
    ("Unsqueeze", "Unsqueeze(a, b)", {"a": F, "b": [0, -1]}),
    ("Where", "Where(a, b, c)", {"a": FLAGS, "b": F, "c": G}),
)


def expression(text: str, arrays: dict[str, object]) -> onnx.ModelProto:
    model = build(f"g (float[2] x) => (float[2] x2) {{ y = {text}  x2 = Neg(x) }}", **arrays)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    model.graph.output.extend(v for v in inferred.graph.value_info if v.name == "y")
    return model


@pytest.mark.parametrize(("op", "text", "arrays"), CASES, ids=[f"{i}-{c[1]}" for i, c in enumerate(CASES)])
def test_the_value_is_that_of_onnx_runtime(op: str, text: str, arrays: dict[str, object]) -> None:
    model = expression(text, arrays)
    graph = graph_of(onnx.load_from_string(model.SerializeToString()))
    got = node_value(graph.nodes[0], graph.opset)
    assert got is not None
    expected = outputs_of(model)["y"]
    assert (graph.nodes[0].op, got.dtype, got.shape) == (op, expected.dtype, expected.shape)
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=0)


def test_every_foldable_operator_is_held_against_onnx_runtime() -> None:
    assert {op for op, _, _ in CASES} == FOLDABLE


@pytest.mark.parametrize("op", ["DequantizeLinear", "QuantizeLinear", "RandomUniform", "RandomNormalLike", "Bernoulli"])
def test_what_must_not_be_folded_is_not_on_the_list(op: str) -> None:
    assert op not in FOLDABLE


def test_a_chain_of_constants_has_a_value_and_one_with_an_input_has_none() -> None:
    model = build("g (int64[1] x) => (int64[1] y) { a = Neg(c)  b = Identity(a)  d = Add(b, c)  y = Add(d, x) }", c=[4])
    tensors = graph_of(model).tensors()
    np.testing.assert_array_equal(known_value(tensors["d"], 21), [0])
    assert known_value(tensors["y"], 21) is None


def test_a_result_that_would_not_fit_the_memory_is_never_computed() -> None:
    model = build(
        "g (float[1] x) => (float[A,B,C] y) { t = ConstantOfShape(s)  y = Add(t, x) }", s=[1 << 20, 1 << 20, 8]
    )
    graph = graph_of(model)
    with pytest.raises(DeclinedError, match="times as large as its inputs, the limit is 4"):
        node_value(graph.nodes[0], graph.opset)


def test_what_the_reference_refuses_is_declined() -> None:
    graph = graph_of(build("g (float[1] x) => (float[1] y) { t = Gather(c, i)  y = Add(t, x) }", c=draw(2), i=[5]))
    with pytest.raises(DeclinedError, match="Gather cannot be computed: "):
        node_value(graph.nodes[0], graph.opset)
