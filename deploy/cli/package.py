"""``effdeploy package``: what a model server wants beside the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.app import Bundle, Json, Log, Quiet, app, session


@app.command()
def package(
    bundle: Bundle,
    triton: Annotated[Path, typer.Option(help="Model repository of Triton Inference Server; made if need be.")],
    name: Annotated[str | None, typer.Option(help="The model's name; default: the bundle's.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with a class name per line.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto; default: what the engine is for.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies that serve at the same time.")] = 1,
    queue_delay: Annotated[int, typer.Option(min=0, help="Microseconds the batcher waits for more requests.")] = 100,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Write a bundle's engine into a Triton model repository, as the next version of its model."""
    with session(as_json, quiet, log, steps=1) as console:
        from deploy import api

        api.package(
            bundle, triton=triton, name=name, labels=labels, device=device, instances=instances,
            queue_delay=queue_delay, console=console,
        )  # fmt: skip
