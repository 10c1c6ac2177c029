"""The command line: thin commands, no logic. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy import __version__
from deploy.errors import EffdeployError

if TYPE_CHECKING:
    from deploy.console import Console

app = typer.Typer(
    name="effdeploy",
    help="Take efficient vision models from a PyTorch checkpoint to an engine that is proven right and measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout; text for people on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Verdict and problems only.")]
Log = Annotated[Path | None, typer.Option("--log", help="Append what the libraries say to this file.")]
Bundles = Annotated[list[Path], typer.Argument(help="Bundle folders, e.g. engines/riformer-s12-224-fp16-onnxruntime.")]
Images = Annotated[Path | None, typer.Option(help="Folder of real photos, added to the deterministic inputs.")]
Baselines = Annotated[str | None, typer.Option("--baseline", help="Any of eager,compile,naive.")]
Seconds = Annotated[float | None, typer.Option(help="Measure at least this long per candidate.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of every candidate while measuring.")]


@contextlib.contextmanager
def session(as_json: bool, quiet: bool, log: Path | None, steps: int = 0) -> Iterator[Console]:
    """Give a console, and turn errors into a message and their exit code."""
    from deploy.console import Console, Mode

    console = Console(Mode.JSON if as_json else Mode.QUIET if quiet else Mode.AUTO, steps=steps)
    try:
        with console.log_file(log) if log else contextlib.nullcontext():
            yield console
    except EffdeployError as error:
        console.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.warn("interrupted; nothing was left behind")
        raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options that stand before a command."""
    if version:
        print(__version__)
        raise typer.Exit


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


@app.command("list")
def list_systems(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show the systems, their variants, parameters, multiply-adds and inputs."""
    with session(as_json, quiet, None) as console:
        from deploy.catalogue import catalogue

        for title, columns, rows in catalogue():
            console.table(title, columns, rows)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    weights: Annotated[Path | None, typer.Option(help="The checkpoint, when the bundle was made from a file.")] = None,
    images: Images = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Check a bundle's files against its manifest, and its engine against PyTorch again."""
    with session(as_json, quiet, log, steps=3) as console:
        from deploy.bundles import verify_bundle

        verify_bundle(bundle, console, weights=weights, images=images)


@app.command()
def bench(
    bundles: Bundles,
    baseline: Baselines = None,
    weights: Annotated[Path | None, typer.Option(help="The checkpoint that the baselines need.")] = None,
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
        from deploy.report import render_bundles

        for path in render_bundles(bundles, out):
            console.line(f"wrote {path}")


def _one_precision(**flags: bool) -> tuple[str, Any]:
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) > 1:
        raise typer.BadParameter(f"got --{' and --'.join(chosen)}; choose one")
    return (f"--{chosen[0]}", chosen[0]) if chosen else ("--fp32", None)


def _terminated(number: int, frame: object) -> None:
    """Let a terminated run clean up after itself, as an interrupted one does."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the ``effdeploy`` command."""
    logging.getLogger("deploy").addHandler(logging.NullHandler())
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except BrokenPipeError:  # `effdeploy list | head`
        sys.stderr.close()
        raise SystemExit(0) from None
