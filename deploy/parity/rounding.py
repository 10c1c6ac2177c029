"""Parity where rounding alone explains a difference: PyTorch's own rounding is the yardstick.

A network that looks where it wants (SparseFormer) reads another value at every pixel of white noise, five looks in a
row: with some weights PyTorch's float32 is further off from its own float64 there than a tolerance allows, and no stage
can be held to less than a few times that. And where PyTorch has two classes closer together than its own rounding moves
logits, no stage can be held to their order. Where a stage breaks its tolerance, the training form runs the pack once
more in another type, float64 for float32 stages, the low type itself for 16 bits:

    own     how far PyTorch is from itself, the largest difference of an image's logits; no stage has a part in it
    ill     an image of noise on which ``ALLOWANCE`` times own is more than ``max_relative``
    judged  ill images by ``ALLOWANCE`` times own, in the largest difference and in energy; every other image, and all
            natural images, extremes and photos, by the tolerance as it is
    tie     an image whose best class changed between classes that float32 PyTorch has no further apart than
            ``ALLOWANCE`` times own, nor than ``max_relative``; any other such image is held against ``top1``

What a stage computes wrong shows on natural images, where no distance is excused. A note names both figures of each
image whose best class changed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from deploy import units
from deploy.parity.compare import Candidate, Infer, verdict_over
from deploy.parity.inputs import InputPack
from deploy.parity.metrics import TASKS, Rows, concatenate, judge, pool
from deploy.records import Comparison, ParityRecord, Precision, Tolerance

# The official reference cases: nobody can be asked for less than a few times the model's own rounding noise. In 16 bits
# PyTorch's own is already that of a graph that keeps nothing in float32.
ALLOWANCE: Mapping[Precision, float] = MappingProxyType({Precision.FP32: 3.0, Precision.FP16: 1.0, Precision.BF16: 1.0})
OTHER: Mapping[Precision, str] = MappingProxyType(
    {Precision.FP32: "float64", Precision.FP16: "float16", Precision.BF16: "bfloat16"}
)
NOISE = "noise"
OWN = "noise by PyTorch's own rounding"
DISTANCES = ("max_relative", "cosine", "snr_db")
BEST = "top1"

InType = Callable[[str], Infer]


def judge_rounding(
    parity: ParityRecord, reference: Infer, in_type: InType, candidates: Sequence[Candidate], inputs: InputPack,
    task: str = "classification", excused: tuple[str, ...] = (*DISTANCES, BEST),
) -> ParityRecord:  # fmt: skip
    """Judge failed comparisons again, ill images and flips of the best class by PyTorch's own rounding.

    Args:
        parity: The verdict so far; comes back as it is where nothing failed, or nothing is ill and nothing flipped.
        reference: The float32 PyTorch model, as in ``check_parity``.
        in_type: Gives the same model in another type, by its name in PyTorch; outputs as float64.
        candidates: Those of ``check_parity``; the ones that failed run once more.
        inputs: The parity inputs.
        task: As in ``check_parity``.
        excused: Which limits may be judged again.
    """
    start, tolerances = time.perf_counter(), dict(parity.tolerances)
    failed = {c.stage for c in parity.comparisons if _failed(c, excused) and _has_yardstick(c, tolerances)}
    judged: dict[tuple[str, str], Judged] = {}
    own: dict[Precision, dict[str, Rows]] = {}
    for candidate in (c for c in candidates if c.stage in failed):
        precision = candidate.precision
        if precision not in own:
            own[precision] = _rows(reference, in_type(OTHER[precision]), inputs, task)
        with candidate.open() as runner:
            rows = _rows(reference, runner.infer, inputs, task)
        for comparison in (c for c in parity.comparisons if c.stage == candidate.stage and _failed(c, excused)):
            there = _Images(
                rows=rows[comparison.output],
                own=own[precision][comparison.output],
                groups=_groups(inputs),
                precision=precision,
            )
            if again := judged_again(comparison, there, tolerances[comparison.precision], excused):
                judged[candidate.stage, comparison.output] = again
    if not judged:
        return parity
    for again in judged.values():
        named = again.comparison.precision
        tolerances[named] = _widest(again.tolerance, tolerances.get(named))
    comparisons = tuple(
        judged[c.stage, c.output].comparison if (c.stage, c.output) in judged else c for c in parity.comparisons
    )
    return dataclasses.replace(
        parity,
        ok=all(c.passed for c in comparisons),
        verdict=_verdict(comparisons, tolerances),
        comparisons=comparisons,
        tolerances=tolerances,
        notes=(*parity.notes, *_notes(tolerances), *(note for again in judged.values() for note in again.flips)),
        seconds=parity.seconds + time.perf_counter() - start,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A comparison that was judged again, what its ill images were held to, and a sentence on each flip."""

    comparison: Comparison
    tolerance: Tolerance
    flips: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """One output, image by image: a stage against float32, and PyTorch in the other type against the same."""

    rows: Rows
    own: Rows
    groups: NDArray[np.str_]
    precision: Precision


