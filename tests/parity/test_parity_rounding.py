"""Noise held to PyTorch's own rounding where that is more than a tolerance, and nothing else excused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deploy import units
from deploy.candidates import prove_rounding
from deploy.parity.compare import Candidate, check_parity
from deploy.parity.inputs import pack
from deploy.parity.rounding import OWN, judge_rounding
from deploy.records import Batch, Precision, Preprocess, TensorSpec, Tolerance

SIZE, LIMIT = (16, 16), 1e-3
INPUTS = pack(
    (TensorSpec(name="images", dtype="float32", shape=("batch", 3, *SIZE)),), SIZE, Preprocess(), batch=Batch.parse(2)
)
GROUPS = [group for chunk in INPUTS.chunks for group in chunk.groups]
PLACE = {image.tobytes(): n for n, image in enumerate(np.concatenate([c.feeds["images"] for c in INPUTS.chunks]))}
LOGITS = np.random.default_rng(0).uniform(-0.5, 0.5, (len(GROUPS), 20))
LOGITS[:, 0] = 1  # the largest output, and the best class by far
LIMITS = {name: Tolerance(max_relative=LIMIT, cosine=0.999999, top1=1.0) for name in ("fp32", "fp16", "int8")}


def network(**off):
    """Return a network that is off from the truth by so much in one logit of each image of a group."""

    def infer(feeds):
        rows = [PLACE[image.tobytes()] for image in feeds["images"]]
        found = LOGITS[rows].copy()
        found[:, 3] += [off.get(GROUPS[row], 0.0) for row in rows]
        return {"logits": found}

    return infer


@dataclasses.dataclass
class Opened:
    infer: object

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


def judged(stage, own, precision="fp32"):
    """Return the verdict on a stage whose reference is off in another type by ``own``."""
    reference = network()
    candidates = [Candidate(stage="engine", precision=Precision(precision), open=lambda: Opened(stage))]
    asked = []

    def in_type(name):
        asked.append(name)
        return own

    first = check_parity(reference, candidates, INPUTS, LIMITS)
    return first, judge_rounding(first, reference, in_type, candidates, INPUTS), asked


@pytest.mark.parametrize(("precision", "other", "times"), [("fp32", "float64", 3), ("fp16", "float16", 1)])
def test_noise_is_held_to_a_few_times_what_pytorch_does_to_it(precision, other, times):
    first, again, asked = judged(network(noise=1.9e-3 * times), network(noise=-2e-3), precision)
    assert not first.ok
    assert again.ok
    assert asked == [other]
    assert again.comparisons[0].precision == f"{precision}, {OWN}"
    assert again.tolerances[f"{precision}, {OWN}"].max_relative == pytest.approx(2e-3 * times)
    assert again.tolerances[precision] == LIMITS[precision]
    assert "held to PyTorch's own rounding on noise" in again.verdict
    assert f"off from its float32 by 0.00200 of the largest output: {precision} is held there" in again.notes[-1]


@pytest.mark.parametrize(
    ("stage", "own", "said"),
    [
        (network(noise=6.1e-3), network(noise=2e-3), "on noise off by 0.00610 of the largest output, PyTorch itself"),
        (network(noise=5e-3, natural=2e-3), network(noise=2e-3, natural=2e-3), "max_relative 0.002 > 0.001"),
        (network(noise=5e-3, extremes=2e-3), network(noise=2e-3, extremes=2e-3), "max_relative 0.002 > 0.001"),
        (network(noise=2.0), network(noise=3.0), "top1 0.75 < 1"),
    ],
    ids=["more than rounding", "natural images", "extremes", "another class"],
)
def test_nothing_else_is_excused(stage, own, said):
    _, again, _ = judged(stage, own)
    assert not again.ok
    assert not again.comparisons[0].passed
    assert said in again.verdict


@pytest.mark.parametrize(
    ("own", "precision"),
    [(network(noise=1e-4), "fp32"), (network(noise=np.nan), "fp32"), (network(noise=1.0), "int8")],
    ids=["PyTorch rounds little", "PyTorch overflows", "no type of PyTorch"],
)
def test_without_a_yardstick_the_verdict_stays(own, precision):
    first, again, _ = judged(network(noise=2e-3), own, precision)
    assert not first.ok
    assert again is first


def two_best(gap, *, stage=0.0):
    """Return a network whose second class is ``gap`` below the best one on natural images, moved up by ``stage``."""

    def infer(feeds):
        rows = [PLACE[image.tobytes()] for image in feeds["images"]]
        found = LOGITS[rows].copy()
        found[:, 1] = 1 - gap + stage * np.array([GROUPS[row] == "natural" for row in rows])
        return {"logits": found}

    return infer


def flips(gap, own, precision="fp16", limit=LIMIT):
    """Judge a stage that gives natural images their second class, where PyTorch's own rounding moves a logit by own."""
    candidates = [
        Candidate(stage="engine", precision=Precision(precision), open=lambda: Opened(two_best(gap, stage=2 * gap)))
    ]
    limits = {precision: Tolerance(max_relative=limit, top1=1.0)}
    first = check_parity(two_best(gap), candidates, INPUTS, limits)
    return first, judge_rounding(first, two_best(gap), lambda _: two_best(gap, stage=own), candidates, INPUTS)


