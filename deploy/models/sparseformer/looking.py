"""Where the tokens of a network look: regions of interest and sampling points as an output, and drawn on a photo.

One look of one token is two corners of its region, then its points, all (x, y) with 0..1 across the image; regions and
points may lie outside.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy.models.drawing import Drawing, Outputs, Panel, Picture

OUTPUT = "looks"
PIXELS = 448  # shorter side of a panel, at least
LINE, DOT = 2, 2.5  # pixels; thinner ones get lost where panels are drawn smaller
CLOSE = 1.0  # pixels of the input within which two points are the same


def one_look(rois: Tensor, points: Tensor) -> Tensor:
    """Join RoIs [N,T,4] (x1, y1, x2, y2) and points [N,T,P,2] to [N,T,2 + P,2]."""
    return torch.cat((rois.reshape(*rois.shape[:2], 2, 2), points), 2)


class Looks(nn.Module):
    """All looks [N,L,T,2 + P,2] from (centre, size, points) of each, in GridSample's -1..1; the first is constant."""

    def forward(self, seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Join them."""
        looks = [
            torch.cat((torch.stack((centre - size / 2, centre + size / 2), 2), points), 2)
            for centre, size, points in seen
        ]
        looks[0] = looks[0] + looks[1] * 0  # an Expand would read the batch from a Shape operator
        return (torch.stack(looks, 1) + 1) / 2


def panels(options: Mapping[str, Any], picture: Picture, outputs: Outputs, other: Outputs) -> tuple[Panel, ...]:
    """Draw each look; the agreement is the share of points within ``CLOSE`` pixels of the other run's."""
    mine, theirs = (np.asarray(found[OUTPUT], np.float64)[0] for found in (outputs, other))
    sides = np.array([picture.shape[1], picture.shape[0]])
    found = []
    for number, (look, its) in enumerate(zip(mine, theirs, strict=True), 1):
        apart = np.abs((look - its)[:, 2:] * sides).max(-1)
        agreement = float((apart <= CLOSE).mean())
        title = f"look {number} of {len(mine)}: {agreement:.0%} of points within {CLOSE:g} px"
        found.append(Panel(title=title, picture=draw_look(picture, look), agreement=agreement))
    return tuple(found)


def draw_look(picture: Picture, look: NDArray[np.float64]) -> Picture:
    """Draw regions as frames and points as dots on the darkened photo, in a colour for each token.

    Args:
        picture: RGB uint8 [H,W,3].
        look: [T,2 + P,2].
    """
    from PIL import Image, ImageDraw

    zoom = max(1, -(-PIXELS // min(picture.shape[:2])))
    size = np.array([picture.shape[1], picture.shape[0]]) * zoom
    image = Image.fromarray(picture // 2).resize((int(size[0]), int(size[1])))
    draw = ImageDraw.Draw(image)
    places = np.nan_to_num(look) * size - 0.5
    colours = [_colour(token, len(places)) for token in range(len(places))]
    for token, colour in zip(places, colours, strict=True):
        low, high = token[:2].min(0), token[:2].max(0)
        draw.rectangle((*low.tolist(), *high.tolist()), outline=colour, width=LINE)
    for token, colour in zip(places, colours, strict=True):
        for x, y in token[2:].tolist():
            draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=colour)
    return np.asarray(image)


def _colour(token: int, tokens: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(token / tokens, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


DRAWING = Drawing(what="regions and sampling points", needs=(OUTPUT,), asked_by="options.looks=true", panels=panels)
