"""``effdeploy inspect``: what a file or bundle holds."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Json, Quiet, app, session


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="ONNX file, checkpoint (also hf://..., https://...), engine of a bundle, or bundle folder.",
            autocompletion=completing.files,
        ),
    ],
    batch: Annotated[int | None, typer.Option(min=1, help="Count multiply-adds for this batch.")] = None,
    axes: Annotated[
        list[str] | None, typer.Option("--axis", help="Size of another dynamic axis: --axis height=224.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Components of the module path that are told apart.")] = 2,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show inputs, outputs, operators, types, parameters, multiply-adds and the biggest modules."""
    with session(as_json, quiet, None) as console:
        from deploy.contents import inspect_path

        inspect_path(path, console, batch=batch, sizes=_sizes(axes or []), depth=depth)


def _sizes(axes: list[str]) -> dict[str, int]:
    found = {}
    for text in axes:
        name, _, size = text.rpartition("=")
        if not name or not (size.isascii() and size.isdigit() and int(size) > 0):
            raise typer.BadParameter(f"--axis: got {text!r}, expected NAME=SIZE")
        found[name] = int(size)
    return found
