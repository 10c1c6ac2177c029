"""The traps of typing a graph, one graph each, and properties that hold for random graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_cases import close, convert, noise, parse, run

from deploy.artifacts import sha256_of
from deploy.errors import GraphPassError, PrecisionError
from deploy.graph.io import tensor_specs
from deploy.precision.convert import convert_precision
from deploy.records import Precision, Target

W = noise(8, 8, scale=0.3)
X = {"x": noise(2, 8, seed=5)}


def test_float32_is_the_same_file(tmp_path: Path) -> None:
    model = parse("g (float[2,8] x) => (float[2,8] z) { z = MatMul(x, w) }", {"w": W})
    path = tmp_path / "20-patched.onnx"
    path.write_bytes(model.SerializeToString())
    record = convert_precision(path, Precision.FP32, tmp_path, target=Target.ONNXRUNTIME)
    assert record.artifact.name == path.name
    assert record.artifact.sha256 == sha256_of(path)
    assert (record.dtype_counts, record.casts, record.kept) == ({"fp32": 1}, 0, ())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_inputs_and_outputs_stay_as_they_were(precision: Precision, tmp_path: Path) -> None:
    model = parse(
        """
        g (float[batch,8] x, int64[n] i) => (float[batch,8] z, int64[n] i2, float[batch,8] x2, float[batch,8] h) {
          h = MatMul(x, w) z = MatMul(h, w) i2 = Identity(i) x2 = Identity(x)
        }
        """,
        {"w": W},
    )
    typed = convert(model, tmp_path, precision)
    assert tensor_specs(typed.model.graph.input) == tensor_specs(model.graph.input)
    assert tensor_specs(typed.model.graph.output) == tensor_specs(model.graph.output)
    assert [n.name for n in typed.model.graph.node if "Cast" not in n.name] == [n.name for n in model.graph.node]
    close(model, typed, X | {"i": np.arange(3)}, 2e-2 if precision is Precision.BF16 else 2e-3)


def test_an_output_that_is_read_again_has_one_cast(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x) => (float[2,8] h, float[2,8] z) {
          h = MatMul(x, w) s = Softmax(h) a = Relu(h) b = Mul(a, s) z = MatMul(b, w)
        }
        """,
        {"w": W},
    )
    typed = convert(model, tmp_path)
    assert sorted(typed.casts()) == sorted(
        [("x", "x_fp16", "fp16"), ("h_fp16", "h", "fp32"), ("s", "s_fp16", "fp16"), ("z_fp16", "z", "fp32")]
    )
    assert typed.node("m/s").input[0] == "h", "the kept node reads the graph output itself"
    assert typed.node("m/a").input[0] == "h_fp16"
    close(model, typed, X, 2e-3)


def test_an_input_or_a_weight_may_be_an_output(tmp_path: Path) -> None:
    model = parse("g (float[2,8] x) => (float[2,8] x, float[8,8] w, float[2,8] z) { z = MatMul(x, w) }", {"w": W})
    typed = convert(model, tmp_path)
    assert [t.data_type for t in typed.model.graph.initializer] == [TensorProto.FLOAT, TensorProto.FLOAT16]
    assert typed.node("m/z").input[1] == "w_fp16"


def test_a_weight_is_written_once_per_type_that_is_read(tmp_path: Path) -> None:
    model = parse(
        "g (float[2,8] x) => (float[2,8] z) { a = MatMul(x, both) b = MatMul(a, low) z = MatMul(b, both) }",
        {"both": W, "low": W * 2, "nobody": W * 3},
    )
    typed = convert(model, tmp_path, keep=("m/a",))
    kinds = {t.name: t.data_type for t in typed.model.graph.initializer}
    assert kinds == {"both": TensorProto.FLOAT, "both_fp16": TensorProto.FLOAT16, "low": TensorProto.FLOAT16}
    assert np.array_equal(numpy_helper.to_array(typed.weight("both_fp16")), W.astype(np.float16))
    close(model, typed, X, 2e-3)


