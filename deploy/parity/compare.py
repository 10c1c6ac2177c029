"""Every stage against the float32 PyTorch model, on the same inputs.

The reference is always one model, the checkpoint's training form (its deploy form where that is another function on
purpose: ``with_drift``), never the previous stage: small errors that add up over the stages stay visible. Running and
pairing is polygraphy's ``Comparator``; what is measured is ours.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.backends.base import Array, Feeds, Runner
from deploy.errors import ParityError, RecipeError, UnknownNameError, did_you_mean
from deploy.parity.inputs import InputPack
from deploy.parity.metrics import TASKS, Rows, concatenate, judge, pool, usage
from deploy.records import Comparison, Drift, ParityRecord, Precision, Tolerance

Infer = Callable[[Feeds], Mapping[str, Array]]

# Below this share of its own size, the outputs hardly depend on the image.
DEAD = 0.01
DECIDING = ("detection", "queries")  # tasks whose reduced precision ``deploy.parity.selection`` judges
PHOTOS = "photos"
EXTREMES = "extremes"  # the group of inputs that saturates every calibrated range; shown for INT8, not judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A stage to compare.

    Attributes:
        stage: "deploy form", "traced", "patched", "fp16", "engine".
        precision: Chooses the tolerance.
        open: Opens the stage for inference; called once, and what it gives is closed before the next one opens.
        sha256: Of the file that it opens, which is held against it when it is opened; empty where there is none.
    """

    stage: str
    precision: Precision
    open: Callable[[], Runner]
    sha256: str = ""


