"""Parity of detectors that select queries, in two gates of which neither replaces the other.

*Gate A*, float32 graph against PyTorch: rows are aligned by the position that each was selected from, which a
validation copy of the graph gives as an extra output (it never ships). What is aligned is held to fixed limits; what
only one of both selected must lie at the cut. A right rewrite is far inside; border padding, a missing or swapped
position embedding, another epsilon, another GELU, aligned corners are far outside, though average precision hardly
moves.

*Gate B*, reduced precision against PyTorch: rounding may select other queries, so decisions are judged: how much of the
selection is shared, how far from the cut the lost queries were, and whether detections that users act on have partners
in both directions. With random weights that proves nothing about precision, since such weights amplify noise and their
scores lie close together; then only what holds for any weights is judged, and the verdict says so. Where no detection
is sure enough to be matched, nothing is proven either, and the verdict says that as well.

Elementwise differences of outputs whose rows moved are reported and are no criterion.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from deploy import units
from deploy.backends.base import Array
from deploy.parity.compare import Candidate
from deploy.parity.detection import MATCH_IOU, MATCH_SCORE, Matches, match_detections, match_overlap
from deploy.parity.inputs import InputPack
from deploy.parity.metrics import TASKS, concatenate, judge, pool
from deploy.parity.validation import (
    Image,
    Open,
    Seen,
    SelectingFile,
    images_of,
    islands,
    names_of,
    run_file,
    run_outputs,
)
from deploy.preprocess import channels_first
from deploy.records import ParityRecord, Precision, SelectionCheck, Tolerance

if TYPE_CHECKING:
    from deploy.models.selecting import SelectingModel

Float = NDArray[np.float64]

# Gate A. Fixed beforehand, never taken from an observed error: a query that is lost always lies within the sum of both
# errors of its score.
MEDIAN, LARGEST, BOX, CUT = 5e-5, 1e-3, 2e-5, 1e-4  # logits, logits, boxes in 0..1, scores at the cut
# Gate B for random weights: right graphs of a model share more than this, graphs with something else in them a few %.
RANDOM_OVERLAP = 0.9
RANDOM_OVERLAP_8_BITS = 0.2  # rounded to 256 levels, random weights select other queries: 42 % are shared (tiny, INT8)
_NOTHING = Tolerance()
BEFORE = ("deploy form", "traced")  # float32 stages from which the graph of gate A is made
JUDGED_GROUPS = ("noise", "natural", "photos")  # on plain extremes most positions are tied, and overlap says nothing


def check_selection(
    model: SelectingModel,
    float32: onnx.ModelProto,
    files: Sequence[SelectingFile | Candidate],
    inputs: InputPack,
    open_: Open,
    tolerances: Mapping[str, Tolerance],
    *,
    random: bool,
    ranges: Collection[str] = JUDGED_GROUPS,
) -> tuple[SelectionCheck, ...]:
    """Put files through gate A (float32) or gate B (everything else).

    Args:
        model: The training form in PyTorch.
        float32: The graph before its types were written, in which values are found by their place and shape.
        files: What is checked; a ``Candidate`` by its outputs only.
        inputs: The parity inputs.
        open_: Opens an ONNX file on ONNX Runtime's CPU.
        tolerances: Precision -> limits; gate B reads ``overlap``, ``margin``, ``matched`` and ``score``.
        random: Whether the weights are random.
        ranges: Groups of inputs that the ranges of 8 bits are for.

    Raises:
        ParityError: the graph does not show its selection where the system says.
    """
    expected = [model.select(chunk.feeds) for chunk in inputs.chunks]
    names = names_of(float32, model, inputs.chunks[0].feeds, expected[0], open_)
    groups = [group for chunk in inputs.chunks for group in chunk.groups]
    height, width = channels_first(next(iter(inputs.chunks[0].feeds.values()))).shape[2:]
    overlap = match_overlap((height, width))
    counts = [len(chunk.groups) for chunk in inputs.chunks]
    mine = [image for run, count in zip(expected, counts, strict=True) for image in images_of(run, count)]
    checks = []
    for file in files:
        start = time.perf_counter()
        if isinstance(file, Candidate):
            theirs = run_outputs(file, inputs, tuple(expected[0].outputs))
        else:
            theirs = run_file(file, names, inputs, expected, open_)
        if file.precision is Precision.FP32:
            check = gate_a(file.stage, mine, theirs, limits=tolerances[file.precision.value])
        else:
            limits, only = tolerances[file.precision.value], ranges if file.precision.quantised else None
            check = gate_b(file.stage, mine, theirs, groups, limits, overlap, random=random, ranges=only)
        if isinstance(file, SelectingFile) and file.typed:
            check = _failing(check, islands(file.typed(), names))
        checks.append(dataclasses.replace(check, seconds=time.perf_counter() - start))
    return tuple(checks)


def with_selection(parity: ParityRecord, checks: Sequence[SelectionCheck]) -> ParityRecord:
    """Add the gates to a parity record; either one's failure is the verdict.

    Where PyTorch's own scores tie at the cut, a right graph may select the other query, and its free outputs then lack
    a detection. Gate A has held such a graph with PyTorch's selection imposed: its free outputs are no criterion.
    """
    parity = _without_ties(parity, checks)
    failed = [check for check in checks if not check.ok]
    last = [check for check in checks if check.gate != "A"][-1:]
    told = "; ".join(told_of(check) for check in (failed[:1] or [*(c for c in checks if c.gate == "A"), *last]))
    verdict = parity.verdict if not parity.ok else told if failed else f"{told}; {parity.verdict}"
    return dataclasses.replace(
        parity,
        ok=parity.ok and not failed,
        verdict=verdict,
        selection=tuple(checks),
        notes=(*parity.notes, *dict.fromkeys(note for check in checks for note in check.notes)),
        seconds=parity.seconds + sum(check.seconds for check in checks),
    )


def _without_ties(parity: ParityRecord, checks: Sequence[SelectionCheck]) -> ParityRecord:
    held = [check for check in checks if check.gate == "A"]
    tied = max((check.tied for check in held), default=0)
    if not tied or not all(check.ok for check in held):
        return parity
    stages = {*BEFORE, *(check.stage for check in held)}
    comparisons = tuple(
        dataclasses.replace(c, passed=True, failures=())
        if c.stage in stages and c.precision == Precision.FP32.value and np.isfinite(c.max_abs)
        else c
        for c in parity.comparisons
    )
    if comparisons == parity.comparisons:
        return parity
    ok = all(c.passed for c in comparisons) and all(d.ok for d in parity.decisions)
    holds = f"parity holds over {len(comparisons)} comparisons on {comparisons[0].images} images"
    note = (
        f"PyTorch's own scores tie at the cut in {tied} images (within {units.given(CUT)}): float32 outputs that "
        "lack a detection there were judged with PyTorch's selection imposed"
    )
    verdict = holds if ok else parity.verdict
    return dataclasses.replace(parity, ok=ok, verdict=verdict, comparisons=comparisons, notes=(*parity.notes, note))


def told_of(check: SelectionCheck) -> str:
    """Say in a sentence what a gate found."""
    if not check.ok:
        return f"gate {check.gate} fails at {check.stage!r}: {'; '.join(check.failures)}"
    if check.gate == "A":
        return (
            f"gate A holds at {check.stage!r}: logits of one position differ by {units.number(check.largest)} at "
            f"most, boxes by {units.number(check.boxes)}"
        )
    if why := check.unproven:
        seen = f"scores and boxes in float32, {units.percent(check.overlap)} of the selection shared"
        known = "" if check.overlap is None else f", {seen}"
        return f"the precision of {check.stage!r} is NOT proven ({why}): finite{known}"
    shared = "" if check.overlap is None else f"{units.percent(check.overlap)} of the selection shared, "
    return f"gate B holds at {check.stage!r}: {shared}{check.matches}"


def gate_a(
    stage: str, expected: Sequence[Image], got: Sequence[Image], *, limits: Tolerance = _NOTHING
) -> SelectionCheck:
    """Hold a float32 graph to PyTorch, image by image; ``limits`` are those of its outputs, rows paired."""
    check = _measured("A", stage, expected, got)
    apart = [
        f"{what} {units.number(value)} > {units.given(limit)}"
        for what, value, limit in (
            ("logits of the same position differ by a median of", check.median, MEDIAN),
            ("logits of the same position differ by", check.largest, LARGEST),
            ("boxes differ by", check.boxes, BOX),
            ("a query that only one of both selected is away from the cut by", check.margin, CUT),
        )
        if value is None or not value <= limit
    ]
    tied = sum(_tied(image.seen) for image in expected if image.seen)
    return _failing(dataclasses.replace(check, tied=tied), [*apart, *_of_outputs(expected, got, limits)])


def gate_b(
    stage: str, expected: Sequence[Image], got: Sequence[Image], groups: Sequence[str], limits: Tolerance,
    overlap: float, *, random: bool, ranges: Collection[str] | None = None,
) -> SelectionCheck:  # fmt: skip
    """Hold decisions in reduced precision to PyTorch's.

    Args:
        stage: Its name.
        expected: PyTorch's images.
        got: The candidate's.
        groups: Of each image; overlap is judged over those that are no extremes.
        limits: Of the precision.
        overlap: Least IoU of a match.
        random: Judge only what holds for any weights.
        ranges: In 8 bits, the groups that the calibrated ranges are for; the others are held to be finite: they are
            clipped, and what a detector finds in them is no decision.
    """
    plain = [i for i, group in enumerate(groups) if group in (JUDGED_GROUPS if ranges is None else ranges)]
    decided = range(len(groups)) if ranges is None else plain
    check = _measured("B", stage, _of(expected, decided), _of(got, decided), overlap)
    shared = _overlap(_of(expected, plain), _of(got, plain))
    check = dataclasses.replace(check, overlap=shared, random=random, images=len(got))
    found = _not_finite([image for i, image in enumerate(got) if i not in decided])
    least = (RANDOM_OVERLAP if ranges is None else RANDOM_OVERLAP_8_BITS) if random else limits.overlap
    if shared is not None and least is not None and _below(shared, least):
        found.append(f"the selection shared is {units.percent(shared)} < {units.percent(least)}")
    if random:
        return _failing(check, found)
    if _below(check.matched, limits.matched):
        found.append(f"matched detections {units.percent(check.matched)} < {units.percent(limits.matched)}")
    for what, value, limit in (
        ("a query that only one of both selected is away from the cut by", check.margin, limits.margin),
        ("scores of matched detections differ by", check.score, limits.score),
    ):
        if value is not None and limit is not None and not value <= limit:
            found.append(f"{what} {units.number(value)} > {units.given(limit)}")
    notes = []
    if check.matched is None:
        notes.append(f"{stage}: {check.matches}; photos of what it was trained on would judge more (--images DIR)")
    if outside := len(got) - len(decided):
        kind = " or ".join(sorted(ranges or ()))
        notes.append(f"{stage}: {outside} images that are not {kind} lie outside the calibrated ranges: held finite")
    return dataclasses.replace(_failing(check, found), notes=tuple(notes))


def _of(images: Sequence[Image], places: Sequence[int]) -> list[Image]:
    return [images[place] for place in places]


def _not_finite(images: Sequence[Image]) -> list[str]:
    bad = sum(not image.finite() for image in images)
    return [f"NaN or infinity in {bad} of {len(images)} images"] if bad else []


def _tied(seen: Seen) -> bool:
    """Whether the first position that was not selected is as good as the last one that was."""
    ranked = -np.sort(-seen.scores)
    count = len(seen.index)
    return len(ranked) > count and bool(ranked[count - 1] - ranked[count] <= CUT)


def _of_outputs(expected: Sequence[Image], got: Sequence[Image], limits: Tolerance) -> list[str]:
    """Judge the outputs, PyTorch's selection imposed where another was taken; ``NaN`` is told elsewhere."""
    finite = [(a.outputs, b.outputs) for a, b in zip(expected, got, strict=True) if b.finite()]
    if limits.unbounded or not finite:
        return []
    task = "detection" if "scores" in finite[0][0] else "queries"
    rows = [
        TASKS[task](*({name: np.asarray(array)[None] for name, array in side.items()} for side in pair))
        for pair in finite
    ]
    return [
        f"output {name!r}: {failure}"
        for name in rows[0]
        for failure in judge(pool(concatenate([one[name] for one in rows])), limits)
    ]


