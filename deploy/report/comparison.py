"""The page that sets several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deploy import summary, units
from deploy.records import RunRecord
from deploy.report import charts, words
from deploy.report.blocks import BAD, GOOD, WARN, Block, Cell, Chart, Listing, Page, Section, Table, Text, cells
from deploy.report.page import TONES, error_tile, failures_of, latency_tile, size_tile

FLOOR = 1e-12  # where a drift of nothing lies on a logarithmic axis


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
        sections=(_overview(runs), _pareto(runs), _compared_latency(runs), _machines(runs)),
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


def _pareto(runs: Sequence[RunRecord]) -> Section:
    """Set latency against drift: what an engine's outputs are off from PyTorch; one chart for what can be compared."""
    groups: dict[tuple[str, ...], list[_Placed]] = {}
    absent: list[str] = []
    for number, run in enumerate(runs, 1):
        latency, error = summary.main_latencies(run.bench)[:1] if run.bench else (), _drift(run)
        if not latency or not math.isfinite(latency[0].p50) or error is None:
            absent.append(f"{number} {run.name}: {'no latency' if not latency else 'no finite error'}")
            continue
        c = latency[0]
        where = (run.environment.cpu, c.device, words.conditions(c), f"batch {c.batch}")
        groups.setdefault(where, []).append(_Placed(number=number, name=run.name, p50=c.p50, drift=error))
    blocks: list[Block] = []
    for index, (group, placed) in enumerate(groups.items()):
        blocks += _pareto_blocks(index, group, placed)
    if absent:
        blocks.append(Listing(items=tuple(absent), tone=WARN))
    return Section(slug="pareto", title="Latency against drift", blocks=tuple(blocks))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placed:
    """A run on the plane of latency (milliseconds) and drift (a share of the largest output)."""

    number: int
    name: str
    p50: float
    drift: float

    def beaten(self, others: Sequence[_Placed]) -> bool:
        """Whether another run is at least as good in both, and better in one."""
        return any(o.p50 <= self.p50 and o.drift <= self.drift and (o.p50, o.drift) != (self.p50, self.drift)
                   for o in others)  # fmt: skip


def _drift(run: RunRecord) -> float | None:
    worst = summary.worst(summary.last_stage(run))
    return worst.max_relative if worst is not None and math.isfinite(worst.max_relative) else None


def _pareto_blocks(index: int, where: tuple[str, ...], placed: Sequence[_Placed]) -> list[Block]:
    title = f"Latency p50 against drift, {where[3]}, {where[2]}"
    sentence = (
        "To the left is faster, down is nearer to float32 PyTorch (largest error of the last stage, of the largest "
        "output; logarithmic). Filled: no other run is better in both."
    )
    spots = [charts.Spot(number=p.number, x=p.p50, y=max(p.drift, FLOOR), front=not p.beaten(placed)) for p in placed]
    svg = charts.scatter(f"chart-pareto-{index}", title, sentence, spots, "ms")
    legend = (("spot-front", "not beaten in both"), ("spot", "beaten"))
    rows = tuple(
        cells(str(p.number), p.name, units.milliseconds(p.p50), units.number(p.drift),
              Cell(text="no", tone=GOOD) if not p.beaten(placed) else "yes")
        for p in placed
    )  # fmt: skip
    columns = ("number", "run", "latency p50", "drift", "beaten in both")
    table = Table(title=f"On {where[0]}", columns=columns, rows=rows, numeric=frozenset({"latency p50", "drift"}))
    return [Chart(title=title, sentence=sentence, svg=svg, legend=legend), table]


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
