"""How long a call takes: every candidate's distribution, the ratios, and where the time goes."""

from __future__ import annotations

import math

from deploy import summary, units
from deploy.records import BenchRecord, Latency, RunRecord, Stage
from deploy.report import charts, words
from deploy.report.blocks import BAD, QUIET, WARN, Block, Chart, Listing, Section, Table, Text, cells


def latency(run: RunRecord) -> Section:
    """Show the distribution of every candidate, the ratios, and where the time goes."""
    bench = run.bench
    if bench is None or not bench.latencies:
        return Section(slug="latency", title="Latency", blocks=(words.not_run(run, "latency"),))
    blocks: list[Block] = [Text(text=bench.method, tone=QUIET)]
    origin = run.origins.get(Stage.LATENCY.value)
    if origin is not None and origin.reused:
        words_on_time = f"Not measured in this run: measured {origin.made} on this machine with the same engine."
        blocks.append(Text(text=words_on_time, tone=WARN))
    if bench.warnings:
        blocks.append(Listing(items=bench.warnings, tone=WARN))
    same, told = summary.timed_and_compared(run)
    blocks += [Text(text=told, tone=QUIET if same else BAD)] if told else []
    blocks += [Text(text=summary.noise_line(bench.noise), tone=QUIET)] if bench.noise else []
    blocks += [_strip_chart(bench, batch) for batch in sorted({c.batch for c in bench.latencies})]
    blocks += [_ratio_table(bench), _latency_table(bench), _module_chart(bench)]
    return Section(slug="latency", title="Latency", blocks=tuple(blocks))


def _strip_chart(bench: BenchRecord, batch: int) -> Block:
    chosen = [c for c in bench.latencies if c.batch == batch]
    usable = [c for c in chosen if sum(map(math.isfinite, c.samples)) >= 2]
    calls = "; ".join(f"{c.name}: {_samples(c)}" for c in chosen)
    if not usable:
        return Text(text=f"No distribution at batch {batch}: it needs two samples; {calls}.", tone=WARN)
    rows = [
        charts.Strip(
            label=_candidate(c), samples=c.samples, p50=c.p50, p99=c.p99, text=f"p50 {units.milliseconds(c.p50)}"
        )
        for c in usable
    ]
    title = f"Latency of one call, batch {batch}"
    sentence = (
        "Each dot is one call; of long series the record keeps calls evenly in time, and those are drawn by evenly "
        f"spaced ranks; {calls}."
    )
    svg = charts.strips(f"chart-latency-{batch}", title, sentence, rows, "ms")
    return Chart(title=title, sentence=sentence, svg=svg, legend=(("dots", "one call"), ("p50", "p50"), ("p99", "p99")))


def _ratio_table(bench: BenchRecord) -> Block:
    if not bench.ratios:
        return Text(text="Ratios: not run: no baseline was asked for (--baseline eager,compile,naive).", tone=QUIET)
    columns = ("candidate", "baseline", "batch", "speed-up (p10 to p90)", "95 % of the median", "rounds")
    return Table(
        title="Against the baselines, interleaved round by round",
        columns=columns,
        numeric=frozenset(columns[2:]),
        rows=tuple(
            cells(
                r.name,
                r.baseline,
                str(r.batch),
                units.ratio(r.median, r.p10, r.p90),
                units.interval(r.interval),
                units.count(r.rounds),
            )
            for r in bench.ratios
        ),
    )


def _latency_table(bench: BenchRecord) -> Table:
    notes = any(c.note for c in bench.latencies)
    figures = (
        "batch", "p50", "95 % of p50", "p90", "p95", "p99", "mean", "CoV", "images/s", "calls", "peak memory", "build",
    )  # fmt: skip
    return Table(
        title="Latency in figures, one call",
        columns=("candidate", *figures, *(("note",) if notes else ())),
        numeric=frozenset(figures),
        rows=tuple(
            cells(
                _candidate(c),
                str(c.batch),
                units.milliseconds(c.p50),
                units.interval(c.interval),
                *(units.milliseconds(v) for v in (c.p90, c.p95, c.p99, c.mean)),
                units.percent(c.cov),
                units.number(c.throughput),
                units.count(_calls(c)),
                units.size(c.peak_memory) if c.peak_memory else units.NOT_MEASURED,
                units.seconds(c.build_seconds),
                *((c.note,) if notes else ()),
            )
            for c in bench.latencies
        ),
    )


def _module_chart(bench: BenchRecord) -> Block:
    ordered = sorted(bench.modules.items(), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return Text(text="Time per module: not measured: the record holds no profile of this runtime.", tone=QUIET)
    head, tail = ordered[: charts.MOST_BARS], ordered[charts.MOST_BARS :]
    rows = [charts.Bar(label=name, value=share, text=units.percent(share)) for name, share in head]
    if tail:
        rest = sum(share for _, share in tail)
        rows.append(charts.Bar(label=f"{len(tail)} other modules", value=rest, text=units.percent(rest)))
    title = "Time per module"
    sentence = (
        "Share of the engine's time, by the module of the network that a node came from; bars relative to the largest."
    )
    return Chart(title=title, sentence=sentence, svg=charts.bars("chart-modules", title, sentence, rows))


def _candidate(c: Latency) -> str:
    return f"{c.name}, {words.conditions(c)}"


def _calls(c: Latency) -> int:
    """Return how many calls were timed; records of before this was counted have their samples only."""
    return max(c.calls, len(c.samples))


def _samples(c: Latency) -> str:
    calls, kept = _calls(c), len(c.samples)
    text = f"{units.count(calls)} call{'s' if calls != 1 else ''}"
    return text if kept == calls else f"{text}, {units.count(kept)} kept"
