"""Generated pictures with coloured shapes on a textured ground, and the boxes in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("red", "green", "blue", "yellow")
COLOURS = np.array([[0.9, 0.15, 0.1], [0.1, 0.75, 0.2], [0.15, 0.25, 0.9], [0.9, 0.85, 0.1]])
LIGHTEST, LOWEST, HIGHEST = 0.75, 0.12, 0.5  # of a colour; sides of shapes as a share of the picture's
APART = 0.2  # largest overlap (IoU) of two shapes


@dataclass(frozen=True)
class Scene:
    """A picture uint8 [H,W,3], class of each shape [M], boxes float [M,4] as corners in pixels."""

    picture: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def scene(seed: int, size: tuple[int, int]) -> Scene:
    """Draw the picture of a seed, height and width in pixels: two to five ellipses, rectangles and triangles."""
    draw = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width] + 0.5
    picture = _ground(draw, rows, columns)
    labels: list[int] = []
    boxes: list[np.ndarray] = []
    for _ in range(draw.integers(2, 6)):
        side = draw.uniform(LOWEST, HIGHEST, 2) * (width, height)
        low = draw.uniform(0, 1, 2) * ((width, height) - side)
        box = np.concatenate([low, low + side])
        if any(_overlap(box, other) > APART for other in boxes):
            continue
        label = int(draw.integers(len(NAMES)))
        inside = _inside(int(draw.integers(3)), box, rows, columns)
        picture[inside] = COLOURS[label] * draw.uniform(LIGHTEST, 1) + draw.normal(0, 0.03, (int(inside.sum()), 3))
        labels.append(label)
        boxes.append(box)
    pixels = np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)
    return Scene(picture=pixels, labels=np.array(labels), boxes=np.stack(boxes))


def _ground(draw: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    waves = [
        np.sin(columns / draw.uniform(6, 30) + draw.uniform(0, 6)) * np.cos(rows / draw.uniform(6, 30))
        for _ in range(3)
    ]
    return draw.uniform(0.3, 0.6) + 0.12 * np.stack(waves, -1) + draw.normal(0, 0.04, (*rows.shape, 3))


def _inside(shape: int, box: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    across = (2 * columns - box[0] - box[2]) / (box[2] - box[0])
    down = (2 * rows - box[1] - box[3]) / (box[3] - box[1])
    if shape == 0:
        return (abs(across) <= 1) & (abs(down) <= 1)
    if shape == 1:
        return across**2 + down**2 <= 1
    return (abs(down) <= 1) & (abs(across) <= (down + 1) / 2)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


def write_coco(folder: Path, count: int, *, first: int = 1_000_000) -> Path:
    """Write pictures of several proportions and their boxes as COCO does: ``images/*.png`` and ``annotations.json``."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        size = ((128, 128), (120, 160), (176, 112))[index % 3]
        found = scene(first + index, size)
        name = f"{index:05}.png"
        Image.fromarray(found.picture).save(folder / "images" / name)
        images.append({"id": index + 10, "file_name": name, "height": size[0], "width": size[1]})
        for label, box in zip(found.labels, found.boxes, strict=True):
            corner, side = box[:2], box[2:] - box[:2]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": index + 10,
                    "category_id": int(label),
                    "bbox": [*map(float, corner), *map(float, side)],
                    "area": float(side.prod()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(NAMES)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(data))
    return folder
