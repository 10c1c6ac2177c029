"""What stays float32 and what does not: each rule of the policy on the smallest graph that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from precision_cases import convert, noise, parse

from deploy.errors import PrecisionError
from deploy.precision import policy
from deploy.records import Precision, Target

LOW = [Precision.FP16, Precision.BF16]

# Every operator of the table, between two products that are low.
KEPT = {
    "LayerNormalization": "y = LayerNormalization(h, g, g)",
    "InstanceNormalization": "y = InstanceNormalization(h, g3, g3)",
    "LpNormalization": "y = LpNormalization<axis=-1, p=2>(h)",
    "MeanVarianceNormalization": "y = MeanVarianceNormalization<axes=[2]>(h)",
    "LRN": "y = LRN<size=3>(h)",
    "Softmax": "y = Softmax<axis=-1>(h)",
    "LogSoftmax": "y = LogSoftmax<axis=-1>(h)",
    "ReduceMean": "y = ReduceMean(h, last)",
    "ReduceSum": "y = ReduceSum(h, last)",
    "ReduceSumSquare": "y = ReduceSumSquare(h, last)",
    "ReduceL1": "y = ReduceL1(h, last)",
    "ReduceL2": "y = ReduceL2(h, last)",
    "ReduceProd": "y = ReduceProd(h, last)",
    "ReduceLogSum": "a = Exp(h) y = ReduceLogSum(a, last)",
    "ReduceLogSumExp": "y = ReduceLogSumExp(h, last)",
    "CumSum": "y = CumSum(h, one)",
    "Log": "a = Exp(h) y = Log(a)",
    "Pow": "y = Pow(h, two)",
    "Sin": "y = Sin(h)",
    "Cos": "y = Cos(h)",
    "Tan": "y = Tan(h)",
}
WEIGHTS = {
    "w": noise(8, 8, scale=0.3),
    "g": noise(8, seed=1),
    "g3": noise(3, seed=2),
    "last": np.array([-1]),
    "one": np.array(1),
    "two": np.array(2.0, np.float32),
}


def sandwich(body: str) -> onnx.ModelProto:
    text = f"g (float[2,3,8] x) => (float[?,?,?] z) {{ h = MatMul(x, w) {body} p = Relu(y) z = Neg(p) }}"
    return parse(
        text,
        {n: w for n, w in WEIGHTS.items() if re.search(rf"\b{n}\b", text.partition("{")[2])},
    )


@pytest.mark.parametrize("op", KEPT)
def test_an_operator_of_the_table_stays_float32_and_its_surroundings_are_low(op: str, tmp_path: Path) -> None:
    typed = convert(sandwich(KEPT[op]), tmp_path)
    assert typed.kind("y") == "fp32"
    assert typed.reason("y") == policy.KEPT_OPS[op]
    assert typed.kind("h") == "fp16"


def test_the_table_is_tested_whole() -> None:
    elsewhere = {"TopK", "ArgMax", "ArgMin", "Range", "RoiAlign", "NonMaxSuppression", "GroupNormalization"}
    too_new = {"RMSNormalization"}  # opset 23
    assert set(KEPT) | elsewhere | too_new == set(policy.KEPT_OPS)
    assert all(onnx.defs.has(op) for op in policy.KEPT_OPS)
    assert all(onnx.defs.has(op) for op in policy.ELEMENTWISE | policy.PRODUCTS)


@pytest.mark.parametrize("op", ["Relu", "Gelu", "Sigmoid", "Erf", "Tanh", "HardSwish", "Identity"])
def test_other_operators_are_low(op: str, tmp_path: Path) -> None:
    typed = convert(sandwich(f"y = {op}(h)"), tmp_path)
    assert typed.kind("y") == "fp16"
    assert not typed.record.kept
    assert typed.casts() == [("x", "x_fp16", "fp16"), ("z_fp16", "z", "fp32")]


@pytest.mark.parametrize(
    ("target", "opset", "stash", "kind"),
    [
        (Target.TENSORRT, 21, 1, "fp16"),
        (Target.TENSORRT, 21, 10, "fp32"),
        (Target.ONNXRUNTIME, 21, 1, "fp32"),
    ],
)
def test_group_norm_is_low_only_where_its_statistics_are_float32(
    target: Target, opset: int, stash: int, kind: str, tmp_path: Path
) -> None:
    model = parse(
        f"g (float[1,4,2,2] x) => (float[1,4,2,2] z) {{ "
        f"h = Conv(x, w) y = GroupNormalization<num_groups=2, stash_type={stash}>(h, s, s) z = Conv(y, w) }}",
        {"w": noise(4, 4, 1, 1), "s": noise(4)},
        opset,
    )
    assert convert(model, tmp_path, target=target).kind("y") == kind


def test_top_k_scores_stay_float32_up_to_the_product_that_makes_them(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,9,8] x) => (float[2,3] s, int64[2,3] i, float[2,9,4] z) {
          h = MatMul(x, w)
          c = MatMul(h, w4)
          b = Add(c, b4)
          m = ReduceMax<keepdims=0>(b, last)
          p = Sigmoid(m)
          s, i = TopK(p, k)
          z = MatMul(h, w4)
        }
        """,
        {"w": noise(8, 8), "w4": noise(8, 4), "b4": noise(4), "last": np.array([-1]), "k": np.array([3])},
    )
    typed = convert(model, tmp_path)
    assert {n: typed.kind(n) for n in "hcbp"} == {"h": "fp16", "c": "fp32", "b": "fp32", "p": "fp32"}
    assert typed.reason("c") == policy.SELECT
    assert typed.kind("z") == "fp16"
    assert typed.kind("s") == "fp32"


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_an_arg_max_is_decided_in_float32(op: str, tmp_path: Path) -> None:
    model = parse(
        f"g (float[2,8] x) => (int64[2] i) {{ h = MatMul(x, w) c = MatMul(h, w) i = {op}<axis=1, keepdims=0>(c) }}",
        {"w": noise(8, 8)},
    )
    typed = convert(model, tmp_path)
    assert (typed.kind("h"), typed.kind("c"), typed.reads("i")) == ("fp16", "fp32", ["fp32"])


