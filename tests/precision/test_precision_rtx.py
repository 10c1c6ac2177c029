"""Typed graphs go through NVIDIA's parser and ahead-of-time builder, which refuse mixed types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from precision_cases import convert, noise, parse

from deploy.backends.base import BuildOptions
from deploy.backends.tensorrt_rtx import BACKEND
from deploy.errors import EngineBuildError
from deploy.precision import policy
from deploy.records import EngineRecord, Precision

MISSING = BACKEND.available()
pytestmark = [pytest.mark.rtx, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

VISION = (
    """
    g (float[1,3,32,32] images) => (float[1,8] logits) {
      c = Conv<strides=[4,4]>(images, wc, bc)
      n = GroupNormalization<num_groups=1>(c, g16, g16)
      r = Add(c, n)
      u = Gelu(r)
      p = Conv(u, w1)
      up = Resize<mode="linear">(p, , scales)
      i = InstanceNormalization(up, g16, g16)
      f = Reshape(i, flat)
      t = Transpose<perm=[0,2,1]>(f)
      l = LayerNormalization(t, g16, g16)
      q = MatMul(l, wq)
      kt = Transpose<perm=[0,2,1]>(l)
      a = MatMul(q, kt)
      s = Softmax(a)
      v = MatMul(s, l)
      m = ReduceMean<keepdims=0>(v, one)
      logits = MatMul(m, wh)
    }
    """,
    {
        "wc": noise(16, 3, 4, 4, scale=0.1), "bc": noise(16), "g16": noise(16, seed=2), "w1": noise(16, 16, 1, 1),
        "wq": noise(16, 16, scale=0.2), "wh": noise(16, 8), "scales": "scales", "flat": "flat", "one": "one",
    },
)  # fmt: skip
DETECT = (
    """
    g (float[1,4,8,8] x, float[1,6,8] q, float[1,6,2] ref)
      => (float[1,4,1,6] z, float[1,3] s, int64[1,3] i, float[1,6,2] b) {
      v = Conv(x, w4)
      o = MatMul(q, w2)
      lo = Clip(ref, low, high)
      hi = Sub(unit, lo)
      d = Div(lo, hi)
      e = Log(d)
      u = Add(e, o)
      b = Sigmoid(u)
      d2 = Mul(b, two)
      grid = Sub(d2, unit)
      g4 = Reshape(grid, shape)
      y = GridSample(v, g4)
      z = Relu(y)
      c = MatMul(q, w5)
      m = ReduceMax<keepdims=0>(c, last)
      s, i = TopK(m, k)
    }
    """,
    {
        "w4": noise(4, 4, 1, 1), "w2": noise(8, 2), "w5": noise(8, 5), "low": 1e-5, "high": 1 - 1e-5, "unit": 1.0,
        "two": 2.0, "shape": "shape", "last": "last", "k": "k",
    },
)  # fmt: skip
INTEGERS = {"scales": [1, 1, 2, 2], "flat": [1, 16, -1], "one": [1], "shape": [1, 1, 6, 2], "last": [-1], "k": [3]}


def graph(case: tuple[str, dict]) -> onnx.ModelProto:
    text, weights = case
    made = {}
    for name, value in weights.items():
        if isinstance(value, str):
            made[name] = np.array(INTEGERS[value], np.float32 if name == "scales" else np.int64)
        else:
            made[name] = np.asarray(value, np.float32)
    return parse(text, made, 22)


def build(path: Path, precision: Precision, *sm: int) -> tuple[EngineRecord, ...]:
    return BACKEND.build(path, path.parent, BuildOptions(precision=precision, sm=sm))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("case", [VISION, DETECT], ids=["vision", "detect"])
def test_a_typed_graph_builds_for_ampere_and_ada(case: tuple[str, dict], precision: Precision, tmp_path: Path) -> None:
    typed = convert(graph(case), tmp_path, precision)
    for engine in build(typed.path, precision, 80, 89):
        assert engine.audit.ok, engine.audit.statement
        assert engine.audit.kernels[precision.value] > 0


def test_a_graph_that_lost_one_cast_is_refused_by_the_parser(tmp_path: Path) -> None:
    """The control: were the parser indifferent to types, the test above would prove nothing."""
    typed = convert(graph(VISION), tmp_path)
    (cast,) = (n for n in typed.model.graph.node if n.output[0] == "images_fp16")
    typed.model.graph.node.remove(cast)
    typed.node("m/c").input[0] = "images"
    del typed.model.graph.value_info[:]
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(typed.model.SerializeToString())
    with pytest.raises(EngineBuildError, match="parser refused"):
        build(broken, Precision.FP16, 89)


def test_float32_norms_and_softmax_cost_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for name, kept in (("policy", policy.KEPT_OPS), ("all low", {})):
        monkeypatch.setattr(policy, "KEPT_OPS", kept)
        typed = convert(graph(VISION), tmp_path)
        (engine,) = build(typed.path, Precision.FP16, 89)
        counts[name] = sum(engine.audit.kernels.values())
    assert counts["policy"] <= counts["all low"]