def test_names_of_copies_and_casts_never_collide(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x) => (float[2,8] z) {
          a = MatMul(x, w) x_fp16 = Relu(a) w_fp16 = Softmax(x_fp16) b = MatMul(w_fp16, w) z = Add(b, x_fp16)
        }
        """,
        {"w": W},
    )
    typed = convert(model, tmp_path, keep=("m/b",))
    assert typed.weight("w_fp16_1") is not None
    close(model, typed, X, 2e-3)


def test_two_resizes_share_one_scales_tensor_that_stays_float32(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[1,4,2,2] x) => (float[1,4,8,8] z) {
          a = Conv(x, w) b = Resize<mode="nearest">(a, , s) c = Conv(b, w)
          d = Resize<mode="linear">(c, , s) z = Conv(d, w)
        }
        """,
        {"w": noise(4, 4, 1, 1), "s": np.array([1, 1, 2, 2], np.float32)},
    )
    typed = convert(model, tmp_path)
    assert typed.kind("b") == typed.kind("d") == "fp16"
    assert typed.reads("b") == ["fp16", "-", "fp32"]
    assert [t.name for t in typed.model.graph.initializer].count("s") == 1
    assert typed.record.casts == 2
    close(model, typed, {"x": noise(1, 4, 2, 2)}, 3e-3)


def test_a_tensor_read_by_two_kept_nodes_is_cast_once(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x) => (float[2,8] z) {
          h = MatMul(x, w) a = Softmax(h) b = LayerNormalization(h, g, g) c = Mul(a, b) z = MatMul(c, w)
        }
        """,
        {"w": W, "g": noise(8)},
    )
    typed = convert(model, tmp_path)
    assert [c for c in typed.casts() if c[0] == "h"] == [("h", "h_fp32", "fp32")]
    close(model, typed, X, 2e-3)


def test_casts_are_named_after_the_module_they_serve(tmp_path: Path) -> None:
    model = parse("g (float[2,8] x) => (float[2,8] z) { h = MatMul(x, w) n = Softmax(h) z = MatMul(n, w) }", {"w": W})
    for node, name in zip(model.graph.node, ("stem/MatMul", "blocks.0.attn/Softmax", "head/MatMul"), strict=True):
        node.name = name
    typed = convert(model, tmp_path)
    casts = [n.name for n in typed.model.graph.node if n.op_type == "Cast"]
    assert casts == ["stem/Cast_fp16", "blocks.0.attn/Cast_fp32", "head/Cast_fp16", "head/Cast_fp32"]


def test_constant_nodes_are_typed_like_weights(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x) => (float[2,8] z) {
          k = Constant<value = float[8] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>()
          f = Constant<value_float = 0.5>()
          v = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>()
          i = Constant<value_ints = [2, 8]>()
          h = MatMul(x, w) a = Add(h, k) b = Mul(a, f) c = Mul(b, v) r = Reshape(c, i)
          n = Softmax(r) m = Add(n, k) z = MatMul(m, w)
        }
        """,
        {"w": W},
    )
    typed = convert(model, tmp_path, keep=("m/m",))
    kinds = {t.name: t.data_type for t in typed.model.graph.initializer}
    assert kinds["k"] == TensorProto.FLOAT
    assert {kinds[n] for n in ("k_fp16", "f", "v", "w")} == {TensorProto.FLOAT16}
    assert kinds["i"] == TensorProto.INT64
    close(model, typed, X, 4e-3)


@pytest.mark.parametrize("fill", ["", "<value = float[1] {0.25}>"])
def test_a_filled_tensor_takes_the_type_of_its_readers(fill: str, tmp_path: Path) -> None:
    text = f"g (float[2,8] x) => (float[2,8] z) {{ h = MatMul(x, w) s = Shape(h) c = ConstantOfShape{fill}(s) "
    low = convert(parse(text + "z = Add(h, c) }", {"w": W}), tmp_path)
    assert low.kind("c") == "fp16"
    kept = convert(parse(text + "n = Softmax(c) z = Add(h, n) }", {"w": W}), tmp_path)
    assert kept.kind("c") == "fp32"
    both = parse(text + "n = Softmax(c) a = Add(h, c) b = Mul(a, n) z = MatMul(b, w) }", {"w": W})
    typed = convert(both, tmp_path)
    assert [c for c in typed.casts() if c[0] == "c"] == [("c", "c_fp16", "fp16")]
    close(both, typed, X, 2e-3)