@pytest.mark.parametrize(
    ("gap", "own", "precision", "ties"),
    [
        (2e-4, 3e-4, "fp16", True),
        (2e-4, 1.9e-4, "fp16", False),  # within max_relative, but more than PyTorch's own rounding
        (2e-4, 1e-4, "fp32", True),  # three times
        (2e-4, 6e-5, "fp32", False),
        (1.5e-3, 1e-2, "fp16", False),  # PyTorch rounds more than that, but the tolerance allows less
        (2e-4, np.nan, "fp16", False),
    ],
)
def test_a_tie_is_what_pytorchs_own_rounding_makes_of_it(gap, own, precision, ties):
    first, again = flips(gap, own, precision)
    natural = GROUPS.count("natural")
    assert not first.ok
    assert again.ok == (ties and 2 * gap <= LIMIT)
    (comparison,) = again.comparisons
    assert comparison.top1 == 1 - natural / len(GROUPS)
    assert comparison.top1_ties == (natural if ties else 0)
    assert comparison.top1_gaps == pytest.approx((gap,) * natural)
    assert sum(note.endswith("a near tie" if ties else "no tie") for note in again.notes) == natural
    assert f"(natural): PyTorch has both classes {units.number(gap)} of the largest output apart" in again.notes[-1]
    assert ("near ties" in again.verdict) == ties


def test_energy_counts_as_well():
    def smeared(feeds):
        """Add to every logit of noise what the largest difference alone would allow."""
        off = network(noise=2e-3)(feeds)["logits"] - network()(feeds)["logits"]
        return {"logits": network()(feeds)["logits"] + off.max(1, keepdims=True)}

    _, again, _ = judged(smeared, network(noise=1e-3))
    assert not again.ok
    assert "on noise off by 0.00200" in again.verdict
    assert judged(network(noise=2e-3), network(noise=1e-3))[1].ok


def test_what_holds_is_not_measured():
    first, again, asked = judged(network(noise=5e-4), network(noise=1.0))
    assert first.ok
    assert again is first
    assert asked == []


class WithoutHalf(torch.nn.Module):
    """A network that PyTorch cannot compute in 16 bits on a CPU."""

    def forward(self, images):
        return torch.linalg.svdvals(images[:, 0]), images.mean((2, 3))


def test_a_type_that_pytorch_has_no_kernel_for_is_no_yardstick():
    module = WithoutHalf()
    about = SimpleNamespace(task="classification", decisions=None)

    def run(feeds):
        return {"logits": module(torch.from_numpy(feeds["images"]))[0].numpy()}

    def off(feeds):
        return {"logits": run(feeds)["logits"] * 1.01}

    loaded = SimpleNamespace(
        system=about, reference=module, deploy=module, approximate=False, outputs=("logits", "means"), run=run
    )
    verdicts = {}
    for precision in ("fp16", "fp32"):
        candidates = [Candidate(stage="engine", precision=Precision(precision), open=lambda: Opened(off))]
        first = check_parity(run, candidates, INPUTS, LIMITS)
        verdicts[precision] = (first, prove_rounding(loaded, first, candidates, INPUTS))
    for first, again in verdicts.values():
        assert not first.ok
        assert again is first  # in float64 it rounds by far less than the stage is off
