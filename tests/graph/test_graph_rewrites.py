"""The variants that each pass must take, its traps, and what the rewritten graph is made of."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from graph_cases import apply, assert_same, build, draw, ops

from deploy.graph.io import graph_of, model_of
from deploy.graph.passes import (
    CONSTANT_AXES,
    FOLD_CONSTANTS,
    FUSE_BATCH_NORM,
    FUSE_GELU,
    FUSE_GROUP_NORM,
    FUSE_LAYER_NORM,
    REMOVE_CASTS,
    REMOVE_RESHAPES,
    SHARE_INITIALIZERS,
)


def statistics(channels: int) -> dict[str, np.ndarray]:
    return {
        "g": draw(channels, seed=1),
        "b": draw(channels, seed=2),
        "m": draw(channels, seed=3),
        "v": draw(channels, seed=4) ** 2 + 0.1,
    }


# --- batch normalisation


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batch_norm_folds_into_grouped_and_transposed_convolutions(op: str, groups: int, bias: bool) -> None:
    weight = draw(8, 4 // groups, 3, 3) if op == "Conv" else draw(4, 8 // groups, 3, 3)
    text = f"""g (float[N,4,6,6] x) => (float[N,8,H,W] y) {{
        a = {op}<group = {groups}, strides = [2, 2], pads = [1, 1, 1, 1]>(x, w{", c" if bias else ""})
        n = BatchNormalization<epsilon = 0.001>(a, g, b, m, v)
        y = Relu(n)
    }}"""
    model = build(text, w=weight, **({"c": draw(8)} if bias else {}), **statistics(8))
    result, after = apply(FUSE_BATCH_NORM, model)
    assert (result.sites, ops(after)) == (1, [op, "Relu"])
    assert_same(model, after, atol=1e-5)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5)])
def test_batch_norm_folds_into_every_form_of_gemm(trans_a: int, trans_b: int, bias: tuple[int, ...] | None) -> None:
    text = f"""g (float[3,3] x) => (float[3,5] y) {{
        a = Gemm<alpha = 0.5, beta = 3.0, transA = {trans_a}, transB = {trans_b}>(x, w{"" if bias is None else ", c"})
        y = BatchNormalization(a, g, b, m, v)
    }}"""
    arrays = {} if bias is None else {"c": draw(*bias)}
    model = build(text, w=draw(5, 3) if trans_b else draw(3, 5), **arrays, **statistics(5))
    result, after = apply(FUSE_BATCH_NORM, model)
    assert (result.sites, ops(after)) == (1, ["Gemm"])
    assert after.graph.node[0].output == ["y"]
    assert_same(model, after, atol=1e-5)


def test_batch_norm_does_not_change_weights_that_another_layer_shares() -> None:
    text = """g (float[1,2,3,3] x) => (float[1,2,3,3] y) {
        a = Conv(x, w)  n = BatchNormalization(a, g, b, m, v)  y = Conv(n, w)
    }"""
    model = build(text, w=draw(2, 2, 1, 1), **statistics(2))
    result, after = apply(FUSE_BATCH_NORM, model)
    assert result.sites == 1
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    np.testing.assert_array_equal(kept["w"], draw(2, 2, 1, 1))
    assert_same(model, after)


# --- layer normalisation

SQUARES = {"Pow": "Pow(d, two)", "Mul": "Mul(d, d)"}
QUOTIENTS = {
    "Div": "normal = Div(d, root)",
    "Reciprocal": "r = Reciprocal(root)  normal = Mul(d, r)",
    "Reciprocal first": "r = Reciprocal(root)  normal = Mul(r, d)",
    "Sub twice": "again = Sub(x, mean)  normal = Div(again, root)",
}
AFFINES = {
    "none": "y = Identity(normal)",
    "gain": "s = Mul(normal, gain)  y = Identity(s)",
    "bias": "s = Add(bias, normal)  y = Identity(s)",
    "both": "s = Mul(gain, normal)  t = Add(s, bias)  y = Identity(t)",
}


@pytest.mark.parametrize(
    ("square", "quotient", "affine"), list(itertools.product(SQUARES.values(), QUOTIENTS.values(), AFFINES.values()))
)
@pytest.mark.parametrize("axes", [[-1], [2], [1, -1]])
def test_layer_norm_is_found_in_every_form(square: str, quotient: str, affine: str, axes: list[int]) -> None:
    text = f"""g (float[N,3,4] x) => (float[N,3,4] y) {{
        mean = ReduceMean(x, axes)  d = Sub(x, mean)  q = {square}  var = ReduceMean(q, axes)
        s0 = Add(eps, var)  root = Sqrt(s0)  {quotient}  {affine}
    }}"""
    model = build(text, axes=axes, two=2.0, eps=1e-5, gain=draw(4), bias=draw(4, seed=1))
    result, after = apply(FUSE_LAYER_NORM, model)
    assert (result.sites, ops(after)) == (1, ["LayerNormalization", "Identity"])
    assert len(after.graph.node[0].input) == 3  # gain and bias are always written out
    assert_same(model, after, atol=2e-6)


def test_a_gain_along_another_axis_stays_behind_the_norm() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,4] y) {
        mean = ReduceMean(x, axes)  d = Sub(x, mean)  q = Mul(d, d)  var = ReduceMean(q, axes)
        s = Add(var, eps)  root = Sqrt(s)  n = Div(d, root)  y = Mul(n, gain)
    }"""
    model = build(text, axes=[-1], eps=1e-5, gain=draw(3, 1))
    result, after = apply(FUSE_LAYER_NORM, model)
    assert (result.sites, ops(after)) == (1, ["LayerNormalization", "Mul"])
    assert_same(model, after)


