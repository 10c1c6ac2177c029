"""Folders with COCO annotations: what is read, what average precision says, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from toy.shapes import NAMES, scene, write_coco

from deploy.coco import average_precision, category_of_labels, read_coco
from deploy.errors import ImageError
from deploy.preprocess import shown_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "shapes", 6)


def truth(folder):
    """The annotations as detections, one entry an image."""
    read = read_coco(folder)
    found = []
    for image in read.images:
        mine = [a for a in read.annotations if a["image_id"] == image.id]
        boxes = np.array([a["bbox"] for a in mine])
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([a["category_id"] for a in mine])
        found.append({"labels": labels, "boxes": boxes, "scores": np.linspace(0.9, 0.6, len(mine))})
    return read, found


def changed(folder, target, change):
    """Copy a folder's annotations, changed, beside its images."""
    target.mkdir()
    (target / "images").symlink_to(folder / "images")
    data = json.loads((folder / "annotations.json").read_text())
    change(data)
    (target / "annotations.json").write_text(json.dumps(data))
    return target


def test_the_truth_scores_one_and_anything_else_less(folder):
    read, found = truth(folder)
    labels, told = category_of_labels(read, 80)
    assert labels == {0: 0, 1: 1, 2: 2, 3: 3}
    assert "labels (4 of 80 classes)" in told
    assert average_precision(read, found, labels)["AP"] == 1.0  # annotation number 0 counts as well
    moved = [{**one, "boxes": one["boxes"] + [6, 0, 6, 0]} for one in found]
    other = [{**one, "labels": (one["labels"] + 1) % 4} for one in found]
    fewer = [{**one, "scores": np.zeros_like(one["scores"])} for one in found]
    assert 0 < average_precision(read, moved, labels)["AP"] < 0.8
    assert average_precision(read, other, labels)["AP50"] < 0.1
    assert average_precision(read, fewer, labels)["AP50"] == 0


def test_labels_count_categories_where_there_are_as_many(folder, tmp_path):
    """COCO's 80 categories have numbers up to 90."""

    def renumber(data):
        for entry in data["categories"]:
            entry["id"] = 10 * entry["id"] + 3
        for entry in data["annotations"]:
            entry["category_id"] = 10 * entry["category_id"] + 3

    read = read_coco(changed(folder, tmp_path / "numbers", renumber))
    assert category_of_labels(read, len(NAMES))[0] == {0: 3, 1: 13, 2: 23, 3: 33}
    with pytest.raises(ImageError, match="has 4 categories, the detector 3 classes"):
        category_of_labels(read, 3)


def test_the_layout_of_the_release_is_found(folder, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").symlink_to(folder / "images")
    (tmp_path / "annotations" / "instances_val.json").write_text((folder / "annotations.json").read_text())
    (tmp_path / "annotations" / "captions_val.json").write_text("{}")
    assert [image.path.parent.name for image in read_coco(tmp_path, limit=2).images] == ["val", "val"]


def _no_size(data):
    data["images"][0]["width"] = 0


def _gone(data):
    data["images"][0]["file_name"] = "gone.png"


BAD = {
    "a size of zero": (_no_size, "is 0 x 120 pixels|is 0 x 128 pixels"),
    "an image that is not there": (_gone, "names gone.png, which is not in"),
    "no annotations": (lambda data: data["annotations"].clear(), "has no annotation"),
    "no boxes": (lambda data: data["annotations"][0].pop("bbox"), "no COCO annotation file: KeyError"),
    "no categories": (lambda data: data.pop("categories"), "has no categories"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_refused(folder, tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(ImageError, match=message) as error:
        read_coco(changed(folder, tmp_path / "bad", change))
    assert error.value.hint


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ImageError, match="got annotation files: none; expected exactly one"):
        read_coco(tmp_path)
    (tmp_path / "a.json").write_text("not json")
    with pytest.raises(ImageError, match="cannot be read as JSON"):
        read_coco(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ImageError, match=r"a\.json, b\.json"):
        read_coco(tmp_path)


def test_a_turned_image_has_the_size_that_is_shown(tmp_path):
    picture = Image.fromarray(scene(0, (40, 60)).picture)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "plain.jpg")
    assert shown_size(tmp_path / "turned.jpg") == (40, 60)
    assert shown_size(tmp_path / "plain.jpg") == (60, 40)
    (tmp_path / "none.jpg").write_text("no image")
    with pytest.raises(ImageError, match="cannot be read as an image"):
        shown_size(tmp_path / "none.jpg")
