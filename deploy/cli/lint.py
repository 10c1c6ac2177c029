"""``effdeploy lint``: what a runtime is known to refuse, told of an ONNX file before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Json, Quiet, app, session


@app.command()
def lint(
    model: Annotated[Path, typer.Argument(help="ONNX file.", autocompletion=completing.bundles_and_models)],
    for_: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help="tensorrt, tensorrt==11.4, tensorrt_rtx or onnxruntime; may be repeated. Default: all.",
            autocompletion=completing.goals,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as errors.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an ONNX file against what TensorRT, TensorRT-RTX and ONNX Runtime refuse, before a build."""
    with session(as_json, quiet, None) as console:
        from deploy import api

        api.lint(model, for_=for_ or (), strict=strict, console=console)
