"""The terminal: the only user of rich.

Three kinds of reader, one set of calls. A person at a terminal gets colour, a spinner and progress bars; a log file or
a pipe gets plain lines; a program gets one JSON object per line (``Mode.JSON``) and the human text goes to stderr.
rich is imported only for a terminal, so that ``effdeploy --help`` and CI logs never pay for it.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from deploy import summary, units
from deploy.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console as RichConsole
    from rich.progress import Progress

    from deploy.records import RunRecord

_TITLE_WIDTH = 11
_PLAIN_PROGRESS_SECONDS = 10.0  # a CI log wants a sign of life, not a line per image
_COLOURS = {"good": "green", "bad": "bold red", "warn": "yellow", "quiet": "dim", "strong": "bold", "": ""}


class Mode(str, enum.Enum):
    """Who reads: ``AUTO`` looks at the stream, ``PLAIN`` never styles, ``QUIET`` shows verdicts and problems only.

    ``SILENT`` writes nothing: for programs that call effdeploy as a library and get records and exceptions.
    """

    AUTO = "auto"
    PLAIN = "plain"
    QUIET = "quiet"
    JSON = "json"
    SILENT = "silent"


class Step:
    """A step that runs; ``note`` adds what it came to, shown when it ends."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.notes: list[str] = []
        self.started = time.perf_counter()

    def note(self, text: str) -> None:
        """Add a few words on the result: ``"13 passes, 87 sites"``."""
        self.notes.append(text)

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.started


