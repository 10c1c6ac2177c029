"""Commands on finished bundles: ``verify``, ``bench``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.app import Baselines, Bundle, Bundles, Images, Json, Log, Quiet, Seconds, Threads, Weights, app, session


@app.command()
def verify(
    bundle: Bundle,
    weights: Weights = None,
    images: Images = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Check a bundle's files against its manifest, its engine against PyTorch again, and batches row by row."""
    with session(as_json, quiet, log, steps=4) as console:
        from deploy.bundles import verify_bundle

        verify_bundle(bundle, console, weights=weights, images=images)


@app.command()
def bench(
    bundles: Bundles,
    baseline: Baselines = None,
    weights: Weights = None,
    seconds: Seconds = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Time the engines of bundles against each other, interleaved, and against baselines."""
    with session(as_json, quiet, log, steps=1) as console:
        from deploy.bundles import bench_bundles

        names = tuple(baseline.split(",")) if baseline else ()
        bench_bundles(bundles, console, baselines=names, weights=weights, seconds=seconds, threads=threads)


@app.command()
def report(
    bundles: Bundles,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: the bundle, or . for several.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Render report.html and report.md again, from manifests alone; several bundles give a comparison."""
    with session(as_json, quiet, None) as console:
        from deploy.api import render

        render(bundles, out=out, console=console)