def judged_again(
    comparison: Comparison, there: _Images, tolerance: Tolerance, excused: tuple[str, ...] = (*DISTANCES, BEST)
) -> Judged | None:
    """Return the comparison with its new failures; ``None`` where no image is ill and none has another best class."""
    rows, own = there.rows, there.own
    if tolerance.max_relative is None:
        return None
    peak, most = float(rows.peak.max()), ALLOWANCE[there.precision] * own.max_abs
    # Not finite is no yardstick: such an image is judged as any other.
    ill = (there.groups == NOISE) & (own.finite == 1) & (most > tolerance.max_relative * peak)
    ill &= _failed(comparison, [name for name in DISTANCES if name in excused])
    flipped = _flipped(rows) if _failed(comparison, [BEST]) else ()
    if not ill.any() and not flipped:
        return None
    near = np.minimum(most, tolerance.max_relative * peak)
    ties = {image for image, gap in flipped if own.finite[image] and gap <= near[image]}
    failures = (*_best_class(comparison, rows, tolerance, len(ties)), *_distances(comparison, there, tolerance, ill))
    found = dataclasses.replace(comparison, passed=not failures, failures=failures, top1_ties=len(ties))
    notes = tuple(_told(comparison.stage, there, image, gap, image in ties) for image, gap in flipped)
    if not ill.any():
        return Judged(comparison=found, tolerance=tolerance, flips=notes)
    held = dataclasses.replace(tolerance, max_relative=float(most[ill].max()) / peak, cosine=None, snr_db=None)
    found = dataclasses.replace(found, precision=f"{comparison.precision}, {OWN}")
    return Judged(comparison=found, tolerance=held, flips=notes)


def _best_class(comparison: Comparison, rows: Rows, tolerance: Tolerance, ties: int) -> tuple[str, ...]:
    """Return the failures that are no distances, the agreement of the best class counted with its ties."""
    again = judge(pool(rows), Tolerance(top1=tolerance.top1), ties)
    kept = (f for f in comparison.failures if not f.startswith((*DISTANCES, BEST)))
    return (*kept, *(f for f in again if f.startswith(BEST)))


