from __future__ import annotations

import math

import numpy as np
import pytest

from deploy.errors import ParityError
from deploy.parity.metrics import UNJUDGED, Metrics, compare_classification, concatenate, judge, pool, usage
from deploy.records import Tolerance

REFERENCE = np.random.default_rng(0).standard_normal((4, 20)).astype(np.float32)
STRICT = Tolerance(max_relative=1e-4, cosine=0.9999, snr_db=60, top1=1.0, top5=0.9)


def metrics(candidate: np.ndarray, reference: np.ndarray = REFERENCE) -> Metrics:
    return pool(compare_classification({"logits": reference}, {"logits": candidate})["logits"])


def test_equal_outputs():
    got = metrics(REFERENCE.copy())
    assert got == Metrics(
        images=4, nonfinite=0, max_abs=0.0, mean_abs=0.0, max_relative=0.0, relative_l2=0.0, cosine=1.0,
        snr_db=math.inf, top1=1.0, top5=1.0,
    )  # fmt: skip
    assert judge(got, STRICT) == ()
    assert usage(got, STRICT)[0] == 0


def test_hand_computed_values():
    reference = np.array([[3.0, 4.0], [0.0, -10.0]])
    candidate = np.array([[4.0, 4.0], [0.0, -10.0]])
    got = metrics(candidate, reference)
    assert got.max_abs == 1
    assert got.mean_abs == 0.25
    assert got.max_relative == pytest.approx(0.1)
    assert got.relative_l2 == pytest.approx(math.sqrt(1 / 125))
    assert got.snr_db == pytest.approx(10 * math.log10(125))
    assert got.cosine == pytest.approx(28 / (5 * math.sqrt(32)))  # of the worse image
    assert got.top1 == 0.5  # 4 and 4: the first one wins
    assert got.top5 is None


def test_cosine_keeps_its_digits_near_one():
    reference = np.zeros((1, 1000))
    reference[0, 0] = 1.0
    candidate = reference.copy()
    candidate[0, 1] = 1e-7
    assert 1 - metrics(candidate, reference).cosine == pytest.approx(0.5e-14, rel=0.05)


def test_the_class_scores_are_matched_not_the_positions():
    candidate = REFERENCE.copy()
    best, second = np.argsort(-REFERENCE[0])[:2]
    candidate[0, [best, second]] = REFERENCE[0, [second, best]]
    got = metrics(candidate)
    assert got.top1 == 0.75
    assert got.top5 == 1.0
    assert "top1 0.75 < 1" in judge(got, Tolerance(top1=1.0))


