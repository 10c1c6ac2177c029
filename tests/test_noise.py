"""Intervals of medians: how often they hold the truth, and that the naive one does not."""

from __future__ import annotations

import math

import numpy as np

from deploy import noise
from deploy.noise import interval_of_median

ROUNDS, CALLS, REPEATS = 20, 12, 100


def measurement(seed: int, *, shared: float) -> np.ndarray:
    """Rounds of calls around 10 that share what the machine did meanwhile."""
    draw = np.random.default_rng(seed).normal
    return 10 + shared * draw(size=(ROUNDS, 1)) + 0.2 * draw(size=(ROUNDS, CALLS))


def independent(values: np.ndarray) -> tuple[float, float]:
    """The interval of order statistics, as if each call were a repeat of its own."""
    ordered = np.sort(values.reshape(-1))
    reach = 1.96 * math.sqrt(len(ordered)) / 2
    return float(ordered[math.floor(len(ordered) / 2 - reach)]), float(ordered[math.ceil(len(ordered) / 2 + reach)])


def held(interval, *, shared: float) -> float:
    found = [interval(measurement(seed, shared=shared)) for seed in range(REPEATS)]
    return sum(low <= 10 <= high for low, high in found) / REPEATS


def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(noise, "DRAWS", 100)
    assert held(interval_of_median, shared=1.0) >= 0.87  # 95 % less the error of 100 repeats and of 20 rounds
    assert held(interval_of_median, shared=0.0) >= 0.87


def test_calls_taken_for_independent_repeats_hold_it_far_less_often():
    assert held(independent, shared=0.0) >= 0.87
    assert held(independent, shared=1.0) < 0.6


def test_more_rounds_narrow_it_and_the_same_values_give_the_same():
    draw = np.random.default_rng(0).normal(10, 1, (2000, 3))
    few, many = interval_of_median(draw[:20]), interval_of_median(draw)
    assert many[1] - many[0] < 0.3 * (few[1] - few[0])
    assert interval_of_median(draw) == many
    assert interval_of_median(draw[: noise.FEWEST - 1]) is None
