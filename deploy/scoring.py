"""The function of ``deploy.api`` on labelled data: how well an engine does what it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploy.keywords import PathLike, console_or_silence

if TYPE_CHECKING:
    from deploy.answers import EvalRecord
    from deploy.console import Console


def evaluate(
    bundle: PathLike,
    *,
    coco: PathLike | None = None,
    imagefolder: PathLike | None = None,
    max_images: int | None = None,
    max_drop: float | None = None,
    weights: PathLike | None = None,
    console: Console | None = None,
) -> EvalRecord:
    """Score a bundle's engine on labelled images, beside PyTorch: ``effdeploy eval``.

    Args:
        bundle: Bundle folder.
        coco: Folder of images with COCO annotations, for detectors: ``images/*.jpg`` and ``annotations.json``, or
            ``NAME/*.jpg`` and ``annotations/instances_NAME.json``.
        imagefolder: Folder with one sub-folder of images for each class, for classifiers.
        max_images: At most so many images.
        max_drop: Fail if the engine scores lower than PyTorch by more than this, as a share of 1.
        weights: As for ``verify``.
        console: Where progress goes; nowhere when left out.

    Returns:
        The scores of both, and how far they agree.

    Raises:
        RecipeError: No data was named, or both kinds.
        BundleError: The engine does not give what can be scored, or a file was changed.
        ImageError: The data cannot be used.
        GateError: The engine lost more than ``max_drop``.
    """
    from deploy.classifying import classify_bundle
    from deploy.errors import RecipeError
    from deploy.evaluating import evaluate_bundle

    if coco is not None and imagefolder is not None:
        raise RecipeError("got coco and imagefolder, expected one of them", hint="detectors take coco")
    if imagefolder is not None:
        return classify_bundle(
            Path(bundle), console_or_silence(console), folder=Path(imagefolder), max_images=max_images,
            max_drop=max_drop, weights=weights,
        )  # fmt: skip
    if coco is None:
        raise RecipeError(
            "no labelled data was named",
            hint=f"effdeploy eval {bundle} --imagefolder FOLDER, or --coco FOLDER for detectors",
        )
    return evaluate_bundle(
        Path(bundle), console_or_silence(console), coco=Path(coco), max_images=max_images, max_drop=max_drop,
        weights=weights,
    )  # fmt: skip
