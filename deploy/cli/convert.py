"""``effdeploy convert``: a checkpoint from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Json, Quiet, app, session
from deploy.cli.export import Assignments, Variant


@app.command()
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint in any layout and wrapping that loads: a file, hf://... or https://...",
            autocompletion=completing.files,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors, .pth or .pt.")],
    system: Annotated[
        str,
        typer.Option(
            help="A system (see `effdeploy list`) or a recipe file (*.yaml).",
            autocompletion=completing.systems_and_recipes,
        ),
    ],
    variant: Variant = None,
    to: Annotated[
        str | None, typer.Option(help="Layout to write; default: the checkpoint's own. A wrong name lists them.")
    ] = None,
    assignments: Assignments = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint as a plain one in another layout, read it back, and compare the outputs."""
    with session(as_json, quiet, None, steps=1) as console:
        from deploy import api

        api.convert(
            checkpoint, out, system=system, variant=variant, to=to, set_=assignments or (), force=force, console=console
        )
