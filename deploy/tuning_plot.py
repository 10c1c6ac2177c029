"""Pictures of what was searched: the fronts of ``effdeploy tune`` and ``--budget``, and the modules of ``bisect``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.answers import BisectRecord, BudgetPoint, BudgetRecord, ModuleError, TuneRecord

TEXT, QUIET, LINE, CHOSEN = "#1a1a1a", "#8a8a8a", "#2a6fbb", "#c0392b"
_BARS = 16
_SMALLEST = 1e-9  # what a logarithmic axis can show of an error of nothing


@contextlib.contextmanager
def drawn(path: Path, title: str, size: tuple[float, float] = (7.2, 4.4), columns: int = 1) -> Iterator[list[Any]]:
    """Give the axes of a figure, and write it as SVG: the same bytes for the same drawing."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "effdeploy", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(1, columns, squeeze=False)[0])
        yield axes
        axes[0].set_title(title, loc="left", fontsize=11, color=TEXT)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def draw_front(record: TuneRecord, path: Path) -> None:
    """Write the measured schedules, the front among them and what was asked, as SVG."""
    with drawn(path, f"{record.system} {record.variant}: {record.what}") as (axis,):
        front = sorted((s for s in record.schedules if s.front), key=lambda s: s.speedup)
        axis.plot([s.speedup for s in front], [s.drift for s in front], color=LINE, linewidth=1, zorder=1)
        for s in record.schedules:
            _point(axis, (s.speedup, s.drift), (s.p10, s.p90), s.name, chosen=s.chosen, front=s.front)
        if record.target_speedup is not None:
            axis.axvline(record.target_speedup, color=QUIET, linestyle=":", linewidth=1)
        if record.max_drift is not None:
            axis.axhline(record.max_drift, color=QUIET, linestyle=":", linewidth=1)
        axis.set_xlabel(f"speed-up over none at batch {record.batch} (median, p10 to p90)", color=TEXT)
        axis.set_ylabel(f"drift of the outputs over {record.images} images", color=TEXT)
        axis.margins(0.12)


def draw_budget(record: BudgetRecord, path: Path) -> None:
    """Write the measured choices of modules: drift against speed where it was timed, else against what is kept."""
    title = f"{record.system} {record.variant} {record.precision}: {record.budget}"
    with drawn(path, title) as (axis,):
        timed = all(p.speedup is not None for p in record.points)
        places = [
            (_across(p, timed=timed), p.apart.error if math.isfinite(p.apart.error) else 1.0, p) for p in record.points
        ]
        front = sorted((x, y) for x, y, p in places if p.front)
        axis.plot([x for x, _ in front], [y for _, y in front], color=LINE, linewidth=1, zorder=1)
        for x, y, p in places:
            spread = (p.p10 or x, p.p90 or x) if timed else (x, x)
            _point(axis, (x, y), spread, p.name, chosen=p.chosen, front=p.front)
        axis.set_xlabel("speed-up over FP32 (median, p10 to p90)" if timed else "modules kept high", color=TEXT)
        axis.set_ylabel(f"relative distance from FP32, {record.images}", color=TEXT)
        axis.margins(0.12)


def draw_bisection(record: BisectRecord, path: Path) -> None:
    """Write the error along the network, and the modules that make most of it, as SVG."""
    worst = sorted(record.modules, key=lambda m: m.alone.error)[-_BARS:]
    title = f"{record.bundle}: error of {record.precision}"
    with drawn(path, title, size=(11, 0.5 + 0.3 * max(_BARS, 10)), columns=2) as (along, bars):
        after = [_shown(b.after) for b in record.boundaries]
        along.semilogy(range(len(after)), after, color=LINE, linewidth=1)
        for place, b in enumerate(record.boundaries):
            if b.jump:
                along.plot([place], [_shown(b.after)], "o", color=CHOSEN, markersize=4)
        if first := next((i for i, b in enumerate(record.boundaries) if b.jump), None):
            along.annotate(
                record.jump, (first, after[first]), xytext=(5, 5), textcoords="offset points", fontsize=8, color=CHOSEN
            )
        along.set_xlabel("modules, in the order of the network", color=TEXT)
        along.set_ylabel("relative distance of the activations that leave", color=TEXT)
        _module_bars(bars, worst)


def _module_bars(axis: Any, worst: list[ModuleError]) -> None:
    places = range(len(worst))
    axis.barh(places, [_shown(m.alone.error) for m in worst], height=0.7, color=LINE)
    axis.plot([_shown(m.without.error) for m in worst], list(places), "|", color=CHOSEN, markersize=10)
    axis.set_yticks(list(places), [m.module for m in worst], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("error: it alone low (bar), all low but it (mark)", color=TEXT)


def _point(
    axis: Any, place: tuple[float, float], spread: tuple[float, float], name: str, *, chosen: bool, front: bool
) -> None:
    colour = CHOSEN if chosen else LINE if front else QUIET
    axis.errorbar(
        *place, xerr=[[max(0, place[0] - spread[0])], [max(0, spread[1] - place[0])]],
        fmt="o", markersize=6 if chosen else 4.5, color=colour, elinewidth=0.8, zorder=2,
    )  # fmt: skip
    axis.annotate(
        name + (" (chosen)" if chosen else ""), place, xytext=(5, 5), textcoords="offset points", fontsize=8,
        color=colour,
    )  # fmt: skip


def _across(point: BudgetPoint, *, timed: bool) -> float:
    return point.speedup if timed and point.speedup is not None else float(point.kept)


def _shown(error: float) -> float:
    return min(max(error, _SMALLEST), 1e3)
