"""The search of ``effdeploy tune``: schedules of least drift within a latency, from a table of what layers take.

Two models, made of measurements, that only propose; what they propose is built and timed:

    latency   a + b n + c n^2 for the n elements that enter a layer, d m for the m that leave it, e where it takes any
              away; by least squares over the layers of the measured engines. The last layer has numbers of its own: a
              head may read only a part of it.
    drift     the layers' own drifts, each measured alone, add up as independent errors do: in squares
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.answers import LayerLatency
from deploy.errors import BenchmarkError

Schedule = tuple[int, ...]
BUCKETS = 400  # of latency: a layer is rounded up by at most 1 / 400 of the slowest schedule
FEW, MULTIPLE = 20, 8  # counts tried a layer, besides those that leave a multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerModel:
    """Milliseconds of each layer, and of everything outside of the layers; ``weights`` are a layer's."""

    weights: tuple[tuple[float, ...], ...]
    outside: float

    def layer(self, index: int, before: int, taken: int) -> float:
        """Predict one layer."""
        return max(0.0, float(np.dot(self.weights[index], _features(before, taken))))

    def total(self, start: int, schedule: Schedule) -> float:
        """Predict a schedule."""
        return self.outside + sum(self.layer(i, *step) for i, step in enumerate(steps(start, schedule)))


def steps(start: int, schedule: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield for each layer how many elements enter it, and how many it takes away."""
    left = start
    for taken in schedule:
        yield left, taken
        left -= taken


def fit_layers(table: Sequence[LayerLatency], outside: float) -> LayerModel:
    """Fit the latency model.

    Raises:
        BenchmarkError: no layer was measured.
    """
    if not table:
        raise BenchmarkError(
            "the profile of the engine names no layer, so nothing says what a layer takes",
            hint="tune with --backend onnxruntime",
        )
    last = max(row.layer for row in table)
    body, end = ([row for row in table if (row.layer == last) == at_end] for at_end in (False, True))
    weights = (_fit(body or end),) * last + (_fit(end),)
    return LayerModel(weights=weights, outside=outside)


def _fit(table: Sequence[LayerLatency]) -> tuple[float, ...]:
    rows = np.array([_features(row.before, row.taken) for row in table])
    scale = np.abs(rows).max(0)
    scale[scale == 0] = 1
    found = np.linalg.lstsq(rows / scale, np.array([row.milliseconds for row in table]), rcond=1e-9)[0] / scale
    return tuple(float(w) for w in found)


def _features(before: int, taken: int) -> NDArray[np.float64]:
    return np.array([1.0, before, before**2, before - taken, float(taken > 0)])


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftModel:
    """Drift of each layer alone, at a few counts that it takes away."""

    points: tuple[Mapping[int, float], ...]

    def layer(self, index: int, taken: int) -> float:
        """Predict the squared drift of one layer; 0 at 0, linear between what was measured and beyond."""
        known = {0: 0.0, **self.points[index]}
        counts = sorted(known)
        last = counts[-1]
        if taken > last > 0:
            return (known[last] * taken / last) ** 2
        return float(np.interp(taken, counts, [known[c] for c in counts])) ** 2

    def total(self, schedule: Schedule) -> float:
        """Predict the drift of a schedule."""
        return float(np.sqrt(sum(self.layer(index, taken) for index, taken in enumerate(schedule))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A schedule with its predicted milliseconds and drift."""

    schedule: Schedule
    milliseconds: float
    drift: float


def search(start: int, depth: int, most: Callable[[int], int], cost: LayerModel, drift: DriftModel) -> list[Proposal]:
    """Find the schedules of least predicted drift for every latency, by dynamic programming over layers.

    A state is how many elements are left and how much time was spent, in buckets; each keeps its best way there.

    Returns:
        The predicted front, fastest first: drift falls as latency rises.
    """
    whole = sum(cost.layer(index, start, 0) for index in range(depth)) or 1.0
    unit = whole / BUCKETS
    best: dict[int, NDArray[np.float64]] = {start: np.full(BUCKETS + depth + 1, np.inf)}
    best[start][0] = 0.0
    back: list[dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]] = []
    for index in range(depth):
        best, pointers = _advance(index, best, most, cost, drift, unit)
        back.append(pointers)
    found: list[Proposal] = []
    for bucket in range(BUCKETS + depth + 1):
        left = min(best, key=lambda tokens: float(best[tokens][bucket]))
        if not np.isfinite(best[left][bucket]) or (found and best[left][bucket] >= found[-1].drift ** 2 - 1e-18):
            continue
        schedule = _walk(back, left, bucket)
        found.append(Proposal(schedule=schedule, milliseconds=cost.total(start, schedule), drift=drift.total(schedule)))
    return found


def _advance(
    index: int, best: Mapping[int, NDArray[np.float64]], most: Callable[[int], int], cost: LayerModel,
    drift: DriftModel, unit: float,
) -> tuple[dict[int, NDArray[np.float64]], dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]]:  # fmt: skip
    """Go one layer on from every state; returns the states behind it, and from where (elements, bucket) each came."""
    after: dict[int, NDArray[np.float64]] = {}
    pointers: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for before, drifts in best.items():
        size = len(drifts)
        for taken in _counts(before, most(before)):
            shift = int(np.ceil(cost.layer(index, before, taken) / unit - 1e-9))
            if shift >= size:
                continue
            left = before - taken
            if left not in after:
                after[left] = np.full(size, np.inf)
                pointers[left] = (np.full(size, -1), np.full(size, -1))
            moved = np.full(size, np.inf)
            moved[shift:] = drifts[: size - shift] + drift.layer(index, taken)
            better = moved < after[left]
            after[left][better] = moved[better]
            pointers[left][0][better] = before
            pointers[left][1][better] = np.flatnonzero(better) - shift
    return after, pointers


def _counts(before: int, most: int) -> list[int]:
    """Choose which counts a layer tries: none, a few evenly, and those that leave a multiple."""
    even = {round(most * n / FEW) for n in range(FEW + 1)}
    return sorted(even | {taken for taken in range(most + 1) if (before - taken) % MULTIPLE == 0})


def _walk(
    back: Sequence[Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]]], left: int, bucket: int
) -> Schedule:
    """Follow a state back to the first layer."""
    taken: list[int] = []
    for pointers in reversed(back):
        before, earlier = (int(array[bucket]) for array in pointers[left])
        taken.append(before - left)
        left, bucket = before, earlier
    return tuple(reversed(taken))
