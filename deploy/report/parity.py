"""Every stage against the fp32 PyTorch model, with the limits it was held to."""

from __future__ import annotations

from deploy import summary, units
from deploy.records import Comparison, ParityRecord, RunRecord, Tolerance
from deploy.report import charts, words
from deploy.report.blocks import BAD, GOOD, QUIET, Block, Chart, Details, Image, Listing, Section, Table, Text, cells
from deploy.report.modules import module_blocks


def parity(run: RunRecord) -> Section:
    """Show every stage against the fp32 PyTorch model, with the limits it was held to."""
    title = "Parity with fp32 PyTorch"
    record = run.parity
    if record is None or not record.comparisons:
        return Section(slug="parity", title=title, blocks=(words.not_run(run, "parity"),))
    blocks: list[Block] = [
        Text(text=record.verdict, tone=GOOD if record.ok else BAD),
        _error_chart(record),
        _parity_table(record),
        _tolerance_table(record),
        Details(summary="Error by kind of input", blocks=(_per_input_table(record),)),
        *module_blocks(run),
    ]
    blocks += _decision_blocks(record)
    blocks += _selection_blocks(run)
    blocks += _batch_blocks(run)
    blocks += [
        Image(title=p.title, sentence=p.sentence, media=p.media, data=p.data, width=p.width, height=p.height)
        for p in record.pictures
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
        allowed = f" of {units.given(limit)}" if limit is not None else ""
        mark = "" if c.passed else "FAIL "
        text = f"{mark}{units.number(c.max_relative)}{allowed}"
        points.append(
            charts.Point(label=_stage(record, c), value=c.max_relative, text=text, limit=limit, bad=not c.passed)
        )
    title = "Largest error by stage"
    sentence = (
        "Largest absolute difference of any output value, divided by the largest absolute value of the PyTorch "
        "reference; logarithmic axis. Beside each mark: the error and, where there is one, its limit."
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
                words.verdict(c.passed, "pass" if c.passed else "; ".join(c.failures)),
                units.number(c.max_relative),
                units.cosine(c.cosine),
                summary.top1(c),
                words.agreement(c.top5),
                words.decibel(c.snr_db),
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

    return Table(
        title="Limits of the recipe",
        columns=columns,
        numeric=frozenset(columns[1:]),
        rows=tuple(
            cells(
                name,
                _limit(t.max_relative),
                _limit(t.cosine),
                _limit(t.snr_db, " dB"),
                words.agreement(t.top1),
                words.agreement(t.top5),
            )
            for name, t in sorted(record.tolerances.items())
        ),
    )


def _per_input_table(record: ParityRecord) -> Table:
    groups = sorted(record.inputs)
    columns = ("stage", *(f"{g} ({units.count(record.inputs[g])} images)" for g in groups))
    return Table(
        title="Max relative error by kind of input, each relative to the largest output of its own kind",
        columns=columns,
        numeric=frozenset(columns[1:]),
        rows=tuple(
            cells(_stage(record, c), *(units.number(c.per_input.get(g)) for g in groups)) for c in record.comparisons
        ),
    )


def _decision_blocks(record: ParityRecord) -> list[Block]:
    """Show what a network that chooses chose otherwise than PyTorch, a row per stage and module."""
    if not record.decisions:
        return []
    columns = ("stage", "module", "verdict", "flips", "widest margin", "limit", "same place, running freely", "images")
    table = Table(
        title=f"Decisions ({record.decisions[0].what}): PyTorch's imposed on every earlier module; the share in the "
        "same place is of a free run and not judged",
        columns=columns,
        numeric=frozenset(columns[3:]),
        rows=tuple(
            cells(
                c.stage, c.module, words.verdict(c.ok, "pass" if c.ok else "no near tie"), units.count(c.flips),
                units.number(c.margin), units.number(c.limit), units.percent(c.same), units.count(c.images),
            )
            for c in record.decisions
        ),
    )  # fmt: skip
    if all(c.ok for c in record.decisions):
        return [Details(summary=f"{len(record.decisions)} checks of decisions", blocks=(table,))]
    return [table]


def _selection_blocks(run: RunRecord) -> list[Block]:
    """Show both gates of a detector: a row per stage, rows aligned by the position that they were selected from."""
    rows = summary.selection_rows(run)
    if not rows:
        return []
    columns = summary.SELECTION_COLUMNS
    table = Table(
        title="Queries aligned by the position that they were selected from; gate A: float32, gate B: what is decided",
        columns=columns,
        numeric=frozenset(columns[2:-1]),
        rows=tuple(
            cells(*row[:-1], words.verdict(not row[-1].startswith("FAIL: "), row[-1].removeprefix("FAIL: ")))
            for row in rows
        ),
    )
    return [table]


def _batch_blocks(run: RunRecord) -> list[Block]:
    """Show what the batch suite found: a row per stage, and every check folded away."""
    record = run.parity.batches if run.parity else None
    if record is None:
        return []
    columns = summary.BATCH_COLUMNS
    table = Table(
        title="Rows of a batch: largest difference by check, of the largest output",
        columns=columns,
        numeric=frozenset(columns[2:-1]),
        rows=tuple(
            cells(*row[:-1], words.verdict(row[-1] == "pass", row[-1].removeprefix("FAIL: ")))
            for row in summary.batch_rows(run)
        ),
    )
    every = ("stage", "check", "batch", "detail", "output", "row", "difference", "limit", "verdict")
    details = Table(
        title="Every check at every size, with its worst row",
        columns=every,
        numeric=frozenset(("batch", "row", "difference", "limit")),
        rows=tuple(
            cells(
                c.stage, c.check, str(c.batch), c.detail or "-", c.output or "-", str(c.row), units.number(c.error),
                units.number(c.limit), words.verdict(c.ok, "pass" if c.ok else c.check),
            )
            for c in record.checks
        ),
    )  # fmt: skip
    tone = GOOD if record.ok else BAD
    return [
        Text(text=record.verdict, tone=tone),
        table,
        Details(summary=f"{len(record.checks)} batch checks", blocks=(details,)),
    ]


def _limit(value: float | None, unit: str = "") -> str:
    return "not judged" if value is None else f"{units.given(value)}{unit}"


def _stage(record: ParityRecord, comparison: Comparison) -> str:
    several = len({c.output for c in record.comparisons}) > 1
    return f"{comparison.stage}: {comparison.output}" if several else comparison.stage
