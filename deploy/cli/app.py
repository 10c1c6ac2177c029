"""The typer application, what commands share, and how they end: an error is a message and its exit code."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from deploy import __version__
from deploy.cli import completing
from deploy.errors import EffdeployError

if TYPE_CHECKING:
    from deploy.console import Console


class Group(typer.core.TyperGroup):
    """Gives programs that asked for ``--json`` wrong usage as an error object too; people read it on stderr."""

    as_json = False

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Remember what was typed; the parser's own errors know only a part of it."""
        given = kwargs.get("args", args[0] if args else None)
        self.as_json = "--json" in (sys.argv[1:] if given is None else given)
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse what stands before a command."""
        with self._usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run a command."""
        with self._usage():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _usage(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Some versions of typer ship the parser's exceptions under a private name: their shape tells them.
            if self.as_json and hasattr(error, "format_message"):
                from deploy.console import Console, Mode

                Console(Mode.JSON).usage(error.format_message())
            raise


app = typer.Typer(
    cls=Group,
    name="effdeploy",
    help="Take efficient vision models from a PyTorch checkpoint to an engine that is proven right and measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout; text for people on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Verdict and problems only.")]
Log = Annotated[Path | None, typer.Option("--log", help="Append what the libraries say to this file.")]
Bundle = Annotated[Path, typer.Argument(help="Bundle folder.", autocompletion=completing.bundles)]
Bundles = Annotated[
    list[Path],
    typer.Argument(
        help="Bundle folders, e.g. engines/riformer-s12-224-fp16-onnxruntime.", autocompletion=completing.bundles
    ),
]
Images = Annotated[Path | None, typer.Option(help="Folder of real photos, added to the deterministic inputs.")]
Baselines = Annotated[
    str | None,
    typer.Option("--baseline", help="Any of eager,compile,naive.", autocompletion=completing.baselines),
]
Weights = Annotated[
    str | None,
    typer.Option(  # a bracket would be markup
        help=r"A file, hf://OWNER/REPO\[/FILE]\[@REVISION], https://...\[#sha256=HEX], random or random:SEED."
    ),
]
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
        console.interrupted()
        raise typer.Exit(130) from None
    except (typer.Exit, typer.BadParameter, typer.Abort):
        raise
    except Exception as error:
        console.defect(error)
        raise


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
