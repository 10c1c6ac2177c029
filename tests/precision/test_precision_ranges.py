"""The range check: what it measures, what it warns of and what it keeps in float32."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from precision_cases import convert, noise, parse, run

from deploy.errors import PrecisionError
from deploy.precision.ranges import ranges_of
from deploy.precision.view import tensor_types
from deploy.records import Precision


def measured(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    return ranges_of(model, tensor_types(model), feeds)


def chain(scale: float = 1.0) -> onnx.ModelProto:
    return parse(
        """
        g (float[batch,8] x, int64[1] n) => (float[batch,8] z) {
          stem = MatMul(x, w) wide = Mul(stem, s) view = Reshape(wide, shape) fine = Tanh(view)
          k = Add(n, n) z = MatMul(fine, w)
        }
        """,
        {"w": np.eye(8, dtype=np.float32), "s": np.array(scale, np.float32), "shape": np.array([-1, 8])},
    )


def test_every_float_tensor_is_measured_as_numpy_does() -> None:
    feeds = {"x": noise(5, 8), "n": np.ones(1, np.int64)}
    found = measured(chain(3), feeds)
    x = np.abs(feeds["x"]).max()
    wanted = {"x": x, "stem": x, "wide": 3 * x, "view": 3 * x, "fine": np.tanh(3 * x), "z": np.tanh(3 * x)}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_largest_of_all_batches_counts() -> None:
    for place in range(5):
        x = np.full((5, 8), 0.5, np.float32)
        x[place, 3] = -7
        assert measured(chain(), {"x": x, "n": np.ones(1, np.int64)})["stem"] == 7


def test_a_fixed_batch_is_run_as_it_is() -> None:
    model = parse("g (float[4,8] x) => (float[4,8] z) { z = MatMul(x, w) }", {"w": np.eye(8, dtype=np.float32)})
    x = noise(8, 8)
    assert measured(model, {"x": x})["z"] == pytest.approx(np.abs(x).max())


def test_infinite_fills_are_left_out_and_nan_is_told(tmp_path: Path) -> None:
    model = parse(
        """
        g (float[2,8] x, bool[2,8] c) => (float[2,8] z) {
          m = Where(c, x, fill) s = Softmax(m) z = MatMul(s, w)
        }
        """,
        {"w": np.eye(8, dtype=np.float32), "fill": np.array(-np.inf, np.float32)},
    )
    masked = np.zeros((2, 8), bool)
    masked[:, :4] = True
    feeds = {"x": noise(2, 8), "c": masked}
    found = measured(model, feeds)
    assert found["m"] == pytest.approx(np.abs(feeds["x"][:, :4]).max())
    feeds["c"] = np.zeros((2, 8), bool)  # softmax of nothing but minus infinity
    assert math.isnan(measured(model, feeds)["s"])
    (warning,) = (w for w in convert(model, tmp_path, feeds=feeds).record.warnings if "NaN" in w)
    assert "m/s" in warning or "(m)" in warning


def test_what_overflows_stays_float32_with_a_warning(tmp_path: Path) -> None:
    model = chain(1e5)
    feeds = {"x": noise(2, 8, seed=1), "n": np.ones(1, np.int64)}
    typed = convert(model, tmp_path, feeds=feeds)
    assert {n: typed.kind(n) for n in ("stem", "wide", "view", "fine", "z")} == {
        "stem": "fp16", "wide": "fp32", "view": "fp32", "fine": "fp32", "z": "fp16",
    }  # fmt: skip
    assert typed.reason("wide") == "range: a value beyond float16's largest, 65504"
    (warning,) = (w for w in typed.record.warnings if "exceed" in w)
    assert "2 tensors exceed float16's 65504" in warning
    assert "wide (m)" in warning
    assert typed.record.largest_activation == pytest.approx(1e5 * np.abs(feeds["x"]).max())
    assert np.allclose(run(typed.model, feeds)[0], run(model, feeds)[0], atol=2e-3)


def test_without_the_check_the_same_graph_overflows(tmp_path: Path) -> None:
    """The negative control of the test above: the rule does something."""
    model = parse(
        "g (float[2,8] x) => (float[2,8] z) { a = MatMul(x, w) b = Mul(a, s) c = Div(b, s) z = MatMul(c, w) }",
        {"w": np.eye(8, dtype=np.float32) * 300, "s": np.array(300, np.float32)},
    )
    feeds = {"x": np.ones((2, 8), np.float32)}
    blind = convert(model, tmp_path)
    assert any("not measured" in w for w in blind.record.warnings)
    assert blind.record.largest_activation is None
    from deploy.precision.emulate import emulated

    assert not np.isfinite(run(emulated(blind.model), feeds)[0]).all()
    checked = convert(model, tmp_path, feeds=feeds)
    assert np.allclose(run(emulated(checked.model), feeds)[0], 9e4, rtol=1e-3)


def test_coming_near_is_warned_about_and_stays_low(tmp_path: Path) -> None:
    feeds = {"x": np.ones((2, 8), np.float32), "n": np.ones(1, np.int64)}
    typed = convert(chain(20000), tmp_path, feeds=feeds)
    assert typed.kind("wide") == "fp16"
    (warning,) = typed.record.warnings
    assert "2 tensors are within 4x of float16's 65504" in warning
    assert "largest 2e+04 at wide (m)" in warning
    assert not convert(chain(16000), tmp_path, feeds=feeds).record.warnings


def test_bfloat16_has_the_range_of_float32(tmp_path: Path) -> None:
    feeds = {"x": noise(2, 8), "n": np.ones(1, np.int64)}
    typed = convert(chain(1e5), tmp_path, Precision.BF16, feeds=feeds)
    assert (typed.kind("wide"), typed.record.warnings) == ("bf16", ())


@pytest.mark.parametrize(
    "feeds",
    [{"x": np.ones((2, 9), np.float32), "n": np.ones(1, np.int64)}, {"y": np.ones((2, 8), np.float32)}],
)
def test_feeds_that_do_not_fit_are_an_error(feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(PrecisionError, match="range check cannot run the graph on"):
        measured(chain(), feeds)