def test_eye_like_and_casts_follow_their_readers(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[8,8] x, bool[8,8] mask, double[8,8] d) => (float[8,8] z) {
          h = MatMul(x, w) e = EyeLike(h) m = Cast<to=1>(mask) f = Cast<to=1>(d) q = Cast<to=1>(h)
          a = Add(h, e) b = Mul(a, m) c = Add(b, f) t = Add(c, q) z = MatMul(t, w)
        }
        """,
        {"w": W},
    )
    typed = convert(model, tmp_path)
    assert {n: typed.kind(n) for n in "emfq"} == dict.fromkeys("emfq", "fp16")
    assert typed.record.casts == 2
    feeds = {"x": noise(8, 8), "mask": noise(8, 8) > 0, "d": noise(8, 8).astype(np.float64)}
    close(model, typed, feeds, 4e-3)


def test_other_types_are_left_alone(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x, double[2,8] d, int64[2,8] i, int32[2,8] j)
          => (float[2,8] z, double[2,8] p, int64[2,8] q, int32[2,8] r) {
          z = MatMul(x, w) p = Add(d, dw) q = Add(i, i) r = Mul(j, j)
        }
        """,
        {"w": W, "dw": np.ones((2, 8))},
    )
    typed = convert(model, tmp_path)
    assert typed.weight("dw").SerializeToString() == numpy_helper.from_array(np.ones((2, 8)), "dw").SerializeToString()
    feeds = X | {"d": noise(2, 8).astype(np.float64), "i": np.ones((2, 8), np.int64), "j": np.ones((2, 8), np.int32)}
    assert np.array_equal(run(typed.model, feeds)[1], run(model, feeds)[1])
    assert typed.record.dtype_counts == {"fp16": 1}


@pytest.mark.parametrize(
    "text",
    [
        "p = Pow(h, two) z = Relu(p)",
        "c = Clip(h, lo, hi) z = Relu(c)",
        "d = Dropout(h, half) z = Relu(d)",
        "q = QuantizeLinear(h, half, zp) e = DequantizeLinear(q, half, zp) z = Relu(e)",
        "l = CastLike(i, h) a = Add(h, l) z = Relu(a)",
        "a, b = Split<axis=1, num_outputs=2>(h) c = Concat<axis=1>(b, a) z = Relu(c)",
        "o = OneHot<axis=1>(j, depth, values) z = Add(h, o)",
        "p = Pad(h, pads, half) s = Slice(p, one, three) z = Relu(s)",
        "n = IsNaN(h) z = Where(n, x, h)",
        "t = Greater(h, x) z = Where(t, x, h)",
        "m = Max(h, x, half) z = Min(m, half)",
        "b = BatchNormalization(h, v, v, v, pos) z = Relu(b)",
        "p = PRelu(h, half) z = Gelu(p)",
        "g2 = GatherElements<axis=1>(h, i) z = Relu(g2)",
        "s = Shape(h) e = Expand(half, s) z = Add(e, h)",
    ],
)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_attributes_and_slots_with_a_type_of_their_own(text: str, precision: Precision, tmp_path: Path) -> None:
    weights = {
        "w": W, "two": np.float32(2), "lo": np.float32(-1), "hi": np.float32(1), "half": np.float32(0.5),
        "zp": np.int8(0), "depth": np.array(8), "values": np.array([0.5, 2], np.float32), "j": np.array([1, 3]),
        "pads": np.array([1, 0, 1, 0]), "one": np.array([1]), "three": np.array([3]), "v": noise(8),
        "pos": np.abs(noise(8)) + 1,
    }  # fmt: skip
    used = {n: np.asarray(v) for n, v in weights.items() if any(t.strip(" ()") == n for t in _words(text)) or n == "w"}
    body = text.replace("z =", "y =")
    model = parse(
        f"g (float[2,8] x, int64[2,8] i) => (float[2,8] z) {{ h = MatMul(x, w) {body} z = MatMul(y, w) }}", used
    )
    typed = convert(model, tmp_path, precision)
    assert typed.kind("h") == typed.kind("z") == precision.value
    close(model, typed, X | {"i": np.arange(16).reshape(2, 8) % 8}, 3e-2 if precision is Precision.BF16 else 4e-3)


def _words(text: str) -> list[str]:
    return text.replace("(", " ").replace(")", " ").replace(",", " ").split()