def test_a_grid_is_made_in_float32_and_sampled_in_one_type(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[1,4,5,5] x, float[1,6,8] q) => (float[1,4,2,3] z) {
          v = Conv(x, w)
          o = MatMul(q, w2)
          t = Sigmoid(o)
          d = Mul(t, two)
          e = Sub(d, one)
          r = Reshape(e, shape)
          z = GridSample(v, r)
        }
        """,
        {
            "w": noise(4, 4, 1, 1), "w2": noise(8, 2), "shape": np.array([1, 2, 3, 2]),
            "two": np.array(2.0, np.float32), "one": np.array(1.0, np.float32),
        },
    )  # fmt: skip
    typed = convert(model, tmp_path)
    assert {n: typed.kind(n) for n in "votder"} == {"v": "fp16", "o": "fp16"} | dict.fromkeys("tder", "fp32")
    assert typed.reads("z") == ["fp16", "fp16"]
    assert typed.reason("t") == policy.GRID


def test_an_inverse_sigmoid_and_the_update_behind_it_stay_float32(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[1,6,4] ref, float[1,6,8] q) => (float[1,6,4] z) {
          p = MatMul(q, w)
          d = MatMul(q, w)
          s = Sigmoid(p)
          c = Clip(s, lo, hi)
          n = Sub(one, c)
          r = Div(c, n)
          l = Log(r)
          u = Add(l, d)
          y = Sigmoid(u)
          z = Relu(y)
        }
        """,
        {"w": noise(8, 4), "lo": np.float32(1e-5), "hi": np.float32(1 - 1e-5), "one": np.float32(1)},
    )
    typed = convert(model, tmp_path)
    assert {typed.kind(n) for n in "scnrluy"} == {"fp32"}
    assert {typed.kind(n) for n in "pd"} == {"fp16"}