def check_parity(
    reference: Infer,
    candidates: Sequence[Candidate],
    inputs: InputPack,
    tolerances: Mapping[str, Tolerance],
    *,
    task: str = "classification",
    calibrated: bool = False,
) -> ParityRecord:
    """Compare every candidate with the reference and judge it.

    Args:
        reference: The float32 PyTorch model in training form: feeds -> outputs by name. It runs once per chunk.
        candidates: The stages; each is opened, run over all inputs and closed in turn.
        inputs: What ``deploy.parity.inputs.pack`` made.
        tolerances: Precision -> limits.
        task: Which comparison of ``deploy.parity.metrics.TASKS`` is used.
        calibrated: Whether the ranges of INT8 and FP8 were measured on a folder's photos. They clip what is not of
            their kind, so photos alone are judged then, and other images are shown.

    Returns:
        The verdict. A broken tolerance is a verdict (``ok`` is False), not an exception.

    Raises:
        ParityError: the reference gives NaN or infinity, or a candidate's outputs do not have the reference's names and
            shapes.
        RecipeError: a candidate's precision has no tolerance, or one without any limit.
        UnknownNameError: no such task.
    """
    start = time.perf_counter()
    if task not in TASKS:
        raise UnknownNameError(f"unknown task {task!r}", hint=did_you_mean(task, TASKS))
    for candidate in candidates:
        _require_limits(candidate.precision, tolerances, task)
    tolerances = {name: _of_outputs(tolerance, task) for name, tolerance in tolerances.items()}
    with _quiet_polygraphy():
        expected = _run("pytorch", reference, inputs)
        notes = _reference_notes(expected, inputs)
        if calibrated and any(candidate.precision.quantised for candidate in candidates):
            notes += _range_notes(inputs.counts)
        comparisons: list[Comparison] = []
        for candidate in candidates:
            with candidate.open() as runner:
                rows = _compare(expected, _run(candidate.stage, runner.infer, inputs), inputs, TASKS[task])
            comparisons += [_comparison(candidate, name, rows[name], inputs, tolerances, calibrated) for name in rows]
    if not comparisons:
        raise ParityError("nothing was compared: no stage or no output", hint="effdeploy export ... --until parity")
    return ParityRecord(
        ok=all(c.passed for c in comparisons),
        verdict=verdict_over(comparisons, tolerances),
        tolerances={c.precision: tolerances[c.precision] for c in comparisons},
        comparisons=tuple(comparisons),
        inputs=inputs.counts,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def with_drift(parity: ParityRecord, drift: Drift, limit: float | None, *, approximate: bool) -> ParityRecord:
    """Judge how far the deploy form is from the training form, and say so where parity did not compare with the latter.

    Args:
        parity: The verdict so far.
        drift: As measured.
        limit: Of ``drift.fp32_relative``; ``None``: not judged.
        approximate: Whether parity compared with the deploy form, because it is another function on purpose.
    """
    told = f"the deploy form is off from the training form by {drift.fp32_relative:.2g} of the largest output"
    held = "no limit was asked" if limit is None else f"parity.max_drift allows {limit:.2g}"
    if limit is not None and not drift.fp32_relative <= limit:  # NaN is no agreement
        enough = f"{1.5 * drift.fp32_relative:.2g}" if drift.fp32_relative < 0.5 else "null"
        wider = f"--set parity.max_drift={enough} takes it"
        verdict = f"{told}; {held}; {wider}" if parity.ok else f"{parity.verdict}; and {told}; {held}"
        return dataclasses.replace(parity, ok=False, verdict=verdict)
    if not approximate:
        return parity
    note = f"{told} ({held}); every other comparison is with the deploy form in PyTorch"
    return dataclasses.replace(parity, notes=(*parity.notes, note))


def _of_outputs(tolerance: Tolerance, task: str) -> Tolerance:
    """Leave the distance of outputs unjudged where a detector is judged by its decisions (gate B)."""
    if task not in DECIDING or not tolerance.decides:
        return tolerance
    return dataclasses.replace(tolerance, max_relative=None, cosine=None, snr_db=None, top1=None, top5=None)


def _require_limits(precision: Precision, tolerances: Mapping[str, Tolerance], task: str) -> None:
    limits = tolerances.get(precision.value)
    if limits is None or limits == Tolerance() or (limits.decides and limits.unbounded and task not in DECIDING):
        got = "none" if limits is None else "one without any limit"
        raise RecipeError(
            f"parity: the tolerance for {precision.value} is {got}; expected at least one limit",
            hint=f"--set parity.tolerances.{precision.value}.cosine=0.999",
        )


def _run(name: str, infer: Infer, inputs: InputPack) -> Any:
    """Run all chunks and return polygraphy's RunResults with one entry."""
    from polygraphy.comparator import Comparator

    from deploy.parity.polygraphy_runner import CallableRunner

    feeds = [chunk.feeds for chunk in inputs.chunks]
    return Comparator.run([CallableRunner(name, infer, feeds[0])], data_loader=feeds)


def _compare(
    expected: Any,
    got: Any,
    inputs: InputPack,
    compare: Callable[[Mapping[str, Array], Mapping[str, Array]], dict[str, Rows]],
) -> dict[str, Rows]:
    """Compare two runs and return the errors per output, padding dropped."""
    from polygraphy.comparator import Comparator, RunResults

    accuracy = Comparator.compare_accuracy(
        RunResults([*expected, *got]), compare_func=lambda a, b: compare(dict(a.items()), dict(b.items()))
    )
    # Since 0.50 there is one result per comparison function; before, the result itself.
    first = getattr(accuracy, "lst", [accuracy])[0]
    ((_, chunks),) = first.items()
    outputs = list(chunks[0])
    counted = [len(chunk.groups) for chunk in inputs.chunks]
    return {
        name: concatenate([rows[name].take(slice(n)) for rows, n in zip(chunks, counted, strict=True)])
        for name in outputs
    }


def _comparison(
    candidate: Candidate, output: str, rows: Rows, inputs: InputPack, tolerances: Mapping[str, Tolerance],
    calibrated: bool,
) -> Comparison:  # fmt: skip
    groups = np.array([group for chunk in inputs.chunks for group in chunk.groups])
    metrics = pool(rows.take(_judged(candidate.precision, groups, calibrated)))
    tolerance = tolerances[candidate.precision.value]
    failures = judge(metrics, tolerance)
    return Comparison(
        stage=candidate.stage,
        output=output,
        images=metrics.images,
        max_abs=metrics.max_abs,
        mean_abs=metrics.mean_abs,
        max_relative=metrics.max_relative,
        relative_l2=metrics.relative_l2,
        cosine=metrics.cosine,
        snr_db=metrics.snr_db,
        top1=metrics.top1,
        top5=metrics.top5,
        top1_gaps=metrics.flips,
        passed=not failures,
        failures=failures,
        per_input={group: pool(rows.take(groups == group)).max_relative for group in inputs.counts},
        precision=candidate.precision.value,
        sha256=candidate.sha256,
    )


def _judged(precision: Precision, groups: NDArray[np.str_], calibrated: bool) -> NDArray[np.bool_]:
    """Choose the images that decide: ranges that were measured on images of one kind do not hold on others."""
    photos: NDArray[np.bool_] = groups == PHOTOS
    judged = photos if calibrated and photos.any() else groups != EXTREMES
    return judged if precision.quantised and judged.any() else np.ones(len(groups), np.bool_)


def _range_notes(counts: Mapping[str, int]) -> list[str]:
    """Say which images decide where ranges were measured on photos."""
    if PHOTOS not in counts:
        return ["ranges were measured on photos, and there are none to judge on: --images with photos of that kind"]
    outside = sum(counts.values()) - counts[PHOTOS]
    return [f"in 8 bits {counts[PHOTOS]} photos decide; {outside} generated images lie outside the calibrated ranges"]


def _reference_notes(expected: Any, inputs: InputPack) -> list[str]:
    """Check that the reference can prove anything at all.

    Raises:
        ParityError: it gives NaN or infinity.
    """
    ((_, chunks),) = expected.items()
    notes = []
    for name in chunks[0].keys():  # noqa: SIM118  an IterationResult does not iterate over its names
        flat = _counted(name, chunks, inputs)
        if bad := int((~np.isfinite(flat).all(axis=1)).sum()):
            raise ParityError(
                f"the PyTorch reference gives NaN or infinity in output {name!r} for {bad} of {len(flat)} images; "
                "there is nothing to compare with",
                hint="check the weights file; without --weights the road itself can be tested",
            )
        size = float(np.sqrt((flat**2).mean()))
        spread = float(np.sqrt(((flat - flat.mean(axis=0)) ** 2).mean()))
        if size == 0 or (len(flat) > 1 and spread < DEAD * size):
            notes.append(
                f"output {name!r} of the reference hardly depends on the image (it varies by {spread:.2g}, its size is "
                f"{size:.2g}): parity on such a network proves little"
            )
    return notes


def _counted(output: str, chunks: Sequence[Any], inputs: InputPack) -> NDArray[np.float64]:
    """Return an output of the reference as [images, values], padding dropped."""
    parts = []
    for result, chunk in zip(chunks, inputs.chunks, strict=True):
        values, images = result[output], len(next(iter(chunk.feeds.values())))
        if values.shape[:1] != (images,):
            raise ParityError(
                f"output {output!r} of PyTorch has shape {list(values.shape)}, expected [{images}, ...]",
                hint="axis 0 of every output is the image; see docs/adding_a_model.md",
            )
        parts.append(values[: len(chunk.groups)].reshape(len(chunk.groups), -1))
    return np.concatenate(parts).astype(np.float64)


def verdict_over(comparisons: Sequence[Comparison], tolerances: Mapping[str, Tolerance]) -> str:
    """Say which comparison fails first, or which is nearest to its limit."""
    failed = [c for c in comparisons if not c.passed]
    if failed:
        first = failed[0]
        return (
            f"parity fails at {first.stage!r}, output {first.output!r}: {'; '.join(first.failures)} "
            f"({len(failed)} of {len(comparisons)} comparisons fail)"
        )
    nearest = [(*usage(c, tolerances[c.precision]), c) for c in comparisons]
    share, sentence, worst = max(nearest, key=lambda n: n[0])
    return (
        f"parity holds over {len(comparisons)} comparisons on {worst.images} images; "
        f"nearest to its limit is {worst.stage!r}: {sentence}, {share:.0%} used"
    )


@contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Send polygraphy's console output to logging, as debug messages: the verdict is told elsewhere, once."""
    from polygraphy.logger import G_LOGGER

    def demote(entry: logging.LogRecord) -> bool:
        entry.levelno, entry.levelname = logging.DEBUG, "DEBUG"
        return True

    log = logging.getLogger("Polygraphy")
    before = G_LOGGER.use_python_logging_system, G_LOGGER.colors
    severity = G_LOGGER.INFO if log.isEnabledFor(logging.DEBUG) else G_LOGGER.CRITICAL
    log.addFilter(demote)
    try:
        G_LOGGER.use_python_logging_system, G_LOGGER.colors = True, False
        with G_LOGGER.verbosity(severity):
            yield
    finally:
        G_LOGGER.use_python_logging_system, G_LOGGER.colors = before
        log.removeFilter(demote)
