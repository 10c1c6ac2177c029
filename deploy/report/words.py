"""Phrases that several sections share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deploy import summary, units
from deploy.records import Audit, Latency, RunRecord
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


def shares(numbers: Mapping[str, float], *, counted: bool = True) -> str:
    """Return ``"fp16 142 (74 %), fp32 50 (26 %)"``, or shares alone for what is not counted, largest first."""
    total = sum(numbers.values())
    if not total:
        return "not told"
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    percent = [(name, n, _whole_percent(n / total)) for name, n in ordered]
    return ", ".join(f"{name} {units.count(int(n))} ({p})" if counted else f"{name} {p}" for name, n, p in percent)


def _whole_percent(share: float) -> str:
    """Return ``"74 %"``; what is neither none nor all is never said to be."""
    whole = round(100 * share)
    if 0 < share < 1 and whole in (0, 100):
        return "< 1 %" if whole == 0 else "> 99 %"
    return f"{whole} %"


def fusions(audit: Audit) -> str:
    """Return fused kernels by kind, beside what the graph has: ``"attention 12 for 12 blocks"``."""
    kinds = sorted({*audit.fused, *audit.expected})
    counted = [(kind, audit.fused.get(kind, 0), audit.expected.get(kind)) for kind in kinds]
    return ", ".join(f"{kind} {n}" + (f" for {of} blocks" if of else "") for kind, n, of in counted) or "none"


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
