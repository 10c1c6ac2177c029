"""``effdeploy export``: from a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli.app import Baselines, Images, Json, Log, Quiet, Seconds, Threads, app, session


@app.command()
def export(
    system: Annotated[str, typer.Argument(help="A system (see `effdeploy list`) or a recipe file (*.yaml).")],
    variant: Annotated[str | None, typer.Option(help="Which size of it, e.g. s12.")] = None,
    weights: Annotated[str | None, typer.Option(help="A checkpoint file, random, or random:SEED.")] = None,
    size: Annotated[str | None, typer.Option(help="224 or HEIGHTxWIDTH.")] = None,
    batch: Annotated[str | None, typer.Option(help="4, or min:opt:max such as 1:8:32.")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Compute in float32 (default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Write FP16 into the graph.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Write BF16 into the graph.")] = False,
    backend: Annotated[str | None, typer.Option(help="onnxruntime, tensorrt_rtx or tensorrt.")] = None,
    target: Annotated[str | None, typer.Option(help="Lower the graph for onnxruntime or tensorrt.")] = None,
    sm: Annotated[str | None, typer.Option(help="Ahead-of-time targets, e.g. 80,89,120.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[Path | None, typer.Option(help="Bundle folder; default engines/<name>.")] = None,
    images: Images = None,
    baseline: Baselines = None,
    seconds: Seconds = None,
    threads: Threads = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe key: --set bench.rounds=50.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Take earlier stages from the bundle.")] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Compare outputs around every pass.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Take a model from its checkpoint to a bundle: engine, parity, latency, report."""
    with session(as_json, quiet, log) as console:
        from deploy.pipeline import run
        from deploy.resolve import default_name, resolve_recipe, stages_between

        options = {
            "variant": ("--variant", variant),
            "weights": ("--weights", weights),
            "size": ("--size", size),
            "batch": ("--batch", batch),
            "precision": _one_precision(fp32=fp32, fp16=fp16, bf16=bf16),
            "target": ("--target", target),
            "engine.backend": ("--backend", backend),
            "engine.sm": ("--sm", sm.split(",") if sm else None),
            "engine.device": ("--device", device),
            "parity.images": ("--images", images),
            "bench.baselines": ("--baseline", baseline.split(",") if baseline else None),
            "bench.seconds": ("--seconds", seconds),
            "bench.threads": ("--threads", threads),
            "passes.verify_each": ("--verify-each", verify_each or None),
        }
        recipe = resolve_recipe(system, options, assignments or [])
        first, last = stages_between(start, until)
        console.steps = last.order - first.order + 1 + (first.order > 0)
        run(recipe, out or Path("engines") / default_name(recipe), until=last, start=first, console=console)


def _one_precision(**flags: bool) -> tuple[str, Any]:
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) > 1:
        raise typer.BadParameter(f"got --{' and --'.join(chosen)}; choose one")
    return (f"--{chosen[0]}", chosen[0]) if chosen else ("--fp32", None)