def test_a_decomposed_layer_norm_is_float32_throughout(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,3,8] x) => (float[2,3,8] z) {
          h = MatMul(x, w)
          m = ReduceMean(h, last)
          d = Sub(h, m)
          q = Mul(d, d)
          v = ReduceMean(q, last)
          e = Add(v, eps)
          r = Sqrt(e)
          n = Div(d, r)
          z = MatMul(n, w)
        }
        """,
        {"w": noise(8, 8), "last": np.array([-1]), "eps": np.float32(1e-6)},
    )
    typed = convert(model, tmp_path)
    assert {typed.kind(n) for n in "mdqvern"} == {"fp32"}
    assert typed.record.casts == 4  # x, h, n and the output
    assert (typed.kind("h"), typed.reads("z")) == ("fp16", ["fp16", "fp16"])


def test_a_hand_written_softmax_is_float32_throughout(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,3,8] x) => (float[2,3,8] z) {
          h = MatMul(x, w) m = ReduceMax(h, last) d = Sub(h, m) e = Exp(d)
          s = ReduceSum(e, last) p = Div(e, s) z = MatMul(p, w)
        }
        """,
        {"w": noise(8, 8), "last": np.array([-1])},
    )
    typed = convert(model, tmp_path)
    assert {typed.kind(n) for n in "desp"} == {"fp32"}
    assert {typed.kind(n) for n in "hm"} == {"fp16"}


def test_arithmetic_on_whole_numbers_stays_float32(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x, int64[8] i) => (float[2,8] z) {
          h = MatMul(x, w) f = Cast<to=1>(i) s = Mul(f, third) r = Floor(s) z = Add(h, r)
        }
        """,
        {"w": noise(8, 8), "third": np.float32(1 / 3)},
    )
    typed = convert(model, tmp_path)
    assert {n: typed.kind(n) for n in "fsr"} == dict.fromkeys("fsr", "fp32")
    assert typed.reason("s") == policy.INDEX


def test_indices_computed_from_floats_stay_float32(tmp_path: Path) -> None:
    model = parse(
        "g (float[2,8] x) => (int64[2,8] i) { h = MatMul(x, w) s = Mul(h, k) r = Floor(s) i = Cast<to=7>(r) }",
        {"w": noise(8, 8), "k": np.float32(100)},
    )
    typed = convert(model, tmp_path)
    assert {n: typed.kind(n) for n in "hsr"} == {"h": "fp16", "s": "fp32", "r": "fp32"}


@pytest.mark.parametrize(("reduction", "kind"), [("none", "fp16"), ("add", "fp32")])
def test_a_scatter_that_adds_stays_float32(reduction: str, kind: str, tmp_path: Path) -> None:
    model = parse(
        f"""
        g (float[2,8] x, int64[1,8] i) => (float[2,8] z) {{
          h = MatMul(x, w) u = Slice(h, zero, one)
          y = ScatterElements<axis=0, reduction="{reduction}">(h, i, u) z = MatMul(y, w)
        }}
        """,
        {"w": noise(8, 8), "zero": np.array([0]), "one": np.array([1])},
    )
    assert convert(model, tmp_path).kind("y") == kind


def test_what_lies_between_float32_nodes_is_not_cast_down_and_up(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,3,8] x) => (float[2,3,8] z) {
          h = MatMul(x, w) n = LayerNormalization(h, g, g) t = Transpose<perm=[0,2,1]>(n) r = Relu(t) s = Softmax(r)
          u = Transpose<perm=[0,2,1]>(s) z = MatMul(u, w)
        }
        """,
        {"w": noise(8, 8), "g": noise(8)},
    )
    typed = convert(model, tmp_path)
    assert {typed.kind(n) for n in "tr"} == {"fp32"}
    assert typed.reason("t") == policy.BETWEEN
    assert typed.record.casts == 4


