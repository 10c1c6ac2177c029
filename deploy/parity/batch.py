"""Whether the rows of a batch leave each other alone: a batched engine must be many engines of batch 1.

Public engines have failed exactly here: right at batch 1, wrong rows beyond it, rows that read each other. Parity with
PyTorch sees such a leak only where it is larger than the tolerance; here a candidate is held against itself, so nothing
but the order of its sums may differ.

    alone       a row has in the batch the outputs that it has alone (at the smallest batch, repeated to fill it)
    permuted    permuted rows have permuted outputs
    duplicated  the same row at two places of one batch has the same outputs
    neighbour   one row of extreme values, of NaN, of infinity changes nothing in the others
    repeated    the same batch has the same outputs once more, after the noise
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import summary, units
from deploy.backends.base import Array, Feeds
from deploy.errors import EngineBuildError, ParityError, SizeError, UnknownNameError, did_you_mean
from deploy.parity.compare import Candidate
from deploy.parity.inputs import InputPack
from deploy.parity.metrics import TASKS
from deploy.records import Batch, BatchCheck, BatchRecord, ParityRecord, Precision, Tolerance

Outputs = Mapping[str, Array]
Errors = Mapping[str, NDArray[np.float64]]  # output -> error of each row

RUNS, ALONE, PERMUTED, DUPLICATED, NEIGHBOUR, REPEATED = (
    "runs", "alone", "permuted", "duplicated", "neighbour", "repeated",
)  # fmt: skip
CHECKS = (RUNS, ALONE, PERMUTED, DUPLICATED, NEIGHBOUR, REPEATED)

# A tolerance against PyTorch has to hold rounded weights, rounded activations and another form of the graph. Two runs
# of one candidate share all of that: only the order of sums differs with the batch (other kernels, other tiles).
SHARE_OF_TOLERANCE = 0.25
# Where the recipe limits no max_relative. Float32: sums of K terms in another order differ by about sqrt(K) roundings,
# K < 2**18. 16 bits: products are summed in float32, so only results that round to the other side differ, by one unit
# a layer at few places.
# INT8 and FP8: an activation at a border between two levels may fall to the other one.
ROUNDING = {
    Precision.FP32.value: 512 * 2.0**-24, Precision.FP16.value: 8 * 2.0**-11, Precision.BF16.value: 8 * 2.0**-8,
    Precision.INT8.value: 8 * 2.0**-8, Precision.FP8.value: 8 * 2.0**-4,
}  # fmt: skip
# What the neighbour's float inputs become, signs alternating. 6e4 is within float16: it overflows later, as it may.
NOISE: Mapping[str, float] = {"extreme values": 6e4, "NaN": math.nan, "infinity": math.inf}
_GROUPS = ("noise", "natural", "photos")  # rows are ordinary images; the extremes are the neighbour's part


def check_batches(
    candidates: Sequence[Candidate],
    inputs: InputPack,
    batch: Batch,
    tolerances: Mapping[str, Tolerance],
    *,
    task: str = "classification",
) -> BatchRecord:
    """Run every check on every candidate at batch ``min``, ``opt``, ``max`` and one size between.

    Args:
        candidates: What is opened, checked and closed in turn.
        inputs: The parity inputs, of which the rows are taken.
        batch: What the candidates take.
        tolerances: Precision -> parity limits; a quarter of ``max_relative`` is the limit here.
        task: Which comparison of ``deploy.parity.metrics.TASKS`` pairs outputs; classification is element by element.

    Returns:
        A check per candidate, kind and size. A broken limit is a verdict (``ok`` is False), not an exception.

    Raises:
        ParityError: an output's axis 0 is not the batch, or nothing was checked.
        UnknownNameError: no such task.
    """
    start = time.perf_counter()
    if task not in TASKS:
        raise UnknownNameError(f"unknown task {task!r}", hint=did_you_mean(task, TASKS))
    rows = rows_of(inputs, batch.max)
    checks: list[BatchCheck] = []
    for candidate in candidates:
        with candidate.open() as runner:
            limit = limit_of(candidate.precision, tolerances)
            subject = _Subject(candidate.stage, runner.infer, rows, batch, limit, task)
            checks += _checked(subject)
    if not checks:
        raise ParityError("no candidate for the batch suite: nothing runs here", hint="effdeploy export ...")
    return BatchRecord(
        ok=all(c.ok for c in checks),
        verdict=_verdict(checks),
        checks=tuple(checks),
        sizes=sizes_of(batch),
        notes=("batch 1 has no neighbours: only repeated calls were checked",) if batch.max == 1 else (),
        seconds=time.perf_counter() - start,
    )


def with_batches(parity: ParityRecord, batches: BatchRecord) -> ParityRecord:
    """Add the batch suite to a parity record; either one's failure is the verdict."""
    verdict = batches.verdict if parity.ok and not batches.ok else parity.verdict
    return dataclasses.replace(parity, ok=parity.ok and batches.ok, verdict=verdict, batches=batches)


