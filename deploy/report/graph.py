"""The exported graph, what each pass changed, the precision written into it, and the deploy form it came from."""

from __future__ import annotations

from collections.abc import Mapping

from deploy import summary, units
from deploy.records import PassesRecord, RunRecord
from deploy.report import charts, quantization, words
from deploy.report.blocks import WARN, Block, Cell, Chart, Details, Facts, Listing, Section, Table, Text, cells


def graph(run: RunRecord) -> Section:
    """Show the exported graph, the checks on it, and what each pass changed."""
    if run.trace is None:
        return Section(slug="graph", title="Graph", blocks=(words.not_run(run, "trace"),))
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
        return Section(slug="graph", title="Graph", blocks=(*blocks, words.not_run(run, "passes")))
    blocks += [_op_chart(run.passes.op_counts_before, run.passes.op_counts), *_passes(run.passes)]
    return Section(slug="graph", title="Graph", blocks=tuple(blocks))


def _op_chart(before: Mapping[str, int], after: Mapping[str, int]) -> Chart:
    names = sorted({*before, *after}, key=lambda n: (-max(before.get(n, 0), after.get(n, 0)), n))
    rows = [_op_bar(n, before.get(n, 0), after.get(n, 0)) for n in names[: charts.MOST_BARS]]
    if tail := names[charts.MOST_BARS :]:
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
    verified = any(p.max_abs_change is not None for p in record.passes)  # --verify-each
    figures = ("sites", "declined", "nodes", *(("change of outputs",) if verified else ()), "time")
    table = Table(
        title="Passes",
        columns=("pass", "why", *figures),
        numeric=frozenset(figures),
        rows=tuple(
            cells(
                Cell(text=p.name, code=True),
                p.reason,
                units.count(p.sites),
                units.count(len(p.declined)),
                f"{units.count(p.nodes_before)} → {units.count(p.nodes_after)}",
                *((units.number(p.max_abs_change),) if verified else ()),
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
        return Section(slug="precision", title="Precision", blocks=(words.not_run(run, "precision"),))
    facts = Facts(
        rows=(
            ("asked", Cell(text=p.precision.value)),
            ("floating-point nodes", Cell(text=words.counts(p.dtype_counts))),
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
    if p.quantization:
        blocks += quantization.blocks(p.quantization, p.precision)
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
    if d is None:
        return Section(
            slug="deploy-form",
            title="Deploy form",
            blocks=(facts, Text(text=f"drift: {summary.why_missing(run, 'parity')}", tone=WARN)),
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


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
