"""How far two outputs are apart, and whether that is too far.

Errors are kept per image (``Rows``) and pooled at the end, so that batches, padding and groups need no second pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.backends.base import Array
from deploy.errors import ParityError
from deploy.parity.detection import align_detections, align_queries
from deploy.records import Comparison, Tolerance

Float = NDArray[np.float64]
Outputs = Mapping[str, Array]
Align = Callable[[Outputs, Outputs], tuple[dict[str, Float], dict[str, Float]]]

TOP = 5
_NO_CLASSES: dict[str, Any] = {"top1": None, "top5": None, "flip": None}  # [images, detections] are no class scores
NOT_JUDGED = "not judged"  # what ``usage`` says where nothing is limited
UNJUDGED = "no limit of the tolerance applies to this output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Errors of one output, one value per image, all float64 [images].

    Attributes:
        max_abs: Largest ``|candidate - reference|``.
        mean_abs: Mean of the same.
        peak: Largest ``|reference|``.
        error: Sum of squared differences.
        energy: Sum of squared reference values.
        cosine: Cosine of the angle between both, flattened.
        finite: 1 where the candidate has neither NaN nor infinity.
        top1: 1 where both have the same largest class; ``None`` where the output is not [images, classes].
        top5: Share of the reference's five largest classes that are among the candidate's five; ``None`` as above, and
            where there are not more than five classes.
        flip: The reference's score of its best class minus its score of the candidate's best class: 0 where both choose
            the same, infinite where the candidate is not finite; ``None`` as ``top1``.
    """

    max_abs: Float
    mean_abs: Float
    peak: Float
    error: Float
    energy: Float
    cosine: Float
    finite: Float
    top1: Float | None
    top5: Float | None
    flip: Float | None

    def __len__(self) -> int:
        return len(self.max_abs)

    def __bool__(self) -> bool:
        """Say whether the candidate is finite; polygraphy reads this as the match of one output."""
        return bool(self.finite.all())

    def take(self, rows: slice | NDArray[np.bool_]) -> Rows:
        """Return the errors of some images."""
        return _each(lambda column: column[0][rows], [self])


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Errors of one output over all images.

    ``max_relative`` is ``max_abs`` over the largest ``|reference|`` of all images; ``relative_l2`` and ``snr_db`` pool
    the energy of all images; ``cosine`` is that of the worst image; ``top1`` and ``top5`` are shares of images.
    ``flips`` holds, for each image whose best class changed, how far apart the reference has the two classes, over the
    same largest ``|reference|``.
    """

    images: int
    nonfinite: int  # images with NaN or infinity
    max_abs: float
    mean_abs: float
    max_relative: float
    relative_l2: float
    cosine: float
    snr_db: float
    top1: float | None
    top5: float | None
    flips: tuple[float, ...] = ()


def compare_classification(reference: Outputs, candidate: Outputs) -> dict[str, Rows]:
    """Compare every output image by image; outputs [images, classes] get top-1 and top-5 agreement as well.

    Raises:
        ParityError: an output is missing or has another shape.
    """
    return {name: _rows(name, expected, candidate) for name, expected in reference.items()}


def compare_detection(reference: Outputs, candidate: Outputs) -> dict[str, Rows]:
    """Compare ``labels``, ``boxes`` and ``scores`` of detections that were paired before.

    Raises:
        ParityError: an output is missing or has another shape.
    """
    return _compare_aligned(align_detections, reference, candidate)


def compare_queries(reference: Outputs, candidate: Outputs) -> dict[str, Rows]:
    """Compare outputs [images, queries, ...] whose queries were paired before.

    Raises:
        ParityError: an output is missing or has another shape.
    """
    return _compare_aligned(align_queries, reference, candidate)


def _compare_aligned(align: Align, reference: Outputs, candidate: Outputs) -> dict[str, Rows]:
    for name, value in reference.items():
        _check_shape(name, value, candidate)
    expected, got = align(reference, candidate)
    return {name: dataclasses.replace(_rows(name, value, got), **_NO_CLASSES) for name, value in expected.items()}


# A task brings its own comparison where distance of values says little (boxes are matched before they are compared).
TASKS: Mapping[str, Callable[[Outputs, Outputs], dict[str, Rows]]] = {
    "classification": compare_classification,
    "detection": compare_detection,
    "queries": compare_queries,
    "maps": compare_classification,
}


def furthest(task: str, reference: Outputs, candidate: Outputs) -> tuple[float, float]:
    """Return the largest difference of all outputs, absolute and over the largest ``|reference|`` of its output."""
    pooled = [pool(rows) for rows in TASKS[task](reference, candidate).values()]
    return max(m.max_abs for m in pooled), max(m.max_relative for m in pooled)


def _check_shape(name: str, expected: Array, candidate: Outputs) -> None:
    if name not in candidate:
        raise ParityError(
            f"output {name!r} is missing: got {', '.join(candidate) or 'none'}",
            hint="inspect the outputs of the graph of this stage",
        )
    if candidate[name].shape != expected.shape:
        raise ParityError(
            f"output {name!r} has shape {list(candidate[name].shape)}, expected {list(expected.shape)} as in PyTorch",
            hint="inspect the outputs of the graph of this stage",
        )


def _rows(name: str, expected: Array, candidate: Outputs) -> Rows:
    _check_shape(name, expected, candidate)
    a = expected.reshape(len(expected), -1).astype(np.float64)
    b = candidate[name].reshape(len(expected), -1).astype(np.float64)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(b).all(axis=1))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        gap = np.where(finite[:, None], np.abs(a - b), np.inf)
        top1, top5, flip = _agreement(a, b, finite) if expected.ndim == 2 else (None, None, None)
        return Rows(
            max_abs=gap.max(axis=1),
            mean_abs=gap.mean(axis=1),
            peak=np.abs(a).max(axis=1),
            error=(gap**2).sum(axis=1),
            energy=(a**2).sum(axis=1),
            cosine=_cosine(a, np.where(finite[:, None], b, 0)),
            finite=finite.astype(np.float64),
            top1=top1,
            top5=top5,
            flip=flip,
        )


def _cosine(a: Float, b: Float) -> Float:
    """Return the cosine per row. Two zero rows agree (1), one zero row does not (0).

    ``1 - |u - v|^2 / 2`` of the unit vectors: near 1, where all decisions fall, a dot product loses half the digits.
    """
    norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    units = [x / np.where(norm == 0, 1, norm) for x, norm in zip((a, b), norms, strict=True)]
    cosine: Float = 1 - ((units[0] - units[1]) ** 2).sum(axis=1) / 2
    zero = [norm[:, 0] == 0 for norm in norms]
    return np.where(zero[0] & zero[1], 1.0, np.where(zero[0] | zero[1], 0.0, cosine))


def _agreement(a: Float, b: Float, finite: NDArray[np.bool_]) -> tuple[Float | None, Float | None, Float | None]:
    """Return ``top1``, ``top5`` and ``flip`` of ``Rows``."""
    classes = a.shape[1]
    if classes < 2:
        return None, None, None
    chosen = b.argmax(axis=1)
    top1 = (a.argmax(axis=1) == chosen) & finite
    flip: Float = np.where(finite, a.max(axis=1) - a[np.arange(len(a)), chosen], np.inf)
    if classes <= TOP:
        return top1.astype(np.float64), None, flip
    best = [np.argsort(-x, axis=1, kind="stable")[:, :TOP] for x in (a, b)]
    shared = (best[0][:, :, None] == best[1][:, None, :]).any(axis=2).mean(axis=1)
    return top1.astype(np.float64), np.where(finite, shared, 0.0), flip


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Join the errors of several batches."""
    return _each(np.concatenate, parts)


