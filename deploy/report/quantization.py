"""What INT8 and FP8 left out, what their ranges were measured on, and which of these cannot be trusted."""

from __future__ import annotations

from deploy import units
from deploy.records import CalibratedTensor, Calibration, Precision, Quantization
from deploy.report.blocks import Block, Cell, Details, Facts, Table, cells

_SHOWN = 200


def blocks(found: Quantization, precision: Precision) -> list[Block]:
    """Draw the quantised part of a graph."""
    c = found.calibration
    facts = Facts(
        rows=(
            ("quantised products", Cell(text=f"{found.nodes} of {found.products}")),
            ("style", Cell(text=found.style)),
            ("weights", Cell(text=found.weights)),
            ("calibration", Cell(text=_calibration(c))),
        )
    )
    drawn: list[Block] = [facts]
    if found.smoothed:
        told = ", ".join(f"{norm} ({strength:g})" for norm, strength in found.smoothed.items())
        drawn.append(Facts(rows=(("outliers moved into weights (strength)", Cell(text=told)),)))
    if found.kept:
        rows = tuple(
            cells(k.reason, units.count(k.nodes), Cell(text=", ".join(k.examples), code=True)) for k in found.kept
        )
        title = f"Kept out of {precision.value.upper()}"
        columns = ("reason", "products", "for example")
        drawn.append(Table(title=title, columns=columns, rows=rows, numeric=frozenset({"products"})))
    if c.skipped:
        drawn.append(Facts(rows=tuple(("left out", Cell(text=text)) for text in c.skipped)))
    drawn.append(Details(summary=f"{len(c.tensors)} calibrated tensors", blocks=(_ranges(c.tensors),)))
    return drawn


def _calibration(c: Calibration) -> str:
    again = ", measured earlier" if c.cached else ""
    return f"{c.images} used of {c.source}, {c.method}{again}"


def _ranges(tensors: tuple[CalibratedTensor, ...]) -> Table:
    """List tensors, those with the most saturation and the fewest levels first."""
    order = sorted(tensors, key=lambda t: (-t.dead, -t.saturated, t.levels, t.tensor))
    columns = ("tensor", "measured", "kept", "saturated", "levels used")
    rows = tuple(
        cells(
            Cell(text=t.tensor, code=True),
            f"{t.low:.4g} to {t.high:.4g}",
            f"{t.clip_low:.4g} to {t.clip_high:.4g}",
            f"{100 * t.saturated:.2g} %",
            f"{t.levels} (dead)" if t.dead else str(t.levels),
        )
        for t in order[:_SHOWN]
    )
    return Table(title="", columns=columns, rows=rows, numeric=frozenset(columns[1:]))
