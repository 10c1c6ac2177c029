"""``effdeploy run``: what an engine says about a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.app import Bundle, Json, Log, Quiet, app, session


@app.command()
def run(
    bundle: Bundle,
    photo: Annotated[Path, typer.Argument(help="Image file; it goes through the bundle's preprocessing.")],
    labels: Annotated[Path | None, typer.Option(help="Text file with a class name per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name, of a classifier.")] = 5,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score, of a detector.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="PNG file to draw.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Run a bundle's engine on a photo: the best classes, or the detections."""
    with session(as_json, quiet, log, steps=1) as console:
        from deploy import api

        api.predict(bundle, photo, labels=labels, top=top, threshold=threshold, out=out, console=console)
