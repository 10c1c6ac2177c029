"""Detections and queries in the other run's order: rows are sets, and equal scores may stand in either order.

Two right detectors rarely agree row by row: scores that differ by less than rounding swap rows, and at the cut one of
two such detections is left out. So rows are paired first, one to one, and what is then compared is a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.backends.base import Array

Float = NDArray[np.float64]
Outputs = Mapping[str, Array]

MIN_IOU = 0.5  # of a pair: whatever is nearer than this is measured, not refused
TIE = 0.02  # a detection whose score is this near the other run's lowest may be missing there

MATCH_SCORE = 0.5  # detections that users act on; both runs must have them
MATCH_IOU, MATCH_IOU_SMALL, SMALL = 0.9, 0.85, 320  # overlap of a match; on small inputs a pixel is a larger share


def align_detections(reference: Outputs, candidate: Outputs) -> tuple[dict[str, Float], dict[str, Float]]:
    """Pair the detections of each image: same label, boxes that overlap, nearest first.

    What has no partner is told by its score. The other run left it out, so its score there is at most the lowest that
    is in; the two scores differ by at least what lies between. Near the cut that is nothing. Beyond ``TIE`` the label
    counts as wrong as well. An image with NaN or infinity is returned as it came.

    Args:
        reference: ``labels`` [N,K], ``boxes`` [N,K,4] as corners, ``scores`` [N,K].
        candidate: The same of the other run.

    Returns:
        Both in the reference's order, as float64.
    """
    expected = {name: np.asarray(value, np.float64) for name, value in reference.items()}
    got = {name: np.array(candidate[name], np.float64) for name in expected}
    for image in range(len(expected["scores"])):
        a, b = ({name: value[image] for name, value in side.items()} for side in (expected, got))
        if all(np.isfinite(value).all() for value in b.values()):
            for name, value in _aligned(a, b).items():
                got[name][image] = value
    return expected, got


def _aligned(a: Mapping[str, Float], b: Mapping[str, Float]) -> dict[str, Float]:
    """Return the candidate's detections of one image, ``b``, in the order of ``a``."""
    partner = pair(_cost(a, b))
    alone = np.flatnonzero(partner < 0)
    left = np.setdiff1d(np.arange(len(partner)), partner)
    order = partner.copy()
    order[alone] = left
    out = {name: value[order] for name, value in b.items()}
    lost = np.maximum(a["scores"][alone] - b["scores"].min(initial=np.inf), 0)
    added = np.maximum(b["scores"][left] - a["scores"].min(initial=np.inf), 0)
    error = np.maximum(lost, added)
    out["scores"][alone] = a["scores"][alone] - error
    out["boxes"][alone] = a["boxes"][alone]
    wrong = a["labels"].max(initial=0) + 1
    out["labels"][alone] = a["labels"][alone] + np.where(error > TIE, wrong, 0)
    return out


def _cost(a: Mapping[str, Float], b: Mapping[str, Float]) -> Float:
    """Return how far each pair [K,K] is apart, infinite for pairs that cannot be one detection."""
    boxes = a["boxes"], b["boxes"]
    scale = max(float(np.abs(boxes[0]).max(initial=0)), 1e-12)
    apart = np.abs(boxes[0][:, None] - boxes[1][None]).max(2) / scale
    possible = (a["labels"][:, None] == b["labels"][None]) & (iou(*boxes) >= MIN_IOU)
    return np.where(possible, apart + np.abs(a["scores"][:, None] - b["scores"][None]), np.inf)


def iou(a: Float, b: Float) -> Float:
    """Return the overlap [A,B] of boxes [A,4] and [B,4] given as corners; equal boxes without area overlap fully."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - shared
    equal = np.isclose(a[:, None], b[None], rtol=1e-3, atol=1e-3).all(2)
    return np.asarray(np.where(equal, 1.0, shared / np.where(union > 0, union, 1.0)))


def align_queries(reference: Outputs, candidate: Outputs) -> tuple[dict[str, Float], dict[str, Float]]:
    """Put the candidate's queries, rows of axis 1 of every output, next to the reference's nearest ones.

    A decoder treats its queries alike, so their order means nothing. Every row gets a partner, however far.
    """
    expected = {name: np.asarray(value, np.float64) for name, value in reference.items()}
    got = {name: np.array(candidate[name], np.float64) for name in expected}
    for image in range(len(next(iter(expected.values())))):
        if all(np.isfinite(value[image]).all() for value in got.values()):
            order = pair(sum(_distance(value[image], got[name][image]) for name, value in expected.items()))
            for value in got.values():
                value[image] = value[image][order]
    return expected, got


def _distance(a: Float, b: Float) -> Float:
    """Return the largest difference between rows of [Q,...], over the largest value, as [Q,Q]."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    scale = max(float(np.abs(a).max(initial=0)), 1e-12)
    return np.stack([np.abs(row - b).max(1) for row in a]) / scale


