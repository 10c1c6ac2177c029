"""``effdeploy show``: what an engine did with a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.app import Bundle, Json, Log, Quiet, Weights, app, session


@app.command()
def show(
    bundle: Bundle,
    photo: Annotated[Path, typer.Argument(help="Image file.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: named after photo and bundle.")] = None,
    weights: Weights = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Draw what the engine did with a photo (which patches were merged), beside PyTorch."""
    with session(as_json, quiet, log, steps=3) as console:
        from deploy import api

        api.show(bundle, photo, out=out, weights=weights, console=console)
