"""The typer application, what commands share, and how they end: an error is a message and its exit code."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
