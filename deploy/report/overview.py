"""What was asked beside what the engines compute in."""

from __future__ import annotations

from deploy import summary
from deploy.records import RunRecord
from deploy.report import words
from deploy.report.blocks import WARN, Block, Cell, Details, Facts, Section, Table, cells
from deploy.report.lint import lint_blocks

FOLD = "fold_preprocess"  # the pass


def _images(run: RunRecord) -> str:
    """Say what the graph takes, and where pixels are normalised."""
    names = [spec.name for spec in run.trace.inputs] if run.trace else []
    if names and "images" not in names:
        return f"none: the graph takes {', '.join(names)}"
    if not run.model.preprocess.embed:
        return "float32 [N, 3, height, width], scaled and normalised before the graph"
    taken = "uint8 [N, height, width, 3], scaled and normalised by the graph"
    passes = [p for p in run.passes.passes if p.name == FOLD] if run.passes else []
    if not passes:
        return taken
    where = "inside the first convolution" if passes[0].sites else "by operators of their own"
    return f"{taken}, {where}" + (f"; {'; '.join(passes[0].declined)}" if passes[0].declined else "")


def asked_and_ran(run: RunRecord) -> Section:
    """Show what was asked beside what the engines compute in."""
    rows = [
        ("model", Cell(text=summary.model_line(run))),
        ("weights", Cell(text=run.model.weights.statement)),
        (
            "asked precision",
            Cell(text=run.precision.precision.value if run.precision else summary.why_missing(run, "precision")),
        ),
        ("images", Cell(text=_images(run))),
        *((name, Cell(text=text)) for name, text in summary.choice_rows(run)),
        ("graph lowered for", Cell(text=run.passes.target.value if run.passes else summary.why_missing(run, "passes"))),
    ]
    blocks: list[Block] = [Facts(rows=tuple(rows))]
    if not run.engines:
        return Section(slug="asked", title="Asked and ran", blocks=(*blocks, words.not_run(run, "engine")))
    table = Table(
        title="Engines",
        columns=(
            "engine",
            "version",
            "precision audit",
            "kernels by precision",
            "weights",
            "time",
            "fused kernels",
            "evidence",
            "ran here",
        ),
        rows=tuple(
            cells(
                summary.engine_name(e),
                e.backend_version,
                words.verdict(e.audit.ok, e.audit.statement),
                words.shares(e.audit.kernels),
                words.shares(e.audit.weights, counted=False),
                words.shares(e.audit.microseconds, counted=False),
                words.fusions(e.audit),
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
    return Section(slug="asked", title="Asked and ran", blocks=(*blocks, table, folded, *lint_blocks(run.engines)))
