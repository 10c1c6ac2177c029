"""``effdeploy tune``: which schedule this machine should run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Images, Json, Log, Quiet, Seconds, Threads, Weights, app, session
from deploy.cli.export import Assignments, System, Variant
from deploy.cli.flags import SystemCommand


@app.command(cls=SystemCommand)
def tune(
    system: System,
    target_speedup: Annotated[
        float | None, typer.Option(help="At least so many times as fast as without a schedule; then the least drift.")
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(help="At most this relative distance of the outputs from those without a schedule."),
    ] = None,
    variant: Variant = None,
    weights: Weights = None,
    size: Annotated[str | None, typer.Option(help="224 or HEIGHTxWIDTH.")] = None,
    batch: Annotated[str | None, typer.Option(help="4, or min:opt:max; opt is timed.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="The runtime that is timed.", autocompletion=completing.backends)
    ] = None,
    images: Images = None,
    seconds: Seconds = None,
    threads: Threads = None,
    assignments: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="Recipe file of the chosen schedule; the plot lies beside it.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Search schedules on this machine: latency by layer, drift, their front, and the chosen one as a recipe."""
    with session(as_json, quiet, log) as console:
        from deploy import api

        api.tune(
            system, target_speedup=target_speedup, max_drift=max_drift, variant=variant, weights=weights, size=size,
            batch=batch, backend=backend, images=images, seconds=seconds, threads=threads, set_=assignments or (),
            out=out, console=console,
        )  # fmt: skip
