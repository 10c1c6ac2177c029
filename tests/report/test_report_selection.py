"""Both gates of a detector on the page and on the terminal."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

from deploy import summary
from deploy.console import Console, Mode
from deploy.parity.selection import with_selection
from deploy.records import RunRecord, SelectionCheck, from_json, to_json
from deploy.report import render
from deploy.report.page import failures_of

from . import sample

CHECK = SelectionCheck(
    stage="fp16", gate="B", images=8, moved=0.14, overlap=0.998, lost=10, margin=0.0045, rank=98, median=2e-3,
    largest=0.76, boxes=3e-4, elementwise=6.57, matched=1.0, matches="60 of 60 detections above 0.5 matched",
    score=0.009, random=False, ok=True, failures=(), notes=(), seconds=1.0,
)  # fmt: skip


def judged(**changes: Any) -> RunRecord:
    run = sample.full_run()
    assert run.parity is not None
    parity = with_selection(run.parity, [dataclasses.replace(CHECK, **changes)])
    return dataclasses.replace(run, ok=parity.ok, verdict=parity.verdict, parity=parity)


def shown(run: RunRecord, folder: Path) -> tuple[str, str]:
    out = io.StringIO()
    Console(Mode.PLAIN, stdout=out, stderr=out).summary(run)
    render([run], folder, ("md",))
    return out.getvalue(), (folder / "report.md").read_text()


def test_differences_of_rows_that_moved_are_no_criterion(tmp_path: Path) -> None:
    assert summary.selection_rows(judged()) == [
        (
            "fp16", "B", "0.00200", "0.760", "3.00e-4", "6.57 (not a criterion)", "14.0 %", "99.8 %",
            "10, 0.00450, rank 98", "100 %", "pass",
        ),
    ]  # fmt: skip
    assert summary.selection_rows(judged(moved=0.0))[0][5] == "6.57"
    for text in shown(judged(), tmp_path):
        assert "not a criterion" in text


def test_random_weights_are_said_to_prove_no_precision(tmp_path: Path) -> None:
    run = judged(random=True)
    assert run.ok
    assert "NOT proven (weights: random)" in run.verdict
    for text in shown(run, tmp_path):
        assert "precision not proven (weights: random)" in text


def test_a_failed_gate_heads_everything(tmp_path: Path) -> None:
    run = judged(ok=False, failures=("matched detections 61.0 % < 99.5 %",))
    assert summary.status(run) == summary.FAILED
    for text in shown(run, tmp_path):
        assert "gate B fails at 'fp16': matched detections 61.0 % < 99.5 %" in text.replace("\\", "")
    assert failures_of(run) == ("fp16, gate B: matched detections 61.0 % < 99.5 %",)
    assert failures_of(judged()) == ()


def test_what_a_stage_does_not_show_is_left_open(tmp_path: Path) -> None:
    run = judged(moved=None, overlap=None, lost=None, margin=None, rank=None, median=None, largest=None, boxes=None,
                 elementwise=None, score=None, matched=None)  # fmt: skip
    assert summary.selection_rows(run)[0][2:-1] == ("-",) * 8
    assert from_json(RunRecord, to_json(run)) == run