def test_top5_counts_the_share_of_the_set():
    candidate = REFERENCE.copy()
    candidate[0, np.argsort(-REFERENCE[0])[4]] = -100  # the fifth falls out
    assert metrics(candidate).top5 == pytest.approx(1 - 0.2 / 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_fail_any_tolerance(value):
    candidate = REFERENCE.copy()
    candidate[2, 3] = value
    got = metrics(candidate)
    assert got.nonfinite == 1
    assert got.max_abs == got.relative_l2 == got.mean_abs == math.inf
    assert got.snr_db == -math.inf
    assert got.top1 == 0.75
    assert judge(got, Tolerance()) == ("NaN or infinity in 1 of 4 images", UNJUDGED)
    assert len(judge(got, STRICT)) == 6


def test_an_error_of_one_percent_breaks_every_limit_that_looks_at_values():
    candidate = REFERENCE + 0.01 * np.abs(REFERENCE).max() * np.sign(np.sin(np.arange(80.0))).reshape(4, 20)
    failures = judge(metrics(candidate), Tolerance(max_relative=9e-3, cosine=0.9999, snr_db=60))
    assert [f.split()[0] for f in failures] == ["max_relative", "cosine", "snr_db"]


@pytest.mark.parametrize(
    ("tolerance", "sentence"),
    [
        (Tolerance(cosine=0.9999), "cosine 0.9981 < 0.9999"),
        (Tolerance(cosine=0.99810001), "cosine 0.9981 < 0.99810001"),
        (Tolerance(max_relative=1e-4), "max_relative 0.05 > 0.0001"),
        (Tolerance(snr_db=40), "snr_db 31.2 < 40"),
        (Tolerance(top1=1.0), "top1 0.875 < 1"),
        (Tolerance(top5=0.99), "top5 0.95 < 0.99"),
    ],
)
def test_sentences(tolerance, sentence):
    got = Metrics(
        images=8, nonfinite=0, max_abs=1.0, mean_abs=0.1, max_relative=0.05, relative_l2=0.02, cosine=0.9981,
        snr_db=31.2, top1=0.875, top5=0.95,
    )  # fmt: skip
    assert judge(got, tolerance) == (sentence,)
    assert usage(got, tolerance)[0] > 1


def test_a_limit_that_is_just_met_holds():
    got = metrics(REFERENCE.copy())
    assert judge(got, Tolerance(max_relative=0.0, cosine=1.0, top1=1.0, top5=1.0)) == ()


def test_usage_names_the_tightest_limit():
    got = Metrics(
        images=8, nonfinite=0, max_abs=1.0, mean_abs=0.1, max_relative=0.05, relative_l2=0.02, cosine=0.99995,
        snr_db=46.0, top1=1.0, top5=None,
    )  # fmt: skip
    share, sentence = usage(got, Tolerance(max_relative=0.5, cosine=0.9999, snr_db=40, top1=1.0, top5=1.0))
    assert share == pytest.approx(0.501, abs=1e-3)
    assert sentence == "snr_db 46 (limit 40)"
    assert usage(got, Tolerance(top1=1.0))[0] == 0


def test_zeros():
    zeros = np.zeros((2, 8))
    assert metrics(zeros, zeros).cosine == 1
    assert metrics(zeros, zeros).max_relative == 0
    got = metrics(zeros + 1, zeros)
    assert got.cosine == 0
    assert got.max_relative == math.inf
    assert got.snr_db == -math.inf


def test_structure_must_agree():
    with pytest.raises(ParityError, match="'logits' is missing: got other"):
        compare_classification({"logits": REFERENCE}, {"other": REFERENCE})
    with pytest.raises(ParityError, match=r"shape \[4, 19\], expected \[4, 20\]"):
        compare_classification({"logits": REFERENCE}, {"logits": REFERENCE[:, :19]})


def test_parts_pool_to_the_whole():
    candidate = REFERENCE + 1e-3
    whole = compare_classification({"logits": REFERENCE}, {"logits": candidate})["logits"]
    parts = [whole.take(slice(0, 1)), whole.take(np.array([False, True, True, True]))]
    assert pool(concatenate(parts)) == pool(whole)
    assert len(whole) == 4


def test_feature_maps_have_no_classes():
    maps = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    got = metrics(maps.copy(), maps)
    assert got.top1 is None
    assert got.top5 is None
    assert judge(got, STRICT) == ()


@pytest.mark.parametrize("tolerance", [Tolerance(), Tolerance(top1=1.0, top5=0.9)])
def test_what_no_limit_applies_to_has_not_passed(tolerance):
    maps = np.ones((2, 3, 4, 4))
    assert judge(metrics(maps, maps), tolerance) == ("no limit of the tolerance applies to this output",)
    assert judge(metrics(maps, maps), Tolerance(top1=1.0, cosine=0.9)) == ()
    assert (judge(metrics(REFERENCE), tolerance) == ()) == (tolerance != Tolerance())


def flipped(gap: float) -> Metrics:
    """Return four images of largest score 10, of which one has its best two classes, ``gap`` apart, trade places."""
    reference = np.tile([10.0, 5.0, 1.0], (4, 1))
    reference[2, 1] = 10.0 - gap
    candidate = reference.copy()
    candidate[2, :2] = candidate[2, 1::-1]
    return metrics(candidate, reference)


@pytest.mark.parametrize("gap", [0.0625, 5.0])
def test_a_flip_fails_and_is_measured_unless_it_is_counted_as_a_tie(gap):
    got, limits = flipped(gap), Tolerance(top1=1.0)
    assert got.top1 == 0.75  # the record stays honest
    assert got.flips == pytest.approx((gap / 10,))
    assert judge(got, limits) == ("top1 0.75 < 1",)  # however small the gap: who says that it is a tie has a yardstick
    assert judge(got, limits, ties=1) == ()


def test_a_near_tie_does_not_excuse_another_limit_or_another_flip():
    assert judge(flipped(0.15), Tolerance(max_relative=0.01, top1=1.0), ties=1) == ("max_relative 0.015 > 0.01",)
    got = Metrics(
        images=4, nonfinite=0, max_abs=0.1, mean_abs=0.1, max_relative=0.01, relative_l2=0.0, cosine=1.0, snr_db=50.0,
        top1=0.5, top5=None, flips=(0.01, 0.5),
    )  # fmt: skip
    tolerance = Tolerance(max_relative=0.01, top1=1.0)
    assert judge(got, tolerance, ties=1) == ("top1 0.75 < 1, 1 near tie counted as agreement",)
    assert judge(got, Tolerance(max_relative=0.01, top1=0.75), ties=1) == ()
    assert usage(got, tolerance)[0] == math.inf


def test_nan_is_infinitely_far_from_a_near_tie():
    candidate = np.array([[math.nan, 1.0], [2.0, 1.0]])
    got = metrics(candidate, np.array([[1.0, 1.0], [2.0, 1.0]]))
    assert got.top1 == 0.5
    assert got.flips == (math.inf,)