def _each(make: Callable[[list[Float]], Float], parts: Sequence[Rows]) -> Rows:
    """Make one ``Rows`` out of several, column by column."""
    columns: dict[str, Any] = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Rows)}
    joined: dict[str, Any] = {n: None if values[0] is None else make(values) for n, values in columns.items()}
    return Rows(**joined)


def pool(rows: Rows) -> Metrics:
    """Sum the errors of all images up. With NaN or infinity in the candidate, errors are infinite."""
    error, energy = float(rows.error.sum()), float(rows.energy.sum())
    return Metrics(
        images=len(rows),
        nonfinite=int((rows.finite == 0).sum()),
        max_abs=float(rows.max_abs.max()),
        mean_abs=float(rows.mean_abs.mean()),
        max_relative=_ratio(float(rows.max_abs.max()), float(rows.peak.max())),
        relative_l2=math.sqrt(_ratio(error, energy)),
        cosine=float(rows.cosine.min()),
        snr_db=_snr(error, energy),
        top1=None if rows.top1 is None else float(rows.top1.mean()),
        top5=None if rows.top5 is None else float(rows.top5.mean()),
        flips=_flips(rows),
    )


def _flips(rows: Rows) -> tuple[float, ...]:
    if rows.top1 is None or rows.flip is None:
        return ()
    peak = float(rows.peak.max())
    return tuple(_ratio(float(gap), peak) for gap in rows.flip[rows.top1 == 0])