def test_a_norm_read_by_a_low_and_a_kept_node_is_cast_once(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x) => (float[2,8] z) {
          h = MatMul(x, w) n = LayerNormalization(h, g, g) a = Relu(n) s = Softmax(n) b = Sigmoid(n)
          c = Add(a, b) d = Mul(c, s) z = MatMul(d, w)
        }
        """,
        {"w": noise(8, 8), "g": noise(8)},
    )
    typed = convert(model, tmp_path)
    assert [c for c in typed.casts() if c[0] == "n"] == [("n", "n_fp16", "fp16")]
    assert typed.reads("s") == ["fp32"]


def test_asked_nodes_stay_float32_by_module_path(tmp_path: Path) -> None:
    model = parse(
        "g (float[2,8] x) => (float[2,8] z) { a = MatMul(x, w) b = MatMul(a, w) z = MatMul(b, w) }", {"w": noise(8, 8)}
    )
    for node, path in zip(model.graph.node, ("stages.1.mlp", "stages.10.mlp", "head"), strict=True):
        node.name = f"{path}/MatMul"
    typed = convert(model, tmp_path, keep=(r"stages\.1\.", "^head/"))
    kinds = {n.name: typed.types[n.output[0]] for n in typed.model.graph.node if n.op_type == "MatMul"}
    assert kinds == {"stages.1.mlp/MatMul": 1, "stages.10.mlp/MatMul": 10, "head/MatMul": 1}
    assert {k.reason for k in typed.record.kept} == {policy.ASKED.format(pattern=p) for p in (r"stages\.1\.", "^head/")}
    assert {n.name for n in typed.model.graph.node if n.op_type == "Cast"} == {
        "stages.10.mlp/Cast_fp16",
        "head/Cast_fp32",
    }


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (("nowhere",), "matches no floating-point node"),
        (("(",), "is not a regular expression"),
        ((".",), "nothing in this graph"),
    ],
)
def test_a_keep_that_cannot_be_meant_is_refused(keep: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match=message) as caught:
        convert(sandwich("y = Relu(h)"), tmp_path, keep=keep)
    assert caught.value.hint
    assert not list(tmp_path.glob("30-*"))


def test_an_operator_that_does_not_take_the_type_stays_float32(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x) => (float[2,8] z) {
          h = MatMul(x, w) y = Einsum<equation="ij,ij->ij">(h, h) z = MatMul(y, w)
        }
        """,
        {"w": noise(8, 8)},
        22,
    )
    assert convert(model, tmp_path).kind("y") == "fp16"
    typed = convert(model, tmp_path, Precision.BF16)
    assert typed.kind("y") == "fp32"
    assert typed.reason("y") == "type: the operator does not take bfloat16 at opset 22"


def test_a_custom_operator_stays_float32(tmp_path: Path) -> None:
    model = parse(
        "g (float[2,8] x) => (float[2,8] z) { h = MatMul(x, w) y = Relu(h) z = MatMul(y, w) }", {"w": noise(8, 8)}
    )
    model.graph.node[1].domain = "example.com"
    model.opset_import.append(helper.make_opsetid("example.com", 1))
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8]))
    typed = convert(model, tmp_path)
    assert (typed.kind("y"), typed.reads("y"), typed.reads("z")) == ("fp32", ["fp32"], ["fp16", "fp16"])
    assert typed.reason("y") == policy.UNKNOWN


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("y = Add(h, eps)", True),  # 1e-12 is zero in float16
        ("y = Where(c, h, fill)", True),  # -3e38 is beyond it
        ("y = Where(c, h, masked)", False),  # minus infinity is minus infinity in both
        ("y = Clip(h, fill, huge)", False),  # no float16 value is beyond these bounds, infinite or not
    ],
)
def test_scalars_that_float16_cannot_hold(body: str, kept: bool, tmp_path: Path) -> None:
    scalars = {"eps": 1e-12, "fill": -3e38, "huge": 3e38, "masked": -np.inf}
    weights = {n: np.array(v, np.float32) for n, v in scalars.items() if n in body} | {"w": noise(8, 8)}
    model = parse(
        f"g (float[2,8] x, bool[2,8] c) => (float[2,8] z) {{ h = MatMul(x, w) {body} z = MatMul(y, w) }}", weights
    )
    typed = convert(model, tmp_path)
    assert typed.kind("z") == "fp16"
    if kept:
        assert typed.kind("y") == "fp32"
        assert typed.reason("y").startswith("range: ")
    else:
        assert typed.kind("y") == "fp16"
        assert not typed.record.kept


def test_no_pinned_slot_shares_its_type_with_the_data() -> None:
    """Otherwise a low node would break its own schema."""
    for op, slots in policy.PINNED.items():
        schema = onnx.defs.get_schema(op)
        pinned = {schema.inputs[i].type_str for i in slots}
        rest = {f.type_str for i, f in enumerate(schema.inputs) if i not in slots} | {
            f.type_str for f in schema.outputs
        }
        assert not pinned & rest
