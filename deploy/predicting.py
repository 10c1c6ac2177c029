"""``effdeploy run``: what an engine says about photos, from its bundle alone; no weights and no PyTorch reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deploy import units
from deploy.answers import Prediction, PredictionRecord
from deploy.artifacts import read_manifest, storage_errors
from deploy.backends import load_backend
from deploy.backends.base import Array, Feeds
from deploy.bundles import runnable_engine
from deploy.candidates import engine_options
from deploy.console import Console
from deploy.errors import BundleError
from deploy.labels import read_labels
from deploy.preprocess import preprocess, shown_size
from deploy.recipe import Recipe, layer_of_data, resolve
from deploy.records import RunRecord, TensorSpec

DETECTIONS = ("labels", "boxes", "scores")
INK, QUIET, MARK = "#1a1a1a", "#666666", "#0a66c2"
_SIDE = 6.0  # inches of the photo's longer side in the picture


def predict_photo(
    bundle: Path,
    photo: Path,
    console: Console,
    *,
    labels: Path | None = None,
    top: int = 5,
    threshold: float = 0.5,
    out: Path | None = None,
) -> PredictionRecord:
    """Run a bundle's engine on a photo and say what it sees.

    Args:
        bundle: A bundle's folder.
        photo: Image file; it goes through the recipe's preprocessing.
        console: Where the table goes.
        labels: Text file with a class name per line; left out: the names that the bundle was exported with.
        top: Classes to name, of a classifier.
        threshold: Detections below this score are left out, of a detector.
        out: PNG file to draw; left out: nothing is drawn.

    Raises:
        BundleError: no bundle, changed, or its engine gives neither classes nor detections.
        BackendUnavailableError: no engine of the bundle runs here.
        ImageError: the photo or the class names cannot be read.
        StorageError: the picture cannot be written.
    """
    run = read_manifest(bundle)
    engine = runnable_engine(run, bundle)
    recipe = resolve([layer_of_data(f"manifest of {run.name}", run.recipe)])
    inputs, outputs = _interface(run)
    names = read_labels(labels, recipe.classes) if labels else run.model.names
    feeds = _feeds(photo, recipe, inputs)
    backend, options = load_backend(engine.backend), engine_options(recipe, inputs)
    with console.step("engine") as step, backend.open(engine, bundle, options) as runner:
        got = {name: value[0] for name, value in runner.infer(feeds).items()}
        step.note(f"{engine.backend} on {runner.device}, {recipe.precision.value}")
    found = _detections(got, threshold) if set(DETECTIONS) <= set(outputs) else _best(got[outputs[0]], top)
    found = tuple(_named(one, names) for one in found)
    console.line(run.model.weights.statement)
    console.table(photo.name, ("class", "score", "box"), [_row(one) for one in found])
    if not found:
        console.line(f"nothing above a score of {units.given(threshold)}")
    if out is not None:
        with storage_errors(f"cannot write {out}"):
            _draw(out, photo, found, f"{run.name}: {photo.name}", run.model.weights.statement)
        console.line(f"wrote {out}")
    record = PredictionRecord(bundle=run.name, photo=photo.name, found=found, file=str(out) if out else "")
    console.result(record)
    return record


def _interface(run: RunRecord) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """Return the engine's inputs and outputs.

    Raises:
        BundleError: it gives neither detections nor a score per class.
    """
    if run.trace is None:
        raise BundleError(f"{run.name}: its manifest has an engine and no trace", hint="export again")
    names = tuple(spec.name for spec in run.trace.outputs)
    if not set(DETECTIONS) <= set(names) and len(run.trace.outputs[0].shape) != 2:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in run.trace.outputs)
        raise BundleError(
            f"{run.name} gives {shapes}: neither detections nor a score per class",
            hint="effdeploy show draws what such an engine did; export the whole network to run it",
        )
    return run.trace.inputs, names


def _feeds(photo: Path, recipe: Recipe, inputs: Sequence[TensorSpec]) -> Feeds:
    """The photo, repeated to the smallest batch, and its own size where a detector wants to know it."""
    image = preprocess(photo, recipe.size, recipe.preprocess.record())
    # Boxes are in pixels of what the network saw: the whole photo, or the part that was cut out of it.
    seen = shown_size(photo) if recipe.preprocess.fit == "stretch" else (recipe.size[1], recipe.size[0])
    known: dict[str, Array] = {"images": image, "orig_target_sizes": np.array(seen, np.int64)}
    if unknown := [spec.name for spec in inputs if spec.name not in known]:
        raise BundleError(
            f"the engine wants {', '.join(unknown)}, which no photo gives", hint="export the whole network to run it"
        )
    return {spec.name: np.repeat(known[spec.name][None], recipe.batch.min, axis=0) for spec in inputs}


def _best(logits: NDArray[np.generic], top: int) -> tuple[Prediction, ...]:
    """The best classes of one image with their softmax probabilities."""
    values = np.asarray(logits, np.float64)
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    return tuple(
        Prediction(label=int(index), name="", score=float(shares[index])) for index in np.argsort(-shares)[:top]
    )


def _detections(got: Mapping[str, Array], threshold: float) -> tuple[Prediction, ...]:
    rows = zip(got["labels"], got["boxes"], got["scores"], strict=True)
    found = [
        Prediction(label=int(label), name="", score=float(score), box=tuple(float(edge) for edge in box))
        for label, box, score in rows
        if score >= threshold
    ]
    return tuple(sorted(found, key=lambda one: -one.score))


def _named(one: Prediction, names: Sequence[str]) -> Prediction:
    name = names[one.label] if one.label < len(names) else f"class {one.label}"
    return Prediction(label=one.label, name=name, score=one.score, box=one.box)


def _row(one: Prediction) -> tuple[str, str, str]:
    return one.name, f"{one.score:.3f}", " ".join(f"{edge:.0f}" for edge in one.box)


def _draw(path: Path, photo: Path, found: Sequence[Prediction], title: str, weights: str) -> None:
    """Write the photo with its boxes, or beside it the best classes as bars, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    with Image.open(photo) as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    height, width = shown.shape[:2]
    boxed = [one for one in found if one.box]
    bars = [one for one in found if not one.box]
    scale = _SIDE / max(height, width)
    figure = Figure(
        figsize=(max(width * scale, 3) + (4 if bars else 0.2), max(height * scale, 2.4) + 0.9), dpi=120,
        layout="constrained",
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, parse_math=False)
    figure.supxlabel(weights, x=0.01, ha="left", fontsize=8, color=QUIET, parse_math=False)
    axes = figure.subplots(1, 2 if bars else 1, squeeze=False)[0]
    axes[0].imshow(shown)
    axes[0].set_axis_off()
    for one in boxed:
        left, top, right, bottom = one.box
        axes[0].add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=MARK, linewidth=2))
        axes[0].text(
            left, top, f" {one.name} {one.score:.2f} ", fontsize=8, color="white", va="bottom", parse_math=False,
            bbox={"facecolor": MARK, "edgecolor": "none", "pad": 1}, clip_on=True,
        )  # fmt: skip
    if bars:
        places = range(len(bars))
        axes[1].barh(places, [one.score for one in bars], color=MARK, height=0.6)
        axes[1].set_yticks(places, [one.name for one in bars], fontsize=9, color=INK, parse_math=False)
        axes[1].set_xlim(0, 1)
        axes[1].invert_yaxis()
        axes[1].set_xlabel("softmax", fontsize=8, color=QUIET)
        axes[1].spines[["top", "right", "left"]].set_visible(False)
        axes[1].tick_params(length=0, labelsize=8)
    figure.savefig(path, format="png")
