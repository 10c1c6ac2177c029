"""The road: ``run`` takes a recipe to a bundle, a line a stage; everything else here serves it."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from deploy import __version__
from deploy.artifacts import (
    MANIFEST,
    artifacts_of,
    environment,
    open_artifact,
    publish,
    read_manifest,
    run_folder,
    storage_errors,
    write_manifest,
)
from deploy.backends import load_backend
from deploy.backends.base import Backend, Feeds
from deploy.bench import measure
from deploy.candidates import batch_candidates, bench_candidates, build_options, parity_candidates
from deploy.console import Console, Mode
from deploy.errors import BackendUnavailableError, BundleError, ParityError, RecipeError, StorageError
from deploy.graph.pipeline import run_passes
from deploy.models import find_system
from deploy.models.base import Loaded, System, load_model, measure_drift
from deploy.parity.batch import check_batches, with_batches
from deploy.parity.compare import check_parity
from deploy.parity.inputs import InputPack
from deploy.precision.convert import convert_precision
from deploy.preprocess import find_images
from deploy.recipe import Recipe, layer_of_data, resolve
from deploy.records import (
    SCHEMA_VERSION,
    Artifact,
    BenchRecord,
    EngineRecord,
    Environment,
    ModelRecord,
    ParityRecord,
    PassesRecord,
    Precision,
    PrecisionRecord,
    RunRecord,
    Stage,
    Target,
    TraceRecord,
)
from deploy.report import render
from deploy.resolve import bench_options, parity_inputs, sample_feeds, tolerances
from deploy.trace import TraceRequest, choose_opset, onnx_from_torch

T = TypeVar("T")
RECIPE_FILE = "recipe.yaml"
_RANGE_IMAGES = 2  # enough to see an FP16 overflow coming, cheap enough to be on the road

# What each stage consumes of the recipe; a stage may be taken from an earlier bundle only when none of it changed.
CONSUMES: Mapping[Stage, tuple[str, ...]] = {
    Stage.TRACE: ("system", "variant", "size", "batch", "classes", "options", "trace"),
    Stage.PASSES: ("passes",),
    Stage.PRECISION: ("precision", "typing", "parity", "preprocess"),  # the range check runs on parity inputs
    Stage.ENGINE: ("engine",),
    Stage.PARITY: ("parity", "preprocess"),
    Stage.LATENCY: ("bench",),
}


def run(
    recipe: Recipe,
    out: Path,
    *,
    until: Stage = Stage.REPORT,
    start: Stage = Stage.MODEL,
    console: Console | None = None,
) -> RunRecord:
    """Take a recipe to a bundle at ``out``; the folder appears whole or not at all.

    Args:
        recipe: What to do.
        out: Bundle folder. A run whose parity fails appears beside it as ``<out>.failed`` and leaves ``out`` alone.
        until: Last stage to run.
        start: First stage to run; earlier ones are taken from the bundle at ``out``.
        console: Where progress goes; nowhere when left out.

    Raises:
        ParityError: outputs are out of tolerance; the failed bundle holds the evidence.
        StorageError: ``out`` holds a bundle that went further than ``until``, or something else.
        EffdeployError: any other stage failed; nothing is left behind.
    """
    begin = time.perf_counter()
    _refuse_to_shorten(out, until)
    with run_folder(out) as folder:
        road = _Road(recipe=recipe, folder=folder, until=until, start=start, console=console or Console(Mode.SILENT))
        road.continue_from(out)
        loaded = road.load()
        traced = road.step(Stage.TRACE, lambda: road.trace(loaded), lambda old: old.trace)
        patched = road.step(Stage.PASSES, lambda: road.patch(traced), lambda old: old.passes)
        typed = road.step(Stage.PRECISION, lambda: road.type(patched), lambda old: old.precision)
        engines = road.step(Stage.ENGINE, lambda: road.build(typed), lambda old: old.engines) or ()
        parity = road.step(Stage.PARITY, lambda: road.prove(loaded, engines), lambda old: old.parity)
        latency = road.step(Stage.LATENCY, lambda: road.time(loaded, engines), lambda old: old.bench)
        ok, verdict = _verdict(parity, until)
        record = RunRecord(
            schema_version=SCHEMA_VERSION, effdeploy=__version__, name=out.name, created=_now(), until=until, ok=ok,
            verdict=verdict, recipe=recipe.to_data(), environment=road.environment(), model=road.described(loaded),
            trace=traced, passes=patched, precision=typed, engines=engines, parity=parity, bench=latency,
            stage_seconds={**road.seconds, "total": time.perf_counter() - begin},
        )  # fmt: skip
        return road.finish(record, out)


@dataclass(kw_only=True, slots=True)
class _Road:
    """The state of one run: where it writes, what it reuses, how long each stage took."""

    recipe: Recipe
    folder: Path
    until: Stage
    start: Stage
    console: Console
    system: System = field(init=False)
    backend: Backend = field(init=False)
    target: Target = field(init=False)
    inputs: InputPack | None = None
    stages: dict[str, Artifact] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    old: RunRecord | None = None

    def __post_init__(self) -> None:
        self.system = find_system(self.recipe.system)
        self.backend = load_backend(self.recipe.engine.backend)
        self.target = self.recipe.target or self.backend.target
        if self.recipe.parity.images and self.until.order >= Stage.PARITY.order:
            find_images(self.recipe.parity.images, 1)  # a wrong folder shall not cost a whole export
        if self.until.order >= Stage.ENGINE.order and (reason := self.backend.available()):
            raise BackendUnavailableError(f"backend {self.backend.name}: {reason}", hint="or --backend onnxruntime")

    def continue_from(self, bundle: Path) -> None:
        """Link the files of the stages that are not run again, after checking that they are what they were."""
        if self.start.order <= Stage.TRACE.order:
            return
        self.old = read_manifest(bundle)
        _check_reusable(self.old, self.recipe, self.start)
        for artifact in artifacts_of(self.old, before=self.start):
            source = open_artifact(artifact, bundle)
            with storage_errors(f"cannot copy {artifact.name}"):
                shutil.copy2(source, self.folder / artifact.name)

    def step(self, stage: Stage, make: Callable[[], T], reuse: Callable[[RunRecord], T | None]) -> T | None:
        """Run a stage, take it from the earlier bundle, or leave it out."""
        if stage.order > self.until.order:
            return None
        if self.old is not None and stage.order < self.start.order:
            skipped = stage is Stage.LATENCY and self.old.until.order >= stage.order  # no engine could be timed
            if (record := reuse(self.old)) is None and skipped:
                return None
            if record is None:
                raise BundleError(f"the earlier bundle has no stage {stage.value}", hint=f"--from {stage.value}")
            self.note_artifact(stage, record)
            return record
        begin = time.perf_counter()
        with self.console.step(stage.value) as shown:
            record = make()
            shown.note(_note(record))
        self.note_artifact(stage, record)
        self.seconds[stage.value] = time.perf_counter() - begin
        return record

    def note_artifact(self, stage: Stage, record: Any) -> None:
        """Remember the ONNX file that a stage left, for parity."""
        names = {Stage.TRACE: "traced", Stage.PASSES: "patched", Stage.PRECISION: self.recipe.precision.value}
        if stage in names and record.artifact not in self.stages.values():
            self.stages[names[stage]] = record.artifact

    def load(self) -> Loaded:
        """Load the reference and its deploy form; every run needs them."""
        begin = time.perf_counter()
        with self.console.step(Stage.MODEL.value) as shown:
            loaded = load_model(self.system, self.recipe, self.target)
            shown.note(loaded.record.weights.statement)
        if self.old and self.old.model.weights != loaded.record.weights:
            raise RecipeError(
                f"--from {self.start.value}: the bundle has other weights ({self.old.model.weights.statement})",
                hint="export from the start",
            )
        self.seconds[Stage.MODEL.value] = time.perf_counter() - begin
        return loaded

    def trace(self, loaded: Loaded) -> TraceRecord:
        """Export the deploy form."""
        section = self.recipe.trace
        request = TraceRequest(
            inputs=loaded.inputs,
            outputs=loaded.system.outputs,
            batch=self.recipe.batch,
            opset=choose_opset(section.opset, self.target, section.attention_op),
        )
        return onnx_from_torch(loaded.deploy, request, self.folder)

    def patch(self, traced: TraceRecord | None) -> PassesRecord:
        """Run the target's graph passes."""
        path = self.folder / _needed(traced).artifact.name
        verify = dict(self.pack().chunks[0].feeds) if self.recipe.passes.verify_each else None
        return run_passes(path, self.target, self.folder, verify=verify)

    def type(self, patched: PassesRecord | None) -> PrecisionRecord:
        """Write the precision into the graph."""
        return convert_precision(
            self.folder / _needed(patched).artifact.name,
            self.recipe.precision,
            self.folder,
            feeds=None if self.recipe.precision is Precision.FP32 else self.sample(),
            keep=self.recipe.typing.keep_fp32,
            target=self.target,
        )

    def build(self, typed: PrecisionRecord | None) -> tuple[EngineRecord, ...]:
        """Build the engines and audit what they compute in."""
        model = self.folder / _needed(typed).artifact.name
        return self.backend.build(model, self.folder, build_options(self.recipe))

    def prove(self, loaded: Loaded, engines: Sequence[EngineRecord]) -> ParityRecord:
        """Compare every stage with PyTorch, and the rows of a batch of what ships with each other."""
        candidates = parity_candidates(loaded, self.recipe, self.folder, self.stages, engines)
        limits, task = tolerances(self.recipe), self.system.task
        parity = check_parity(loaded.run, candidates, self.pack(), limits, task=task)
        shipped = batch_candidates(candidates, every=False)
        return with_batches(parity, check_batches(shipped, self.pack(), self.recipe.batch, limits, task=task))

    def environment(self) -> Environment:
        """Describe the machine that measured: with a reused latency, the earlier bundle's."""
        reused = self.old is not None and self.start.order > Stage.LATENCY.order
        return self.old.environment if self.old is not None and reused else environment()

    def described(self, loaded: Loaded) -> ModelRecord:
        """Add the drift of the deploy form to the model's record, where parity was asked for."""
        if self.until.order < Stage.PARITY.order:
            return loaded.record
        if self.old and self.start.order > Stage.PARITY.order:
            return dataclasses.replace(loaded.record, drift=self.old.model.drift)
        return dataclasses.replace(loaded.record, drift=measure_drift(loaded))

    def time(self, loaded: Loaded, engines: Sequence[EngineRecord]) -> BenchRecord | None:
        """Time the engines against the baselines; ``None`` where no engine can run here."""
        if not any(engine.runnable for engine in engines):
            return None
        feeds = self.sample(self.recipe.batch.opt)
        with bench_candidates(self.recipe, self.folder, engines, feeds, loaded) as found:
            candidates, profile = found
            return measure(candidates, bench_options(self.recipe), profile=profile)

    def pack(self) -> InputPack:
        """Make the parity inputs, once."""
        if self.inputs is None:
            self.inputs = parity_inputs(self.system, self.recipe)
        return self.inputs

    def sample(self, count: int = 0) -> Feeds:
        """Return feeds of natural-looking images: ``count`` of them, or a few in multiples of the smallest batch."""
        batch = self.recipe.batch.min
        return sample_feeds(self.pack(), count or batch * math.ceil(_RANGE_IMAGES / batch))

    def finish(self, record: RunRecord, out: Path) -> RunRecord:
        """Write recipe, manifest and reports, publish the bundle, and say how it went."""
        final = out if record.ok else out.with_name(out.name + ".failed")
        with storage_errors(f"cannot write the bundle {final}"):
            (self.folder / RECIPE_FILE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            if self.until is Stage.REPORT:
                with self.console.step(Stage.REPORT.value) as shown:
                    render([record], self.folder)
                    shown.note("report.html, report.md")
        write_manifest(record, self.folder)
        publish(self.folder, final)
        self.console.summary(record, final)
        self.console.result(record)
        if not record.ok:
            raise ParityError(record.verdict, hint=f"the evidence is in {final}; nothing was written to {out}")
        return record


def _refuse_to_shorten(out: Path, until: Stage) -> None:
    """Keep a bundle that went further down the road than this run would."""
    if (out / MANIFEST).is_file() and (old := read_manifest(out)).until.order > until.order:
        raise StorageError(
            f"{out} holds a bundle that went on to {old.until.value}; a run until {until.value} would replace it",
            hint="choose another folder with --out, or remove it yourself",
        )


def _verdict(parity: ParityRecord | None, until: Stage) -> tuple[bool, str]:
    if parity is None:
        return True, f"stopped after {until.value} as asked; nothing was compared with PyTorch"
    return parity.ok, parity.verdict


def _now() -> str:
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return datetime.datetime.fromtimestamp(moment, tz=datetime.timezone.utc).isoformat()


def _needed(record: T | None) -> T:
    if record is None:  # stages run in order, so this is a mistake in this file
        raise AssertionError("a stage ran before the one that it consumes")
    return record


def _check_reusable(old: RunRecord, recipe: Recipe, start: Stage) -> None:
    new = recipe.to_data()
    changed = [
        f"{key} (needs --from {stage.value})"
        for stage, keys in CONSUMES.items()
        if stage.order < start.order
        for key in keys
        if old.recipe.get(key) != new[key]
    ]
    before = resolve([layer_of_data("manifest", old.recipe)])
    lowering = [(r.target or load_backend(r.engine.backend).target, r.engine.device) for r in (before, recipe)]
    if lowering[0] != lowering[1]:
        changed.append("target or device (needs --from trace)")
    if changed:
        raise RecipeError(
            f"--from {start.value} would reuse stages made with another recipe; changed: {', '.join(changed)}",
            hint="start at the earliest of them",
        )


def _note(record: Any) -> str:
    """Say in a few words what a stage came to."""
    match record:
        case TraceRecord():
            return f"opset {record.opset}, {sum(record.op_counts.values())} nodes"
        case PassesRecord():
            sites = sum(p.sites for p in record.passes)
            return f"{sites} sites, {sum(record.op_counts.values())} nodes for {record.target.value}"
        case PrecisionRecord():
            return f"{record.precision.value}, {record.casts} casts"
        case ParityRecord():
            return record.verdict
        case BenchRecord():
            first = record.latencies[0]
            return f"{first.name} p50 {first.p50:.2f} ms at batch {first.batch}, {first.threads} thread(s)"
        case None:
            return "not measured: no engine of this run can run on this machine"
        case _:
            return ", ".join(engine.audit.statement if engine.runnable else engine.device for engine in record)
