from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from deploy.backends.base import Feeds
from deploy.errors import BackendUnavailableError, ParityError, RecipeError, UnknownNameError
from deploy.parity.compare import Candidate, check_parity
from deploy.parity.inputs import pack
from deploy.records import Batch, ParityRecord, Precision, Preprocess, TensorSpec, Tolerance, from_json, to_json

IMAGES = (TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),)
WEIGHTS = np.random.default_rng(0).standard_normal((3 * 8 * 8, 12)).astype(np.float32)
TOLERANCES = {
    "fp32": Tolerance(max_relative=1e-4, cosine=0.99999, top1=1.0),
    "fp16": Tolerance(max_relative=5e-3, cosine=0.9999, top1=1.0),
}
Infer = Callable[[Feeds], dict[str, np.ndarray]]


def inputs(batch: Batch | None = None):
    return pack(IMAGES, (8, 8), Preprocess(), batch=batch or Batch())


def model(feeds: Feeds) -> dict[str, np.ndarray]:
    return {"logits": feeds["images"].reshape(len(feeds["images"]), -1) @ WEIGHTS}


class FakeRunner:
    name, device = "fake", "cpu"
    opened: list[FakeRunner] = []  # noqa: RUF012

    def __init__(self, infer: Infer) -> None:
        self.infer = infer
        FakeRunner.opened.append(self)

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        FakeRunner.opened.remove(self)


def candidate(infer: Infer, stage: str = "traced", precision: Precision = Precision.FP32) -> Candidate:
    return Candidate(stage=stage, precision=precision, open=lambda: FakeRunner(infer))


def check(*candidates: Candidate, batch: Batch | None = None, reference: Infer = model) -> ParityRecord:
    return check_parity(reference, candidates, inputs(batch), TOLERANCES)


def off_by(share: float) -> Infer:
    """Shift every logit by a share of the largest; signs differ, so that no metric is blind to it."""

    def infer(feeds: Feeds) -> dict[str, np.ndarray]:
        logits = model(feeds)["logits"]
        signs = np.sign(np.sin(np.arange(1.0, logits.size + 1))).reshape(logits.shape)
        return {"logits": (logits + share * 30 * signs).astype(np.float32)}

    return infer


def spoiled(spoil: Callable[[np.ndarray], None]) -> Infer:
    def infer(feeds: Feeds) -> dict[str, np.ndarray]:
        logits = model(feeds)["logits"].copy()
        spoil(logits)
        return {"logits": logits}

    return infer


def test_the_model_against_itself():
    result = check(candidate(model), candidate(model, "engine", Precision.FP16))
    assert result.ok
    assert result.verdict.startswith("parity holds over 2 comparisons on 8 images")
    assert [(c.stage, c.precision, c.max_abs, c.top1) for c in result.comparisons] == [
        ("traced", "fp32", 0.0, 1.0),
        ("engine", "fp16", 0.0, 1.0),
    ]
    assert result.inputs == {"noise": 2, "natural": 3, "extremes": 3}
    assert result.notes == ()
    assert from_json(ParityRecord, to_json(result)) == result


def test_the_verdict_names_what_is_nearest_to_its_limit():
    result = check(candidate(model), candidate(off_by(2e-5), "engine"))
    assert result.ok
    assert "nearest to its limit is 'engine': " in result.verdict
    assert "% used" in result.verdict


def test_an_error_of_one_percent_fails():
    result = check(candidate(off_by(1e-2)), candidate(off_by(1e-2), "fp16", Precision.FP16), candidate(model, "engine"))
    assert not result.ok
    assert [c.passed for c in result.comparisons] == [False, False, True]
    assert result.verdict.startswith("parity fails at 'traced', output 'logits': max_relative 0.0")
    assert result.verdict.endswith("(2 of 3 comparisons fail)")


def test_fp16_noise_passes_as_fp16_and_fails_as_fp32():
    result = check(candidate(off_by(1e-3)), candidate(off_by(1e-3), "fp16", Precision.FP16))
    assert [c.passed for c in result.comparisons] == [False, True]


@pytest.mark.parametrize("row", [0, -1])
def test_a_nan_fails(row):
    def spoil(logits: np.ndarray) -> None:
        logits[row, 3] = np.nan

    result = check(candidate(spoiled(spoil)), batch=Batch(min=4, opt=4, max=4))
    assert not result.ok
    assert result.comparisons[0].failures[0] == "NaN or infinity in 2 of 8 images"
    assert from_json(ParityRecord, to_json(result)) == result


def test_swapped_classes_fail():
    result = check(candidate(spoiled(lambda logits: logits.__setitem__(slice(None), logits[:, ::-1].copy()))))
    assert not result.ok
    assert result.comparisons[0].top1 == 0
    assert any(f.startswith("top1 0 < 1") for f in result.comparisons[0].failures)


@pytest.mark.parametrize("gap", [1e-5, 1e-2])
def test_flips_fail_and_are_recorded_with_their_gaps(gap):
    def near(feeds: Feeds, sign: float) -> dict[str, np.ndarray]:
        logits = np.clip(model(feeds)["logits"], -1.0, 1.0)
        logits[:, 0], logits[:, 1] = 3.0, 2.0
        logits[:1, 1] = 3.0 + sign * gap  # the first image of each chunk
        return {"logits": logits}

    result = check(
        candidate(lambda f: near(f, 1.0)), batch=Batch(min=4, opt=4, max=4), reference=lambda f: near(f, -1.0)
    )
    (comparison,) = result.comparisons
    assert comparison.top1 == 0.75
    assert comparison.top1_gaps == pytest.approx((gap / 3, gap / 3), rel=1e-2)
    assert comparison.top1_ties == 0  # what a near tie is, PyTorch's own rounding says (deploy.parity.rounding)
    assert not result.ok
    assert from_json(ParityRecord, to_json(result)) == result


