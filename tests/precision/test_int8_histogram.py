"""Ranges from distributions: what each method keeps, on distributions whose best range is known."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.precision.histogram import BINS, METHODS, Measured, clipped, described

EVERY = ("minmax", *METHODS)


def measured(values: np.ndarray) -> Measured:
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=BINS, range=(low, high) if high > low else (low, low + 1))
    return Measured(low=low, high=high, counts=counts.astype(np.int64))


def error(values: np.ndarray, kept: tuple[float, float]) -> float:
    step = (kept[1] - kept[0]) / 255
    return float(np.mean((np.clip(np.rint(values / step) * step, *kept) - values) ** 2))


@pytest.fixture(scope="module")
def heavy_tailed() -> np.ndarray:
    """Values of size 1 with a few outliers at 100: what minmax spends nearly all of its levels on."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.standard_normal(200_000), [100.0, -80.0, 90.0]])


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_holds_zero_and_nothing_beyond_what_was_measured(method: str, symmetric: bool) -> None:
    values = np.random.default_rng(1).uniform(0.5, 3.0, 10_000)  # no zero among them
    low, high = clipped(measured(values), method, symmetric=symmetric, percentile=99.9)
    assert low <= 0 <= high <= values.max()
    assert low == (-high if symmetric else 0.0)


def test_minmax_keeps_every_value(heavy_tailed: np.ndarray) -> None:
    kept = clipped(measured(heavy_tailed), "minmax", symmetric=False, percentile=99.99)
    assert kept == (heavy_tailed.min(), heavy_tailed.max())
    assert described("t", measured(heavy_tailed), kept).saturated == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_has_the_least_error_of_all_methods_and_the_others_beat_minmax_on_outliers(
    heavy_tailed: np.ndarray, symmetric: bool
) -> None:
    bulk = heavy_tailed[:-3]
    kept = {m: clipped(measured(heavy_tailed), m, symmetric=symmetric, percentile=99.99) for m in EVERY}
    whole = {m: error(heavy_tailed, kept[m]) for m in EVERY}
    assert min(whole.values()) == whole["mse"]
    for method in ("percentile", "entropy"):
        assert error(bulk, kept[method]) < error(bulk, kept["minmax"]) / 10


def test_percentile_leaves_out_the_share_that_was_asked(heavy_tailed: np.ndarray) -> None:
    normal = np.random.default_rng(2).standard_normal(400_000)
    kept = clipped(measured(normal), "percentile", symmetric=False, percentile=99.0)
    assert described("t", measured(normal), kept).saturated == pytest.approx(0.01, abs=0.003)
    assert kept[1] == pytest.approx(2.576, abs=0.05)  # half a percent of a normal distribution lies above


@pytest.mark.parametrize(("value", "levels"), [(0.0, 1), (3.0, 1)])
def test_a_constant_tensor_is_dead(value: float, levels: int) -> None:
    constant = measured(np.full(100, value))
    found = described("t", constant, clipped(constant, "minmax", symmetric=False, percentile=99.99))
    assert found.dead
    assert found.levels == levels


def test_a_tensor_of_a_few_values_is_dead_and_a_spread_one_is_not(heavy_tailed: np.ndarray) -> None:
    few = measured(np.repeat([0.0, 0.25, 0.5, 1.0], 50))
    assert described("t", few, (0.0, 1.0)).dead
    spread = measured(heavy_tailed[:-3])
    assert not described("t", spread, clipped(spread, "minmax", symmetric=False, percentile=99.99)).dead
    outliers = measured(np.concatenate([np.full(1000, 0.01), [100.0]]))  # two levels are used
    assert described("t", outliers, (0.0, 100.0)).dead
