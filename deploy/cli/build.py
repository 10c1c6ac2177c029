"""``effdeploy build``: engines on the target machine, from what was exported elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import completing
from deploy.cli.app import Json, Log, Quiet, Threads, app, session


@app.command()
def build(
    source: Annotated[
        Path,
        typer.Argument(help="A bundle's folder, or an ONNX file.", autocompletion=completing.bundles_and_models),
    ],
    backend: Annotated[
        str | None,
        typer.Option(
            help="tensorrt, tensorrt_rtx, openvino or onnxruntime; "
            "default: the bundle's if it builds engines, else tensorrt.",
            autocompletion=completing.backends,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option(help="4, or min:opt:max; repeat it for several optimisation profiles.")
    ] = None,
    sm: Annotated[str | None, typer.Option(help="Ahead-of-time targets of tensorrt_rtx, e.g. 80,89,120.")] = None,
    level: Annotated[int | None, typer.Option(help="Builder optimisation level, 0 to 5.")] = None,
    workspace: Annotated[str | None, typer.Option(help="Limit of the builder's scratch memory, e.g. 4GiB.")] = None,
    tf32: Annotated[bool | None, typer.Option("--tf32/--no-tf32", help="FP32 products in TF32.")] = None,
    timing_cache: Annotated[
        bool | None, typer.Option("--timing-cache/--no-timing-cache", help="Keep TensorRT's timings for later builds.")
    ] = None,
    version_compatible: Annotated[
        bool | None, typer.Option("--version-compatible", help="An engine for later minor versions too.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Hardware compatibility: none, ampere_plus or same_compute_capability.")
    ] = None,
    refit: Annotated[bool | None, typer.Option("--refit", help="Let the engine's weights be replaced.")] = None,
    strip: Annotated[bool | None, typer.Option("--strip", help="Leave the weights out of the engine.")] = None,
    lint: Annotated[str | None, typer.Option(help="stop at lint errors (default), or warn and build.")] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Refuse a graph that is not FP32.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Refuse a graph that is not FP16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Refuse a graph that is not BF16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Refuse a graph that is not INT8.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Refuse a graph that is not FP8.")] = False,
    device: Annotated[str | None, typer.Option(help="Of onnxruntime: auto, cpu or cuda.")] = None,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="New bundle, or folder for the engine; default: beside.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Build engines on this machine from a bundle or an ONNX file that was made elsewhere."""
    flags = {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}
    asked = [name for name, given in flags.items() if given]
    if len(asked) > 1:
        raise typer.BadParameter(f"got --{' and --'.join(asked)}; choose one")
    with session(as_json, quiet, log, steps=2 if source.is_dir() else 1) as console:
        from deploy import api

        api.build(
            source, backend=backend, batch=batch, sm=sm, level=level, workspace=workspace, tf32=tf32,
            timing_cache=timing_cache, version_compatible=version_compatible, hardware=hardware, refit=refit,
            strip=strip, lint=lint, precision=asked[0] if asked else None, device=device, threads=threads, out=out,
            console=console,
        )  # fmt: skip
