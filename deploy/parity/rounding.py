"""Parity where a network amplifies rounding: noise is judged by what PyTorch's own rounding does to it.

A network that looks where it wants (SparseFormer) reads another value at every pixel of white noise, five looks in a
row: with some weights PyTorch's float32 is further off from its own float64 there than a tolerance allows, and no stage
can be held to less than a few times that. Where a stage breaks its tolerance, the training form runs the pack once more
in another type, float64 for float32 stages, the low type itself for 16 bits:

    own     how far PyTorch is from itself, image by image; no stage has a part in it
    ill     an image of noise on which ``ALLOWANCE`` times own is more than ``max_relative``
    judged  ill images by ``ALLOWANCE`` times own, in the largest difference and in energy; every other image, and all
            natural images, extremes and photos, by the tolerance as it is; the best class over all images as before

What a stage computes wrong shows on natural images, where nothing is excused.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from deploy import units
from deploy.parity.compare import Candidate, Infer
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

InType = Callable[[str], Infer]


def judge_rounding(
    parity: ParityRecord, reference: Infer, in_type: InType, candidates: Sequence[Candidate], inputs: InputPack,
    task: str = "classification",
) -> ParityRecord:  # fmt: skip
    """Judge failed comparisons again, ill images by PyTorch's own rounding.

    Args:
        parity: The verdict so far; comes back as it is where nothing failed, or nothing is ill.
        reference: The float32 PyTorch model, as in ``check_parity``.
        in_type: Gives the same model in another type, by its name in PyTorch; outputs as float64.
        candidates: Those of ``check_parity``; the ones that failed run once more.
        inputs: The parity inputs.
        task: As in ``check_parity``.
    """
    start, tolerances = time.perf_counter(), dict(parity.tolerances)
    failed = {c.stage for c in parity.comparisons if _apart(c, tolerances)}
    judged: dict[tuple[str, str], tuple[Comparison, Tolerance]] = {}
    own: dict[Precision, dict[str, Rows]] = {}
    for candidate in (c for c in candidates if c.stage in failed):
        precision = candidate.precision
        if precision not in own:
            own[precision] = _rows(reference, in_type(OTHER[precision]), inputs, task)
        with candidate.open() as runner:
            rows = _rows(reference, runner.infer, inputs, task)
        for comparison in (c for c in parity.comparisons if c.stage == candidate.stage):
            there = _Images(rows=rows[comparison.output], own=own[precision][comparison.output], groups=_groups(inputs))
            if again := judged_again(comparison, there, tolerances[comparison.precision], ALLOWANCE[precision]):
                judged[candidate.stage, comparison.output] = again
    if not judged:
        return parity
    for comparison, tolerance in judged.values():
        tolerances[comparison.precision] = _widest(tolerance, tolerances.get(comparison.precision))
    comparisons = tuple(judged.get((c.stage, c.output), (c,))[0] for c in parity.comparisons)
    broken = [c for c in comparisons if not c.passed]
    return dataclasses.replace(
        parity,
        ok=not broken,
        verdict=_verdict(comparisons, broken),
        comparisons=comparisons,
        tolerances=tolerances,
        notes=(*parity.notes, *_notes(tolerances)),
        seconds=parity.seconds + time.perf_counter() - start,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """One output, image by image: a stage against float32, and PyTorch in the other type against the same."""

    rows: Rows
    own: Rows
    groups: NDArray[np.str_]


def judged_again(
    comparison: Comparison, there: _Images, tolerance: Tolerance, allowance: float
) -> tuple[Comparison, Tolerance] | None:
    """Return the comparison with its new failures, and what its ill images were held to; ``None`` where none is ill."""
    rows, own = there.rows, there.own
    peak, most = float(rows.peak.max()), allowance * own.max_abs
    if tolerance.max_relative is None:
        return None
    # Not finite is no yardstick: such an image is judged as any other.
    ill = (there.groups == NOISE) & (own.finite == 1) & (most > tolerance.max_relative * peak)
    if not ill.any():
        return None
    kept = tuple(f for f in comparison.failures if not f.startswith(DISTANCES))
    others = judge(pool(rows.take(~ill)), dataclasses.replace(tolerance, top1=None, top5=None)) if not ill.all() else ()
    over = ill & ~((rows.max_abs <= most) & (rows.error <= allowance**2 * own.error))
    beyond = tuple(
        f"on noise off by {units.number(rows.max_abs[i] / peak)} of the largest output, PyTorch itself by "
        f"{units.number(own.max_abs[i] / peak)}" for i in np.flatnonzero(over)
    )  # fmt: skip
    failures = (*kept, *others, *beyond)
    held = dataclasses.replace(tolerance, max_relative=float(most[ill].max()) / peak, cosine=None, snr_db=None)
    named = f"{comparison.precision}, {OWN}"
    return dataclasses.replace(comparison, passed=not failures, failures=failures, precision=named), held


def _apart(comparison: Comparison, tolerances: Mapping[str, Tolerance]) -> bool:
    """Tell whether a comparison failed in its distance, in a type that PyTorch has a yardstick for."""
    known = comparison.precision in OTHER and tolerances[comparison.precision].max_relative is not None
    return known and any(f.startswith(DISTANCES) for f in comparison.failures)


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


def _verdict(comparisons: Sequence[Comparison], broken: Sequence[Comparison]) -> str:
    if broken:
        first = broken[0]
        return (
            f"parity fails at {first.stage!r}, output {first.output!r}: {'; '.join(first.failures)} "
            f"({len(broken)} of {len(comparisons)} comparisons fail)"
        )
    moved = sum(c.precision.endswith(OWN) for c in comparisons)
    return (
        f"parity holds over {len(comparisons)} comparisons on {comparisons[0].images} images; {moved} of them are held "
        "to PyTorch's own rounding on noise, where that breaks the tolerance as well"
    )
