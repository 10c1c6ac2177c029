"""``effdeploy diff``: two bundles against each other, with gates for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Json, Quiet, Seconds, Threads, app, session


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Bundle before.", autocompletion=completing.bundles)],
    b: Annotated[Path, typer.Argument(help="Bundle after.", autocompletion=completing.bundles)],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Gate, repeatable: 'latency>5%' (B against A), 'ops>+10' (B - A), 'error>0.01' (B)."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A gate inside the noise counts as fired.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time both engines now, interleaved, instead of comparing records.")
    ] = False,
    seconds: Seconds = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs: recipe, versions, operators, errors, sizes, latency; exit code 21 when a gate fires."""
    if (seconds or threads) and not measure:
        raise typer.BadParameter("--seconds and --threads belong to --measure")
    with session(as_json, quiet, None, steps=1 if measure else 0) as console:
        from deploy.bundles import bench_bundles
        from deploy.comparing import diff_bundles
        from deploy.gates import parse_gate

        for text in fail_if or ():
            parse_gate(text)  # before the measurement
        measured = bench_bundles([a, b], console, seconds=seconds, threads=threads) if measure else None
        diff_bundles(a, b, console, fail_if=fail_if or (), strict=strict, measured=measured)