def test_a_norm_that_is_a_graph_output_keeps_its_gain_outside() -> None:
    text = """g (float[2,4] x) => (float[2,4] n, float[2,4] y) {
        mean = ReduceMean(x, axes)  d = Sub(x, mean)  q = Mul(d, d)  var = ReduceMean(q, axes)
        s = Add(var, eps)  root = Sqrt(s)  n = Div(d, root)  y = Mul(n, gain)
    }"""
    model = build(text, axes=[-1], eps=1e-5, gain=draw(4))
    result, after = apply(FUSE_LAYER_NORM, model)
    assert (result.sites, ops(after)) == (1, ["LayerNormalization", "Mul"])
    assert_same(model, after)


def test_layer_norm_with_axes_as_attributes_of_an_old_opset() -> None:
    text = """g (float[2,4] x) => (float[2,4] y) {
        mean = ReduceMean<axes = [1]>(x)  d = Sub(x, mean)  q = Mul(d, d)  var = ReduceMean<axes = [-1]>(q)
        s = Add(var, eps)  root = Sqrt(s)  y = Div(d, root)
    }"""
    model = build(text, opset=17, eps=1e-5)
    result, after = apply(FUSE_LAYER_NORM, model)
    assert (result.sites, ops(after)) == (1, ["LayerNormalization"])
    assert_same(model, after)


# --- group normalisation


