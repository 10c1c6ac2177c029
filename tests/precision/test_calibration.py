"""Calibration: images from a folder, what goes wrong with them, and what is measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from support import effdeploy

from deploy.errors import ImageError, PrecisionError
from deploy.graph.base import parse_example
from deploy.precision import calibrate
from deploy.precision.calibrate import measure
from deploy.precision.images import (
    CalibrationImages,
    check_images,
    chosen_images,
    generated_images,
    images_of_folder,
)
from deploy.records import Preprocess, TensorSpec

INPUTS = (TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),)
PLAIN = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=1.0)


def model() -> onnx.ModelProto:
    return parse_example("""
        net (float[N,3,8,8] images) => (float[N,2,8,8] y)
        <float[2,3,1,1] weight = {1, 0, 0, 0, -2, 0}>
        { c = Conv(images, weight) z = Relu(c) y = Neg(z) }
    """)


def folder_of(tmp_path: Path, count: int, *, flat: bool = False) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(count):
        rng = np.random.default_rng(index)
        size = (8 + index % 5, 8 + index % 3)  # any size
        pixels = np.full((*size, 3), 40 * index % 255) if flat else rng.integers(0, 255, (*size, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03}.png")
    return folder


def images_of(folder: Path, *, batch: int = 3, limit: int = 1000) -> CalibrationImages:
    return images_of_folder(folder, (8, 8), PLAIN, limit=limit, batch=batch, inputs=INPUTS, makers={})


def run(images: CalibrationImages, tensors: tuple[str, ...] = ("images", "c", "z")) -> dict[str, calibrate.Measured]:
    return measure(model(), tensors, images, digest="d", advance=lambda n: None)[0]


def test_extremes_and_counts_are_those_of_all_images(tmp_path: Path) -> None:
    images = images_of(folder_of(tmp_path, 7))
    found = run(images)
    rows = np.concatenate([feeds["images"] for feeds in images.batches()])[:7]
    assert found["images"].low == rows.min()
    assert found["images"].high == rows.max()
    assert found["c"].low == pytest.approx(-2 * rows[:, 1].max())
    assert found["z"].low == 0
    assert found["z"].counts.sum() == 9 * 2 * 64  # nine rows: the last batch of three is filled up
    assert found["images"].counts.sum() == 9 * 3 * 64


def test_tensors_are_measured_in_groups_that_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(images_of(folder_of(tmp_path, 4)))
    monkeypatch.setattr(calibrate, "GROUP_BYTES", 1)
    monkeypatch.setenv("EFFDEPLOY_CACHE", str(tmp_path / "other"))
    parts = run(images_of(tmp_path / "photos"))
    for name, found in whole.items():
        assert (found.low, found.high) == (parts[name].low, parts[name].high)
        assert (found.counts == parts[name].counts).all()


def test_only_one_batch_of_images_is_held_at_a_time(tmp_path: Path) -> None:
    alive = 0

    def read(index: int) -> np.ndarray:
        nonlocal alive
        alive += 1
        return np.random.default_rng(index).random((3, 8, 8)).astype(np.float32)

    images = generated_images(read, 12, identity="i", batch=4, inputs=INPUTS, makers={})
    batches: Iterator[object] = images.batches()
    next(batches)
    assert alive == 4


def test_the_same_graph_and_images_are_measured_once_and_a_new_image_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    first, cached = measure(model(), ("c",), images_of(folder), digest="d", advance=lambda n: None)
    assert not cached
    again, cached = measure(model(), ("c",), images_of(folder), digest="d", advance=lambda n: None)
    assert cached
    assert (again["c"].counts == first["c"].counts).all()
    assert not measure(model(), ("c",), images_of(folder), digest="other", advance=lambda n: None)[1]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "003.png")
    assert not measure(model(), ("c",), images_of(folder), digest="d", advance=lambda n: None)[1]


def test_a_damaged_cache_is_measured_again(tmp_path: Path, cache: Path) -> None:
    folder = folder_of(tmp_path, 2)
    run(images_of(folder), ("c",))
    (kept,) = (cache / calibrate.FOLDER).glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert measure(model(), ("c",), images_of(folder), digest="d", advance=lambda n: None)[1] is False


def test_progress_counts_every_image_twice(tmp_path: Path) -> None:
    seen: list[int] = []
    images = images_of(folder_of(tmp_path, 6))
    measure(model(), ("c",), images, digest="d", advance=seen.append)
    assert sum(seen) == 12


def test_one_corrupt_image_among_many_is_named_skipped_and_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 120)
    (folder / "050.png").write_bytes((folder / "050.png").read_bytes()[:40])
    images = images_of(folder)
    run(images)
    assert list(images.skipped) == ["050.png"]
    assert "cannot be read" in images.skipped["050.png"]
    assert images.count == 119
    again = images_of(folder)
    assert measure(model(), ("images", "c", "z"), again, digest="d", advance=lambda n: None)[1]
    assert list(again.skipped) == ["050.png"]  # the cache tells it as well


def test_more_than_one_in_a_hundred_corrupt_images_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 120)
    for name in ("010.png", "020.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2 of 120 .*010.png, 020.png") as caught:
        run(images_of(folder))
    assert "--calib" in caught.value.hint


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ImageError) as caught:
            images_of(folder)
        assert "--calib" in caught.value.hint


@pytest.mark.parametrize("what", ["missing", "empty", "a file", "no images"])
def test_an_export_refuses_a_folder_before_its_first_stage(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "photos"
    if what == "a file":
        folder.write_text("photos")
    elif what != "missing":
        folder.mkdir()
    for number in range(3 if what == "no images" else 0):
        (folder / f"{number}.jpg").write_text("not a photo")
    for more in ((), ("--dry-run",)):
        result = effdeploy(
            "export", "riformer", "--variant", "tiny", "--int8", "--calib", folder, "--out", tmp_path / "b", *more
        )
        assert (result.exit_code, result.stdout) == (18, "")
        assert "--calib" in result.stderr
        assert not (tmp_path / "b").exists()


def test_headers_of_few_broken_images_are_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 120)
    (folder / "050.png").write_bytes(b"no image")
    check_images(folder, 120)
    (folder / "051.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2 of 120 .*050.png, 051.png"):
        check_images(folder, 120)


def test_of_too_many_images_some_are_taken_evenly(tmp_path: Path) -> None:
    names = [path.name for path in chosen_images(folder_of(tmp_path, 10), 5)]
    assert names == ["000.png", "002.png", "004.png", "006.png", "008.png"]


def test_images_of_one_colour_are_told(tmp_path: Path) -> None:
    images = images_of(folder_of(tmp_path, 5, flat=True))
    run(images)
    assert len(images.flat) == 5
    spread = images_of(folder_of(tmp_path / "b", 5)) if (tmp_path / "b").mkdir() is None else None
    assert spread is not None
    run(spread)
    assert not spread.flat


def test_a_network_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    broken = parse_example("""
        net (float[N,3,8,8] images) => (float[N,3,8,8] y)
        <float zero = {0}>
        { c = Div(images, zero) y = Neg(c) }
    """)
    with pytest.raises(PrecisionError, match="c is not finite"):
        measure(broken, ("c",), images_of(folder_of(tmp_path, 2)), digest="d", advance=lambda n: None)
