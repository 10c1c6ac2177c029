"""Detections are paired before they are compared: order is forgiven, everything else is not."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.errors import ParityError
from deploy.parity.detection import TIE, iou
from deploy.parity.metrics import TASKS, furthest, pool

COUNT, CLASSES = 20, 5


def detections(images=2):
    draw = np.random.default_rng(0)
    corner = draw.uniform(0, 500, (images, COUNT, 2))
    return {
        "labels": draw.integers(0, CLASSES, (images, COUNT)),
        "boxes": np.concatenate([corner, corner + draw.uniform(20, 200, corner.shape)], 2).astype(np.float32),
        "scores": -np.sort(-draw.uniform(0.3, 0.9, (images, COUNT)), axis=1).astype(np.float32),
    }


def changed(found, **arrays):
    return {**{name: value.copy() for name, value in found.items()}, **arrays}


def apart(candidate, reference=None):
    rows = TASKS["detection"](reference or detections(), candidate)
    return {name: pool(value).max_relative for name, value in rows.items()}


def test_order_is_forgiven():
    order = np.random.default_rng(1).permutation(COUNT)
    assert apart({name: value[:, order] for name, value in detections().items()}) == dict.fromkeys(detections(), 0.0)
    assert furthest("detection", detections(), detections()) == (0.0, 0.0)


def test_the_smallest_change_of_a_paired_value_is_measured():
    found = detections()
    found["boxes"][1, 3, 0] += 1.0
    found["scores"][0, 2] += 1e-3
    errors = apart(found)
    assert errors["boxes"] == pytest.approx(1 / detections()["boxes"].max(), rel=1e-4)
    assert errors["scores"] == pytest.approx(1e-3 / detections()["scores"].max(), rel=1e-3)


def test_what_is_near_the_cut_may_be_missing_and_what_is_not_may_not():
    """A detection is replaced by another one, once the last of the list and once the best of it."""
    reference = detections()
    for place, allowed in ((COUNT - 1, True), (0, False)):
        found = changed(reference)
        lowest = found["scores"][0, -1]
        found["boxes"][0, place] = [600, 600, 700, 700]
        found["scores"][0, place] = lowest
        errors = apart(found, reference)
        assert (errors["scores"] <= 1e-6) is allowed
        assert (errors["labels"] == 0) is allowed
    gap = reference["scores"][0, 0] - reference["scores"][0, -1]
    assert gap > TIE
    assert errors["scores"] == pytest.approx(gap / reference["scores"].max(), rel=1e-3)
    assert errors["labels"] >= 1


def test_a_detection_that_is_added_counts_like_one_that_is_lost():
    found = detections()
    found["boxes"][0, -1], found["scores"][0, -1] = [600, 600, 700, 700], 0.95
    assert apart(found)["scores"] > 0.3


@pytest.mark.parametrize("spoil", ["labels", "boxes", "both rows alike", "sizes swapped"])
def test_wrong_detections_fail(spoil):
    found = detections()
    if spoil == "labels":
        found["labels"] = (found["labels"] + 1) % CLASSES
    elif spoil == "boxes":
        found["boxes"] += 300
    elif spoil == "both rows alike":
        found = {name: np.repeat(value[:1], 2, axis=0) for name, value in found.items()}
    else:
        found["boxes"] = found["boxes"][..., [1, 0, 3, 2]]
    assert max(apart(found).values()) > 0.05


def test_numbers_that_are_none_are_seen():
    found = detections()
    found["boxes"][1, 5, 2] = np.nan
    rows = TASKS["detection"](detections(), found)
    assert pool(rows["boxes"]).nonfinite == 1
    with pytest.raises(ParityError, match="missing"):
        TASKS["detection"](detections(), {"labels": found["labels"]})


def test_queries_are_rows_in_any_order():
    draw = np.random.default_rng(0)
    reference = {"pred_logits": draw.standard_normal((2, 9, 4)), "pred_boxes": draw.uniform(0, 1, (2, 9, 4))}
    order = draw.permutation(9)
    found = {name: value[:, order] for name, value in reference.items()}
    assert furthest("queries", reference, found) == (0.0, 0.0)
    found["pred_boxes"][0, 3] += 0.01
    assert furthest("queries", reference, found)[0] == pytest.approx(0.01)
    mixed = {"pred_logits": found["pred_logits"], "pred_boxes": found["pred_boxes"][:, ::-1]}  # no row fits as a whole
    assert furthest("queries", reference, mixed)[0] > 0.1


def test_overlap():
    boxes = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [3, 3, 3, 3]])
    assert np.allclose(iou(boxes, boxes), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])
