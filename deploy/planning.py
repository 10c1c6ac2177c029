"""``effdeploy export --dry-run``: the checks of a run and what it would cost, without writing anything.

A duration is shown only where an earlier run on this machine measured the same stage of the same recipe; everything
else is unknown, and said to be.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy import units
from deploy.answers import PlannedFile, PlannedStage, PlanRecord
from deploy.artifacts import (
    MANIFEST,
    PATCHED,
    TRACED,
    environment,
    read_manifest,
    require_place,
)
from deploy.backends import load_backend
from deploy.backends.base import Backend
from deploy.candidates import build_options
from deploy.console import Console
from deploy.errors import BundleError, StorageError
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.models.sources import choose_text, is_here, parse_source
from deploy.pipeline import check_request
from deploy.recipe import Recipe
from deploy.records import ModelRecord, Precision, RunRecord, Stage, Target, WeightsSource
from deploy.reuse import CONSUMES, preview
from deploy.trace import choose_opset

BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2, Precision.INT8: 1, Precision.FP8: 1}
COLUMNS = ("stage", "does", "seconds", "writes", "evidence")


def plan_export(
    recipe: Recipe,
    out: Path,
    *,
    until: Stage = Stage.REPORT,
    start: Stage | None = None,
    reuse: bool = True,
    console: Console,
) -> PlanRecord:
    """Check what can be checked without the work, and say what a run would do.

    Raises:
        EffdeployError: whatever the run itself would raise before its first stage, or when it loads weights that are
            on this machine.
    """
    require_place(out, until)
    free = _free_space(out)
    backend = load_backend(recipe.engine.backend)
    check_request(recipe, until, backend)
    if until.order >= Stage.ENGINE.order:
        backend.check(build_options(recipe))
    target = recipe.target or backend.target
    kept = preview(recipe, target, until, start or Stage.REPORT if reuse else Stage.MODEL)
    with console.step(Stage.MODEL.value) as step:
        model = _model(recipe, target, console)
        step.note(model.weights.statement)
    choose_opset(recipe.trace.opset, target, recipe.trace.attention_op)
    earlier = earlier_runs(out.parent)
    stages = []
    for stage in (stage for stage in Stage if stage.order <= until.order):
        files = tuple(_files(stage, recipe, backend, model))
        if stage in kept:
            action, seconds, evidence = "reuse", None, f"made {kept[stage].made}"
        else:
            action, (seconds, evidence) = "run", _duration(stage, recipe, earlier)
        stages.append(PlannedStage(stage=stage, action=action, seconds=seconds, evidence=evidence, files=files))
    needed = sum(file.size or 0 for stage in stages for file in stage.files)
    return PlanRecord(
        name=out.name,
        out=str(out),
        until=until,
        recipe=recipe.to_data(),
        model=model,
        backend=backend.name,
        backend_note=backend.available() or "",
        stages=tuple(stages),
        needed=needed,
        free=free,
        warnings=tuple(_warnings(needed, free, out)),
    )


def _model(recipe: Recipe, target: Target, console: Console) -> ModelRecord:
    """Load the model; weights that would have to be downloaded are left where they are, random ones stand in."""
    system = find_system(recipe.system)
    text = choose_text(recipe.weights, recipe.pretrained, f"{recipe.system} {recipe.variant}")
    if is_here(source := parse_source(text)):
        return load_model(system, recipe, target, console).record
    model = load_model(system, recipe.model_copy(update={"weights": "random"}), target, console).record
    weights = WeightsSource(
        kind=source.kind, statement=f"weights: {text} would be downloaded, size unknown", source=text
    )
    return dataclasses.replace(model, weights=weights)


def show(plan: PlanRecord, console: Console) -> None:
    """Write a plan."""
    rows = []
    for stage in plan.stages:
        files = ", ".join(f"{f.name} {'?' if f.size is None else '~' + units.size(f.size)}" for f in stage.files)
        seconds = "-" if stage.action == "reuse" else units.seconds(stage.seconds) if stage.seconds else "unknown"
        rows.append((stage.stage.value, stage.action, seconds, files or "-", stage.evidence))
    console.table(f"plan for {plan.out}", COLUMNS, rows)
    known = [stage.seconds for stage in plan.stages if stage.seconds is not None]
    unknown = sum(stage.seconds is None and stage.action == "run" for stage in plan.stages)
    total = [units.seconds(sum(known))] * bool(known) + [f"{unknown} stages of unknown length"] * bool(unknown)
    console.line(f"time        {' and '.join(total)}")
    console.line(f"space       about {units.size(plan.needed)} needed, {units.size(plan.free)} free")
    console.line(f"backend     {plan.backend}: {plan.backend_note or 'can build here'}")
    for warning in plan.warnings:
        console.warn(warning)
    console.line("dry run: nothing was written")
    console.result(plan)


def earlier_runs(folder: Path) -> tuple[RunRecord, ...]:
    """Read the manifests below a folder that this machine made with these versions, newest first."""
    here = environment()
    found = []
    for path in folder.glob(f"*/{MANIFEST}"):
        try:
            run = read_manifest(path.parent)
        except BundleError:  # another version's, or a damaged one: no evidence
            continue
        if run.environment == here:
            found.append(run)
    return tuple(sorted(found, key=lambda run: run.created, reverse=True))


def _duration(stage: Stage, recipe: Recipe, earlier: Sequence[RunRecord]) -> tuple[float | None, str]:
    """Take the seconds of a stage from the newest run that did the same up to it."""
    new = recipe.to_data()
    keys = {"system", "variant", "size", "weights", "target"}
    consumed = (name for other, names in CONSUMES.items() if other.order <= stage.order for name in names)
    keys |= {name.partition(".")[0] for name in consumed}
    for run in earlier:
        if stage.value in run.stage_seconds and all(run.recipe.get(key) == new[key] for key in keys):
            return run.stage_seconds[stage.value], f"measured in {run.name}"
    return None, "no earlier run of this here"


def _files(stage: Stage, recipe: Recipe, backend: Backend, model: ModelRecord) -> Iterator[PlannedFile]:
    """List what a stage writes; sizes are those of the weights."""
    full = _weights(model, Precision.FP32)
    if stage is Stage.TRACE:
        yield PlannedFile(name=TRACED, size=full[0], basis=full[1])
    if stage is Stage.PASSES:
        yield PlannedFile(name=PATCHED, size=full[0], basis=full[1])
    if stage is Stage.PRECISION and recipe.precision is not Precision.FP32:
        size, basis = _weights(model, recipe.precision)
        yield PlannedFile(name=f"30-{recipe.precision.value}.onnx", size=size, basis=basis)
    if stage is Stage.ENGINE and backend.target is not Target.ONNXRUNTIME:
        size, basis = _weights(model, recipe.precision)
        for name in [f"sm{sm}" for sm in recipe.engine.sm] or ["sm<NN>"]:
            yield PlannedFile(name=f"engine-{name}", size=size, basis=basis)
    if stage is Stage.REPORT:
        for name in ("report.html", "report.md"):
            yield PlannedFile(name=name, size=None, basis="depends on what is measured")


def _weights(model: ModelRecord, precision: Precision) -> tuple[int, str]:
    width = BYTES[precision]
    return model.deploy_parameters * width, f"{model.deploy_parameters} parameters x {width} bytes"


def _free_space(out: Path) -> int:
    """Return the free bytes where ``out`` would be.

    Raises:
        StorageError: the nearest folder that exists cannot be written to.
    """
    existing = next(path for path in out.absolute().parents if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise StorageError(f"cannot write beside {out}: {existing}", hint="choose another folder with --out")
    return shutil.disk_usage(existing).free


def _warnings(needed: int, free: int, out: Path) -> Iterator[str]:
    if needed > free:
        yield f"about {units.size(needed)} are needed beside {out}, {units.size(free)} are free"
    if (out / MANIFEST).is_file():
        yield f"{out} holds a bundle, which the finished run would replace"
