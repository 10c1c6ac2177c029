"""Both gates of detectors on made-up runs: what is forgiven, what is judged, and what fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnx import TensorProto, helper

from deploy.errors import RecipeError
from deploy.parity.compare import _of_outputs, _require_limits
from deploy.parity.detection import match_detections
from deploy.parity.selection import CUT, gate_a, gate_b, told_of, with_selection
from deploy.parity.validation import Image, Names, Seen, islands
from deploy.records import Comparison, ParityRecord, Precision, Tolerance

QUERIES, POSITIONS, CLASSES = 20, 100, 4
SHIFT = np.array([8, 0, 8, 0])
LIMITS = Tolerance(overlap=0.9, margin=0.02, matched=0.995, score=0.05)


def run(seed=0):
    """One image: positions with distinct scores, the best selected; each query is one confident detection."""
    draw = np.random.default_rng(seed)
    scores = draw.permutation(np.linspace(-3, 3, POSITIONS))
    index = np.argsort(-scores)[:QUERIES]
    logits = draw.normal(-3, 0.1, (QUERIES, CLASSES))
    labels = draw.integers(0, CLASSES, QUERIES)
    logits[np.arange(QUERIES), labels] = np.linspace(3, 0.5, QUERIES)
    low = np.stack([np.arange(QUERIES) * 30.0, np.zeros(QUERIES)], 1)
    outputs = {
        "labels": labels,
        "boxes": np.concatenate([low, low + 25], 1),
        "scores": 1 / (1 + np.exp(-logits.max(1))),
    }
    boxes = draw.uniform(0.2, 0.8, (QUERIES, 4))
    seen = Seen(index=index, rows=index, logits=logits, boxes=boxes, placed=logits, scores=scores)
    return Image(outputs=outputs, seen=seen)


def seen(image, **changes):
    return dataclasses.replace(image, seen=dataclasses.replace(image.seen, **changes))


def outputs(image, **changes):
    return dataclasses.replace(image, outputs={**image.outputs, **changes})


def moved(image, order):
    s = image.seen
    kept = {"index": s.index[order], "rows": s.rows[order], "logits": s.logits[order], "boxes": s.boxes[order]}
    return seen(image, **kept, placed=s.logits[order])


def swapped(image, rank, distance):
    """Let the query of a rank give way to a position whose score lies ``distance`` below the cut."""
    s = image.seen
    other = int(np.setdiff1d(np.arange(POSITIONS), s.index)[0])
    index, scores = s.index.copy(), s.scores.copy()
    cut = scores[index].min()
    scores[other] = cut - distance
    if rank == QUERIES - 1:
        scores[index[rank]] = cut
    mine = seen(image, scores=scores)
    index[rank] = other
    return mine, seen(mine, index=index)


def test_order_is_forgiven_and_said_to_be_no_criterion():
    image = run()
    check = gate_a("graph", [image], [moved(image, np.roll(np.arange(QUERIES), 1))])
    assert check.ok
    assert (check.moved, check.largest, check.overlap, check.lost) == (1.0, 0.0, 1.0, 0)
    assert check.elementwise > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"logits": s.logits + 1e-4}, "by a median of 1"),
        (
            lambda s: {"logits": s.logits + 2e-3 * (s.logits == s.logits.max())},
            "logits of the same position differ by 0",
        ),
        (lambda s: {"boxes": s.boxes + 3e-5}, "boxes differ by"),
        (lambda s: {"logits": s.logits * np.nan}, "NaN or infinity in 1 of 1"),
    ],
)
def test_gate_a_fails(change, message):
    image = run()
    check = gate_a("graph", [image], [seen(image, **change(image.seen))])
    assert not check.ok
    assert any(message in failure for failure in check.failures)
    assert told_of(check).startswith("gate A fails at 'graph': ")


def test_only_what_lies_at_the_cut_may_be_selected_otherwise():
    near, there = swapped(run(), QUERIES - 1, CUT / 2)
    assert gate_a("graph", [near], [there]).ok
    far, there = swapped(run(), QUERIES - 1, 3 * CUT)
    check = gate_a("graph", [far], [there])
    assert not check.ok
    assert (check.lost, check.rank) == (1, QUERIES)
    best, there = swapped(run(), 0, CUT / 2)
    check = gate_a("graph", [best], [there])
    assert not check.ok
    assert check.rank == 1


def compared(stage, precision="fp32", **changes):
    fields = {
        "stage": stage, "output": "scores", "images": 8, "max_abs": 0.004, "mean_abs": 0.0, "max_relative": 0.004,
        "relative_l2": 0.0, "cosine": 1.0, "snr_db": 60.0, "top1": None, "top5": None, "passed": False,
        "failures": ("max_relative 0.004 > 0.0005",), "precision": precision,
    }  # fmt: skip
    return Comparison(**{**fields, **changes})


def parity_of(*comparisons):
    ok = all(c.passed for c in comparisons)
    return ParityRecord(
        ok=ok, verdict="parity fails", tolerances={}, comparisons=comparisons, inputs={}, notes=(), seconds=0.0
    )


def test_a_tie_at_the_cut_takes_nothing_from_a_graph_that_gate_a_has_held():
    tied, there = swapped(run(), QUERIES - 1, CUT / 2)
    check = gate_a("patched", [tied], [there])
    assert (check.ok, check.tied) == (True, 1)
    held = with_selection(parity_of(compared("traced"), compared("patched")), [check])
    assert held.ok
    assert "tie at the cut in 1 images" in held.notes[0]
    clear = gate_a("patched", [run()], [run()])
    assert (clear.ok, clear.tied) == (True, 0)
    for check_, comparison in (
        (clear, compared("patched")),  # no tie explains it
        (check, compared("engine sm89")),  # gate A has not seen that engine
        (check, compared("patched", precision="fp16")),
        (check, compared("patched", max_abs=np.inf)),
    ):
        assert not with_selection(parity_of(comparison), [check_]).ok
    failed = dataclasses.replace(check, ok=False, failures=("boxes",))
    for checks, excused in (([check], True), ([failed], False), ([check, failed], False)):  # gate A's alone to excuse
        (judged,) = with_selection(parity_of(compared("patched")), checks).comparisons
        assert judged.passed is excused
    mixed = with_selection(parity_of(compared("patched"), compared("engine sm89")), [check])
    assert [c.passed for c in mixed.comparisons] == [True, False]
    assert (mixed.ok, mixed.verdict) == (False, "parity fails")


def test_gate_a_holds_the_outputs_as_well():
    image, limits = run(), Tolerance(max_relative=5e-4)
    assert gate_a("graph", [image], [image], limits=limits).ok
    wrong = outputs(image, boxes=image.outputs["boxes"] + 3)
    check = gate_a("graph", [image], [wrong], limits=limits)
    assert "output 'boxes': max_relative" in check.failures[0]


def b(expected, got, *, random=False, limits=LIMITS, groups=("photos",)):
    return gate_b("fp16", [expected], [got], groups, limits, 0.85, random=random)


def test_gate_b_judges_decisions():
    image = run()
    assert b(image, image).ok
    assert "20 of 20 detections above 0.5 matched" in told_of(b(image, image))
    boxes, scores, labels = (image.outputs[name] for name in ("boxes", "scores", "labels"))
    for spoilt, message in (
        (outputs(image, boxes=boxes + SHIFT), "matched detections"),
        (outputs(image, labels=(labels + 1) % CLASSES), "matched detections"),
        (outputs(image, scores=scores - 0.06), "scores of matched detections differ by 0.06"),
        (outputs(image, scores=np.where(np.arange(QUERIES) == 3, np.nan, scores)), "NaN or infinity"),
    ):
        check = b(image, spoilt)
        assert not check.ok
        assert any(message in failure for failure in check.failures)
    expected, got = swapped(image, 0, 0.01)
    assert "away from the cut" in b(expected, got).failures[0]
    half = np.setdiff1d(np.arange(POSITIONS), image.seen.index)[:QUERIES]
    check = b(image, seen(image, index=half, rows=half))
    assert "the selection shared is 0" in check.failures[0]


def test_random_weights_are_judged_by_what_holds_for_any_and_it_is_said():
    image = run()
    check = b(image, outputs(image, boxes=image.outputs["boxes"] + SHIFT), random=True)
    assert check.ok
    assert check.random
    assert check.matched < 1
    assert "NOT proven (weights: random)" in told_of(check)
    assert not b(image, outputs(image, scores=image.outputs["scores"] * np.inf), random=True).ok
    half = np.setdiff1d(np.arange(POSITIONS), image.seen.index)[:QUERIES]
    assert not b(image, seen(image, index=half, rows=half), random=True).ok


def test_inputs_without_a_confident_detection_prove_nothing():
    """An empty match is no pass: the verdict and the table say that the precision is not proven, and what would."""
    image = run()
    quiet = outputs(image, scores=image.outputs["scores"] * 0.1)
    check = b(quiet, quiet)
    assert check.unproven == "nothing to match"
    assert told_of(check).startswith("the precision of 'fp16' is NOT proven (nothing to match): finite")
    held = with_selection(parity_of(compared("patched", passed=True, failures=())), [check])
    assert held.verdict.startswith("the precision of 'fp16' is NOT proven")
    assert "gate B holds" not in held.verdict
    assert "nothing was matched" in check.notes[0]
    assert "--images" in check.notes[0]
    one_side = b(quiet, image)  # negative control: what only one of both finds is a difference, not nothing
    assert not one_side.ok
    assert not b(image, image).unproven


def test_overlap_is_judged_where_positions_are_not_tied():
    image = run()
    half = np.setdiff1d(np.arange(POSITIONS), image.seen.index)[:QUERIES]
    other = seen(image, index=half, rows=half)
    limits = Tolerance(overlap=0.9)
    assert b(image, other, groups=("extremes",), limits=limits).ok
    assert not b(image, other, groups=("natural",), limits=limits).ok


def test_calibrated_ranges_are_judged_on_what_they_were_measured_for():
    """Noise beyond the ranges is clipped: what is found in it is no decision, NaN in it is one."""
    image = run()
    wrong = outputs(image, labels=(image.outputs["labels"] + 1) % CLASSES)
    broken = outputs(image, scores=image.outputs["scores"] * np.nan)
    of_photos, of_generated = ("photos",), ("natural", "photos")

    def judge(got, groups, ranges=of_photos):
        pairs = [image] * len(got), got
        return gate_b("int8", *pairs, groups, LIMITS, 0.85, random=False, ranges=ranges)

    check = judge([image, wrong, wrong], ("photos", "noise", "extremes"))
    assert (check.ok, check.images, check.matched) == (True, 3, 1.0)
    assert "2 images that are not photos lie outside" in check.notes[0]
    assert judge([image, wrong], ("photos", "natural")).ok
    # Ranges of generated images are for such images; photos are judged whatever the ranges are of.
    assert not judge([image, wrong], ("photos", "natural"), of_generated).ok
    assert not judge([wrong, image], ("photos", "natural"), of_generated).ok
    assert not judge([image, wrong], ("photos", "photos")).ok
    assert not judge([image, wrong], ("photos", "noise"), None).ok
    assert "NaN or infinity in 1 of 1 images" in judge([image, broken], ("photos", "noise")).failures
    nothing = judge([wrong, wrong], ("natural", "noise"))  # no photo to judge ranges of photos on
    assert (nothing.ok, nothing.overlap, nothing.unproven) == (True, None, "nothing to match")
    assert any("2 images that are not photos" in note for note in nothing.notes)


def test_a_stage_of_which_only_outputs_are_seen_is_judged_by_them():
    image = run()
    bare = dataclasses.replace(image, seen=None)
    check = b(image, bare)
    assert check.ok
    assert (check.overlap, check.median, check.matched) == (None, None, 1.0)
    assert not b(image, outputs(bare, labels=(bare.outputs["labels"] + 1) % CLASSES)).ok


def test_raw_outputs_are_matched_as_detections():
    image = run()
    bare = {"pred_logits": image.seen.logits, "pred_boxes": image.seen.boxes}
    raw = dataclasses.replace(image, outputs=bare)
    assert b(raw, raw).matched == 1.0
    assert not b(raw, dataclasses.replace(raw, outputs={**bare, "pred_boxes": bare["pred_boxes"][::-1]})).ok


def test_a_failed_gate_is_the_verdict():
    image = run()
    parity = ParityRecord(
        ok=True, verdict="parity holds", tolerances={}, comparisons=(), inputs={}, notes=(), seconds=0.0
    )
    good, bad = gate_a("graph", [image], [image]), gate_a("graph", [image], [seen(image, boxes=image.seen.boxes + 1)])
    held = with_selection(parity, [good])
    assert held.ok
    assert held.verdict.startswith("gate A holds at 'graph'")
    assert held.verdict.endswith("; parity holds")
    failed = with_selection(parity, [good, bad])
    assert not failed.ok
    assert failed.verdict.startswith("gate A fails at 'graph': boxes differ by 1")


def test_distances_are_left_unjudged_for_detectors_only():
    both = dataclasses.replace(LIMITS, max_relative=0.05)
    assert _of_outputs(both, "detection").max_relative is None
    assert _of_outputs(both, "maps").max_relative == 0.05
    _require_limits(Precision.FP16, {"fp16": LIMITS}, "detection")
    with pytest.raises(RecipeError, match="one without any limit"):
        _require_limits(Precision.FP16, {"fp16": LIMITS}, "classification")


def test_partners_are_taken_once_and_may_lie_below_the_score():
    found = {"labels": np.array([1, 1]), "boxes": np.array([[0.0, 0, 10, 10]] * 2), "scores": np.array([0.9, 0.8])}
    one = {name: value[:1] for name, value in found.items()}
    assert match_detections(found, one, 0.9).lost == 1
    assert match_detections(one, found, 0.9).added == 1
    lower = {**found, "scores": np.array([0.9, 0.49])}
    matches = match_detections(found, lower, 0.9)
    assert (matches.lost, matches.added, matches.share) == (0, 0, 1.0)
    assert matches.score == pytest.approx(0.31)


def typed(low=()):
    """A head, an addition and a sigmoid to the boxes, and a head and a maximum to the scores; some in float16."""
    nodes, values = [], []
    for name, operator, source in (
        ("head", "Relu", "x"), ("moved", "Add", "head"), ("boxes", "Sigmoid", "moved"),
        ("logits", "Relu", "x"), ("scores", "ReduceMax", "logits"),
    ):  # fmt: skip
        kind = TensorProto.FLOAT16 if name in low else TensorProto.FLOAT
        values.append(helper.make_tensor_value_info(name, kind, None))
        inputs = [source, source] if operator == "Add" else [source]
        nodes.append(helper.make_node(operator, inputs, [name], name=name))
    graph = helper.make_graph(nodes, "typed", [], [], value_info=values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_what_decides_must_be_float32():
    names = Names(index="", scores="scores", logits="logits", boxes="boxes")
    assert islands(typed(), names) == ()
    for low in ("boxes", "moved", "head", "scores", "logits"):
        assert islands(typed([low]), names) == (f"not float32 although selection or boxes depend on it: {low}",)
