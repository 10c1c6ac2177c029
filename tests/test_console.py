"""The terminal: what a person, a log file and a program get."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from report import sample

from deploy import console as module
from deploy import summary
from deploy.console import Console, Mode
from deploy.errors import ParityError, StorageError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def make(mode: Mode = Mode.AUTO, *, terminal: bool = False, steps: int = 0) -> tuple[Console, io.StringIO, io.StringIO]:
    kind = Terminal if terminal else io.StringIO
    out, err = kind(), kind()
    return Console(mode, steps=steps, stdout=out, stderr=err), out, err


def events(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def fail_half_way(console: Console) -> None:
    with console.step("engine") as step:
        step.note("half way")
        raise ValueError("boom")


def use_everything(console: Console) -> None:
    """Call every method once."""
    with console.step("passes") as step:
        step.note("13 passes, 87 sites")
        with console.progress(3, "images") as advance:
            advance(1)
            advance(2)
        console.warn("careful")
    console.table("files", ("name", "size"), [("a.onnx", "1 MB"), ("long-name.onnx", "2 MB")])
    console.line("a line", "good")
    console.error(ParityError("off by 3", hint="effdeploy export --fp32"))
    console.summary(sample.full_run(), "engines/x")
    console.result(sample.full_run())


def test_plain_lines_when_not_a_terminal() -> None:
    console, out, err = make(steps=7)
    use_everything(console)
    text = out.getvalue()
    assert text.startswith(
        "[1/7] passes     \n[1/7] passes      13 passes, 87 sites  0.0 s\n"
    )  # the warning came between
    assert "  name            size\n  --------------  ----\n  a.onnx          1 MB\n  long-name.onnx  2 MB\n" in text
    assert err.getvalue() == (
        "warning: careful\nerror: off by 3\nhint: effdeploy export --fp32\nexit code 15 (ParityError)\n"
    )
    for stream in (out, err):
        assert "\x1b" not in stream.getvalue()
        assert "\r" not in stream.getvalue()
        assert all(ord(c) < 128 for c in stream.getvalue())


def test_a_step_without_trouble_is_one_line() -> None:
    console, out, _ = make(steps=7)
    with console.step("trace") as step:
        assert out.getvalue() == "[1/7] trace      "  # a run that is killed now shows where it was
        step.note("opset 20")
    with console.step("passes"):
        pass
    assert out.getvalue() == "[1/7] trace       opset 20  0.0 s\n[2/7] passes      0.0 s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_that_fails_says_so_and_does_not_swallow(terminal: bool) -> None:
    console, out, _ = make(terminal=terminal)
    with pytest.raises(ValueError, match="boom"):
        fail_half_way(console)
    assert "[1] engine" in out.getvalue()
    assert "failed after" in out.getvalue()
    assert "half way" not in out.getvalue()


def test_seconds_are_those_of_the_step() -> None:
    console, out, _ = make(Mode.JSON)
    with console.step("engine"):
        time.sleep(0.05)
    started, done = events(out)
    assert (started["status"], done["status"]) == ("started", "done")
    assert 0.05 <= done["seconds"] < 5


def test_a_terminal_gets_colour_and_the_same_words() -> None:
    console, out, err = make(terminal=True, steps=7)
    use_everything(console)
    assert "\x1b[" in out.getvalue()
    for words in ("[1/7] passes", "13 passes, 87 sites", "long-name.onnx", "PASSED", sample.STATEMENT):
        assert words in out.getvalue()
    assert "off by 3" in err.getvalue()
    assert "exit code 15" in err.getvalue()


def test_a_warning_during_progress_is_printed_above_the_bar() -> None:
    console, out, err = make(terminal=True)
    with console.step("parity"), console.progress(2, "images") as advance:
        advance(1)
        console.warn("careful")
    assert "warning: careful" in out.getvalue()  # by the bar's own console: it would wipe a line of another one
    assert err.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_phases_nest_come_again_and_may_stay_open(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.console._PLAIN_PROGRESS_SECONDS", 0.0)
    console, out, _ = make(terminal=terminal)
    with console.step("engine"), console.phases() as report:
        report("Building", 0, 2)
        for _ in range(2):
            report("Timing", 0, 3)
            report("Timing", 3, 3)
        report("Building", 1, 2)  # a cancelled build never ends its phases
    if not terminal:
        assert "Timing: 3 of 3" in out.getvalue()
        assert "Building: 1 of 2" in out.getvalue()


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {}])
def test_dumb_terminals_and_plain_mode_get_no_escapes(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console, out, err = make(Mode.AUTO if environment else Mode.PLAIN, terminal=True)
    use_everything(console)
    assert "\x1b" not in out.getvalue() + err.getvalue()


def test_quiet_keeps_verdict_weights_bundle_and_trouble() -> None:
    console, out, err = make(Mode.QUIET)
    use_everything(console)
    run = sample.full_run()
    assert out.getvalue().split("\n") == ["", f"PASSED: {run.verdict}", sample.STATEMENT, "bundle      engines/x", ""]
    assert "warning: careful" in err.getvalue()
    assert "exit code 15" in err.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_silent_is_silent(terminal: bool) -> None:
    console, out, err = make(Mode.SILENT, terminal=terminal)
    use_everything(console)
    assert out.getvalue() + err.getvalue() == ""


def test_programs_get_one_object_a_line_and_people_the_other_stream() -> None:
    console, out, err = make(Mode.JSON, steps=7)
    use_everything(console)
    kinds = [e["event"] for e in events(out)]
    assert kinds == ["step", "warning", "step", "table", "line", "error", "summary", "result"]
    by_kind = {e["event"]: e for e in events(out)}
    assert by_kind["step"]["notes"] == ["13 passes, 87 sites"]
    assert by_kind["table"]["rows"][0] == ["a.onnx", "1 MB"]
    assert (by_kind["error"]["exit_code"], by_kind["error"]["type"]) == (15, "ParityError")
    assert by_kind["summary"]["weights"] == sample.STATEMENT
    assert by_kind["result"]["record"]["parity"]["ok"] is True
    assert "PASSED" in err.getvalue()
    assert "warning: careful" in err.getvalue()


def test_results_with_nan_are_still_json() -> None:
    console, out, _ = make(Mode.JSON)
    console.result(sample.broken_numbers_run())
    assert events(out)[0]["record"]["parity"]["comparisons"][-1]["max_relative"] == "nan"


def test_long_steps_give_a_sign_of_life_in_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLAIN_PROGRESS_SECONDS", 0.0)
    console, out, _ = make()
    with console.step("precision"), console.progress(3, "images") as advance:
        advance(1)
        advance(2)
    assert out.getvalue().splitlines()[1:3] == ["      images: 1 of 3", "      images: 3 of 3"]


@pytest.mark.parametrize("terminal", [False, True])
def test_foreign_strings_do_not_steer_the_terminal(terminal: bool) -> None:
    console, out, err = make(terminal=terminal)
    evil = "\x1b]0;owned\x07[bold]\x9b31m\rname"
    console.line(evil)
    console.warn(evil)
    console.table(evil, (evil,), [(evil,)])
    with console.step(evil) as step:
        step.note(evil)
    text = out.getvalue() + err.getvalue()
    assert "\x1b]0;" not in text
    assert "\x9b" not in text
    assert "\x07" not in text
    assert "[bold]" in text  # markup is text


def test_a_narrow_encoding_does_not_crash() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(Mode.PLAIN, stdout=stream, stderr=stream).line("50 → 25 µs")
    assert raw.getvalue() == b"50 ? 25 ?s\n"


def test_log_file_takes_what_libraries_say(tmp_path: Path) -> None:
    console, out, err = make()
    level = logging.getLogger().level
    with console.log_file(tmp_path / "run.log"), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.getLogger("onnxscript").info("translated 42 nodes")
        warnings.warn("deprecated thing", stacklevel=1)
    logging.getLogger("torch.onnx").warning("after")
    text = (tmp_path / "run.log").read_text()
    assert "translated 42 nodes" in text
    assert "deprecated thing" in text
    assert "after" not in text
    assert out.getvalue() + err.getvalue() == ""
    assert logging.getLogger().level == level


@pytest.mark.parametrize("where", ["absent/run.log", "."])
def test_a_log_that_cannot_be_written_is_said_at_once(where: str, tmp_path: Path) -> None:
    console, _, _ = make()
    before = list(logging.getLogger().handlers)
    with pytest.raises(StorageError, match="cannot write the log") as caught, console.log_file(tmp_path / where):
        pytest.fail("work was begun")
    assert caught.value.exit_code == 19
    assert "--log" in caught.value.hint
    assert logging.getLogger().handlers == before


def test_an_error_of_another_kind_still_has_a_code() -> None:
    console, _, err = make()
    console.error(RuntimeError())
    assert err.getvalue() == "error: RuntimeError\nexit code 1 (RuntimeError)\n"


SUMMARIES = {
    "full": (sample.full_run, summary.PASSED),
    "failed": (sample.failed_run, summary.FAILED),
    "stopped": (sample.stopped_run, summary.INCOMPLETE),
    "ahead of time": (sample.ahead_of_time_run, summary.PASSED_UNRUN),
    "broken numbers": (sample.broken_numbers_run, summary.FAILED),
    "hostile": (sample.hostile_run, summary.PASSED),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_summary_begins_with_the_verdict_and_names_the_weights(name: str) -> None:
    build, status = SUMMARIES[name]
    console, out, _ = make()
    console.summary(build(), "engines/x")
    lines = out.getvalue().splitlines()
    assert lines[1].startswith(f"{status}: ")
    assert sample.STATEMENT in lines
    assert lines[-1] == "bundle      engines/x"


def test_summary_has_every_figure() -> None:
    console, out, _ = make()
    console.summary(sample.full_run(), "engines/x")
    text = out.getvalue()
    for words in (
        "riformer s12, 224x224, batch 1, 11.9 M parameters, 1.82 G multiply-adds",
        "asked fp16",
        "142 of 192 floating-point nodes compute in fp16",
        "0.00126",
        "1.08x (1.05 to 1.09) naive; 1.49x (1.44 to 1.53) eager",
        "30-fp16.onnx 23.9 MB",
    ):
        assert words in text


def test_summary_says_what_did_not_run_and_why() -> None:
    console, out, _ = make()
    console.summary(sample.stopped_run())
    console.summary(sample.ahead_of_time_run())
    text = out.getvalue()
    assert "not run: the run stopped after trace (--until trace)" in text
    assert "was built but not run: no NVIDIA GPU on this machine: the engine is for sm89" in text


@pytest.mark.parametrize("where", ["run", "parity", "comparison", "audit"])
def test_one_failure_anywhere_is_a_failure(where: str) -> None:
    run = sample.full_run()
    assert run.parity is not None
    engine = run.engines[0]
    bad = dataclasses.replace(run.parity.comparisons[0], passed=False, failures=("made to fail",))
    broken = {
        "run": {"ok": False},
        "parity": {"parity": dataclasses.replace(run.parity, ok=False)},
        "comparison": {"parity": dataclasses.replace(run.parity, comparisons=(bad,))},
        "audit": {"engines": (dataclasses.replace(engine, audit=dataclasses.replace(engine.audit, ok=False)),)},
    }
    assert summary.status(run) == summary.PASSED
    assert summary.status(dataclasses.replace(run, **broken[where])) == summary.FAILED
    console, out, _ = make()
    console.summary(dataclasses.replace(run, **broken[where]))
    assert "FAIL" in out.getvalue()


@pytest.mark.parametrize(
    ("top1", "ties", "words"),
    [
        (0.875, 1, "87.5 % (1 near tie)"),
        (0.75, 2, "75.0 % (2 near ties)"),
        (0.75, 0, "75.0 %"),
        (None, 0, "not judged"),
    ],
)
def test_near_ties_are_told(top1: float | None, ties: int, words: str) -> None:
    run = sample.full_run()
    assert run.parity is not None
    one = dataclasses.replace(run.parity.comparisons[0], top1=top1, top1_ties=ties)
    run = dataclasses.replace(run, parity=dataclasses.replace(run.parity, comparisons=(one,)))
    assert summary.parity_rows(run)[0][3] == words


def test_nan_is_the_worst_error() -> None:
    run = sample.broken_numbers_run()
    assert run.parity is not None
    found = summary.worst(run.parity.comparisons)
    assert found is not None
    assert found.stage == "engine"


def test_importing_the_console_loads_neither_rich_nor_records() -> None:
    script = (
        "import sys, deploy.console\n"
        "heavy = {'rich', 'deploy.records', 'jinja2', 'torch', 'numpy', 'dataclasses'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
