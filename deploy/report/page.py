"""The page of one run: the verdict, the figures that matter, then every section in a fixed order."""

from __future__ import annotations

from collections.abc import Callable

from deploy import summary, units
from deploy.records import ParityRecord, RunRecord
from deploy.report import graph, latency, overview, parity, provenance, words
from deploy.report.blocks import BAD, GOOD, WARN, Page, Section, Tile

# The order of the page. A section is a function that reads the record and says so where a stage did not run.
SECTIONS: tuple[Callable[[RunRecord], Section], ...] = (
    overview.asked_and_ran,
    parity.parity,
    latency.latency,
    graph.graph,
    graph.precision,
    graph.deploy_form,
    provenance.files,
    provenance.environment,
    provenance.recipe,
    provenance.reproduce,
)
TONES = {summary.PASSED: GOOD, summary.FAILED: BAD}


def run_page(run: RunRecord) -> Page:
    """Return the page of one run, verdict first."""
    status = summary.status(run)
    return Page(
        title=run.name,
        status=status,
        tone=TONES.get(status, WARN),
        verdict=run.verdict,
        statements=(run.model.weights.statement,),
        failures=failures_of(run),
        warnings=summary.warnings_of(run),
        tiles=(latency_tile(run), ratio_tile(run), error_tile(run), size_tile(run)),
        sections=tuple(section(run) for section in SECTIONS),
        footer=_footer(run),
    )


def failures_of(run: RunRecord) -> tuple[str, ...]:
    """Return what failed in the parity check, stage by stage, and in the precision audit; else the failing verdict."""
    broken = _broken_parity(run.parity) if run.parity else []
    same, told = summary.timed_and_compared(run)
    broken += [] if same else [told]
    broken += [f"{name}: {text}" for name, text, ok in summary.precision_ran(run) if not ok]
    return tuple(broken) if broken or run.ok else (run.verdict,)


def _broken_parity(record: ParityRecord) -> list[str]:
    """List what is out of its limits: outputs, decisions, gates of a detector, rows of a batch."""
    broken = [f"{c.stage}, {c.output}: {'; '.join(c.failures)}" for c in record.comparisons if not c.passed]
    broken += [
        f"{c.stage}, {c.module}: PyTorch preferred its own {c.what} by up to {units.number(c.margin)} "
        f"(limit {units.number(c.limit)})"
        for c in record.decisions
        if not c.ok
    ]
    broken += [f"{c.stage}, gate {c.gate}: {'; '.join(c.failures)}" for c in record.selection if not c.ok]
    batches = record.batches.checks if record.batches else ()
    return broken + [f"{c.stage}: {summary.batch_failure(c)}" for c in batches if not c.ok]


def _footer(run: RunRecord) -> str:
    return f"{run.name} · made {run.created} by effdeploy {run.effdeploy} · drawn from manifest.json alone"


def latency_tile(run: RunRecord) -> Tile:
    """Return the median latency of the first candidate that is no baseline."""
    measured = summary.main_latencies(run.bench) if run.bench else ()
    if not measured:
        return Tile(label="latency p50", value="not run", note=_why(run, "latency"))
    best = measured[0]
    note = f"{best.name}, batch {best.batch}, {words.conditions(best)}"
    return Tile(label="latency p50", value=units.milliseconds(best.p50), note=note)


def ratio_tile(run: RunRecord) -> Tile:
    """Return the first ratio against a baseline."""
    if run.bench is None or not run.bench.ratios:
        why = _why(run, "latency") if run.bench is None else "no baseline was asked for (--baseline)"
        return Tile(label="against baseline", value="not run", note=why)
    r = run.bench.ratios[0]
    word = "faster than" if r.p10 > 1 else "slower than" if r.p90 < 1 else "no clear difference from"
    note = f"{word} {r.baseline}, batch {r.batch} ({units.number(r.p10)} to {units.number(r.p90)})"
    return Tile(label="against baseline", value=f"{units.number(r.median)}x", note=note)


def error_tile(run: RunRecord) -> Tile:
    """Return the largest error of the last judged stage."""
    found = summary.worst(summary.last_stage(run))
    if found is None or run.parity is None:
        return Tile(label="error of the last stage", value="not run", note=_why(run, "parity"))
    tolerance = parity.limits_of(run.parity, found)
    limit = tolerance.max_relative if tolerance else None
    allowed = f"{units.given(limit)} allowed, " if limit is not None else ""
    note = f"of the largest output; {allowed}stage {found.stage}"
    if not found.passed:
        return Tile(
            label="error of the last stage",
            value=f"✗ {units.number(found.max_relative)}",
            note=f"FAIL: {note}",
            tone=BAD,
        )
    return Tile(label="error of the last stage", value=units.number(found.max_relative), note=note)


def size_tile(run: RunRecord) -> Tile:
    """Return the size of the first engine."""
    if not run.engines:
        return Tile(label="engine size", value="not run", note=_why(run, "engine"))
    engine = run.engines[0]
    more = f" and {len(run.engines) - 1} more" if len(run.engines) > 1 else ""
    return Tile(
        label="engine size", value=units.size(engine.artifact.size), note=f"{summary.engine_name(engine)}{more}"
    )


def _why(run: RunRecord, stage: str) -> str:
    """Return the reason alone: the tile itself says that nothing ran."""
    return summary.why_missing(run, stage).removeprefix("not run: ")
