"""``effdeploy eval``: the accuracy of a bundle's engine on labelled images, beside PyTorch's on the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deploy import units
from deploy.answers import EvalRecord, ScoredRun
from deploy.backends import load_backend
from deploy.backends.base import Array, Feeds, Runner
from deploy.bundles import reopened, runnable_engine
from deploy.candidates import build_options
from deploy.coco import METRICS, CocoFolder, CocoImage, average_precision, category_of_labels, read_coco
from deploy.console import Console
from deploy.errors import BundleError, GateError, ImageError, RecipeError
from deploy.models.base import Loaded, run_module
from deploy.parity.detection import Matches, match_detections, match_overlap
from deploy.preprocess import preprocess, shown_size
from deploy.recipe import Recipe
from deploy.records import RunRecord

Outputs = Mapping[str, Array]

DETECTIONS = ("labels", "boxes", "scores")
GATED = ("AP", "AP50", "AP75")  # what --max-drop is held against


def evaluate_bundle(
    bundle: Path,
    console: Console,
    *,
    coco: Path,
    max_images: int | None = None,
    max_drop: float | None = None,
    weights: Path | str | None = None,
) -> EvalRecord:
    """Score a bundle's engine and PyTorch on annotated images.

    Args:
        bundle: Bundle folder of a detector.
        console: Where progress goes.
        coco: Folder of images with COCO annotations.
        max_images: At most so many.
        max_drop: How much lower than PyTorch's the engine's AP, AP50 and AP75 may be, as a share of 1.
        weights: Where the reference's weights are now.

    Raises:
        RecipeError: the bundle's preprocessing cuts images, so that boxes cannot be taken back.
        BundleError: the engine gives no detections.
        BackendUnavailableError: no engine of the bundle runs here, or pycocotools is missing.
        ImageError: the folder, its annotations or an image cannot be used.
        GateError: the engine lost more than ``max_drop``.
    """
    folder = read_coco(coco, max_images)
    run, recipe, loaded = reopened(bundle, console, weights)
    _require_detector(run, recipe, loaded)
    categories, paired = category_of_labels(folder, recipe.classes)
    engine = runnable_engine(run, bundle)
    names = (f"{engine.backend}, {recipe.precision.value}", "PyTorch, fp32")
    with (
        load_backend(engine.backend).open(engine, bundle, build_options(recipe)) as runner,
        console.step("eval") as step,
    ):
        found = _detect(runner, loaded, recipe, folder, console)
        scores = [average_precision(folder, side, categories) for side in (found.engine, found.pytorch)]
        step.note(f"{len(folder.images)} images, {len(folder.annotations)} objects")
    matches = Matches.over(
        match_detections(b, a, match_overlap(recipe.size)) for a, b in zip(*found.sides(), strict=True)
    )
    record = EvalRecord(
        bundle=run.name,
        dataset=folder.name,
        images=len(folder.images),
        objects=len(folder.annotations),
        what="COCO average precision",
        weights=loaded.record.weights.statement,
        runs=tuple(ScoredRun(run=name, scores=score) for name, score in zip(names, scores, strict=True)),
        drops={name: scores[1][name] - scores[0][name] for name in METRICS},
        agreement=matches.share,
        notes=(paired, matches.told()),
    )
    _tell(record, console)
    _hold(record, max_drop)
    return record


def _require_detector(run: RunRecord, recipe: Recipe, loaded: Loaded) -> None:
    if missing := [name for name in DETECTIONS if name not in loaded.outputs]:
        raise BundleError(
            f"{run.name} gives {', '.join(loaded.outputs)}, not {', '.join(missing)}: there are no boxes to score",
            hint=f"export a detector with its post-processor: effdeploy export rtdetr --variant {recipe.variant}",
        )
    if recipe.preprocess.fit != "stretch":
        raise RecipeError(
            f"preprocess.fit: got {recipe.preprocess.fit!r}, expected 'stretch': boxes are in pixels of whole images",
            hint="export with --set preprocess.fit=stretch",
        )


@dataclass(kw_only=True)
class _Found:
    """Detections of each image by both runs, in the folder's order."""

    engine: list[Outputs] = field(default_factory=list)
    pytorch: list[Outputs] = field(default_factory=list)

    def sides(self) -> tuple[list[Outputs], list[Outputs]]:
        return self.engine, self.pytorch


def _detect(runner: Runner, loaded: Loaded, recipe: Recipe, folder: CocoFolder, console: Console) -> _Found:
    found = _Found()
    with console.progress(len(folder.images), "images") as advance:
        for count, feeds in _feeds(folder.images, loaded, recipe):
            for side, outputs in (
                (found.engine, runner.infer(feeds)),
                (found.pytorch, run_module(loaded.reference, feeds, loaded.outputs)),
            ):
                side += [{name: outputs[name][row] for name in DETECTIONS} for row in range(count)]
            advance(count)
    return found


def _feeds(images: Sequence[CocoImage], loaded: Loaded, recipe: Recipe) -> Iterator[tuple[int, Feeds]]:
    """Yield batches that the engine takes, with the number of rows that count; others repeat the first ones."""
    spec, size = recipe.preprocess.record(), recipe.batch.opt
    for start in range(0, len(images), size):
        part = images[start : start + size]
        filled = [part[i % len(part)] for i in range(max(len(part), recipe.batch.min))]
        pixels = np.stack([preprocess(_checked(image), recipe.size, spec) for image in filled])
        sizes = np.array([[image.width, image.height] for image in filled], np.int64)
        known: dict[str, Array] = {"images": pixels, "orig_target_sizes": sizes}
        yield len(part), {spec.name: known[spec.name] for spec in loaded.inputs}


def _checked(image: CocoImage) -> Path:
    """Make sure that an image has the size that its boxes are drawn in.

    Raises:
        ImageError: it has another one, for instance because its EXIF data turns it.
    """
    width, height = shown_size(image.path)
    if (width, height) != (image.width, image.height):
        raise ImageError(
            f"{image.path.name} is {width} x {height} pixels as it is shown, "
            f"annotated as {image.width} x {image.height}",
            hint="correct the annotations, or save the image without an EXIF orientation",
        )
    return image.path


def _tell(record: EvalRecord, console: Console) -> None:
    engine, pytorch = record.runs
    console.line(record.weights)
    console.table(
        "accuracy",
        ("metric", engine.run, pytorch.run, "lost"),
        [
            (name, f"{engine.scores[name]:.4f}", f"{pytorch.scores[name]:.4f}", f"{record.drops[name]:+.4f}")
            for name in pytorch.scores
            if pytorch.scores[name] >= 0
        ],
    )
    for note in record.notes:
        console.line(note)
    console.result(record)


def _hold(record: EvalRecord, max_drop: float | None) -> None:
    lost = {name: record.drops[name] for name in GATED if record.drops[name] > (max_drop or 0.0)}
    if max_drop is not None and lost:
        told = ", ".join(f"{name} {units.number(drop)}" for name, drop in lost.items())
        raise GateError(
            f"the engine lost {told} against PyTorch; --max-drop allows {units.given(max_drop)}",
            hint="effdeploy report shows what runs in 16 bits; --set typing.keep_fp32=[...] keeps more in float32",
        )
