"""``effdeploy export``: from a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Baselines, Images, Json, Log, Quiet, Seconds, Threads, Weights, app, session
from deploy.cli.flags import SystemCommand
from deploy.records import Stage

_STAGES = ", ".join(stage.value for stage in Stage)

System = Annotated[
    str,
    typer.Argument(
        help="A system (see `effdeploy list`) or a recipe file (*.yaml).", autocompletion=completing.systems_and_recipes
    ),
]
Variant = Annotated[str | None, typer.Option(help="Which size of it, e.g. s12.", autocompletion=completing.variants)]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any recipe key: --set bench.rounds=50.", autocompletion=completing.assignments),
]


@app.command(cls=SystemCommand)
def export(
    system: System,
    variant: Variant = None,
    weights: Weights = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take the weights that the recipe names.")] = False,
    size: Annotated[str | None, typer.Option(help="224 or HEIGHTxWIDTH.")] = None,
    batch: Annotated[str | None, typer.Option(help="4, or min:opt:max such as 1:8:32.")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Compute in float32 (default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Write FP16 into the graph.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Write BF16 into the graph.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Write INT8 (Q/DQ) into the graph, by calibration.")] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Write FP8 (Q/DQ) into the graph; TensorRT, SM 89 and up.")
    ] = False,
    calib: Annotated[Path | None, typer.Option(help="Folder of images that INT8 and FP8 measure ranges on.")] = None,
    calib_method: Annotated[str | None, typer.Option(help="minmax, percentile, mse or entropy.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Keep the fewest modules high that meet cosine=0.999, top1=0.1 (points) or matched=0.99."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime, openvino, tensorrt_rtx, tensorrt; auto: of the CPU's, the fastest here.",
            autocompletion=completing.export_backends,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Lower the graph for onnxruntime or tensorrt.", autocompletion=completing.targets),
    ] = None,
    sm: Annotated[str | None, typer.Option(help="Ahead-of-time targets, e.g. 80,89,120.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", autocompletion=completing.devices)] = None,
    out: Annotated[Path | None, typer.Option(help="Bundle folder; default engines/<name>.")] = None,
    images: Images = None,
    baseline: Baselines = None,
    seconds: Seconds = None,
    threads: Threads = None,
    assignments: Assignments = None,
    until: Annotated[
        str | None, typer.Option(help=f"Stop after this stage: {_STAGES}.", autocompletion=completing.stages)
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help=f"Make this stage and the later ones again: {_STAGES}.", autocompletion=completing.stages
        ),
    ] = None,
    no_reuse: Annotated[bool, typer.Option("--no-reuse", help="Take no stage from an earlier run.")] = False,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Compare outputs around every pass.")] = False,
    embed_preprocess: Annotated[
        bool, typer.Option("--embed-preprocess", help="The graph takes uint8 NHWC images and normalises them itself.")
    ] = False,
    labels: Annotated[Path | None, typer.Option(help="Text file with a class name per line.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan with its cost, write nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Take a model from its checkpoint to a bundle: engine, parity, latency, report."""
    with session(as_json, quiet, log) as console:
        from deploy import api

        (api.plan if dry_run else api.export)(
            system, variant=variant, weights=_one_source(weights, pretrained), size=size, batch=batch,
            precision=_one_precision(fp32=fp32, fp16=fp16, bf16=bf16, int8=int8, fp8=fp8), backend=backend,
            target=target, sm=sm, device=device, out=out, images=images, calib=calib, calib_method=calib_method,
            budget=budget, baseline=baseline, seconds=seconds, threads=threads, set_=assignments or (), until=until,
            from_=start, reuse=not no_reuse, verify_each=verify_each, embed_preprocess=embed_preprocess, labels=labels,
            console=console,
        )  # fmt: skip


def _one_source(weights: str | None, pretrained: bool) -> str | None:
    if weights is not None and pretrained:
        raise typer.BadParameter("got --weights and --pretrained; choose one")
    return "pretrained" if pretrained else weights


def _one_precision(**flags: bool) -> str | None:
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) > 1:
        raise typer.BadParameter(f"got --{' and --'.join(chosen)}; choose one")
    return chosen[0] if chosen else None