@pytest.mark.parametrize("tail", ["none", "gain", "both", "bias [1,C,1,1]"])
@pytest.mark.parametrize("batch", ["N", "2"])
@pytest.mark.parametrize("split", [[0, 2, -1], [-1, 2, 18], [0, -1, 18]], ids=str)
def test_group_norm_is_found_in_every_form(split: list[int], batch: str, tail: str) -> None:
    tails = {
        "none": "y = Relu(r)",
        "gain": "s = Mul(gain, r)  y = Relu(s)",
        "both": "s = Mul(r, gain)  t = Add(s, bias)  y = Relu(t)",
        "bias [1,C,1,1]": "s = Add(r, wide)  y = Relu(s)",
    }
    text = f"""g (float[{batch},4,3,3] x) => (float[{batch},4,3,3] y) {{
        a = Reshape(x, split)  n = InstanceNormalization<epsilon = 0.001>(a, scale, offset)
        r = Reshape(n, back)  {tails[tail]}
    }}"""
    arrays = {"scale": draw(2), "offset": draw(2, seed=1), "gain": draw(4, 1, 1), "bias": draw(4, 1, 1, seed=1)}
    model = build(text, split=split, back=[-1, 4, 3, 3], wide=draw(1, 4, 1, 1), **arrays)
    result, after = apply(FUSE_GROUP_NORM, model)
    assert (result.sites, ops(after)) == (1, ["GroupNormalization", "Relu"])
    assert_same(model, after, atol=2e-6, batch=2)


def test_a_gain_per_pixel_stays_behind_the_group_norm() -> None:
    text = """g (float[N,4,3,3] x) => (float[N,4,3,3] y) {
        a = Reshape(x, split)  n = InstanceNormalization(a, scale, offset)  r = Reshape(n, back)  y = Mul(r, gain)
    }"""
    model = build(text, split=[0, 1, -1], back=[0, 4, 3, 3], scale=draw(1), offset=draw(1, seed=1), gain=draw(4, 1, 3))
    result, after = apply(FUSE_GROUP_NORM, model)
    assert (result.sites, ops(after)) == (1, ["GroupNormalization", "Mul"])
    assert_same(model, after)


# --- GELU

INSIDE = {"Div": "t = Div(x, root)", "Mul": "t = Mul(x, inverse)", "Mul first": "t = Mul(inverse, x)"}
GATES = {"right": "Add(e, one)", "left": "Add(one, e)"}
PRODUCTS = {
    "(x*gate)*half": "m = Mul(x, gate)  y = Mul(m, half)",
    "half*(gate*x)": "m = Mul(gate, x)  y = Mul(half, m)",
    "x*(half*gate)": "m = Mul(half, gate)  y = Mul(x, m)",
    "(gate*half)*x": "m = Mul(gate, half)  y = Mul(m, x)",
    "(x*half)*gate": "m = Mul(x, half)  y = Mul(m, gate)",
    "gate*(half*x)": "m = Mul(half, x)  y = Mul(gate, m)",
}


@pytest.mark.parametrize(
    ("inside", "gate", "product"), list(itertools.product(INSIDE.values(), GATES.values(), PRODUCTS.values()))
)
def test_gelu_is_found_in_every_form(inside: str, gate: str, product: str) -> None:
    text = f"g (float[2,8] x) => (float[2,8] y) {{ {inside}  e = Erf(t)  gate = {gate}  {product} }}"
    model = build(text, root=2.0**0.5, inverse=0.5**0.5, one=1.0, half=np.array([0.5], np.float32))
    result, after = apply(FUSE_GELU, model)
    assert (result.sites, ops(after)) == (1, ["Gelu"])
    assert onnx.helper.get_node_attr_value(after.graph.node[0], "approximate") == b"none"
    assert_same(model, after)


