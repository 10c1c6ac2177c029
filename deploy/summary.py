"""What a run comes to, in a few lines: the same words on the terminal and at the head of a report.

Everything here is read from the ``RunRecord``; nothing is measured and nothing is assumed. What a run did not do is
said ("not run: ..."), never left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deploy import units

if TYPE_CHECKING:
    from deploy.records import (
        BatchCheck,
        BenchRecord,
        Comparison,
        EngineRecord,
        Latency,
        MachineNoise,
        Ratio,
        RunRecord,
        SelectionCheck,
    )

PASSED, FAILED, INCOMPLETE = "PASSED", "FAILED", "INCOMPLETE"
PASSED_UNRUN = "PASSED, ENGINE NOT RUN"
ROAD = ("model", "trace", "passes", "precision", "engine", "parity", "latency", "report")


def status(run: RunRecord) -> str:
    """Return the one word that heads everything: nothing has passed where nothing was judged.

    ``PASSED_UNRUN`` is for engines that this machine can build but not run: their graph passed, they themselves are
    unproven.
    """
    broken = run.parity is not None and not (run.parity.ok and all(c.passed for c in run.parity.comparisons))
    if not run.ok or broken or not all(e.audit.ok for e in run.engines):
        return FAILED
    if run.parity is None or not run.parity.comparisons:
        return INCOMPLETE
    return PASSED if any(e.runnable for e in run.engines) else PASSED_UNRUN


def why_missing(run: RunRecord, stage: str) -> str:
    """Say why the record of a stage is not there: ``"not run: the run stopped after trace (--until trace)"``."""
    until = run.until.value
    if ROAD.index(until) < ROAD.index(stage):
        return f"not run: the run stopped after {until} (--until {until})"
    if stage == "latency" and run.engines and not any(e.runnable for e in run.engines):
        return f"not run: {reason_not_runnable(run.engines[0])}"
    return "not run: the record of this run has none"


def reason_not_runnable(engine: EngineRecord) -> str:
    """Say why an engine was built but not run here."""
    return engine.reason or f"{engine.artifact.name} cannot run on this machine; the record gives no reason"


def precision_asked(run: RunRecord) -> str:
    """Return the asked precision: ``"asked fp16"``, or why nothing is known."""
    return f"asked {run.precision.precision.value}" if run.precision else why_missing(run, "precision")


def precision_ran(run: RunRecord) -> tuple[tuple[str, str, bool], ...]:
    """Return for each engine its name, the audit's statement, and whether it is what was asked."""
    return tuple((engine_name(e), e.audit.statement, e.audit.ok) for e in run.engines)


def engine_name(engine: EngineRecord) -> str:
    """Return backend and device: ``"onnxruntime on cpu"``."""
    return f"{engine.backend} on {engine.device}"


def choice_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Return what ``--backend auto`` took and why, and the figures of each backend that it tried."""
    if run.choice is None:
        return []
    rows = [("backend", run.choice.reason)]
    for one in run.choice.tried:
        time = units.milliseconds(one.milliseconds) if one.milliseconds is not None else "not timed"
        limit = f"; {one.limit}, {units.percent(one.used)} used" if one.used is not None else ""
        rows.append((f"{one.backend} {one.version}".strip(), f"{time}{limit}{'; ' if one.reason else ''}{one.reason}"))
    return rows


def worst(comparisons: tuple[Comparison, ...]) -> Comparison | None:
    """Return the comparison with the largest relative error; NaN counts as the worst of all."""
    return max(comparisons, key=lambda c: math.inf if math.isnan(c.max_relative) else c.max_relative, default=None)


def last_stage(run: RunRecord) -> tuple[Comparison, ...]:
    """Return the comparisons of the last judged stage: the engine's, when one ran."""
    if run.parity is None or not run.parity.comparisons:
        return ()
    stage = run.parity.comparisons[-1].stage
    return tuple(c for c in run.parity.comparisons if c.stage == stage)