def test_bodies_are_left_alone_and_what_they_capture_is_float32(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x, bool c) => (float[2,8] z) {
          h = MatMul(x, w)
          y = If (c) <
            then_branch = t () => (float[2,8] p) { u = Relu(h) p = MatMul(u, w) },
            else_branch = e () => (float[2,8] q) { q = Neg(h) }
          >
          z = MatMul(y, w)
        }
        """,
        {"w": W},
    )
    typed = convert(model, tmp_path)
    assert typed.reason("y").startswith("control flow")
    body = typed.node("m/y").attribute[0].g
    assert list(body.node[0].input) == ["h_fp32"]
    assert {t.name: t.data_type for t in typed.model.graph.initializer} == {"w": 1, "w_fp16": 10}
    for c in (True, False):
        close(model, typed, X | {"c": np.array(c)}, 2e-3)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 20, "local" : 1]>
    g (float[2,8] x, float[8,8] w) => (float[2,8] z) { z = local.double(x, w) }
    <domain: "local", opset_import: ["" : 20]>
    double (a, b) => (c) { d = MatMul(a, b)  c = Add(d, d) }
    """
    typed = convert(onnx.parser.parse_model(text), tmp_path)
    assert typed.record.dtype_counts["fp16"] == 2  # MatMul and Add


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    heavy = W.copy()
    heavy[3, 4] = -70000
    model = parse(
        "g (float[2,8] x) => (float[2,8] z) { a = MatMul(x, fine) z = MatMul(a, heavy) }", {"fine": W, "heavy": heavy}
    )
    with pytest.raises(PrecisionError, match=r"heavy \(largest 70000\)") as caught:
        convert(model, tmp_path)
    assert "fine" not in str(caught.value)
    assert "--bf16" in caught.value.hint
    assert "keep" in caught.value.hint
    assert not list(tmp_path.glob("30-*"))
    assert convert(model, tmp_path, Precision.BF16).kind("z") == "bf16"
    assert convert(model, tmp_path, keep=("m/z",)).weight("heavy").data_type == TensorProto.FLOAT


@pytest.mark.parametrize(("value", "refused"), [(65504, False), (65519, False), (65520, True)])
def test_the_edge_of_float16(value: float, refused: bool, tmp_path: Path) -> None:
    weights = {"w": np.full((8, 8), value, np.float32)}
    model = parse("g (float[2,8] x) => (float[2,8] z) { z = MatMul(x, w) }", weights)
    if refused:
        with pytest.raises(PrecisionError, match="65520"):
            convert(model, tmp_path)
    else:
        assert numpy_helper.to_array(convert(model, tmp_path).weight("w")).max() == 65504


def test_weights_that_lose_their_value_are_counted(tmp_path: Path) -> None:
    faint = W.copy()
    faint[0, :3] = 1e-9
    faint[1, :5] = 1e-6
    model = parse(
        "g (float[2,8] x) => (float[2,8] z) { a = MatMul(x, w) z = MatMul(a, faint) }", {"w": W, "faint": faint}
    )
    (warning,) = (w for w in convert(model, tmp_path).record.warnings if "weights" in w)
    assert "of 64 weights in 1 tensor(s) 3 become zero in float16 and 5 become subnormal" in warning
    assert "faint" in warning
    assert not [w for w in convert(model, tmp_path, Precision.BF16).record.warnings if "weights" in w]


def test_bfloat16_raises_the_opset_where_it_must(tmp_path: Path) -> None:
    weights = {"w": noise(4, 4, 1, 1)}
    conv = parse("g (float[1,4,2,2] x) => (float[1,4,2,2] z) { z = Conv(x, w) }", weights)
    typed = convert(conv, tmp_path, Precision.BF16)
    assert typed.model.opset_import[0].version == 22
    assert "opset raised from 20 to 22, from which Conv take bfloat16" in typed.record.warnings
    close(conv, typed, {"x": noise(1, 4, 2, 2)}, 2e-2)
    assert convert(conv, tmp_path, Precision.FP16).model.opset_import[0].version == 20
    product = parse("g (float[2,8] x) => (float[2,8] z) { z = MatMul(x, w) }", {"w": W})
    assert convert(product, tmp_path, Precision.BF16).model.opset_import[0].version == 20


@pytest.mark.parametrize(
    ("body", "opset", "why"),
    [
        ("y = Relu(h)", 18, "only 20 and later can be relabelled"),
        ("q = QuantizeLinear(h, s) y = DequantizeLinear(q, s)", 20, "DequantizeLinear, QuantizeLinear changed since"),
    ],
)
def test_an_opset_that_cannot_be_relabelled_is_refused(body: str, opset: int, why: str, tmp_path: Path) -> None:
    weights = {"w": noise(4, 4, 1, 1)} | ({"s": np.float32(0.1)} if "s)" in body else {})
    text = f"g (float[1,4,2,2] x) => (float[1,4,2,2] z) {{ h = Conv(x, w) {body} z = Conv(y, w) }}"
    with pytest.raises(PrecisionError, match=f"Conv take bfloat16 from opset 22, .* {why}") as caught:
        convert(parse(text, weights, opset), tmp_path, Precision.BF16)
    assert caught.value.hint == "--set trace.opset=22"


