"""The page of one run, and the page that compares several."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deploy import summary, units
from deploy.records import RunRecord
from deploy.report import charts, provenance, sections
from deploy.report.blocks import BAD, GOOD, WARN, Block, Cell, Chart, Listing, Page, Section, Table, Text, Tile, cells

_TONES = {summary.PASSED: GOOD, summary.FAILED: BAD}


def run_page(run: RunRecord) -> Page:
    """Return the page of one run, verdict first."""
    status = summary.status(run)
    return Page(
        title=run.name,
        status=status,
        tone=_TONES.get(status, WARN),
        verdict=run.verdict,
        statements=(run.model.weights.statement,),
        warnings=(*failures_of(run), *summary.warnings_of(run)),
        tiles=tuple(_tiles(run)),
        sections=tuple(section(run) for section in (*sections.SECTIONS, *provenance.SECTIONS)),
        footer=_footer(run),
    )


def failures_of(run: RunRecord) -> tuple[str, ...]:
    """Return what failed in the parity check, stage by stage."""
    comparisons = run.parity.comparisons if run.parity else ()
    return tuple(f"✗ FAIL {c.stage}, {c.output}: {'; '.join(c.failures)}" for c in comparisons if not c.passed)


def _footer(run: RunRecord) -> str:
    return f"{run.name} · made {run.created} by effdeploy {run.effdeploy} · drawn from manifest.json alone"


def _tiles(run: RunRecord) -> list[Tile]:
    return [_latency_tile(run), _ratio_tile(run), _error_tile(run), _size_tile(run)]


def _latency_tile(run: RunRecord) -> Tile:
    measured = summary.main_latencies(run.bench) if run.bench else ()
    if not measured:
        return Tile(label="latency p50", value="not run", note=summary.why_missing(run, "latency"))
    best = measured[0]
    threads = f"{best.threads} thread{'s' if best.threads != 1 else ''}"
    note = f"{best.name}, batch {best.batch}, {threads}, {best.device}"
    return Tile(label="latency p50", value=units.milliseconds(best.p50), note=note)


def _ratio_tile(run: RunRecord) -> Tile:
    if run.bench is None or not run.bench.ratios:
        why = summary.why_missing(run, "latency") if run.bench is None else "no baseline was asked for (--baseline)"
        return Tile(label="against baseline", value="not run", note=why)
    r = run.bench.ratios[0]
    note = f"times as fast as {r.baseline}, batch {r.batch} ({units.number(r.p10)} to {units.number(r.p90)})"
    return Tile(label="against baseline", value=f"{units.number(r.median)}x", note=note)


def _error_tile(run: RunRecord) -> Tile:
    found = summary.worst(summary.last_stage(run))
    if found is None or run.parity is None:
        return Tile(label="largest error", value="not run", note=summary.why_missing(run, "parity"))
    tolerance = sections.limits_of(run.parity, found)
    limit = tolerance.max_relative if tolerance else None
    allowed = f"{units.number(limit)} allowed, " if limit is not None else ""
    note = f"of the largest output; {allowed}stage {found.stage}"
    if not found.passed:
        return Tile(
            label="largest error", value=f"✗ {units.number(found.max_relative)}", note=f"FAIL: {note}", tone=BAD
        )
    return Tile(label="largest error", value=units.number(found.max_relative), note=note)


def _size_tile(run: RunRecord) -> Tile:
    if not run.engines:
        return Tile(label="engine size", value="not run", note=summary.why_missing(run, "engine"))
    engine = run.engines[0]
    more = f" and {len(run.engines) - 1} more" if len(run.engines) > 1 else ""
    return Tile(
        label="engine size", value=units.size(engine.artifact.size), note=f"{summary.engine_name(engine)}{more}"
    )


def comparison_page(runs: Sequence[RunRecord]) -> Page:
    """Return the page that sets several runs side by side."""
    states = [summary.status(r) for r in runs]
    failed = sum(s == summary.FAILED for s in states)
    passed = sum(s == summary.PASSED for s in states)
    tone = BAD if failed else GOOD if passed == len(runs) else WARN
    return Page(
        title=f"Comparison of {len(runs)} runs",
        status=summary.FAILED if failed else summary.PASSED if passed == len(runs) else summary.INCOMPLETE,
        tone=tone,
        verdict=f"{passed} of {len(runs)} runs passed, {failed} failed, {len(runs) - passed - failed} not fully judged",
        statements=tuple(dict.fromkeys(r.model.weights.statement for r in runs)),
        warnings=tuple(f"{r.name}: {w}" for r in runs for w in failures_of(r)),
        tiles=(),
        sections=(_overview(runs), _compared_latency(runs), _machines(runs)),
        footer=f"drawn from {len(runs)} manifests alone",
    )


def _overview(runs: Sequence[RunRecord]) -> Section:
    columns = ("run", "verdict", "precision", "engine", "latency p50", "largest error", "engine size", "weights")
    rows = []
    for run in runs:
        status = summary.status(run)
        mark = {summary.PASSED: "✓ ", summary.FAILED: "✗ "}.get(status, "")
        latency, error, size = _latency_tile(run), _error_tile(run), _size_tile(run)
        rows.append(
            cells(
                run.name,
                Cell(text=mark + status, tone=_TONES.get(status, WARN)),
                run.precision.precision.value if run.precision else summary.why_missing(run, "precision"),
                ", ".join(summary.engine_name(e) for e in run.engines) or summary.why_missing(run, "engine"),
                latency.value,
                Cell(text=error.value, tone=error.tone),
                size.value,
                run.model.weights.statement,
            )
        )
    table = Table(title="Runs", columns=columns, rows=tuple(rows), numeric=frozenset(columns[4:7]))
    return Section(slug="overview", title="Overview", blocks=(table,))


def _compared_latency(runs: Sequence[RunRecord]) -> Section:
    """Draw bars per batch size: latencies of different batch sizes do not belong on one axis."""
    found = [(run, c) for run in runs if run.bench for c in summary.main_latencies(run.bench) if math.isfinite(c.p50)]
    blocks: list[Block] = []
    for batch in sorted({c.batch for _, c in found}):
        rows = [
            charts.Bar(label=f"{run.name}: {c.name}", value=c.p50, text=units.milliseconds(c.p50))
            for run, c in found
            if c.batch == batch
        ]
        title = f"Latency p50, batch {batch}"
        sentence = "Shorter is faster. Runs of different machines or thread counts are not comparable; see Machines."
        blocks.append(
            Chart(title=title, sentence=sentence, svg=charts.bars(f"chart-p50-{batch}", title, sentence, rows))
        )
    absent = tuple(f"{r.name}: {summary.why_missing(r, 'latency')}" for r in runs if r.bench is None)
    if absent:
        blocks.append(Listing(items=absent, tone=WARN))
    return Section(slug="latency", title="Latency", blocks=tuple(blocks) or (Text(text="not run", tone=WARN),))


def _machines(runs: Sequence[RunRecord]) -> Section:
    columns = ("run", "cpu", "cores", "gpu", "threads", "made", "effdeploy")
    rows = tuple(
        cells(
            r.name,
            r.environment.cpu,
            str(r.environment.cores),
            r.environment.gpu,
            ", ".join(sorted({str(c.threads) for c in r.bench.latencies})) if r.bench else "not run",
            r.created,
            r.effdeploy,
        )
        for r in runs
    )
    table = Table(title="Where each run was made", columns=columns, rows=rows, numeric=frozenset({"cores", "threads"}))
    return Section(slug="machines", title="Machines", blocks=(table,))