@pytest.mark.parametrize("cube", ["c = Pow(x, three)", "q = Mul(x, x)  c = Mul(x, q)", "q = Mul(x, x)  c = Mul(q, x)"])
@pytest.mark.parametrize("add", ["Add(x, s)", "Add(s, x)"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_the_tanh_form_of_gelu_is_found(cube: str, add: str, product: str) -> None:
    text = f"""g (float[2,8] x) => (float[2,8] y) {{
        {cube}  s = Mul(c, k)  a = {add}  t = Mul(a, r)  e = Tanh(t)  gate = Add(e, one)  {product}
    }}"""
    model = build(text, three=3.0, k=0.044715, r=(2 / np.pi) ** 0.5, one=1.0, half=0.5)
    result, after = apply(FUSE_GELU, model)
    assert (result.sites, ops(after)) == (1, ["Gelu"])
    assert onnx.helper.get_node_attr_value(after.graph.node[0], "approximate") == b"tanh"
    assert_same(model, after)


# --- casts

LOSSLESS = [
    ("bool", 9, 6, 7), ("uint8", 2, 1, 7), ("int8", 3, 1, 6), ("float16", 10, 1, 11), ("float", 1, 11, 10),
    ("float16", 10, 11, 10), ("int32", 6, 7, 6), ("bool", 9, 1, 9),
]  # fmt: skip


@pytest.mark.parametrize(("start", "begin", "middle", "end"), LOSSLESS)
def test_a_detour_that_loses_nothing_is_cut_short(start: str, begin: int, middle: int, end: int) -> None:
    name = onnx.helper.tensor_dtype_to_np_dtype(end).name
    ends = {"float32": "float", "float64": "double"}.get(name, name)
    text = f"""g ({start}[4] x) => ({ends}[4] y) {{
        i = Identity(x)  a = Cast<to = {middle}>(i)  b = Cast<to = {end}>(a)  y = Identity(b)
    }}"""
    model = build(text)
    result, after = apply(REMOVE_CASTS, model)
    assert result.sites == 1
    assert ops(after).count("Cast") == (begin != end)
    assert_same(model, after, atol=0)


def test_equal_casts_merge_into_the_first_and_other_types_stay() -> None:
    text = """g (float[4] x) => (float[4] y) {
        a = Cast<to = 10>(x)  b = Cast<to = 10>(x)  c = Cast<to = 11>(x)  d = Add(a, b)
        e = Cast<to = 1>(d)  f = Cast<to = 1>(c)  y = Add(e, f)
    }"""
    model = build(text)
    result, after = apply(REMOVE_CASTS, model)
    assert result.sites == 2  # b, and the way of c to float64 and back
    assert ops(after) == ["Cast", "Add", "Cast", "Add"]
    assert_same(model, after, atol=0)


# --- reshapes


@pytest.mark.parametrize(("first", "second"), list(itertools.product(itertools.permutations(range(3)), repeat=2)))
def test_transpose_pairs_compose(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    text = f"""g (float[2,3,4] x) => (float[A,B,C] y) {{
        a = Abs(x)  b = Transpose<perm = {list(first)}>(a)  c = Transpose<perm = {list(second)}>(b)  y = Neg(c)
    }}"""
    model = build(text)
    result, after = apply(REMOVE_RESHAPES, model)
    assert result.sites >= 1
    assert ops(after).count("Transpose") <= 1
    assert_same(model, after, atol=0)


def test_a_transpose_without_perm_reverses() -> None:
    model = build("g (float[2,3,4] x) => (float[2,3,4] y) { a = Transpose(x)  b = Transpose(a)  y = Neg(b) }")
    result, after = apply(REMOVE_RESHAPES, model)
    assert (result.sites, ops(after)) == (1, ["Neg"])
    assert_same(model, after, atol=0)


CHAINS = [
    ("Reshape(x, c)", {"c": [4, 6]}, [2, -1], [2, 12]),
    ("Reshape(x, c)", {"c": [4, 6]}, [0, 3, -1], [4, 3, 2]),  # 0 copies from [4, 6], not from [2, 3, 4]
    ("Reshape(x, c)", {"c": [0, -1]}, [-1, 3, 4], [2, 3, 4]),
    ("Flatten<axis = 2>(x)", {}, [3, -1, 2], [3, 4, 2]),
    ("Unsqueeze(x, c)", {"c": [1]}, [6, 4], [6, 4]),
]


@pytest.mark.parametrize(("first", "arrays", "target", "shape"), CHAINS)
def test_reshape_chains_shorten(first: str, arrays: dict[str, object], target: list[int], shape: list[int]) -> None:
    model = build(
        f"g (float[2,3,4] x) => (float{shape} y) {{ a = {first}  b = Reshape(a, t)  y = Neg(b) }}", t=target, **arrays
    )
    result, after = apply(REMOVE_RESHAPES, model)
    assert result.sites >= 1
    assert len(ops(after)) <= 2
    assert_same(model, after, atol=0)


@pytest.mark.parametrize("target", [[-1, 3, 4], [0, 3, 4], [0, 0, 0], [0, 0, -1], [0, -1, 4]], ids=str)
def test_a_reshape_to_the_shape_that_is_there_goes_even_with_a_dynamic_batch(target: list[int]) -> None:
    model = build("g (float[N,3,4] x) => (float[N,3,4] y) { a = Reshape(x, t)  y = Neg(a) }", t=target)
    result, after = apply(REMOVE_RESHAPES, model)
    assert (result.sites, ops(after)) == (1, ["Neg"])
    assert_same(model, after, atol=0, batch=3)


def test_a_reshape_to_the_measured_shape_goes() -> None:
    model = build("g (float[N,M] x) => (float[N,M] y) { a = Abs(x)  s = Shape(a)  b = Reshape(a, s)  y = Neg(b) }")
    result, after = apply(REMOVE_RESHAPES, model)
    assert (result.sites, ops(after)) == (1, ["Abs", "Neg"])


def test_the_graph_output_keeps_its_name_when_the_last_node_goes() -> None:
    text = "g (float[2,3] x) => (float[2,3] y, float[2,3] z) { a = Abs(x)  y = Reshape(a, s)  z = Neg(a) }"
    model = build(text, s=[2, 3])
    result, after = apply(REMOVE_RESHAPES, model)
    assert (result.sites, ops(after)) == (1, ["Abs", "Neg"])
    assert [list(n.output) for n in after.graph.node] == [["y"], ["z"]]
    assert_same(model, after, atol=0)


# --- constants


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 21])
def test_axes_become_inputs_or_attributes_as_the_opset_wants(opset: int) -> None:
    text = """g (float[2,1,4] x) => (float[2,4] s, float m, float[1,1,1] t) {
        s = Squeeze(x)  m = ReduceMean<keepdims = 0>(x)  t = ReduceSum(x)
    }"""
    model = build(text, opset=opset)
    result, after = apply(CONSTANT_AXES, model)
    assert result.sites == 3
    assert_same(model, after)
    squeeze, mean, total = after.graph.node
    assert len(squeeze.input) == len(total.input) == (2 if opset >= 13 else 1)
    assert len(mean.input) == (2 if opset >= 18 else 1)


def test_an_empty_list_of_axes_reduces_all() -> None:
    model = build("g (float[2,3] x) => (float y) { y = ReduceMax<keepdims = 0>(x, none) }", none=np.array([], np.int64))
    result, after = apply(CONSTANT_AXES, model)
    assert result.sites == 1
    assert [list(onnx.numpy_helper.to_array(t)) for t in after.graph.initializer] == [[0, 1]]
    assert_same(model, after)


def test_folding_reads_every_form_of_constant_and_keeps_a_type_that_numpy_lacks() -> None:
    text = """g (bfloat16[2] x) => (bfloat16[2] y, float[2] z) {
        w = Constant<value = bfloat16[2] {16320, 16416}>()  y = Add(x, w)
        f = Constant<value_floats = [1.0, 2.0]>()  i = Constant<value_int = 1>()  j = Cast<to = 1>(i)
        k = Mul(f, j)  c = Cast<to = 1>(y)  z = Add(c, k)
    }"""
    model = build(text, opset=21)
    before = onnx.numpy_helper.to_array(model.graph.node[0].attribute[0].t)
    result, after = apply(FOLD_CONSTANTS, model)
    assert ops(after) == ["Add", "Cast", "Add"]
    kept = {t.name: t for t in after.graph.initializer}
    assert kept["w"].data_type == onnx.TensorProto.BFLOAT16
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept["w"]).astype(np.float32), before.astype(np.float32))
    assert result.sites == 5


