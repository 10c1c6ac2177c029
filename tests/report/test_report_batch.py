"""The batch suite and the audit's details on the page and on the terminal."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from deploy import summary
from deploy.console import Console, Mode
from deploy.records import RunRecord
from deploy.report import render

from . import sample


def leaking_run() -> RunRecord:
    run = sample.full_run()
    assert run.parity is not None
    assert run.parity.batches is not None
    *others, last = run.parity.batches.checks
    broken = dataclasses.replace(last, error=0.25, ok=False, detail="row 7 is NaN")
    batches = dataclasses.replace(run.parity.batches, ok=False, checks=(*others, broken), verdict="a row leaks")
    parity = dataclasses.replace(run.parity, ok=False, verdict="a row leaks", batches=batches)
    return dataclasses.replace(run, ok=False, verdict="a row leaks", parity=parity)


def page(run: RunRecord, folder: Path) -> str:
    render([run], folder, ("md",))
    return (folder / "report.md").read_text()


def test_a_row_per_stage_with_its_largest_differences() -> None:
    assert summary.batch_rows(sample.full_run()) == [
        ("engine", "1, 3, 8", "3.11e-4", "2.17e-4", "-", "0", "-", "pass"),
    ]


def test_a_leak_heads_the_page_and_the_terminal(tmp_path: Path) -> None:
    run = leaking_run()
    found = "neighbour at batch 8 where row 7 is NaN: row 1 of output 'logits' is off by 0.250 (limit 0)"
    head = page(run, tmp_path).split("## ")[0]
    assert f"engine: {found}" in head
    out = io.StringIO()
    Console(Mode.PLAIN, stdout=out, stderr=out).summary(run)
    assert f"FAIL: {found}" in out.getvalue()
    assert summary.status(run) == summary.FAILED


def test_a_run_without_the_suite_shows_no_table(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.parity is not None
    old = dataclasses.replace(run, parity=dataclasses.replace(run.parity, batches=None))
    assert "Rows of a batch" in page(run, tmp_path)
    assert "Rows of a batch" not in page(old, tmp_path)


def test_the_audit_shows_shares_fusions_and_warnings(tmp_path: Path) -> None:
    run = sample.full_run()
    audit = dataclasses.replace(
        run.engines[0].audit, kernels={"fp16": 999, "fp32": 1}, weights={"fp16": 750, "fp32": 250},
        microseconds={"fp16": 1.5, "fp32": 8.5}, fused={"attention": 11, "norm": 2}, expected={"attention": 12},
        warnings=("1 attention blocks are not in a fused kernel: blocks.3",),
    )  # fmt: skip
    text = page(dataclasses.replace(run, engines=(dataclasses.replace(run.engines[0], audit=audit),)), tmp_path)
    assert "fp16 999 (> 99 %), fp32 1 (< 1 %)" in text.replace("\\", "")
    assert "fp16 75 %, fp32 25 %" in text
    assert "fp32 85 %, fp16 15 %" in text
    assert "attention 11 for 12 blocks, norm 2" in text
    assert "onnxruntime on cpu: 1 attention blocks are not in a fused kernel: blocks.3" in text
