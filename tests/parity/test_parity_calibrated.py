"""Which images decide for INT8 and FP8, whose ranges hold for images of one kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_parity_compare import FakeRunner, Infer, model

from deploy.models import find_system
from deploy.parity.compare import Candidate, check_parity
from deploy.parity.inputs import InputPack
from deploy.records import ParityRecord, Precision, Tolerance
from deploy.resolve import parity_inputs, resolve_recipe
from deploy.reuse import _photos

TOLERANCES = {"int8": Tolerance(cosine=0.99, top1=1.0), "fp16": Tolerance(cosine=0.99)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three grey photos, and one file that is none."""
    for index in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * index + 40, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.jpg").write_bytes(b"no image")
    return tmp_path


def inputs(*settings: str, precision: str = "int8") -> InputPack:
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny"), "precision": ("", precision)}, settings)
    return parity_inputs(find_system("riformer"), recipe.model_copy(update={"size": (8, 8)}))


def clipped(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a network whose ranges hold for grey photos gives: colours are lost."""
    grey = feeds["images"].mean(axis=1, keepdims=True) + 0 * feeds["images"]
    flat = np.where(np.ptp(feeds["images"], axis=(1, 2, 3), keepdims=True) < 1, feeds["images"], grey)
    return model({"images": flat})


def judged(infer: Infer, given: InputPack, precision: Precision, *, calibrated: bool) -> ParityRecord:
    candidate = Candidate(stage="engine", precision=precision, open=lambda: FakeRunner(infer))
    return check_parity(model, [candidate], given, TOLERANCES, calibrated=calibrated)


def test_photos_decide_where_ranges_were_measured_on_photos(photos):
    given = inputs(f"quantization.calib={photos}")
    assert given.counts == {"noise": 2, "natural": 3, "extremes": 3, "photos": 3}
    found = judged(clipped, given, Precision.INT8, calibrated=True)
    assert found.ok
    assert found.comparisons[0].images == 3
    assert found.comparisons[0].per_input["noise"] > 0.1  # shown all the same
    assert found.notes[-1] == "in 8 bits 3 photos decide; 8 generated images lie outside the calibrated ranges"
    assert not judged(clipped, given, Precision.INT8, calibrated=False).ok
    assert not judged(clipped, given, Precision.FP16, calibrated=True).ok


def test_an_error_on_a_photo_fails(photos):
    given = inputs(f"quantization.calib={photos}")

    def other_class(feeds):
        return {"logits": np.roll(model(feeds)["logits"], 1, axis=1)}

    found = judged(other_class, given, Precision.INT8, calibrated=True)
    assert not found.ok
    assert "top1 0 < 1" in found.verdict


def test_without_photos_the_generated_images_decide_and_the_note_says_so():
    given = inputs()
    found = judged(model, given, Precision.INT8, calibrated=True)
    assert found.comparisons[0].images == 5  # no extremes
    assert "there are none to judge on: --images" in found.notes[-1]


def test_photos_of_images_come_before_those_of_calib(photos, tmp_path_factory):
    own = tmp_path_factory.mktemp("own")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(own / "a.png")
    assert inputs(f"quantization.calib={photos}", f"parity.images={own}").counts["photos"] == 1
    assert "photos" not in inputs(f"quantization.calib={photos}", precision="fp16").counts
    assert "photos" not in inputs(f"quantization.calib={photos}/gone").counts  # a bundle on another machine
    assert inputs(f"quantization.calib={photos}", "parity.max_images=2").counts["photos"] == 2


def test_a_new_calibration_image_changes_what_parity_consumes(photos):
    recipe = resolve_recipe("riformer", {"precision": ("", "int8")}, (f"quantization.calib={photos}",))
    before = _photos(recipe)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photos / "9.png")
    assert _photos(recipe) != before
