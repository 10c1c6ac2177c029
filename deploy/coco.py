"""Images with annotations as COCO has them, and the average precision of detections on them.

The arithmetic is pycocotools' (extra ``eval``); this file reads a folder, finds its images, numbers the classes as the
detector does, and says what is wrong with a folder before anything runs.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BackendUnavailableError, ImageError

Detections = Mapping[str, NDArray[np.generic]]  # labels [K], boxes [K,4] as corners in pixels, scores [K]

METRICS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR 1", "AR 10", "AR 100")
_HINT = "expected images/*.jpg and annotations.json, or COCO's annotations/instances_NAME.json and NAME/*.jpg"


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoImage:
    """An annotated image: its number in the file, where it lies, width and height as annotated."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoFolder:
    """A folder that was read; ``categories`` are (id, name) in the order of the ids."""

    name: str
    images: tuple[CocoImage, ...]
    categories: tuple[tuple[int, str], ...]
    annotations: tuple[Mapping[str, Any], ...]


def read_coco(folder: Path, limit: int | None = None) -> CocoFolder:
    """Read the annotations of a folder and find its images.

    Args:
        folder: Holds one annotation file, ``*.json`` or ``annotations/*.json``, and the images, beside it, in
            ``images/`` or in the folder that ``instances_NAME.json`` names.
        limit: At most so many images, by id.

    Raises:
        ImageError: no annotation file or several, one that is none, an image that is not there.
    """
    file = _annotation_file(folder)
    data = _read(file)
    try:
        images = [_image(entry, file, folder) for entry in sorted(data["images"], key=lambda e: int(e["id"]))[:limit]]
        categories = sorted((int(c["id"]), str(c.get("name", c["id"]))) for c in data["categories"])
        chosen = {image.id for image in images}
        annotations = [a for a in data["annotations"] if int(a["image_id"]) in chosen]
        # pycocotools takes an annotation of number 0 for none at all.
        numbered = tuple({**_annotation(a), "id": number} for number, a in enumerate(annotations, 1))
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(f"{file} is no COCO annotation file: {type(error).__name__}: {error}", hint=_HINT) from error
    if not numbered or not categories:
        raise ImageError(f"{file} has no annotation for {len(images)} images", hint=_HINT)
    return CocoFolder(name=folder.name, images=tuple(images), categories=tuple(categories), annotations=numbered)


def _annotation_file(folder: Path) -> Path:
    found = sorted([*folder.glob("*.json"), *(folder / "annotations").glob("*.json")])
    named = [path for path in found if path.name.startswith("instances_")] or found
    if len(named) != 1:
        names = ", ".join(path.name for path in named) or "none"
        raise ImageError(f"{folder}: got annotation files: {names}; expected exactly one", hint=_HINT)
    return named[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ImageError(f"{file} cannot be read as JSON: {error}", hint=_HINT) from error
    if missing := {"images", "annotations", "categories"} - set(data if isinstance(data, dict) else ()):
        raise ImageError(f"{file} has no {', '.join(sorted(missing))}", hint=_HINT)
    found: dict[str, Any] = data
    return found


def _image(entry: Mapping[str, Any], file: Path, folder: Path) -> CocoImage:
    name = str(entry["file_name"])
    roots = (folder, folder / "images", folder / file.stem.removeprefix("instances_"), file.parent)
    path = next((root / name for root in roots if (root / name).is_file()), None)
    if path is None:
        raise ImageError(f"{file.name} names {name}, which is not in {folder}", hint=_HINT)
    width, height = int(entry["width"]), int(entry["height"])
    if width < 1 or height < 1:
        raise ImageError(f"{file.name}: {name} is {width} x {height} pixels, expected at least one", hint=_HINT)
    return CocoImage(id=int(entry["id"]), path=path, width=width, height=height)


def _annotation(entry: Mapping[str, Any]) -> dict[str, Any]:
    x, y, width, height = (float(value) for value in entry["bbox"])
    return {
        "image_id": int(entry["image_id"]),
        "category_id": int(entry["category_id"]),
        "bbox": [x, y, width, height],
        "area": float(entry.get("area", width * height)),
        "iscrowd": int(entry.get("iscrowd", 0)),
    }


def category_of_labels(folder: CocoFolder, classes: int) -> tuple[dict[int, int], str]:
    """Return the category id of each label of a detector with so many classes, and in words how they were paired.

    With as many categories as classes, labels count the categories by their ids, as COCO's 80 of 90 are counted.
    Otherwise ids that are labels as they stand are taken so; else labels count the categories.

    Raises:
        ImageError: there are more categories than classes.
    """
    ids = [number for number, _ in folder.categories]
    if len(ids) != classes and all(0 <= number < classes for number in ids):
        return {number: number for number in ids}, f"category ids are labels ({len(ids)} of {classes} classes)"
    if len(ids) > classes:
        raise ImageError(
            f"{folder.name} has {len(ids)} categories, the detector {classes} classes",
            hint="evaluate on the data that the detector was trained for",
        )
    return dict(enumerate(ids)), f"labels count the {len(ids)} categories by their ids"


def average_precision(
    folder: CocoFolder, found: Sequence[Detections], categories: Mapping[int, int]
) -> dict[str, float]:
    """Return COCO's metrics of detections, one entry an image in the folder's order; -1: no such object.

    Detections of labels without a category, and those of no area or no score, count for nothing.

    Raises:
        BackendUnavailableError: pycocotools is not installed.
    """
    coco_api, evaluation = _pycocotools()
    results = [
        row for image, one in zip(folder.images, found, strict=True) for row in _results(image.id, one, categories)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = coco_api()
        truth.dataset = {
            "info": {},
            "images": [{"id": i.id, "width": i.width, "height": i.height} for i in folder.images],
            "annotations": [dict(a) for a in folder.annotations],
            "categories": [{"id": number, "name": name} for number, name in folder.categories],
        }
        truth.createIndex()
        if not results:
            return dict.fromkeys(METRICS, 0.0)
        judged = evaluation(truth, truth.loadRes(results), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {name: float(value) for name, value in zip(METRICS, judged.stats[:9], strict=True)}


def _results(image: int, found: Detections, categories: Mapping[int, int]) -> list[dict[str, Any]]:
    rows = []
    for label, box, score in zip(
        found["labels"].tolist(), found["boxes"].tolist(), found["scores"].tolist(), strict=True
    ):
        if int(label) in categories and score > 0:
            corner, side = box[:2], [box[2] - box[0], box[3] - box[1]]
            rows.append(
                {"image_id": image, "category_id": categories[int(label)], "bbox": [*corner, *side], "score": score}
            )
    return rows


def _pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise BackendUnavailableError(
            f"COCO's average precision needs pycocotools: {error}", hint='pip install "effdeploy[eval]"'
        ) from error
    return COCO, COCOeval