def test_images_that_leak_into_each_other_fail():
    result = check(
        candidate(spoiled(lambda x: x.__setitem__(slice(None), np.roll(x, 1, axis=0)))), batch=Batch.parse(4)
    )
    assert not result.ok


def test_the_group_that_fails_is_named():
    def saturating(feeds: Feeds) -> dict[str, np.ndarray]:
        return model({"images": np.clip(feeds["images"], -2.0, 2.0)})

    errors = check(candidate(saturating)).comparisons[0].per_input
    assert set(errors) == {"noise", "natural", "extremes"}
    assert errors["extremes"] > 0.05


def test_padding_is_not_counted():
    """Batch 5: the last two of ten rows repeat images; a candidate that is wrong only there is right."""
    calls = []

    def wrong_in_padding(feeds: Feeds) -> dict[str, np.ndarray]:
        logits = model(feeds)["logits"].copy()
        calls.append(len(logits))
        if len(calls) == 2:
            logits[3:] = np.nan
        return {"logits": logits}

    result = check(candidate(wrong_in_padding), batch=Batch.parse(5))
    assert calls == [5, 5]
    assert result.ok
    assert result.comparisons[0].images == 8


def test_the_reference_runs_once_per_chunk_and_runners_are_closed_in_turn():
    calls = []

    def counting(feeds: Feeds) -> dict[str, np.ndarray]:
        assert len(FakeRunner.opened) == 0
        calls.append(feeds["images"].shape)
        return model(feeds)

    def alone(feeds: Feeds) -> dict[str, np.ndarray]:
        assert len(FakeRunner.opened) == 1
        return model(feeds)

    assert check(
        candidate(alone), candidate(alone), candidate(alone), batch=Batch.parse("1:4:8"), reference=counting
    ).ok
    assert calls == [(1, 3, 8, 8), (4, 3, 8, 8), (3, 3, 8, 8)]
    assert FakeRunner.opened == []


def test_a_candidate_that_cannot_run_raises_its_own_error_and_is_closed():
    def broken(feeds: Feeds) -> dict[str, np.ndarray]:
        raise BackendUnavailableError("no device")

    with pytest.raises(BackendUnavailableError, match="no device"):
        check(candidate(broken))
    assert FakeRunner.opened == []


def test_reused_output_buffers_are_copied():
    buffer = np.empty((1, 12), np.float32)

    def reusing(feeds: Feeds) -> dict[str, np.ndarray]:
        buffer[:] = model(feeds)["logits"]
        return {"logits": buffer}

    assert check(candidate(reusing)).ok


def test_a_reference_with_nan_proves_nothing():
    with pytest.raises(ParityError, match="NaN or infinity in output 'logits' for 8 of 8 images"):
        check(candidate(model), reference=spoiled(lambda x: x.__setitem__((0, 0), np.inf)))


@pytest.mark.parametrize("scale", [0.0, 1e-4])
def test_a_dead_reference_is_noted(scale):
    def dead(feeds: Feeds) -> dict[str, np.ndarray]:
        return {"logits": scale * (WEIGHTS[:1] * 100 + model(feeds)["logits"] * 1e-3)}

    assert "hardly depends on the image" in check(candidate(dead), reference=dead).notes[0]


def test_an_output_without_batch_axis():
    with pytest.raises(ParityError, match=r"has shape \[12\], expected \[1, ...\]"):
        check(candidate(model), reference=lambda feeds: {"logits": np.zeros(12)})


@pytest.mark.parametrize("tolerances", [{}, {"fp16": Tolerance(cosine=0.9)}, {"fp32": Tolerance()}])
def test_a_check_that_cannot_fail_is_refused(tolerances):
    with pytest.raises(RecipeError, match=r"the tolerance for fp32 is (none|one without any limit)"):
        check_parity(model, [candidate(model)], inputs(), tolerances)
    with pytest.raises(ParityError, match="nothing was compared"):
        check_parity(model, [], inputs(), TOLERANCES)


def test_unknown_task():
    with pytest.raises(UnknownNameError, match="did you mean 'classification'"):
        check_parity(model, [candidate(model)], inputs(), TOLERANCES, task="clasification")


def test_polygraphy_is_quiet_and_logs_for_debugging(capsys, caplog):
    from polygraphy.logger import G_LOGGER

    before = G_LOGGER.module_severity.get(), G_LOGGER.use_python_logging_system, G_LOGGER.colors
    check(candidate(off_by(1.0)))
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="Polygraphy"):
        check(candidate(off_by(1.0)))
    assert {r.levelno for r in caplog.records} == {logging.DEBUG}
    assert any("Accuracy" in r.message for r in caplog.records)
    assert "".join(capsys.readouterr()) == ""
    assert before == (G_LOGGER.module_severity.get(), G_LOGGER.use_python_logging_system, G_LOGGER.colors)
