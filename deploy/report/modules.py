"""Where the error of a reduced precision arises: activations where they leave a module, against the float32 graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deploy import units
from deploy.records import BoundaryError, Precision, RunRecord
from deploy.report import charts
from deploy.report.blocks import QUIET, WARN, Block, Cell, Chart, Details, Table, Text, cells

_BISECT = "effdeploy bisect BUNDLE switches modules one by one and says what each adds to the error of the outputs."


def module_blocks(run: RunRecord) -> list[Block]:
    """Show the error by module, or why there is none."""
    found = run.parity.modules if run.parity else ()
    if found:
        return [_chart(found, run), Details(summary=f"Error by module: all {len(found)}", blocks=(_table(found),))]
    if run.precision is None or run.precision.precision is Precision.FP32:
        why = "the graph is in FP32; that of a lower precision is compared with it module by module."
    else:
        why = f"the record holds none. {_BISECT}"
    return [Text(text=f"Error by module: not measured: {why}", tone=QUIET)]


def _chart(found: Sequence[BoundaryError], run: RunRecord) -> Chart:
    most = sorted(found, key=_added, reverse=True)[: charts.MOST_BARS]
    rows = [charts.Point(label=b.module, value=b.after, text=_text(b), before=b.before) for b in found if b in most]
    shown = "" if len(rows) == len(found) else f"; the {len(rows)} of {len(found)} modules that add most"
    selects = bool(run.parity and run.parity.selection)
    behind = " Behind a selection of queries, rows may be other queries: a jump there says so." if selects else ""
    title = "Error by module"
    sentence = (
        "How far the activations that enter (pale) and leave a module are from those of the float32 graph on the same "
        f"images: relative L2 distance on a logarithmic axis, in the order of the network{shown}.{behind} {_BISECT}"
    )
    svg = charts.log_points("chart-module-error", title, sentence, rows)
    return Chart(title=title, sentence=sentence, svg=svg, legend=(("dot-before", "enters"), ("dot", "leaves")))


def _added(error: BoundaryError) -> float:
    """Return by how much the error grows in a module; what was infinite before does not."""
    return error.after - error.before if math.isfinite(error.before) else 0.0


def _text(error: BoundaryError) -> str:
    return f"{units.number(error.before)} → {units.number(error.after)}{', jump' if error.jump else ''}"


def _table(found: Sequence[BoundaryError]) -> Table:
    columns = ("module", "error in", "error out", "", "furthest tensor that leaves it")
    return Table(
        title="Error by module, in the order of the network",
        columns=columns,
        numeric=frozenset(columns[1:3]),
        rows=tuple(
            cells(
                Cell(text=b.module, code=True),
                units.number(b.before),
                units.number(b.after),
                Cell(text="jump" if b.jump else "", tone=WARN if b.jump else ""),
                Cell(text=b.tensor, code=True),
            )
            for b in found
        ),
    )