class Console:
    """Writes steps, tables, warnings, errors and results for whoever reads.

    Args:
        mode: Who reads.
        steps: How many steps the command has, for ``[3/7]``; 0 leaves the total out.
        stdout, stderr: Streams to write to; the process's own when left out.
    """

    def __init__(
        self, mode: Mode = Mode.AUTO, *, steps: int = 0, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.mode = mode
        self.steps = steps
        self._out = stdout or sys.stdout
        self._err = stderr or sys.stderr
        self._human = self._err if mode is Mode.JSON else self._out
        self._number = 0
        self._open_line = ""  # a plain step line that waits for its seconds
        self._live: Progress | None = None
        self._styled: dict[int, RichConsole] = {}
        self._terse = mode in (Mode.QUIET, Mode.SILENT)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a step with its number and, when it ends, its notes and seconds; a failure is shown as one."""
        self._number += 1
        step = Step(title)
        total = f"/{self.steps}" if self.steps else ""
        head = f"[{self._number}{total}] {title.ljust(_TITLE_WIDTH)}"
        self._event("step", index=self._number, total=self.steps, title=title, status="started")
        self._begin_step(head)
        status = "failed"
        try:
            with self._spinner(head):
                yield step
            status = "done"
        finally:
            seconds = step.seconds
            self._event(
                "step", index=self._number, total=self.steps, title=title, status=status,
                seconds=round(seconds, 3), notes=step.notes,
            )  # fmt: skip
            self._end_step(head, ", ".join(step.notes), seconds, status)

    @contextlib.contextmanager
    def progress(self, total: int, title: str) -> Iterator[Callable[[int], None]]:
        """Show how far a long step is; call what is given with the number of items just done."""
        done, shown = 0, time.perf_counter()
        with self._bar(total, title) as bar:

            def advance(items: int = 1) -> None:
                nonlocal done, shown
                done += items
                bar(items)
                now = time.perf_counter()
                if now - shown < _PLAIN_PROGRESS_SECONDS:
                    return
                shown = now
                self._event("progress", title=title, done=done, total=total)
                if self._live is None and not self._terse:
                    self._write(self._human, f"      {title}: {done} of {total}")

            yield advance

    @contextlib.contextmanager
    def phases(self) -> Iterator[Callable[[str, int, int], None]]:
        """Show a long step whose phases announce themselves and may nest; call what is given with (phase, done, total).

        A phase begins with its first call and ends with the call in which done is total.
        """
        with contextlib.ExitStack() as all_phases:
            shown: dict[str, tuple[contextlib.ExitStack, Callable[[int], None], int]] = {}

            def report(phase: str, done: int, total: int) -> None:
                if phase not in shown:
                    own = all_phases.enter_context(contextlib.ExitStack())
                    shown[phase] = (own, own.enter_context(self.progress(total, phase)), 0)
                own, advance, before = shown[phase]
                advance(done - before)
                shown[phase] = (own, advance, done)
                if done >= total:
                    del shown[phase]
                    own.close()

            yield report

    def line(self, text: str = "", tone: str = "") -> None:
        """Write one line for people; ``tone`` is good, bad, warn, quiet or strong. Quiet mode drops it."""
        if not self._terse:
            self._write(self._human, text, tone)
        self._event("line", text=text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table; numbers come formatted."""
        self._event("table", title=title, columns=list(columns), rows=[list(r) for r in rows])
        if not self._terse:
            self._write_table(title, columns, rows)

    def warn(self, message: str) -> None:
        """Write a warning to stderr; every mode shows it."""
        self._event("warning", message=message)
        self._write(self._err, f"warning: {message}", "warn")

    def error(self, error: BaseException) -> None:
        """Write an error to stderr: what happened, the hint, the exit code."""
        message, hint = getattr(error, "message", str(error) or type(error).__name__), getattr(error, "hint", "")
        code = getattr(error, "exit_code", 1)
        self._event("error", type=type(error).__name__, message=message, hint=hint, exit_code=code)
        self._write(self._err, f"error: {message}", "bad")
        if hint:
            self._write(self._err, f"hint: {hint}", "strong")
        self._write(self._err, f"exit code {code} ({type(error).__name__})", "quiet")

    def usage(self, message: str) -> None:
        """Tell programs about wrong usage; people are told by the command-line parser."""
        self._event("error", type="UsageError", message=message, hint="effdeploy COMMAND --help", exit_code=2)

    def interrupted(self) -> None:
        """Say that Ctrl-C ended the command."""
        message = "interrupted; no bundle was written; the same command goes on after the last finished stage"
        self._event("error", type="KeyboardInterrupt", message=message, hint="", exit_code=130)
        self._write(self._err, f"warning: {message}", "warn")

    def defect(self, error: Exception) -> None:
        """Tell programs about an error that nobody foresaw; people get its traceback."""
        hint = "this is a defect of effdeploy; the traceback is on stderr"
        self._event("error", type=type(error).__name__, message=str(error), hint=hint, exit_code=1)

    def result(self, record: Any) -> None:
        """Give a record to programs; people get theirs from ``summary`` or ``table``."""
        from deploy.records import to_json

        self._event("result", type=type(record).__name__, record=to_json(record))

    def summary(self, run: RunRecord, bundle: Path | str = "") -> None:
        """Write what the terminal shows last: verdict first, weights always, then the figures and the bundle."""
        status = summary.status(run)
        tone = {summary.PASSED: "good", summary.FAILED: "bad"}.get(status, "warn")
        self._event(
            "summary", status=status, verdict=run.verdict, weights=run.model.weights.statement, bundle=str(bundle)
        )
        self._write(self._human, "")
        self._write(self._human, f"{status}: {run.verdict}", tone)
        self._write(self._human, run.model.weights.statement)
        if not self._terse:
            self._figures(run)
        if bundle:
            self._fact("bundle", str(bundle))

    def _figures(self, run: RunRecord) -> None:
        self._fact("model", summary.model_line(run))
        self._fact("precision", summary.precision_asked(run))
        for name, statement, ok in summary.precision_ran(run):
            self._fact("", f"{name}: {'' if ok else 'FAIL: '}{statement}", "" if ok else "bad")
        for number, (name, text) in enumerate(summary.choice_rows(run)):
            self._fact("" if number else name, f"{name}: {text}" if number else text)
        if rows := summary.parity_rows(run):
            self._write_table(
                "parity against fp32 PyTorch", ("stage", "max relative", "cosine", "top-1", "verdict"), rows
            )
        else:
            self._fact("parity", summary.why_missing(run, "parity"))
        if rows := summary.selection_rows(run):
            self._write_table("selected queries against fp32 PyTorch", summary.SELECTION_COLUMNS, rows)
        if rows := summary.batch_rows(run):
            self._write_table("rows of a batch, largest difference by check", summary.BATCH_COLUMNS, rows)
        if rows := summary.latency_rows(run):
            self._write_table("latency", ("candidate", "batch", "p50", "speed-up over baseline"), rows)
        else:
            self._fact("latency", summary.why_missing(run, "latency"))
        self._fact("files", summary.file_sizes(run))
        for warning in summary.warnings_of(run):
            self._fact("warning", warning, "warn")

    def _fact(self, name: str, text: str, tone: str = "") -> None:
        self._write(self._human, f"{name.ljust(_TITLE_WIDTH)} {text}", tone)

    @contextlib.contextmanager
    def log_file(self, path: Path) -> Iterator[None]:
        """Send what libraries log meanwhile, warnings included, to a file instead of the terminal.

        Raises:
            StorageError: the file cannot be written; said before any work is done.
        """
        root = logging.getLogger()
        try:
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"cannot write the log {path}: {error.strerror or error}",
                hint="--log with a file in a folder that exists and that you may write to",
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level, logging.INFO))
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.setLevel(level)
            root.removeHandler(handler)
            handler.close()

    def _event(self, event: str, **fields: Any) -> None:
        if self.mode is not Mode.JSON:
            return
        self._out.write(json.dumps({"event": event, **fields}, sort_keys=False, allow_nan=False) + "\n")
        self._out.flush()

    def _begin_step(self, head: str) -> None:
        """Leave the line open in a log, so that a killed run shows where it was."""
        if self._terse or self._rich(self._human):
            return
        self._raw(self._human, head)
        self._open_line = head

    def _end_step(self, head: str, notes: str, seconds: float, status: str) -> None:
        if self._terse:
            return
        took = units.seconds(seconds) if seconds >= 60 else f"{seconds:.1f} s"
        tail = f" {notes}  {took}" if notes else f" {took}"
        tail = tail if status == "done" else f" failed after {took}"
        if self._open_line:
            self._open_line = ""
            self._raw(self._human, tail + "\n")
        else:
            self._write(self._human, head + tail, "" if status == "done" else "bad")

    def _write(self, stream: TextIO, text: str, tone: str = "") -> None:
        """Write a line; an open step line is closed first, and written again with its seconds when the step ends."""
        if self.mode is Mode.SILENT:
            return
        if self._open_line:
            self._open_line = ""
            self._raw(self._human, "\n")
        if styled := self._rich(stream):
            styled = self._live.console if self._live else styled  # else the bar would wipe the line away
            styled.print(clean(text), style=_COLOURS[tone] or None, markup=False, highlight=False, soft_wrap=True)
        else:
            self._raw(stream, text + "\n")

    def _raw(self, stream: TextIO, text: str) -> None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(clean(text).encode(encoding, errors="replace").decode(encoding))
        stream.flush()

    def _write_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if styled := self._rich(self._human):
            from rich import box
            from rich.table import Table
            from rich.text import Text

            table = Table(
                title=Text(clean(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
            )
            for column in columns:
                table.add_column(Text(clean(column)), overflow="fold")
            for row in rows:
                table.add_row(*(Text(clean(cell), style="bold red" if cell.startswith("FAIL") else "") for cell in row))
            styled.print(table)
            return
        self._write(self._human, title)
        for text in plain_table(columns, rows):
            self._write(self._human, "  " + text)

    def _rich(self, stream: TextIO) -> RichConsole | None:
        """Return rich's console when a person sits at this stream, else ``None``."""
        if self.mode is Mode.PLAIN or not _is_terminal(stream):
            return None
        if id(stream) not in self._styled:
            from rich.console import Console as RichConsole

            self._styled[id(stream)] = RichConsole(file=stream)
        return self._styled[id(stream)]

    @contextlib.contextmanager
    def _spinner(self, head: str) -> Iterator[None]:
        styled = None if self._terse else self._rich(self._human)
        if styled is None:
            yield
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=styled, transient=True) as live:
            live.add_task(clean(head), total=None)
            self._live = live
            try:
                yield
            finally:
                self._live = None

    @contextlib.contextmanager
    def _bar(self, total: int, title: str) -> Iterator[Callable[[int], None]]:
        if self._live is None:
            yield lambda items: None
            return
        live = self._live
        task = live.add_task(f"      {clean(title)}", total=total)
        try:
            yield lambda items: live.advance(task, items)
        finally:
            live.remove_task(task)


class Inside(Console):
    """Shows the progress bars and warnings of what runs inside a step of another console, and nothing else."""

    def __init__(self, outer: Console) -> None:
        super().__init__(Mode.SILENT)
        self._outer = outer

    @contextlib.contextmanager
    def progress(self, total: int, title: str) -> Iterator[Callable[[int], None]]:
        """Show how far a long step is."""
        with self._outer.progress(total, title) as advance:
            yield advance

    def warn(self, message: str) -> None:
        """Show a warning."""
        self._outer.warn(message)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table without any drawing characters: columns two spaces apart, a rule of dashes."""
    cells = [list(map(clean, columns)), *([clean(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * w for w in widths])
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def clean(text: str) -> str:
    """Drop control characters: a node name from a foreign file must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))


def _is_terminal(stream: TextIO) -> bool:
    isatty: Callable[[], bool] | None = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"
