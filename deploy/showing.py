"""``effdeploy show``: what a bundle's engine did with a photo, drawn beside PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploy.answers import PanelRecord, ShowRecord
from deploy.artifacts import open_artifact, storage_errors
from deploy.backends import load_backend
from deploy.backends.base import Feeds
from deploy.bundles import reopened, runnable_engine
from deploy.candidates import build_options
from deploy.console import Console
from deploy.errors import BundleError, UnknownNameError
from deploy.models.base import Loaded, resolve_options, run_module
from deploy.models.drawing import Drawing, Outputs, Panel, Picture
from deploy.preprocess import preprocess
from deploy.recipe import Recipe
from deploy.records import RunRecord

TEXT, QUIET = "#1a1a1a", "#666666"


def show_photo(
    bundle: Path, photo: Path, console: Console, *, out: Path | None = None, weights: Path | str | None = None
) -> ShowRecord:
    """Run a bundle's engine and PyTorch on a photo, and draw what the system has to show of both.

    Args:
        bundle: Bundle folder.
        photo: Image file; it goes through the recipe's preprocessing.
        console: Where progress goes.
        out: PNG file; default: the photo's name with the bundle's, in the current folder.
        weights: Where the reference's weights are now.

    Raises:
        UnknownNameError: the system has nothing to draw.
        BundleError: the engine does not give the outputs that are drawn, or a file was changed.
        BackendUnavailableError: no engine of the bundle runs here.
        ImageError: the photo cannot be read.
        StorageError: the picture cannot be written.
    """
    run, recipe, loaded = reopened(bundle, console, weights)
    drawing = _drawing(run, loaded)
    engine = runnable_engine(run, bundle)
    picture, feeds = _inputs(photo, recipe, loaded)
    with console.step("engine") as step:
        open_artifact(engine.artifact, bundle)
        with load_backend(engine.backend).open(engine, bundle, build_options(recipe)) as runner:
            got = _first(runner.infer(feeds))
            step.note(f"{engine.backend} on {runner.device}, {recipe.precision.value}")
    with console.step("pytorch"):
        expected = _first(run_module(loaded.reference, feeds, loaded.outputs))
    options = resolve_options(loaded.system, recipe)
    rows = [
        (f"{engine.backend}, {recipe.precision.value}", drawing.panels(options, picture, got, expected)),
        ("PyTorch, fp32", drawing.panels(options, picture, expected, got)),
    ]
    path = out or Path(f"{photo.stem}-{run.name}.png")
    title = f"{drawing.what}: {loaded.record.system} {loaded.record.variant}, {photo.name}"
    with storage_errors(f"cannot write {path}"):
        _draw(path, title, loaded.record.weights.statement, picture, rows)
    console.line(f"wrote {path}")
    panels = tuple(
        PanelRecord(run=name, title=panel.title, agreement=panel.agreement) for name, row in rows for panel in row
    )
    console.table("panels", ("run", "panel"), [(panel.run, panel.title) for panel in panels])
    record = ShowRecord(bundle=run.name, photo=photo.name, file=str(path), what=drawing.what, panels=panels)
    console.result(record)
    return record


def _drawing(run: RunRecord, loaded: Loaded) -> Drawing:
    drawing = loaded.system.drawing
    if drawing is None:
        raise UnknownNameError(
            f"{loaded.system.name} has nothing to draw on a photo", hint="effdeploy report shows what was measured"
        )
    if missing := [name for name in drawing.needs if name not in loaded.outputs]:
        raise BundleError(
            f"the engine of {run.name} does not give {', '.join(missing)}, from which {drawing.what} are drawn",
            hint=f"export it again with --set {drawing.asked_by}",
        )
    return drawing


def _inputs(photo: Path, recipe: Recipe, loaded: Loaded) -> tuple[Picture, Feeds]:
    """Return the photo as the network sees it, and the feeds: the photo repeated to the smallest batch."""
    spec = recipe.preprocess.record()
    image = preprocess(photo, recipe.size, spec)
    images = np.repeat(image[None], recipe.batch.min, axis=0)
    drawn = loaded.system.drawing
    makers = {**loaded.system.feeds, **(drawn.feeds if drawn else {})}
    feeds = {s.name: makers[s.name](images) if s.name in makers else images for s in loaded.inputs}
    pixels = image.transpose(1, 2, 0) * np.asarray(spec.std) + np.asarray(spec.mean)
    return np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8), feeds


def _first(outputs: Outputs) -> Outputs:
    return {name: value[:1] for name, value in outputs.items()}


def _draw(path: Path, title: str, weights: str, picture: Picture, rows: Sequence[tuple[str, Sequence[Panel]]]) -> None:
    """Write the photo and both rows of panels as a PNG."""
    from matplotlib.figure import Figure

    columns = 1 + max(len(panels) for _, panels in rows)
    ratio = picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(3 * columns, 3 * ratio * len(rows) + 0.8 * len(rows) + 0.7), dpi=120, layout="constrained")
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
    figure.savefig(path, format="png")
