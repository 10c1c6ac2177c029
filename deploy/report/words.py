"""Phrases that several sections share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deploy import summary, units
from deploy.records import Latency, RunRecord
from deploy.report.blocks import BAD, GOOD, WARN, Cell, Text


def not_run(run: RunRecord, stage: str) -> Text:
    """Say in place of a section why the stage is not there."""
    return Text(text=f"{stage}: {summary.why_missing(run, stage)}", tone=WARN)


def verdict(ok: bool, text: str) -> Cell:
    """Return a verdict with sign, word and colour."""
    return Cell(text=f"✓\u00a0{text}", tone=GOOD) if ok else Cell(text=f"✗\u00a0FAIL: {text}", tone=BAD)


def counts(numbers: Mapping[str, int]) -> str:
    """Return ``"fp16 142, fp32 50"``, largest first."""
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {units.count(n)}" for name, n in ordered) or "none"


def agreement(share: float | None) -> str:
    """Return a share of images, or that the task does not judge it."""
    return "not judged" if share is None else units.percent(share)


def decibel(value: float | None) -> str:
    """Return a signal-to-noise ratio with its unit; ``infinite`` for equal outputs."""
    text = units.number(value)
    return f"{text} dB" if value is not None and math.isfinite(value) else text


def conditions(latency: Latency) -> str:
    """Return what a latency holds for: ``"1 thread, cpu"``."""
    return f"{latency.threads} thread{'s' if latency.threads != 1 else ''}, {latency.device}"
