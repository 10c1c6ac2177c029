"""The emulation rounds where a GPU would, and ONNX Runtime's optimiser does not undo it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from precision_cases import convert, noise, parse, run

from deploy.graph.io import tensor_specs
from deploy.precision.emulate import emulated
from deploy.precision.view import tensor_types
from deploy.precision.weights import lowered, rounded_bits, to_float32
from deploy.records import Precision

LOW = [Precision.FP16, Precision.BF16]
NUMPY = {Precision.FP16: np.float16, Precision.BF16: ml_dtypes.bfloat16}


def through(values: np.ndarray, low: Precision) -> np.ndarray:
    return values.astype(NUMPY[low]).astype(np.float32)


@pytest.mark.parametrize("low", LOW)
def test_rounding_is_that_of_numpy(low: Precision) -> None:
    values = np.concatenate(
        [
            noise(20000) * np.float32(10) ** np.random.default_rng(1).integers(-40, 38, 20000).astype(np.float32),
            np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65519, 65520, 3.4e38, 1e-45], np.float32),
            np.array([0x3F808000, 0x3F818000, 0x3F80FFFF], np.uint32).view(np.float32),  # ties of bfloat16
        ]
    )
    with np.errstate(over="ignore"):
        wanted = values.astype(NUMPY[low]).view(np.uint16)
    assert np.array_equal(rounded_bits(values, low), wanted)
    assert np.isnan(to_float32(rounded_bits(np.array([np.nan], np.float32), low), low)).all()


@pytest.mark.parametrize("low", LOW)
def test_a_rounded_weight_reads_back_in_onnx(low: Precision) -> None:
    values = noise(3, 5)
    tensor, loss = lowered(numpy_helper.from_array(values, "w"), "w_low", low)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.float32), through(values, low))
    assert (tensor.name, list(tensor.dims), loss.zeros, loss.subnormal, loss.beyond) == ("w_low", [3, 5], 0, 0, 0.0)


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("low", LOW)
def test_every_low_tensor_is_rounded(low: Precision, optimise: bool, tmp_path: Path) -> None:
    model = parse(
        """
        g (float[4,8] x) => (float[4,8] z) {
          e = MatMul(x, one) a = Mul(e, v) b = Transpose(a) c = Transpose(b) d = Add(c, v)
          f = Mul(d, d) z = MatMul(f, one)
        }
        """,
        {"v": noise(8, seed=1), "one": np.eye(8, dtype=np.float32)},
    )
    twin = emulated(convert(model, tmp_path, low).model)
    x = noise(4, 8)
    v = through(noise(8, seed=1), low)
    a = through(through(x, low) * v, low)
    d = through(a + v, low)
    wanted = through(d * d, low)
    (got,) = run(twin, {"x": x}, optimise=optimise)
    assert np.array_equal(got, wanted)
    assert not np.array_equal(got, run(model, {"x": x})[0]), "a twin that rounds nothing would pass otherwise"


@pytest.mark.parametrize("low", LOW)
def test_the_twin_has_the_same_interface_and_computes_in_float32(low: Precision, tmp_path: Path) -> None:
    model = parse(
        """
        g (float[batch,8] x) => (float[batch,8] z, float[batch,8] n) {
          h = MatMul(x, w) n = Softmax(h) s = Shape(h) c = ConstantOfShape<value = float[1] {0.3}>(s) a = Add(h, c)
          z = Mul(a, n)
        }
        """,
        {"w": noise(8, 8)},
    )
    typed = convert(model, tmp_path, low, keep=("m/n",))
    before = typed.model.SerializeToString()
    twin = emulated(typed.model)
    assert typed.model.SerializeToString() == before
    assert tensor_specs(twin.graph.input) == tensor_specs(model.graph.input)
    assert tensor_specs(twin.graph.output) == tensor_specs(model.graph.output)
    types = tensor_types(twin)
    rounding = {n.output[0] for n in twin.graph.node if n.op_type == "Cast"}
    low_kinds = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    assert {name for name, kind in types.items() if kind in low_kinds} <= rounding
    assert {types[i] for n in twin.graph.node if n.op_type != "Cast" for i in n.input} <= {1, 7}


def test_a_float32_graph_comes_back_as_it_is() -> None:
    model = parse("g (float[2,8] x) => (float[2,8] z) { z = Relu(x) }")
    assert emulated(model) == model


def test_low_constant_nodes_are_widened() -> None:
    node = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.FLOAT16, [2], [0.5, 2.0]))
    cast = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)
    add = helper.make_node("Add", ["h", "k"], ["y"])
    back = helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT)
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node, cast, add, back], "g", [value("x", 1, [2])], [value("z", 1, [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert run(emulated(model), {"x": np.ones(2, np.float32)})[0].tolist() == [1.5, 3.0]