def pair(cost: Float | int) -> NDArray[np.intp]:
    """Pair rows with columns one to one, mutual nearest first; -1 where all that is left costs infinity."""
    cost = np.array(cost, np.float64)
    partner = np.full(len(cost), -1, np.intp)
    while np.isfinite(cost).any():
        best = cost.argmin(1)
        rows = np.flatnonzero(np.isfinite(cost.min(1)) & (cost.argmin(0)[best] == np.arange(len(cost))))
        partner[rows] = best[rows]
        cost[rows] = np.inf
        cost[:, best[rows]] = np.inf
    return partner


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """Detections of two runs above ``MATCH_SCORE``, matched one to one in both directions.

    ``lost``: of ``expected`` in the reference, without a partner in the candidate; ``added``: of ``got`` in the
    candidate, without one in the reference. ``score`` is the largest difference of the scores of a match.
    """

    expected: int = 0
    got: int = 0
    lost: int = 0
    added: int = 0
    score: float = 0.0

    @classmethod
    def over(cls, parts: Iterable[Matches]) -> Matches:
        """Sum up images."""
        found = list(parts)
        counts = {name: sum(getattr(m, name) for m in found) for name in ("expected", "got", "lost", "added")}
        return cls(**counts, score=max((m.score for m in found), default=0.0))

    @property
    def share(self) -> float | None:
        """The share, of both directions, that has a partner; ``None`` where no score is high enough."""
        total = self.expected + self.got
        return 1 - (self.lost + self.added) / total if total else None

    def told(self) -> str:
        """Say it in a sentence."""
        if self.share is None:
            return f"no detection has a score of {MATCH_SCORE} or more: nothing was matched"
        return (
            f"{self.expected - self.lost} of {self.expected} detections above {MATCH_SCORE} matched, "
            f"{self.added} added; scores of a match differ by {self.score:.2g} at most"
        )


def match_overlap(size: tuple[int, int]) -> float:
    """Return the overlap that a match needs at an input size, height and width in pixels."""
    return MATCH_IOU if min(size) >= SMALL else MATCH_IOU_SMALL


def match_detections(reference: Outputs, candidate: Outputs, overlap: float) -> Matches:
    """Match the detections of one image: same label, one to one, boxes that overlap by ``overlap`` or more.

    A detection above ``MATCH_SCORE`` may have its partner below it: scores are compared, not cut twice.

    Args:
        reference: ``labels`` [K], ``boxes`` [K,4] as corners, ``scores`` [K].
        candidate: The same of the other run.
        overlap: Least IoU.
    """
    a, b = (
        {name: np.asarray(side[name], np.float64) for name in ("labels", "boxes", "scores")}
        for side in (reference, candidate)
    )
    apart = np.abs(a["scores"][:, None] - b["scores"][None])
    overlaps = iou(a["boxes"], b["boxes"])
    possible = (a["labels"][:, None] == b["labels"][None]) & (overlaps >= overlap) & np.isfinite(apart)
    partner = pair(np.where(possible, 1 - overlaps + apart, np.inf))
    rows = np.flatnonzero(partner >= 0)
    alone = np.setdiff1d(np.arange(len(b["scores"])), partner[rows])
    high = {name: side["scores"] >= MATCH_SCORE for name, side in (("a", a), ("b", b))}
    judged = rows[high["a"][rows] | high["b"][partner[rows]]]
    return Matches(
        expected=int(high["a"].sum()),
        got=int(high["b"].sum()),
        lost=int((high["a"] & (partner < 0)).sum()),
        added=int(high["b"][alone].sum()),
        score=float(apart[judged, partner[judged]].max(initial=0.0)),
    )
