"""The sections of a report on one run, in the order of the page.

Each function reads the ``RunRecord`` and returns a ``Section``; a new section is one function and one line in
``SECTIONS``. What a run did not do is said in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from deploy import summary, units
from deploy.records import BenchRecord, Comparison, Latency, ParityRecord, PassesRecord, RunRecord, Tolerance
from deploy.report import charts
from deploy.report.blocks import (
    BAD,
    GOOD,
    QUIET,
    WARN,
    Block,
    Cell,
    Chart,
    Details,
    Facts,
    Listing,
    Section,
    Table,
    Text,
    cells,
)

_MOST_BARS = 12


def asked_and_ran(run: RunRecord) -> Section:
    """Show what was asked beside what the engines compute in."""
    rows = [
        ("model", Cell(text=summary.model_line(run))),
        ("weights", Cell(text=run.model.weights.statement)),
        ("asked precision", Cell(text=run.precision.precision.value if run.precision else _missing(run, "precision"))),
        ("graph lowered for", Cell(text=run.passes.target.value if run.passes else _missing(run, "passes"))),
    ]
    blocks: list[Block] = [Facts(rows=tuple(rows))]
    if not run.engines:
        return Section(slug="asked", title="Asked and ran", blocks=(*blocks, _not_run(run, "engine")))
    table = Table(
        title="Engines",
        columns=(
            "engine",
            "version",
            "precision audit",
            "kernels by precision",
            "fused kernels",
            "evidence",
            "ran here",
        ),
        rows=tuple(
            cells(
                summary.engine_name(e),
                e.backend_version,
                _verdict_cell(e.audit.ok, e.audit.statement),
                _counts(e.audit.kernels),
                _counts(e.audit.fused),
                e.audit.evidence,
                Cell(text="yes") if e.runnable else Cell(text=f"no: {summary.reason_not_runnable(e)}", tone=WARN),
            )
            for e in run.engines
        ),
    )
    options = tuple(
        (summary.engine_name(e), Cell(text=", ".join(f"{k} = {v}" for k, v in sorted(e.options.items())) or "none"))
        for e in run.engines
    )
    folded = Details(summary="Build options", blocks=(Facts(rows=options),))
    return Section(slug="asked", title="Asked and ran", blocks=(*blocks, table, folded))


def parity(run: RunRecord) -> Section:
    """Show every stage against the fp32 PyTorch model, with the limits it was held to."""
    title = "Parity with fp32 PyTorch"
    record = run.parity
    if record is None or not record.comparisons:
        return Section(slug="parity", title=title, blocks=(_not_run(run, "parity"),))
    blocks: list[Block] = [
        Text(text=record.verdict, tone=GOOD if record.ok else BAD),
        _error_chart(record),
        _parity_table(record),
        _tolerance_table(record),
        Details(summary="Error by kind of input", blocks=(_per_input_table(record),)),
    ]
    if record.notes:
        blocks.append(Listing(items=record.notes, tone=QUIET))
    return Section(slug="parity", title=title, blocks=tuple(blocks))


def limits_of(record: ParityRecord, comparison: Comparison) -> Tolerance | None:
    """Return the limits that judged a comparison, when the record says which."""
    return record.tolerances.get(comparison.precision)


def _error_chart(record: ParityRecord) -> Chart:
    points = []
    for c in record.comparisons:
        tolerance = limits_of(record, c)
        limit = tolerance.max_relative if tolerance else None
        allowed = f" of {units.number(limit)} allowed" if limit is not None else ""
        mark = "" if c.passed else "FAIL "
        text = f"{mark}{units.number(c.max_relative)}{allowed}"
        points.append(
            charts.Point(label=_stage(record, c), value=c.max_relative, text=text, limit=limit, bad=not c.passed)
        )
    title = "Largest error by stage"
    sentence = (
        "Largest absolute difference of any output value, divided by the largest absolute value of the PyTorch "
        "reference; logarithmic axis."
    )
    svg = charts.log_points("chart-error", title, sentence, points)
    legend = (("dot", "error"), ("limit", "limit of the recipe"))
    return Chart(title=title, sentence=sentence, svg=svg, legend=legend if any(p.limit for p in points) else legend[:1])


def _parity_table(record: ParityRecord) -> Table:
    columns = (
        "stage", "verdict", "max relative", "cosine", "top-1", "top-5", "SNR", "max abs", "mean abs", "relative L2",
        "images",
    )  # fmt: skip
    return Table(
        title="Error by stage, all inputs together",
        columns=columns,
        numeric=frozenset(columns[2:]),
        rows=tuple(
            cells(
                _stage(record, c),
                _verdict_cell(c.passed, "pass" if c.passed else "; ".join(c.failures)),
                units.number(c.max_relative),
                units.cosine(c.cosine),
                _agreement(c.top1),
                _agreement(c.top5),
                _decibel(c.snr_db),
                units.number(c.max_abs),
                units.number(c.mean_abs),
                units.number(c.relative_l2),
                units.count(c.images),
            )
            for c in record.comparisons
        ),
    )


def _tolerance_table(record: ParityRecord) -> Table:
    columns = (
        "precision",
        "max relative at most",
        "cosine at least",
        "SNR at least",
        "top-1 at least",
        "top-5 at least",
    )

    def limit(text: str, value: float | None) -> str:
        return "not judged" if value is None else text

    return Table(
        title="Limits of the recipe",
        columns=columns,
        numeric=frozenset(columns[1:]),
        rows=tuple(
            cells(
                name,
                limit(units.number(t.max_relative), t.max_relative),
                limit(units.cosine(t.cosine), t.cosine),
                limit(_decibel(t.snr_db), t.snr_db),
                limit(units.percent(t.top1), t.top1),
                limit(units.percent(t.top5), t.top5),
            )
            for name, t in sorted(record.tolerances.items())
        ),
    )


def _per_input_table(record: ParityRecord) -> Table:
    groups = sorted(record.inputs)
    columns = ("stage", *(f"{g} ({units.count(record.inputs[g])} images)" for g in groups))
    return Table(
        title="Max relative error by kind of input",
        columns=columns,
        numeric=frozenset(columns[1:]),
        rows=tuple(
            cells(_stage(record, c), *(units.number(c.per_input.get(g)) for g in groups)) for c in record.comparisons
        ),
    )


def latency(run: RunRecord) -> Section:
    """Show the distribution of every candidate, the ratios, and where the time goes."""
    bench = run.bench
    if bench is None or not bench.latencies:
        return Section(slug="latency", title="Latency", blocks=(_not_run(run, "latency"),))
    blocks: list[Block] = [Text(text=bench.method, tone=QUIET)]
    if bench.warnings:
        blocks.append(Listing(items=bench.warnings, tone=WARN))
    blocks += [_strip_chart(bench, batch) for batch in sorted({c.batch for c in bench.latencies})]
    blocks += [_ratio_table(bench), _latency_table(bench), _module_chart(bench)]
    return Section(slug="latency", title="Latency", blocks=tuple(blocks))


def _strip_chart(bench: BenchRecord, batch: int) -> Block:
    chosen = [c for c in bench.latencies if c.batch == batch]
    usable = [c for c in chosen if sum(map(math.isfinite, c.samples)) >= 2]
    words = [f"{c.name}: {_samples(c)}" for c in chosen]
    if not usable:
        return Text(text=f"No distribution at batch {batch}: it needs two samples; {'; '.join(words)}.", tone=WARN)
    rows = [
        charts.Strip(
            label=_candidate(c), samples=c.samples, p50=c.p50, p99=c.p99, text=f"p50 {units.milliseconds(c.p50)}"
        )
        for c in usable
    ]
    title = f"Latency of one call, batch {batch}"
    sentence = f"Each dot is one call, long series thinned by rank; {'; '.join(words)}."
    svg = charts.strips(f"chart-latency-{batch}", title, sentence, rows, "ms")
    return Chart(title=title, sentence=sentence, svg=svg, legend=(("dots", "one call"), ("p50", "p50"), ("p99", "p99")))


def _ratio_table(bench: BenchRecord) -> Block:
    if not bench.ratios:
        return Text(text="Ratios: not run: no baseline was asked for (--baseline eager,compile,naive).", tone=QUIET)
    columns = ("candidate", "baseline", "batch", "times faster (p10 to p90)", "rounds")
    return Table(
        title="Against the baselines, interleaved round by round",
        columns=columns,
        numeric=frozenset(columns[2:]),
        rows=tuple(
            cells(r.name, r.baseline, str(r.batch), units.ratio(r.median, r.p10, r.p90), units.count(r.rounds))
            for r in bench.ratios
        ),
    )


def _latency_table(bench: BenchRecord) -> Table:
    columns = (
        "candidate", "batch", "p50", "p90", "p95", "p99", "mean", "CoV", "images/s", "calls", "peak memory", "build",
        "note",
    )  # fmt: skip
    return Table(
        title="Latency of one call",
        columns=columns,
        numeric=frozenset(columns[1:-1]),
        rows=tuple(
            cells(
                _candidate(c),
                str(c.batch),
                *(units.milliseconds(v) for v in (c.p50, c.p90, c.p95, c.p99, c.mean)),
                units.percent(c.cov),
                units.number(c.throughput),
                units.count(len(c.samples)),
                units.size(c.peak_memory) if c.peak_memory else units.NOT_MEASURED,
                units.seconds(c.build_seconds),
                c.note,
            )
            for c in bench.latencies
        ),
    )


def _module_chart(bench: BenchRecord) -> Block:
    ordered = sorted(bench.modules.items(), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return Text(text="Time per module: not measured: the record holds no profile of this runtime.", tone=QUIET)
    head, tail = ordered[:_MOST_BARS], ordered[_MOST_BARS:]
    rows = [charts.Bar(label=name, value=share, text=units.percent(share)) for name, share in head]
    if tail:
        rest = sum(share for _, share in tail)
        rows.append(charts.Bar(label=f"{len(tail)} other modules", value=rest, text=units.percent(rest)))
    title = "Time per module"
    sentence = "Share of the engine's time, by the module of the network that a node came from."
    return Chart(title=title, sentence=sentence, svg=charts.bars("chart-modules", title, sentence, rows))


def graph(run: RunRecord) -> Section:
    """Show the exported graph, the checks on it, and what each pass changed."""
    if run.trace is None:
        return Section(slug="graph", title="Graph", blocks=(_not_run(run, "trace"),))
    t = run.trace
    facts = Facts(
        rows=(
            ("opset", Cell(text=str(t.opset))),
            ("inputs", Cell(text="; ".join(f"{s.name} {s.dtype} {_shape(s.shape)}" for s in t.inputs))),
            ("outputs", Cell(text="; ".join(f"{s.name} {s.dtype} {_shape(s.shape)}" for s in t.outputs))),
            ("batch", Cell(text=str(t.batch))),
        )
    )
    blocks: list[Block] = [facts]
    if t.checks:
        blocks.append(Details(summary=f"{len(t.checks)} checks on the export", blocks=(Listing(items=t.checks),)))
    if run.passes is None:
        return Section(slug="graph", title="Graph", blocks=(*blocks, _not_run(run, "passes")))
    blocks += [_op_chart(run.passes.op_counts_before, run.passes.op_counts), *_passes(run.passes)]
    return Section(slug="graph", title="Graph", blocks=tuple(blocks))


def _op_chart(before: Mapping[str, int], after: Mapping[str, int]) -> Chart:
    names = sorted({*before, *after}, key=lambda n: (-max(before.get(n, 0), after.get(n, 0)), n))
    rows = [_op_bar(n, before.get(n, 0), after.get(n, 0)) for n in names[:_MOST_BARS]]
    if tail := names[_MOST_BARS:]:
        counted = [sum(counts.get(n, 0) for n in tail) for counts in (before, after)]
        rows.append(_op_bar(f"{len(tail)} other operators", *counted))
    title = "Operators before and after the passes"
    sentence = f"{units.count(sum(before.values()))} nodes before the passes, {units.count(sum(after.values()))} after."
    svg = charts.bars("chart-ops", title, sentence, rows)
    return Chart(title=title, sentence=sentence, svg=svg, legend=(("bar-before", "before"), ("bar", "after")))


def _op_bar(name: str, before: int, after: int) -> charts.Bar:
    text = f"{units.count(before)} → {units.count(after)}" if before != after else units.count(after)
    return charts.Bar(label=name, value=after, before=before, text=text)


def _passes(record: PassesRecord) -> list[Block]:
    columns = ("pass", "why", "sites", "declined", "nodes", "change of outputs", "time")
    table = Table(
        title="Passes",
        columns=columns,
        numeric=frozenset(columns[2:]),
        rows=tuple(
            cells(
                Cell(text=p.name, code=True),
                p.reason,
                units.count(p.sites),
                units.count(len(p.declined)),
                f"{units.count(p.nodes_before)} → {units.count(p.nodes_after)}",
                units.number(p.max_abs_change),
                units.seconds(p.seconds),
            )
            for p in record.passes
        ),
    )
    declined = [(p.name, Cell(text=why)) for p in record.passes for why in p.declined]
    if not declined:
        return [table]
    return [
        table,
        Details(summary=f"{len(declined)} sites declined, with reasons", blocks=(Facts(rows=tuple(declined)),)),
    ]


def precision(run: RunRecord) -> Section:
    """Show which part of the graph computes in what, and what stays float32 for which reason."""
    p = run.precision
    if p is None:
        return Section(slug="precision", title="Precision", blocks=(_not_run(run, "precision"),))
    facts = Facts(
        rows=(
            ("asked", Cell(text=p.precision.value)),
            ("floating-point nodes", Cell(text=_counts(p.dtype_counts))),
            ("casts", Cell(text=units.count(p.casts))),
            ("largest activation", Cell(text=units.number(p.largest_activation))),
        )
    )
    blocks: list[Block] = [facts]
    if p.warnings:
        blocks.append(Listing(items=p.warnings, tone=WARN))
    if p.kept:
        rows = tuple(cells(k.reason, units.count(k.nodes), Cell(text=", ".join(k.examples), code=True)) for k in p.kept)
        columns = ("reason", "nodes", "for example")
        blocks.append(Table(title="Kept in float32", columns=columns, rows=rows, numeric=frozenset({"nodes"})))
    return Section(slug="precision", title="Precision", blocks=tuple(blocks))


def deploy_form(run: RunRecord) -> Section:
    """Show what re-parameterisation changed."""
    m = run.model
    d = m.drift
    facts = Facts(
        rows=(
            ("form", Cell(text=f"{m.form}: {m.form_reason}" if m.form_reason else m.form)),
            ("parameters", Cell(text=f"{units.count(m.parameters)} → {units.count(m.deploy_parameters)}")),
        )
    )
    columns = ("computed in", "largest difference", "of the largest output")
    table = Table(
        title="Drift: deploy form against training form, same input",
        columns=columns,
        numeric=frozenset(columns[1:]),
        rows=(
            cells("float32", units.number(d.fp32_max_abs), units.number(d.fp32_relative)),
            cells("float64", units.number(d.fp64_max_abs), units.number(d.fp64_relative)),
        ),
    )
    return Section(slug="deploy-form", title="Deploy form", blocks=(facts, table))


def _missing(run: RunRecord, stage: str) -> str:
    return summary.why_missing(run, stage)


def _not_run(run: RunRecord, stage: str) -> Text:
    return Text(text=_missing(run, stage), tone=WARN)


def _verdict_cell(ok: bool, words: str) -> Cell:
    return Cell(text=f"✓ {words}", tone=GOOD) if ok else Cell(text=f"✗ FAIL: {words}", tone=BAD)


def _stage(record: ParityRecord, comparison: Comparison) -> str:
    several = len({c.output for c in record.comparisons}) > 1
    return f"{comparison.stage}: {comparison.output}" if several else comparison.stage


def _counts(counts: Mapping[str, int]) -> str:
    return (
        ", ".join(f"{name} {units.count(n)}" for name, n in sorted(counts.items(), key=lambda i: (-i[1], i[0])))
        or "none"
    )


def _agreement(share: float | None) -> str:
    return "not judged" if share is None else units.percent(share)


def _decibel(value: float | None) -> str:
    text = units.number(value)
    return f"{text} dB" if value is not None and math.isfinite(value) else text


def _candidate(c: Latency) -> str:
    return f"{c.name}, {c.threads} thread{'s' if c.threads != 1 else ''}, {c.device}"


def _samples(c: Latency) -> str:
    return f"{units.count(len(c.samples))} call{'s' if len(c.samples) != 1 else ''}"


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


SECTIONS: tuple[Callable[[RunRecord], Section], ...] = (asked_and_ran, parity, latency, graph, precision, deploy_form)
