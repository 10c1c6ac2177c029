"""From the distribution of an activation to the range that is kept: minmax, percentile, mse, entropy.

A range is a trade: what lies beyond it saturates, what lies within is rounded to one of 256 levels. The methods differ
in where they see the optimum. All of them work on one histogram of ``BINS`` bins between the measured extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from deploy.records import CalibratedTensor

BINS = 2048
DEAD_LEVELS = 8
"""A tensor whose measured values fall on this many of 256 levels or fewer tells nothing of other images."""

_LEVELS = 256
_FEW, _STEP = 128, 16  # entropy: levels of the quantised half, and the distance of the ranges that are tried
_SHARES = np.linspace(0.02, 1.0, 99)  # mse: shares of the extremes that are tried

Floats = NDArray[np.float64]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one tensor took over all images: its exact extremes, and how its values lie between them.

    ``counts`` [BINS] may be of a regular sample of large tensors.
    """

    low: float
    high: float
    counts: NDArray[np.int64]

    @property
    def centres(self) -> Floats:
        """The middle of each bin."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return (edges[:-1] + edges[1:]) / 2


def clipped(measured: Measured, method: str, *, symmetric: bool, percentile: float) -> Range:
    """Return the range that a method keeps; it holds zero, and is symmetric about it where that is asked.

    Args:
        measured: The distribution.
        method: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"entropy"``.
        symmetric: Whether zero is the middle of the range.
        percentile: Share of values, in percent, that ``"percentile"`` keeps.
    """
    low, high = min(measured.low, 0.0), max(measured.high, 0.0)
    if high > low and method != "minmax":
        low, high = METHODS[method](measured, symmetric, percentile)
        low, high = max(min(low, 0.0), min(measured.low, 0.0)), min(max(high, 0.0), max(measured.high, 0.0))
    size = max(-low, high)
    return (-size, size) if symmetric else (low, high)


def described(tensor: str, measured: Measured, kept: Range) -> CalibratedTensor:
    """Say what a range leaves out, and how much of it is used."""
    total = max(int(measured.counts.sum()), 1)
    centres, taken = measured.centres, measured.counts > 0
    beyond = (centres < kept[0]) | (centres > kept[1])
    step = (kept[1] - kept[0]) / (_LEVELS - 1)
    levels = len(np.unique(np.rint(np.clip(centres[taken], *kept) / step))) if step > 0 else 1
    return CalibratedTensor(
        tensor=tensor,
        low=measured.low,
        high=measured.high,
        clip_low=kept[0],
        clip_high=kept[1],
        saturated=float(measured.counts[beyond].sum() / total),
        levels=levels,
        dead=levels <= DEAD_LEVELS,
    )


def _percentile(measured: Measured, symmetric: bool, percentile: float) -> Range:
    share = percentile / 100
    if symmetric:
        size = _quantile(np.abs(measured.centres), measured.counts, share)
        return -size, size
    tail = (1 - share) / 2
    return tuple(_quantile(measured.centres, measured.counts, q) for q in (tail, 1 - tail))  # type: ignore[return-value]


def _quantile(values: Floats, counts: NDArray[np.int64], share: float) -> float:
    order = np.argsort(values, kind="stable")
    running = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(running, share * running[-1])])


def _mse(measured: Measured, symmetric: bool, percentile: float) -> Range:
    """Take the range with the least mean square of rounding and saturation together."""
    low, high = min(measured.low, 0.0), max(measured.high, 0.0)
    if symmetric:
        size = max(-low, high)
        best = min(_SHARES, key=lambda share: _squares(measured, -size * share, size * share))
        return -size * best, size * best
    for _ in range(2):  # one end, then the other, then both once more
        top = min(_SHARES, key=lambda share: _squares(measured, low, max(measured.high, 0.0) * share))
        high = max(measured.high, 0.0) * float(top)
        bottom = min(_SHARES, key=lambda share: _squares(measured, min(measured.low, 0.0) * share, high))
        low = min(measured.low, 0.0) * float(bottom)
    return low, high


def _squares(measured: Measured, low: float, high: float) -> float:
    step = (high - low) / (_LEVELS - 1)
    if step <= 0:
        return float("inf")
    centres = measured.centres
    rounded = np.clip(np.rint(centres / step) * step, low, high)
    return float((measured.counts * (centres - rounded) ** 2).sum())


def _entropy(measured: Measured, symmetric: bool, percentile: float) -> Range:
    """Take the size at which the quantised distribution of absolute values tells most of the whole one.

    Relative entropy between the clipped histogram, its tail in the last bin, and the same in 128 levels (S. Migacz,
    8-bit Inference with TensorRT, GTC 2017).
    """
    size = max(-measured.low, measured.high)
    whole, _ = np.histogram(np.abs(measured.centres), bins=BINS, range=(0.0, size), weights=measured.counts)
    whole[0] = min(whole[0], whole[1])  # the zeros of a Relu would outvote all other values
    ends = range(_FEW, BINS + 1, _STEP)
    best = min(ends, key=lambda end: _divergence(whole, end))
    kept = size * best / BINS
    return max(measured.low, -kept), min(measured.high, kept)


def _divergence(whole: Floats, end: int) -> float:
    """Relative entropy of the first ``end`` bins against themselves in 128 levels."""
    clip = whole[:end].astype(np.float64)
    bins = np.minimum(np.arange(end) * _FEW // end, _FEW - 1)
    taken = clip > 0
    mass = np.bincount(bins, weights=clip, minlength=_FEW)
    spread = np.bincount(bins, weights=taken, minlength=_FEW)
    coarse = np.where(taken, mass[bins] / np.maximum(spread[bins], 1), 0.0)
    fine = clip.copy()
    fine[-1] += whole[end:].sum()
    if not coarse.any():
        return float("inf")
    p, q = fine / fine.sum(), coarse / coarse.sum()
    if p[-1] > 0 and q[-1] == 0:
        q[-1] = 1e-12  # the tail lies where the quantised distribution has nothing: a large, finite loss
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


METHODS: Mapping[str, Callable[[Measured, bool, float], Range]] = MappingProxyType(
    {"percentile": _percentile, "mse": _mse, "entropy": _entropy}
)
"""What clips; minmax keeps everything."""