def main_latencies(bench: BenchRecord) -> tuple[Latency, ...]:
    """Return what was measured for the run itself: every candidate that is no baseline."""
    baselines = {r.baseline for r in bench.ratios}
    return tuple(c for c in bench.latencies if c.name not in baselines)


def ratios_of(bench: BenchRecord, latency: Latency) -> tuple[Ratio, ...]:
    """Return the comparisons of one candidate, best known baselines in the order they were measured."""
    return tuple(r for r in bench.ratios if r.name == latency.name and r.batch == latency.batch)


def model_line(run: RunRecord) -> str:
    """Return system, variant, size, batch, parameters and multiply-adds in one line."""
    m = run.model
    batch = f", batch {run.trace.batch}" if run.trace else ""
    height, width = m.size
    return (
        f"{m.system} {m.variant}, {height}x{width}{batch}, "
        f"{units.millions(m.deploy_parameters)} parameters, {units.giga(m.macs)} multiply-adds"
    )


def parity_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Return a row per stage and output: stage, largest relative error, cosine, top-1, verdict."""
    if run.parity is None:
        return []
    several = len({c.output for c in run.parity.comparisons}) > 1
    return [
        (
            f"{c.stage}: {c.output}" if several else c.stage,
            units.number(c.max_relative),
            units.cosine(c.cosine),
            top1(c),
            "pass" if c.passed else "FAIL: " + "; ".join(c.failures),
        )
        for c in run.parity.comparisons
    ]


SELECTION_COLUMNS = (
    "stage", "gate", "logits, median", "logits, largest", "boxes", "row by row", "rows moved", "shared",
    "lost, margin, best", "matched", "verdict",
)  # fmt: skip


def selection_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Return a row per stage of a detector: differences by position, what moved, what was lost, the verdict.

    Differences row by row are marked as no criterion where rows moved.
    """
    return [
        (
            c.stage,
            c.gate,
            *(units.number(value) if value is not None else "-" for value in (c.median, c.largest, c.boxes)),
            "-" if c.elementwise is None else units.number(c.elementwise) + (" (not a criterion)" if c.moved else ""),
            *("-" if share is None else units.percent(share) for share in (c.moved, c.overlap)),
            "-" if c.lost is None else f"{c.lost}, {units.number(c.margin)}" + (f", rank {c.rank}" if c.rank else ""),
            "-" if c.matched is None else units.percent(c.matched),
            _selection_verdict(c),
        )
        for c in (run.parity.selection if run.parity else ())
    ]


def _selection_verdict(check: SelectionCheck) -> str:
    if not check.ok:
        return "FAIL: " + "; ".join(check.failures)
    return f"precision not proven ({check.unproven})" if check.unproven else "pass"


BATCH_COLUMNS = ("stage", "batch sizes", "alone", "permuted", "duplicated", "neighbour", "repeated", "verdict")


