"""What ``effdeploy show`` draws of a detector: the boxes of one run on the photo, marked where the other has none."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deploy.models.drawing import Drawing, Outputs, Panel, Picture

SCORE = 0.5
OVERLAP = 0.85  # least IoU of boxes that are one; the boxes are those of the network's input, often a small one
SHOWN = 240  # shorter side of the drawing, at least about
ALONE = (255, 0, 255)  # of a box without a partner: no class has it


def colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class: neighbours lie far apart on the circle of hues, from red to blue."""
    red, green, blue = colorsys.hsv_to_rgb(0.75 * (label * 0.618034 % 1), 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def panels(options: Mapping[str, Any], picture: Picture, outputs: Outputs, other: Outputs) -> tuple[Panel, ...]:
    """Draw boxes above ``SCORE``; those without a partner in the other run are magenta.

    Args:
        options: Of the network; not read.
        picture: The photo as the network sees it.
        outputs: ``labels`` [1,K], ``boxes`` [1,K,4] in pixels of the picture, ``scores`` [1,K].
        other: The same of the run that it is shown beside.
    """
    mine, theirs = _first(outputs), _first(other)
    rows = np.flatnonzero(mine["scores"] >= SCORE)
    matched = _matched(mine, theirs)[rows]
    factor = max(1, SHOWN // min(picture.shape[:2]))  # letters need pixels
    size = picture.shape[1] * factor, picture.shape[0] * factor
    canvas = Image.fromarray(picture).convert("RGB").resize(size, Image.Resampling.NEAREST)
    draw, letters = ImageDraw.Draw(canvas), max(10, min(size) // 28)
    for row, known in zip(rows[::-1], matched[::-1], strict=True):  # the best one lies on top
        paint = colour(int(mine["labels"][row])) if known else ALONE
        box = tuple(float(value) * factor for value in mine["boxes"][row])
        draw.rectangle(_ordered(box), outline=paint, width=max(1, round(min(size) / 160)))
        draw.text(
            (box[0] + 2, box[1] + 1),
            f"{int(mine['labels'][row])}: {mine['scores'][row]:.2f}",
            fill=paint,
            font_size=letters,
        )
    alone = int((~matched).sum())
    told = f"{alone} without a partner" if alone else "all matched"
    title = f"{len(rows)} detections above {SCORE}, {told}"
    agreement = float(matched.mean()) if len(rows) else None
    return (Panel(title=title, picture=np.asarray(canvas), agreement=agreement),)


def _first(outputs: Outputs) -> dict[str, NDArray[np.float64]]:
    return {name: np.asarray(outputs[name][0], np.float64) for name in ("labels", "boxes", "scores")}


def _ordered(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    return min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])


def _matched(mine: Mapping[str, NDArray[np.float64]], theirs: Mapping[str, NDArray[np.float64]]) -> NDArray[np.bool_]:
    """Tell for each row of ``mine`` whether the other run has it; each row of the other run is taken once."""
    free = np.ones(len(theirs["scores"]), bool)
    found = np.zeros(len(mine["scores"]), bool)
    for row in range(len(found)):
        overlaps = np.where(
            free & (theirs["labels"] == mine["labels"][row]), _iou(mine["boxes"][row], theirs["boxes"]), 0
        )
        best = int(overlaps.argmax())
        if overlaps[best] >= OVERLAP:
            found[row], free[best] = True, False
    return found


def _iou(box: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    shared = np.clip(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0, None).prod(1)
    area = (box[2:] - box[:2]).prod()
    union = area + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared
    return np.asarray(shared / np.maximum(union, 1e-12))


def input_sizes(images: NDArray[np.float32]) -> NDArray[np.int64]:
    """Ask for boxes in pixels of the input [n,3,H,W]: width and height [n,2]."""
    return np.tile(np.array([[images.shape[3], images.shape[2]]], np.int64), (len(images), 1))


DRAWING = Drawing(
    what="detections",
    needs=("labels", "boxes", "scores"),
    asked_by="options.head=detections",
    panels=panels,
    feeds={"orig_target_sizes": input_sizes},
)
