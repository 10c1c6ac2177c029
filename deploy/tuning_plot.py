"""The front of ``effdeploy tune`` as a picture: speed-up against drift, a dot a schedule."""

from __future__ import annotations

from pathlib import Path

from deploy.answers import TuneRecord

TEXT, QUIET, LINE, CHOSEN = "#1a1a1a", "#8a8a8a", "#2a6fbb", "#c0392b"


def draw_front(record: TuneRecord, path: Path) -> None:
    """Write the measured schedules, the front among them and what was asked, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "effdeploy", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        front = sorted((s for s in record.schedules if s.front), key=lambda s: s.speedup)
        axis.plot([s.speedup for s in front], [s.drift for s in front], color=LINE, linewidth=1, zorder=1)
        for s in record.schedules:
            colour = CHOSEN if s.chosen else LINE if s.front else QUIET
            axis.errorbar(
                s.speedup, s.drift, xerr=[[max(0, s.speedup - s.p10)], [max(0, s.p90 - s.speedup)]],
                fmt="o", markersize=6 if s.chosen else 4.5, color=colour, elinewidth=0.8, zorder=2,
            )  # fmt: skip
            axis.annotate(
                s.name + (" (chosen)" if s.chosen else ""), (s.speedup, s.drift), xytext=(5, 5),
                textcoords="offset points", fontsize=8, color=colour,
            )  # fmt: skip
        if record.target_speedup is not None:
            axis.axvline(record.target_speedup, color=QUIET, linestyle=":", linewidth=1)
        if record.max_drift is not None:
            axis.axhline(record.max_drift, color=QUIET, linestyle=":", linewidth=1)
        axis.set_xlabel(f"speed-up over none at batch {record.batch} (median, p10 to p90)", color=TEXT)
        axis.set_ylabel(f"drift of the outputs over {record.images} images", color=TEXT)
        axis.set_title(f"{record.system} {record.variant}: {record.what}", loc="left", fontsize=11, color=TEXT)
        axis.margins(0.12)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