def _ratio(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return error / scale if scale > 0 else math.inf


def _snr(error: float, energy: float) -> float:
    ratio = _ratio(error, energy)
    if ratio == 0:
        return math.inf
    return -math.inf if math.isinf(ratio) else -10 * math.log10(ratio)


def judge(metrics: Metrics, tolerance: Tolerance, ties: int = 0) -> tuple[str, ...]:
    """Return one sentence per limit that is broken, e.g. ``"cosine 0.9981 < 0.9999"``; none when all hold.

    NaN and infinity fail whatever the tolerance says, and so does an output that no limit applies to, unless it is left
    to ``deploy.parity.selection``: what was not judged has not passed. So many images whose best class changed as are
    ``ties`` (``deploy.parity.rounding``) are not held against ``top1``.
    """
    failures = []
    judged = _judged(metrics, tolerance, ties)
    if metrics.nonfinite:
        failures.append(f"NaN or infinity in {metrics.nonfinite} of {metrics.images} images")
    for name, value, limit in judged:
        most = name == "max_relative"
        if not (value <= limit if most else value >= limit):
            sentence = "{} {} {} {}".format(name, *_apart(value, ">" if most else "<", limit))
            tail = f", {ties} near tie{'s' if ties != 1 else ''} counted as agreement" if ties else ""
            failures.append(sentence + (tail if name == "top1" else ""))
    if not judged and not tolerance.decides:
        failures.append(UNJUDGED)
    return tuple(failures)


def usage(metrics: Metrics | Comparison, tolerance: Tolerance) -> tuple[float, str]:
    """Return how much of the tightest limit is used up (1 is the limit itself), and the sentence that says which."""
    ties = metrics.top1_ties if isinstance(metrics, Comparison) else 0
    shares = [(_share(*judged), *judged) for judged in _judged(metrics, tolerance, ties)]
    if not shares:
        return 0.0, NOT_JUDGED
    share, name, value, limit = max(shares, key=lambda s: (s[0], s[1] == "max_relative"))
    digits = 3 if value < 0.1 else 6  # an error needs few, a cosine near 1 many
    return share, f"{name} {value:.{digits}g} (limit {limit:g})"


def _judged(metrics: Metrics | Comparison, tolerance: Tolerance, ties: int) -> list[tuple[str, float, float]]:
    """List (metric, value, limit) for what is both measured and limited; near ties count as agreement."""
    values = {name: getattr(metrics, name) for name in ("max_relative", "cosine", "snr_db", "top1", "top5")}
    if metrics.top1 is not None and ties:
        values["top1"] = (round(metrics.top1 * metrics.images) + ties) / metrics.images
    pairs = ((name, value, getattr(tolerance, name)) for name, value in values.items())
    return [(name, value, limit) for name, value, limit in pairs if value is not None and limit is not None]


def _share(name: str, value: float, limit: float) -> float:
    if name == "snr_db":
        return float(10 ** ((limit - value) / 20)) if math.isfinite(value) else 0.0 if value > 0 else math.inf
    if name == "max_relative":
        return _ratio(value, limit)
    return _ratio(max(0.0, 1 - value), 1 - limit)


def _apart(value: float, sign: str, limit: float) -> tuple[str, str, str]:
    """Print both numbers with as many digits as it takes to tell them apart."""
    for digits in range(4, 17):
        if f"{value:.{digits}g}" != f"{limit:.{digits}g}":
            return f"{value:.{digits}g}", sign, f"{limit:.{digits}g}"
    return repr(value), sign, repr(limit)
