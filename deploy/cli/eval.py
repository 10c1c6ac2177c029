"""``effdeploy eval``: accuracy on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.app import Bundle, Json, Log, Quiet, Weights, app, session


@app.command("eval")
def evaluate(
    bundle: Bundle,
    coco: Annotated[
        Path | None, typer.Option(help="Folder of images with COCO annotations, for detectors.", show_default=False)
    ] = None,
    imagefolder: Annotated[
        Path | None, typer.Option(help="Folder of classes as sub-folders, for classifiers.", show_default=False)
    ] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="At most so many images.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Fail if the engine scores lower than PyTorch by more.")
    ] = None,
    weights: Weights = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Score the engine on labelled images, beside PyTorch."""
    with session(as_json, quiet, log, steps=2) as console:
        from deploy import api

        api.evaluate(
            bundle, coco=coco, imagefolder=imagefolder, max_images=max_images, max_drop=max_drop, weights=weights,
            console=console,
        )  # fmt: skip