def sizes_of(batch: Batch) -> tuple[int, ...]:
    """Return min, opt, max and one size between, ascending.

    Between is in the middle of the wider gap, and odd where it can be: kernels are tuned for the named sizes and cut
    their work into even tiles.
    """
    low, high = max((batch.min, batch.opt), (batch.opt, batch.max), key=lambda gap: gap[1] - gap[0])
    middle = (low + high) // 2
    odd = middle + 1 if middle % 2 == 0 and middle + 1 < high else middle
    return tuple(sorted({batch.min, batch.opt, batch.max, odd}))


def limit_of(precision: Precision, tolerances: Mapping[str, Tolerance]) -> float:
    """Return how far a row may be from itself in another batch, as a share of the largest output."""
    tolerance = tolerances.get(precision.value)
    if tolerance is None or tolerance.max_relative is None:
        return ROUNDING.get(precision.value, max(ROUNDING.values()))
    return SHARE_OF_TOLERANCE * tolerance.max_relative


def rows_of(inputs: InputPack, count: int) -> Feeds:
    """Take ``count`` rows that differ from the parity inputs; beyond the pack's own, images shifted sideways."""
    found: dict[str, list[Array]] = {}
    for chunk in inputs.chunks:
        for place, group in enumerate(chunk.groups):
            if group in _GROUPS:
                for name, array in chunk.feeds.items():
                    found.setdefault(name, []).append(array[place])
    return {
        name: np.stack([_shifted(rows[i % len(rows)], i // len(rows)) for i in range(count)])
        for name, rows in found.items()
    }


def _shifted(row: Array, times: int) -> Array:
    if not times or not row.ndim or not (row.dtype.kind == "f" or row.dtype == np.uint8):
        return row
    axis = -2 if row.dtype == np.uint8 else -1  # of pixels, the last axis is the colour
    return np.roll(row, times * (row.shape[axis] // 5 + 1), axis=axis)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A candidate that is open, and what it is checked with."""

    stage: str
    infer: Callable[[Feeds], Mapping[str, Array]]
    rows: Feeds
    batch: Batch
    limit: float
    task: str

    def run(self, feeds: Feeds) -> Outputs:
        """Run once.

        Raises:
            ParityError: axis 0 of an output is not the batch.
        """
        size = len(next(iter(feeds.values())))
        outputs = dict(self.infer(feeds))
        for name, value in outputs.items():
            if value.shape[:1] != (size,):
                raise ParityError(
                    f"output {name!r} of {self.stage!r} has shape {list(value.shape)} at batch {size}, "
                    f"expected [{size}, ...]",
                    hint="axis 0 of every output is the image; see docs/adding_a_model.md",
                )
        return outputs

    def record(self, check: str, size: int, errors: Errors, rows: Sequence[int], **more: Any) -> BatchCheck:
        """Judge a check by the output and the row that are nearest to the limit, or furthest beyond it."""
        limit = more.pop("limit", self.limit)
        output = max(errors, key=lambda name: _worst(errors[name]))
        error = _worst(errors[output])
        row = rows[int(np.argmax(_lost(errors[output])))]
        return BatchCheck(
            stage=self.stage, check=check, batch=size, output=output, row=row, error=error, limit=limit,
            ok=error <= limit, **more,
        )  # fmt: skip


def _checked(subject: _Subject) -> list[BatchCheck]:
    """Check one candidate; a size that it refuses or fails at is a finding, and ends its checks."""
    found: list[BatchCheck] = []
    size = subject.batch.min
    try:
        alone = _alone(subject)
        for size in sizes_of(subject.batch):
            found += _checked_size(subject, size, alone)
    except (EngineBuildError, SizeError) as error:
        found.append(
            BatchCheck(
                stage=subject.stage, check=RUNS, batch=size, output="", row=0, error=math.inf, limit=0.0, ok=False,
                detail=error.message,
            )
        )  # fmt: skip
    return found


def _alone(subject: _Subject) -> dict[int, Outputs]:
    """Run the first two rows, the middle one and each size's last one alone; a larger smallest batch is filled up."""
    top = subject.batch.max
    chosen = {0, 1, top // 2, *(size - 1 for size in sizes_of(subject.batch))}
    outputs: dict[int, Outputs] = {}
    for row in sorted(r for r in chosen if r < top):
        once = subject.run({n: np.repeat(a[row : row + 1], subject.batch.min, axis=0) for n, a in subject.rows.items()})
        outputs[row] = {name: value[:1] for name, value in once.items()}
    return outputs


def _checked_size(subject: _Subject, size: int, alone: Mapping[int, Outputs]) -> Iterator[BatchCheck]:
    feeds = _take(subject.rows, range(size))
    base = subject.run(feeds)
    noisy = {kind: (place, subject.run(_noisy(feeds, place, kind))) for kind, place in _places(size).items()}
    repeated = subject.record(REPEATED, size, exact(base, subject.run(feeds)), range(size))
    if size > 1:
        rows = [row for row in alone if row < size]
        apart = _paired(subject, _stacked([alone[row] for row in rows]), _take(base, rows))
        yield subject.record(ALONE, size, apart, rows)
        order = derangement(size)
        apart = _paired(subject, _take(base, order), subject.run(_take(feeds, order)))
        yield subject.record(PERMUTED, size, apart, order)
        half = [row % math.ceil(size / 2) for row in range(size)]
        twice = subject.run(_take(feeds, half))
        pairs = range(size // 2)
        apart = _paired(subject, _take(twice, pairs), _take(twice, [p + math.ceil(size / 2) for p in pairs]))
        yield subject.record(DUPLICATED, size, apart, [p + math.ceil(size / 2) for p in pairs])
        for kind, (place, outputs) in noisy.items():
            others = [row for row in range(size) if row != place]
            apart = exact(_take(base, others), _take(outputs, others))
            # The same shape at the same place runs through the same kernels, bit for bit, where runs repeat at all.
            limit = 0.0 if repeated.error == 0 else subject.limit
            yield subject.record(NEIGHBOUR, size, apart, others, limit=limit, detail=f"row {place} is {kind}")
    yield repeated


def _places(size: int) -> dict[str, int]:
    """Put each kind of noise into another row: the first, the last, the middle one."""
    return dict(zip(NOISE, (0, size - 1, size // 2), strict=True))


def _noisy(feeds: Feeds, place: int, kind: str) -> Feeds:
    """Spoil one row's float inputs, and make its pixels a checkerboard of black and white, whatever the kind.

    Another integer input, which must stay in range, takes another row's value.
    """
    noisy = {name: array.copy() for name, array in feeds.items()}
    for array in noisy.values():
        if array.dtype.kind == "f":
            signs = np.where(np.arange(array[place].size) % 2, -1, 1).reshape(array[place].shape)
            array[place] = (signs * NOISE[kind]).astype(array.dtype)
        elif array.dtype == np.uint8:
            array[place] = 255 * (np.arange(array[place].size) % 2).reshape(array[place].shape)
        else:
            array[place] = array[(place + 1) % len(array)]
    return noisy


def derangement(size: int) -> list[int]:
    """Draw a permutation that leaves no row in its place; the same one for the same size."""
    generator = np.random.default_rng(size)
    while True:
        order = generator.permutation(size)
        if size < 2 or not (order == np.arange(size)).any():
            return [int(row) for row in order]


def _take(arrays: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    return {name: array[list(rows)] for name, array in arrays.items()}


def _stacked(outputs: Sequence[Outputs]) -> dict[str, Array]:
    return {name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]}


def exact(expected: Outputs, got: Outputs) -> Errors:
    """Return per output and row how far two runs are apart, element by element; equal bits are 0, NaN equals NaN.

    Floats: the largest difference over the largest finite ``|expected|``, infinite where only one is finite. Integers
    and booleans: the number of elements that differ, so that no limit below 1 lets one pass.
    """
    return {name: _apart(value, got[name]) for name, value in expected.items()}


def _apart(expected: Array, got: Array) -> NDArray[np.float64]:
    if expected.shape != got.shape:
        return np.full(len(expected), np.inf)
    if expected.dtype.kind != "f":
        changed = expected.reshape(len(expected), -1) != got.reshape(len(got), -1)
        return np.asarray(changed.sum(axis=1), dtype=np.float64)
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (expected, got))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    peak = np.abs(a, where=np.isfinite(a), out=np.zeros_like(a)).max(initial=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b) / peak)
    return np.asarray(_lost(gap).max(axis=1, initial=0.0))


def _paired(subject: _Subject, expected: Outputs, got: Outputs) -> Errors:
    """Compare as the task does: boxes of another order are matched first, scores of classes are not."""
    if subject.task == "classification":
        return exact(expected, got)
    rows = TASKS[subject.task](expected, got)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {n: np.where(r.max_abs == 0, 0.0, r.max_abs / r.peak.max(initial=0.0)) for n, r in rows.items()}


def _worst(errors: NDArray[np.float64]) -> float:
    return float(_lost(errors).max(initial=0.0))


def _lost(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Count what cannot be compared as infinitely wrong."""
    return np.where(np.isnan(errors), np.inf, errors)


def _verdict(checks: Sequence[BatchCheck]) -> str:
    failed = [c for c in checks if not c.ok]
    if failed:
        first = failed[0]
        told = f"batch check fails at {first.stage!r}: {summary.batch_failure(first)}"
        return f"{told} ({len(failed)} of {len(checks)} batch checks fail)"
    judged = [c for c in checks if c.limit]
    worst = max(judged, key=lambda c: c.error / c.limit)
    sizes = ", ".join(map(str, sorted({c.batch for c in checks})))
    return (
        f"rows are independent over {len(checks)} checks at batch {sizes}; nearest to its limit is {worst.stage!r}, "
        f"{worst.check}: {units.number(worst.error)} (limit {units.number(worst.limit)})"
    )