def test_nodes_that_no_output_needs_go_and_inputs_that_nobody_reads_stay() -> None:
    model = build("g (float[2] x, float[2] unread) => (float[2] y) { y = Neg(x)  dead = Abs(x)  deader = Exp(dead) }")
    result, after = apply(FOLD_CONSTANTS, model)
    assert (result.sites, ops(after)) == (2, ["Neg"])
    assert [i.name for i in after.graph.input] == ["x", "unread"]


def test_sharing_redirects_every_consumer_and_merges_equal_expressions() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) {
        e = Expand(p, s)  f = Expand(q, t)  a = Add(x, e)  b = Mul(a, f)  c = Add(b, q)
        u = Shape(x)  v = Shape(x)  d = Reshape(c, u)  y = Reshape(d, v)
    }"""
    model = build(text, p=draw(2), q=draw(2), s=[1, 2], t=[1, 2])
    result, after = apply(SHARE_INITIALIZERS, model)
    assert result.sites == 4  # p and q, s and t, two Expand, two Shape
    assert [t.name for t in after.graph.initializer] == ["p", "s"]
    assert (ops(after).count("Expand"), ops(after).count("Shape")) == (1, 1)
    assert_same(model, after, atol=0)


def test_sharing_does_not_load_or_change_the_weights() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Mul(x, p)  y = Add(a, q) }", p=draw(2), q=draw(2, seed=1))
    graph = graph_of(model)
    SHARE_INITIALIZERS.apply(graph)
    assert all(type(t._values).__name__ == "LazyValues" for n in graph.nodes for t in n.inputs[1:])


def test_expressions_that_differ_in_a_tensor_attribute_stay_apart() -> None:
    text = """g (float[2] x) => (float[2] y) {
        a = ConstantOfShape<value = float[1] {3}>(s)  b = ConstantOfShape<value = float[1] {5}>(s)
        c = Mul(x, a)  y = Add(c, b)
    }"""
    model = build(text, s=[2])
    result, after = apply(SHARE_INITIALIZERS, model)
    assert result.sites == 0
    assert_same(model, after, atol=0)


def test_twin_casts_merge_into_the_first_in_the_graph_whatever_the_order_of_consumers() -> None:
    text = """g (float[4] x) => (float[4] y) {
        a = Cast<to = 10>(x)  same = Cast<to = 1>(x)  b = Cast<to = 10>(same)  c = Add(a, b)  y = Cast<to = 1>(c)
    }"""
    model = build(text)
    graph = graph_of(onnx.load_from_string(model.SerializeToString()))
    graph.inputs[0].outputs.reverse()
    assert REMOVE_CASTS.apply(graph).sites == 2
    after = model_of(graph)
    assert ops(after) == ["Cast", "Add", "Cast"]
    assert_same(model, after, atol=0)


def test_half_precision_weights_are_not_rounded_twice() -> None:
    text = "g (float16[1,2,2,2] x) => (float16[1,2,2,2] y) { a = Conv(x, w)  y = BatchNormalization(a, g, b, m, v) }"
    arrays = {name: values.astype(np.float16) for name, values in statistics(2).items()}
    result, _ = apply(FUSE_BATCH_NORM, build(text, w=draw(2, 2, 1, 1).astype(np.float16), **arrays))
    assert result.declined == ("block/BatchNormalization: the weights are float16, which folding would round again",)


def test_nodes_without_names_are_named_by_what_they_make() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Cast<to = 10>(x)  b = Cast<to = 1>(a)  y = Neg(b) }")
    for node in model.graph.node:
        node.name = ""
    result, _ = apply(REMOVE_CASTS, model)
    assert result.declined == ("Cast that makes b: the chain float32 -> float16 -> float32 loses values in the middle",)
