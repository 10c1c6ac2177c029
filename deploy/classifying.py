"""``effdeploy eval --imagefolder``: top-1 and top-5 of an engine and of PyTorch on a folder of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy import units
from deploy.answers import EvalRecord, ScoredRun
from deploy.backends import load_backend
from deploy.backends.base import Array, Runner
from deploy.bundles import reopened, runnable_engine
from deploy.candidates import build_options
from deploy.console import Console
from deploy.errors import BundleError, GateError, ImageError
from deploy.models.base import Loaded, run_module
from deploy.preprocess import SUFFIXES, preprocess
from deploy.recipe import Recipe

LOGITS, TOP1, TOP5 = "logits", "top-1", "top-5"
Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution
_NAMED = 5  # unreadable files that a sentence names; the record has all
_HINT = "--imagefolder takes a folder with one sub-folder of images for each class"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Images in one sub-folder a class; ``labels[i]`` is the class of ``paths[i]``."""

    name: str
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    order: str  # how the classes are numbered


def read_imagefolder(folder: Path, limit: int | None = None) -> ImageFolder:
    """List a folder of classes.

    Classes are numbered as torchvision's ``ImageFolder`` does, by sorted name, but names that are all whole numbers
    by their value: ``10`` comes after ``9``. ``limit`` keeps so many images, spread evenly over all.

    Raises:
        ImageError: the folder cannot be read, has no sub-folders, or one of them holds no image.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        numbered = bool(names) and all(name.isascii() and name.isdigit() for name in names)
        names.sort(key=int if numbered else str)
        found = [(path, label) for label, name in enumerate(names) for path in _images(folder / name)]
    except OSError as error:
        raise ImageError(f"cannot list {folder}: {error.strerror or error}", hint=_HINT) from error
    if not names:
        raise ImageError(f"{folder} has no sub-folders, expected one for each class", hint=_HINT)
    if empty := [name for label, name in enumerate(names) if label not in {label for _, label in found}]:
        raise ImageError(
            f"{len(empty)} of {len(names)} classes in {folder} hold no image: {_some(empty)}; "
            f"expected files that end in {', '.join(SUFFIXES)}",
            hint="remove the sub-folders that are no classes",
        )
    if limit is not None and limit < len(found):
        found = [found[index] for index in np.linspace(0, len(found) - 1, limit).round().astype(int)]
    return ImageFolder(
        name=folder.resolve().name,
        classes=tuple(names),
        paths=tuple(path for path, _ in found),
        labels=tuple(label for _, label in found),
        order="classes numbered by the value of their names" if numbered else "classes numbered by sorted name",
    )


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def classify_bundle(
    bundle: Path,
    console: Console,
    *,
    folder: Path,
    max_images: int | None = None,
    max_drop: float | None = None,
    weights: Path | str | None = None,
) -> EvalRecord:
    """Score a bundle's engine and PyTorch on images of known classes.

    Args:
        bundle: Bundle folder of a classifier.
        console: Where progress goes.
        folder: Images, a sub-folder a class.
        max_images: At most so many, spread evenly over the classes.
        max_drop: How much lower than PyTorch's the engine's top-1 may be, as a share of 1.
        weights: Where the reference's weights are now.

    Raises:
        BundleError: the engine gives no logits.
        BackendUnavailableError: no engine of the bundle runs here.
        ImageError: the folder cannot be used, has other classes than the network, or none of its images can be read.
        GateError: the engine lost more than ``max_drop``.
    """
    data = read_imagefolder(folder, max_images)
    run, recipe, loaded = reopened(bundle, console, weights)
    _require_classifier(run.name, recipe, loaded, data)
    engine = runnable_engine(run, bundle)
    with (
        load_backend(engine.backend).open(engine, bundle, build_options(recipe)) as runner,
        console.step("eval") as step,
    ):
        found = _classify(runner, loaded, recipe, data, console)
        step.note(f"{len(found.labels)} images, {len(data.classes)} classes")
    record = _record(
        run.name, data, loaded, found, names=(f"{engine.backend}, {recipe.precision.value}", "PyTorch, fp32")
    )
    _tell(record, console)
    if max_drop is not None and record.drops[TOP1] > max_drop:
        raise GateError(
            f"the engine lost {units.number(record.drops[TOP1])} of top-1 against PyTorch; "
            f"--max-drop allows {units.given(max_drop)}",
            hint="--set typing.keep_fp32=[...] keeps more in float32; more images narrow the intervals",
        )
    return record


def _require_classifier(name: str, recipe: Recipe, loaded: Loaded, data: ImageFolder) -> None:
    if LOGITS not in loaded.outputs:
        raise BundleError(
            f"{name} gives {', '.join(loaded.outputs)}, not {LOGITS}: there is no class to score",
            hint="--coco FOLDER scores detectors",
        )
    if len(data.classes) != recipe.classes:
        raise ImageError(
            f"{data.name} has {len(data.classes)} classes (sub-folders), the network has {recipe.classes}",
            hint="the folder must hold every class that the network was trained on, in the same order",
        )


@dataclass(kw_only=True)
class _Found:
    """Logits of both runs and the classes of the images that could be read."""

    engine: list[Array] = field(default_factory=list)
    pytorch: list[Array] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def _classify(runner: Runner, loaded: Loaded, recipe: Recipe, data: ImageFolder, console: Console) -> _Found:
    found = _Found()
    with console.progress(len(data.paths), "images") as advance:
        for labels, pixels in _batches(recipe, data, found.unreadable):
            rows = [i % len(pixels) for i in range(max(len(pixels), recipe.batch.min))]  # a fixed batch is filled up
            feeds = {"images": np.stack([pixels[row] for row in rows])}
            found.engine += list(runner.infer(feeds)[LOGITS][: len(labels)])
            found.pytorch += list(run_module(loaded.reference, feeds, loaded.outputs)[LOGITS][: len(labels)])
            found.labels += labels
            advance(len(labels))
    if not found.labels:
        raise ImageError(
            f"none of the {len(data.paths)} images of {data.name} can be read: {_some(found.unreadable)}", hint=_HINT
        )
    return found


def _batches(
    recipe: Recipe, data: ImageFolder, unreadable: list[str]
) -> Iterator[tuple[list[int], list[NDArray[np.float32]]]]:
    """Yield classes and inputs, a batch of the engine at a time; files that cannot be read go to ``unreadable``."""
    spec = recipe.preprocess.record()
    labels: list[int] = []
    pixels: list[NDArray[np.float32]] = []
    for path, label in zip(data.paths, data.labels, strict=True):
        try:
            pixels.append(preprocess(path, recipe.size, spec))
        except ImageError:
            unreadable.append(f"{data.classes[label]}/{path.name}")
            continue
        labels.append(label)
        if len(pixels) == recipe.batch.opt:
            yield labels, pixels
            labels, pixels = [], []
    if pixels:
        yield labels, pixels


def _record(name: str, data: ImageFolder, loaded: Loaded, found: _Found, names: tuple[str, str]) -> EvalRecord:
    labels = np.asarray(found.labels)
    engine, pytorch = np.stack(found.engine), np.stack(found.pytorch)
    runs = tuple(scored(run, logits, labels) for run, logits in zip(names, (engine, pytorch), strict=True))
    agreement = float((engine.argmax(1) == pytorch.argmax(1)).mean())
    notes = [f"both name the same class for {agreement:.2%} of the images", data.order]
    notes.append(f"intervals: 95 % (Wilson), of {len(labels)} images")
    if found.unreadable:
        notes.append(
            f"{len(found.unreadable)} of {len(data.paths)} images cannot be read and were left out: "
            f"{_some(found.unreadable)}"
        )
    return EvalRecord(
        bundle=name,
        dataset=data.name,
        images=len(labels),
        objects=len(labels),
        what="classification",
        weights=loaded.record.weights.statement,
        runs=runs,
        drops={metric: runs[1].scores[metric] - runs[0].scores[metric] for metric in runs[0].scores},
        agreement=agreement,
        notes=tuple(notes),
        unreadable=tuple(found.unreadable),
    )


def scored(run: str, logits: NDArray[np.generic], labels: NDArray[np.int_]) -> ScoredRun:
    """Score logits [N, classes] against classes [N]: top-1, top-5 where there are more than 5 classes, intervals.

    A class whose score is not a number is never right.
    """
    values = np.nan_to_num(logits.astype(np.float64), nan=-np.inf)
    own = values[np.arange(len(labels)), labels]
    better = (values > own[:, None]).sum(1) + (values == own[:, None]).sum(1) - 1  # a tie is no hit
    depths = {TOP1: 1} | ({TOP5: 5} if logits.shape[1] > 5 else {})
    hits = {metric: int((better < depth).sum()) for metric, depth in depths.items()}
    return ScoredRun(
        run=run,
        scores={metric: count / len(labels) for metric, count in hits.items()},
        intervals={metric: wilson(count, len(labels)) for metric, count in hits.items()},
    )


def wilson(hits: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927): it holds near 0 and 1, where the normal one does not."""
    share = hits / trials
    centre = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def _tell(record: EvalRecord, console: Console) -> None:
    engine, pytorch = record.runs
    console.line(record.weights)
    console.table(
        "accuracy",
        ("metric", engine.run, pytorch.run, "lost"),
        [
            (metric, _with_interval(engine, metric), _with_interval(pytorch, metric), f"{record.drops[metric]:+.4f}")
            for metric in pytorch.scores
        ],
    )
    for note in record.notes:
        console.line(note)
    console.result(record)


def _with_interval(run: ScoredRun, metric: str) -> str:
    low, high = run.intervals[metric]
    return f"{run.scores[metric]:.4f} ({low:.4f} to {high:.4f})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
