"""``effdeploy bisect``: where the error of a reduced-precision bundle comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Bundle, Json, Log, Quiet, app, session


@app.command()
def bisect(
    bundle: Bundle,
    images: Annotated[
        Path | None, typer.Option(help="Folder of real photos; default: the bundle's, else generated images.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="What runs the graphs; default: ONNX Runtime's CPU.", autocompletion=completing.backends),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The plot; default: BUNDLE-bisect.svg in this folder.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Find the stages and modules that the error of FP16, BF16, INT8 or FP8 comes from, by switching each alone."""
    with session(as_json, quiet, log, steps=4) as console:
        from deploy import api

        api.bisect(bundle, images=images, backend=backend, out=out, console=console)