def batch_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Return a row per stage of the batch suite: its sizes, the largest error of each check, the verdict."""
    checks = run.parity.batches.checks if run.parity and run.parity.batches else ()
    rows = []
    for stage in dict.fromkeys(c.stage for c in checks):
        mine = [c for c in checks if c.stage == stage]
        errors = {name: [c.error for c in mine if c.check == name] for name in BATCH_COLUMNS[2:-1]}
        failed = next((c for c in mine if not c.ok), None)
        rows.append(
            (
                stage,
                ", ".join(str(size) for size in dict.fromkeys(c.batch for c in mine)),
                *(units.number(max(found)) if found else "-" for found in errors.values()),
                "pass" if failed is None else f"FAIL: {batch_failure(failed)}",
            )
        )
    return rows


def batch_failure(check: BatchCheck) -> str:
    """Say what a failed check of the batch suite found: the check, the size, the row and by how much."""
    if not check.output:
        return f"does not run at batch {check.batch}: {check.detail}"
    detail = f" where {check.detail}" if check.detail else ""
    return (
        f"{check.check} at batch {check.batch}{detail}: row {check.row} of output {check.output!r} is off by "
        f"{units.number(check.error)} (limit {units.number(check.limit)})"
    )


def top1(comparison: Comparison) -> str:
    """Return the share of images with the same best class and its near ties: ``"87.5 % (1 near tie)"``."""
    if comparison.top1 is None:
        return "not judged"
    ties = comparison.top1_ties
    return units.percent(comparison.top1) + (f" ({ties} near tie{'s' if ties != 1 else ''})" if ties else "")


def noise_line(noise: MachineNoise) -> str:
    """Say what the machine itself did while latencies were taken."""
    spread = f"varies by {units.percent(noise.cov)} (CoV), slowest {units.number(noise.slowest)}x"
    told = [f"{noise.work}: p50 {units.milliseconds(noise.p50)}, {spread} over {units.count(noise.runs)} runs"]
    if noise.load_before is not None:
        told.append(f"load average {units.number(noise.load_before)} before, {units.number(noise.load_after)} after")
    if noise.stolen is not None:
        told.append(f"{units.percent(noise.stolen)} of the CPU time given to other virtual machines")
    return f"machine noise: {'; '.join(told)}"


def timed_and_compared(run: RunRecord) -> tuple[bool, str]:
    """Say whether accuracy and latency are of the same files, by hash; ``(True, "")`` where one of both is missing."""
    compared = {c.sha256 for c in run.parity.comparisons if c.stage.startswith("engine")} if run.parity else set()
    timed = {c.sha256 for c in run.bench.latencies if c.name.startswith("engine")} if run.bench else set()
    if not any(compared) or not any(timed):  # older bundles have no hashes here
        return True, ""
    names = {e.artifact.sha256: e.artifact.name for e in run.engines}
    if compared == timed and compared <= set(names):
        files = ", ".join(f"{names[sha256]}, sha256 {sha256[:12]}" for sha256 in sorted(timed))
        return True, f"compared with PyTorch and timed: the same file ({files})"
    told = [", ".join(sorted(sha256[:12] for sha256 in found)) for found in (compared, timed)]
    return False, f"compared with PyTorch was {told[0]}, timed was {told[1]}: accuracy and latency are of other files"


def latency_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Return a row per candidate: name, batch, p50, ratio to each baseline."""
    if run.bench is None:
        return []
    return [
        (
            c.name,
            str(c.batch),
            units.milliseconds(c.p50),
            "; ".join(f"{units.ratio(r.median, r.p10, r.p90)} {r.baseline}" for r in ratios_of(run.bench, c)) or "-",
        )
        for c in run.bench.latencies
    ]


def file_sizes(run: RunRecord) -> str:
    """Return every file with its size in one line."""
    return ", ".join(f"{name} {units.size(size)}" for name, size, _ in files(run)) or why_missing(run, "trace")


def files(run: RunRecord) -> tuple[tuple[str, int, str], ...]:
    """Return name, size in bytes and sha256 of each file of the bundle, each file once."""
    stages = (run.trace, run.passes, run.precision, *run.engines)
    found = {s.artifact.name: (s.artifact.name, s.artifact.size, s.artifact.sha256) for s in stages if s is not None}
    return tuple(found[name] for name in sorted(found))


def warnings_of(run: RunRecord) -> tuple[str, ...]:
    """Return everything that a reader must know before trusting a figure."""
    found = [f"{engine_name(e)} was built but not run: {reason_not_runnable(e)}" for e in run.engines if not e.runnable]
    found += run.model.notes
    found += run.precision.warnings if run.precision else ()
    found += [f"{engine_name(e)}: {warning}" for e in run.engines for warning in e.audit.warnings]
    found += run.parity.notes if run.parity else ()
    found += run.parity.batches.notes if run.parity and run.parity.batches else ()
    found += run.bench.warnings if run.bench else ()
    return tuple(dict.fromkeys(found))
