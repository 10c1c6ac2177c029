"""``effdeploy show``: what a bundle's engine did with a photo, drawn beside PyTorch's."""

from __future__ import annotations

from pathlib import Path

from deploy.answers import PanelRecord, ShowRecord
from deploy.artifacts import storage_errors
from deploy.backends import load_backend
from deploy.bundles import reopened, runnable_engine
from deploy.candidates import build_options
from deploy.console import Console
from deploy.errors import BundleError, UnknownNameError
from deploy.models.base import Loaded
from deploy.models.drawing import Drawing
from deploy.pictures import figure_of, panels_of, photo_inputs, run_both
from deploy.records import RunRecord


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
    picture, feeds = photo_inputs(photo, recipe, loaded)
    backend, options = load_backend(engine.backend), build_options(recipe)
    with console.step("engine") as step, backend.open(engine, bundle, options) as runner:
        got, expected = run_both(runner, loaded, feeds)
        step.note(f"{engine.backend} on {runner.device}, {recipe.precision.value}, and PyTorch")
    names = (f"{engine.backend}, {recipe.precision.value}", "PyTorch, fp32")
    rows = panels_of(recipe, loaded, picture, names, got, expected)
    path = out or Path(f"{photo.stem}-{run.name}.png")
    title = f"{drawing.what}: {loaded.record.system} {loaded.record.variant}, {photo.name}"
    with storage_errors(f"cannot write {path}"):
        figure_of(title, loaded.record.weights.statement, picture, rows).savefig(path, format="png")
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
