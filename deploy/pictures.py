"""What an engine did with a photo, drawn beside PyTorch's: for ``effdeploy show`` and for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.backends.base import Feeds, Runner
from deploy.models.base import Loaded, resolve_options, run_module
from deploy.models.drawing import Outputs, Panel, Picture
from deploy.preprocess import channels_first, pixels_of, preprocess
from deploy.recipe import Recipe
from deploy.records import DrawnPhoto

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, QUIET = "#1a1a1a", "#666666"
SIDE = 3.0  # inches of a panel
_QUALITY = 85  # of the JPEG in a report
Rows = Sequence[tuple[str, Sequence[Panel]]]


def photo_inputs(photo: Path, recipe: Recipe, loaded: Loaded) -> tuple[Picture, Feeds]:
    """Return the photo as the network sees it, and the feeds: the photo repeated to the smallest batch.

    Raises:
        ImageError: the photo cannot be read.
    """
    spec = recipe.preprocess.record()
    image = preprocess(photo, recipe.size, spec)
    images = np.repeat(image[None], recipe.batch.min, axis=0)
    drawn = loaded.system.drawing
    makers = {**loaded.system.feeds, **(drawn.feeds if drawn else {})}
    first = channels_first(images)
    feeds = {s.name: makers[s.name](first) if s.name in makers else images for s in loaded.inputs}
    return pixels_of(image, spec), feeds


def panels_of(
    recipe: Recipe, loaded: Loaded, picture: Picture, names: tuple[str, str], got: Outputs, expected: Outputs
) -> Rows:
    """Return the panels of both runs, the engine's (``got``) and PyTorch's; nothing for a system that draws nothing."""
    drawing, options = loaded.system.drawing, resolve_options(loaded.system, recipe)
    if drawing is None:
        return ()
    return (
        (names[0], drawing.panels(options, picture, got, expected)),
        (names[1], drawing.panels(options, picture, expected, got)),
    )


def run_both(runner: Runner, loaded: Loaded, feeds: Feeds) -> tuple[Outputs, Outputs]:
    """Run an engine and the training form, and return the first row of each."""
    return _first(runner.infer(feeds)), _first(run_module(loaded.reference, feeds, loaded.outputs))


def draws(loaded: Loaded) -> bool:
    """Whether a system has something to draw, and its graph gives what that needs."""
    drawing = loaded.system.drawing
    return drawing is not None and all(name in loaded.outputs for name in drawing.needs)


def drawn_photo(photo: Path, recipe: Recipe, loaded: Loaded, runner: Runner, name: str) -> DrawnPhoto:
    """Draw an engine and PyTorch on a photo, small enough to lie inside a report.

    Raises:
        ImageError: the photo cannot be read.
    """
    picture, feeds = photo_inputs(photo, recipe, loaded)
    got, expected = run_both(runner, loaded, feeds)
    rows = panels_of(recipe, loaded, picture, (name, "PyTorch, fp32"), got, expected)
    drawing = loaded.system.drawing
    title = f"{drawing.what if drawing else 'input'}: {photo.name}"
    image = _image_of(figure_of(title, loaded.record.weights.statement, picture, rows))
    sentence = "; ".join(f"{run}: {', '.join(panel.title for panel in panels)}" for run, panels in rows)
    return DrawnPhoto(photo=photo.name, title=title, sentence=sentence, **image)


def _image_of(figure: Figure) -> dict[str, Any]:
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").save(packed, format="JPEG", quality=_QUALITY, optimize=True)
        width, height = image.size
    data = base64.b64encode(packed.getvalue()).decode("ascii")
    return {"media": "image/jpeg", "data": data, "width": width, "height": height}


def _first(outputs: Mapping[str, np.ndarray]) -> Outputs:
    return {name: value[:1] for name, value in outputs.items()}


def figure_of(title: str, weights: str, picture: Picture, rows: Rows) -> Figure:
    """Lay the photo and both rows of panels out."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(panels) for _, panels in rows)
    ratio = picture.shape[0] / picture.shape[1]
    height = (SIDE * ratio + 0.35) * len(rows) + 0.7
    figure = Figure(figsize=(SIDE * columns + 0.3, height), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=TEXT, parse_math=False)
    figure.supxlabel(weights, x=0.01, ha="left", fontsize=8, color=QUIET, parse_math=False)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, panels) in zip(axes, rows, strict=True):
        first = Panel(title="input as the network sees it", picture=picture)
        for axis, panel in zip(line, (first, *panels), strict=False):
            axis.imshow(panel.picture, interpolation="nearest")
            axis.set_title(panel.title, fontsize=9, color=TEXT, parse_math=False)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        line[0].set_ylabel(name, fontsize=10, color=TEXT, parse_math=False)
    return figure