def test_a_graph_that_is_typed_already_is_refused(tmp_path: Path) -> None:
    model = parse("g (float[2,8] x) => (float[2,8] z) { z = MatMul(x, w) }", {"w": W})
    typed = convert(model, tmp_path)
    with pytest.raises(PrecisionError, match="holds 3 16-bit float tensors already"):
        convert_precision(typed.path, Precision.FP16, tmp_path, target=Target.TENSORRT)


def test_a_graph_without_floats_is_refused(tmp_path: Path) -> None:
    model = parse("g (int64[2] x) => (int64[2] z) { z = Add(x, x) }")
    with pytest.raises(PrecisionError, match="no floating-point node"):
        convert(model, tmp_path)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "20-patched.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(GraphPassError):
        convert_precision(path, Precision.FP16, tmp_path, target=Target.TENSORRT)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_twice_the_same_bytes(precision: Precision, tmp_path: Path) -> None:
    model = random_graph(3)
    hashes = {convert(model, tmp_path, precision, feeds={"x": noise(2, 4, 8)}).record.artifact.sha256 for _ in range(2)}
    assert len(hashes) == 1


OPS = ("MatMul", "Relu", "Softmax", "Add", "Mul", "LayerNormalization", "Transpose", "Sigmoid", "Concat", "Identity")


def random_graph(seed: int, nodes: int = 14) -> onnx.ModelProto:
    """A random DAG over [2,4,8] tensors; some tensors are outputs as well as read, some weights are shared."""
    random = np.random.default_rng(seed)
    tensors, made = ["x"], []
    weights = {f"w{i}": noise(8, 8, seed=i, scale=0.3) for i in range(2)} | {"g": noise(8, seed=9)}
    for i in range(nodes):
        op, a, b = random.choice(OPS), *random.choice(tensors[-6:], 2)
        out = f"t{i}"
        if op == "MatMul":
            made.append(helper.make_node(op, [a, f"w{random.integers(2)}"], [out]))
        elif op in ("Add", "Mul"):
            made.append(helper.make_node(op, [a, b], [out]))
        elif op == "LayerNormalization":
            made.append(helper.make_node(op, [a, "g", "g"], [out]))
        elif op == "Transpose":
            made.append(helper.make_node(op, [a], [f"{out}a"], perm=[1, 0, 2]))
            made.append(helper.make_node(op, [f"{out}a"], [out], perm=[1, 0, 2]))
        elif op == "Concat":
            made.append(helper.make_node(op, [a, b], [f"{out}a"], axis=1))
            made.append(helper.make_node("Slice", [f"{out}a", "lo", "hi", "lo1"], [out]))
        else:
            made.append(helper.make_node(op, [a], [out]))
        tensors.append(out)
    made.append(helper.make_node("MatMul", [tensors[-1], "w0"], ["z"]))
    slices = {"lo": np.array([2]), "hi": np.array([6]), "lo1": np.array([1])}
    for node in made:
        node.name = f"m/{node.output[0]}"
    outputs = sorted({"z", *random.choice(tensors[1:], 2)})
    graph = helper.make_graph(
        made, "g", [helper.make_tensor_value_info("x", 1, [2, 4, 8])],
        [helper.make_tensor_value_info(n, 1, [2, 4, 8]) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in (weights | slices).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs_stay_close_whatever_is_kept(seed: int, tmp_path: Path) -> None:
    """``convert`` checks form, order, single casts and used weights of each; a sound rounding stays near."""
    model = random_graph(seed)
    names = [n.name for n in model.graph.node]
    keep = tuple(f"^{n}$" for n in np.random.default_rng(seed).choice(names, 3))
    feeds = {"x": noise(2, 4, 8, seed=seed)}
    typed = convert(model, tmp_path, keep=keep, feeds=feeds)
    close(model, typed, feeds, 2e-2)
    kept = sum(k.nodes for k in typed.record.kept)
    assert sum(typed.record.dtype_counts.values()) == len(model.graph.node)
    assert typed.record.dtype_counts["fp16"] == len(model.graph.node) - kept
    assert typed.record.casts == len(typed.casts())