def _below(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and not value >= limit


def _failing(check: SelectionCheck, failures: Sequence[str]) -> SelectionCheck:
    found = (*check.failures, *failures)
    return dataclasses.replace(check, failures=found, ok=not found)


def _measured(
    gate: str, stage: str, expected: Sequence[Image], got: Sequence[Image], overlap: float = MATCH_IOU
) -> SelectionCheck:
    """Measure what both gates report."""
    pairs = list(zip(expected, got, strict=True))
    bad = _not_finite(got)
    matches = Matches.over(match_detections(_detections(a), _detections(b), overlap) for a, b in pairs if b.finite())
    seen = [_aligned(a.seen, b.seen) for a, b in pairs if a.seen and b.seen and b.finite()]
    rows = np.concatenate([s.logits for s in seen]) if seen else np.zeros(0)
    return SelectionCheck(
        stage=stage,
        gate=gate,
        images=len(pairs),
        moved=float(np.mean([s.moved for s in seen])) if seen else None,
        overlap=_overlap(*zip(*pairs, strict=True)) if seen else None,
        lost=sum(s.lost for s in seen) if seen else None,
        margin=max(s.margin for s in seen) if seen else None,
        rank=min((s.rank for s in seen if s.lost), default=None),
        median=float(np.median(rows)) if rows.size else None,
        largest=float(rows.max()) if rows.size else None,
        boxes=max(s.boxes for s in seen) if seen else None,
        elementwise=max(s.elementwise for s in seen) if seen else None,
        matched=matches.share,
        matches=matches.told(),
        score=matches.score if matches.share is not None else None,
        random=False,
        ok=not bad,
        failures=tuple(bad),
        notes=(),
        seconds=0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Aligned:
    """One image's rows by position: see ``SelectionCheck``; ``logits`` are all differences."""

    moved: float
    lost: int
    margin: float
    rank: int
    logits: Float
    boxes: float
    elementwise: float


def _aligned(a: Seen, b: Seen) -> _Aligned:
    place = {int(position): row for row, position in enumerate(b.rows)}
    row = np.array([place.get(int(position), -1) for position in a.index])
    kept, lost, added = row >= 0, np.flatnonzero(~np.isin(a.index, b.index)), np.setdiff1d(b.index, a.index)
    apart = np.abs(a.scores[np.concatenate([a.index[lost], added])] - a.scores[a.index].min())
    return _Aligned(
        moved=float((a.index != b.index).mean()),
        lost=len(lost),
        margin=float(apart.max(initial=0.0)),
        rank=int(lost[0]) + 1 if len(lost) else len(a.index) + 1,
        logits=np.abs(b.logits[row] - a.logits)[kept].reshape(-1),
        boxes=float(np.abs(b.boxes[row] - a.boxes)[kept].max(initial=0.0)),
        elementwise=float(np.abs(b.placed - a.logits).max()),
    )


def _overlap(expected: Sequence[Image], got: Sequence[Image]) -> float | None:
    """Return the share of PyTorch's selection that the candidate selected as well, over all images."""
    shares = [
        np.isin(a.seen.index, b.seen.index).mean() for a, b in zip(expected, got, strict=True) if a.seen and b.seen
    ]
    return float(np.mean(shares)) if shares else None


def _detections(image: Image) -> Mapping[str, Array]:
    """Return an image's detections; of raw outputs every pair of query and class that could match one."""
    if "scores" in image.outputs:
        return image.outputs
    logits, boxes = (np.asarray(image.outputs[name], np.float64) for name in image.outputs)
    scores = 1 / (1 + np.exp(-logits))
    query, labels = np.nonzero(scores >= MATCH_SCORE / 2)
    half = boxes[query, 2:] / 2
    corners = np.concatenate([boxes[query, :2] - half, boxes[query, :2] + half], 1)
    return {"labels": labels, "boxes": corners, "scores": scores[query, labels]}
