"""The page that sets several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deploy import summary, units
from deploy.records import RunRecord
from deploy.report import charts
from deploy.report.blocks import BAD, GOOD, WARN, Block, Cell, Chart, Listing, Page, Section, Table, Text, cells
from deploy.report.page import TONES, error_tile, failures_of, latency_tile, size_tile


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
        failures=tuple(f"{r.name}: {w}" for r in runs for w in failures_of(r)),
        warnings=(),
        tiles=(),
        sections=(_overview(runs), _compared_latency(runs), _machines(runs)),
        footer=f"drawn from {len(runs)} manifests alone",
    )


def _overview(runs: Sequence[RunRecord]) -> Section:
    columns = (
        "run",
        "verdict",
        "precision",
        "engine",
        "latency p50",
        "error of the last stage",
        "engine size",
        "weights",
    )
    rows = []
    for run in runs:
        status = summary.status(run)
        mark = {summary.PASSED: "✓ ", summary.FAILED: "✗ "}.get(status, "")
        latency, error, size = latency_tile(run), error_tile(run), size_tile(run)
        rows.append(
            cells(
                run.name,
                Cell(text=mark + status, tone=TONES.get(status, WARN)),
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
    alone = len({(run.name, c.batch) for run, c in found}) == len(found)
    for batch in sorted({c.batch for _, c in found}):
        rows = [
            charts.Bar(
                label=run.name if alone else f"{run.name}: {c.name}", value=c.p50, text=units.milliseconds(c.p50)
            )
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