def _distances(comparison: Comparison, there: _Images, tolerance: Tolerance, ill: NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the failures of distances: those that there are, unless images are ill."""
    if not ill.any():
        return tuple(f for f in comparison.failures if f.startswith(DISTANCES))
    rows, own, allowance = there.rows, there.own, ALLOWANCE[there.precision]
    peak = float(rows.peak.max())
    others = judge(pool(rows.take(~ill)), dataclasses.replace(tolerance, top1=None, top5=None)) if not ill.all() else ()
    over = ill & ~((rows.max_abs <= allowance * own.max_abs) & (rows.error <= allowance**2 * own.error))
    beyond = (
        f"on noise off by {units.number(rows.max_abs[i] / peak)} of the largest output, PyTorch itself by "
        f"{units.number(own.max_abs[i] / peak)}" for i in np.flatnonzero(over)
    )  # fmt: skip
    return (*others, *beyond)


def _flipped(rows: Rows) -> tuple[tuple[int, float], ...]:
    """Return the images whose best class changed, and how far apart the reference has both classes."""
    if rows.top1 is None or rows.flip is None:
        return ()
    return tuple((int(i), float(rows.flip[i])) for i in np.flatnonzero((rows.top1 == 0) & (rows.finite == 1)))


def _told(stage: str, there: _Images, image: int, gap: float, tied: bool) -> str:
    """Say how far apart float32 PyTorch has two classes that traded places, and what its own rounding does there."""
    rows, own, other = there.rows, there.own, OTHER[there.precision]
    peak = float(rows.peak.max())
    moves = f"moves logits of this image by up to {units.number(own.max_abs[image] / peak)}"
    also = " and changes the best class as well" if own.top1 is not None and not own.top1[image] else ""
    return (
        f"{stage!r} has another best class on image {image + 1} of {len(rows)} ({there.groups[image]}): PyTorch has "
        f"both classes {units.number(gap / peak)} of the largest output apart, its own {other} {moves}{also}: "
        f"{'a near tie' if tied else 'no tie'}"
    )


def _failed(comparison: Comparison, limits: Sequence[str]) -> bool:
    return any(f.startswith(tuple(limits)) for f in comparison.failures)


def _has_yardstick(comparison: Comparison, tolerances: Mapping[str, Tolerance]) -> bool:
    """Tell whether a comparison was held to a distance in a type that PyTorch can compute in."""
    return comparison.precision in OTHER and tolerances[comparison.precision].max_relative is not None


def _rows(reference: Infer, other: Infer, inputs: InputPack, task: str) -> dict[str, Rows]:
    """Compare two ways to run the pack, image by image, padding dropped."""
    parts: dict[str, list[Rows]] = {}
    for chunk in inputs.chunks:
        expected = reference(chunk.feeds)
        got = {name: value for name, value in other(chunk.feeds).items() if name in expected}
        for name, rows in TASKS[task](expected, got).items():
            parts.setdefault(name, []).append(rows.take(slice(len(chunk.groups))))
    return {name: concatenate(rows) for name, rows in parts.items()}


def _groups(inputs: InputPack) -> NDArray[np.str_]:
    return np.array([group for chunk in inputs.chunks for group in chunk.groups])


def _widest(one: Tolerance, other: Tolerance | None) -> Tolerance:
    if other is None or (one.max_relative or 0) > (other.max_relative or 0):
        return one
    return other


def _notes(tolerances: Mapping[str, Tolerance]) -> list[str]:
    """Say, for each precision, what PyTorch's own rounding does to noise, and what was held to it."""
    told = []
    for name, tolerance in tolerances.items():
        precision, _, tail = name.partition(", ")
        if tail == OWN and tolerance.max_relative is not None:
            times = ALLOWANCE[Precision(precision)]
            told.append(
                f"on noise PyTorch's own {OTHER[Precision(precision)]} is off from its float32 by "
                f"{units.number(tolerance.max_relative / times)} of the largest output: {precision} is held there to "
                f"{times:g} times that, image by image, and to the recipe's limits on all other images"
            )
    return told


def _verdict(comparisons: Sequence[Comparison], tolerances: Mapping[str, Tolerance]) -> str:
    moved, ties = sum(c.precision.endswith(OWN) for c in comparisons), max(c.top1_ties for c in comparisons)
    said = verdict_over(comparisons, tolerances)
    if not all(c.passed for c in comparisons):
        return said
    if moved:
        said = (
            f"parity holds over {len(comparisons)} comparisons on {comparisons[0].images} images; {moved} of them are "
            "held to PyTorch's own rounding on noise, where that breaks the tolerance as well"
        )
    return (
        f"{said}; the best class differs on {ties} image{'s' if ties != 1 else ''} at most, near ties" if ties else said
    )
