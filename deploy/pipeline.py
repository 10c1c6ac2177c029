"""The road: ``run`` takes a recipe to a bundle, a line a stage; everything else here serves it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploy import __version__
from deploy.artifacts import (
    MANIFEST,
    RECIPE,
    artifacts_of,
    environment,
    failed_name,
    open_artifact,
    publish,
    read_manifest,
    refused_writes,
    require_place,
    run_folder,
    storage_errors,
    write_manifest,
)
from deploy.backends import load_backend
from deploy.backends.base import Backend
from deploy.console import Console, Mode
from deploy.errors import BackendUnavailableError, BundleError, ParityError
from deploy.precision.images import check_images
from deploy.preprocess import find_images
from deploy.recipe import Recipe
from deploy.records import (
    SCHEMA_VERSION,
    BackendChoice,
    BenchRecord,
    ModelRecord,
    ParityRecord,
    PassesRecord,
    Precision,
    PrecisionRecord,
    RunRecord,
    Stage,
    StageOrigin,
    TraceRecord,
)
from deploy.report import render
from deploy.reuse import Reuse, made, now, show

if TYPE_CHECKING:
    from deploy.stages import Work

T = TypeVar("T")


def run(
    recipe: Recipe,
    out: Path,
    *,
    until: Stage = Stage.REPORT,
    start: Stage | None = None,
    reuse: bool = True,
    choice: BackendChoice | None = None,
    console: Console | None = None,
) -> RunRecord:
    """Take a recipe to a bundle at ``out``; the folder appears whole or not at all.

    Args:
        recipe: What to do.
        out: Bundle folder. A run whose parity fails appears beside it as ``<out>.failed`` and leaves ``out`` alone.
        until: Last stage to run.
        start: Stages from here on are made again even where an earlier run made the same; ``None``: none are.
        reuse: False: every stage is made again.
        choice: Why the recipe's backend is what it is, where it was chosen (``deploy.fastest``).
        console: Where progress goes; nowhere when left out.

    Raises:
        ParityError: outputs are out of tolerance; the failed bundle holds the evidence.
        StorageError: ``out`` holds a bundle that went further than ``until``, or something else; another run is
            writing it; or the disk refuses.
        EffdeployError: any other stage failed; nothing that looks finished is left behind.
    """
    begin = time.perf_counter()
    with run_folder(out) as folder:
        require_place(out, until)
        road = _Road.begin(recipe, folder, until, console or Console(Mode.SILENT))
        road.reuse.start = start or Stage.REPORT if reuse else Stage.MODEL
        road.look_at(out)
        model = road.step(Stage.MODEL, lambda work: work.load())
        traced = road.step(Stage.TRACE, lambda work: work.trace())
        patched = road.step(Stage.PASSES, lambda work: work.patch(_needed(traced)))
        typed = road.step(Stage.PRECISION, lambda work: work.type(_needed(patched)))
        engines = road.step(Stage.ENGINE, lambda work: work.build(_needed(typed))) or ()
        proof = road.step(
            Stage.PARITY, lambda work: work.prove(_needed(traced), _needed(patched), _needed(typed), engines)
        )
        latency = road.step(Stage.LATENCY, lambda work: work.time(engines))
        parity, drift = proof or (None, None)
        ok, verdict = _verdict(parity, until)
        record = RunRecord(
            schema_version=SCHEMA_VERSION, effdeploy=__version__, name=out.name, created=now(), until=until, ok=ok,
            verdict=verdict, recipe=recipe.to_data(), environment=environment(),
            model=dataclasses.replace(_needed(model), drift=drift), trace=traced, passes=patched, precision=typed,
            engines=engines, parity=parity, bench=latency, origins=road.origins(), choice=choice,
            stage_seconds={**road.seconds(), "total": time.perf_counter() - begin},
        )  # fmt: skip
        return road.finish(record, out)


@dataclass(kw_only=True)
class _Road:
    """The state of one run: where it writes, and what it takes from earlier runs."""

    recipe: Recipe
    folder: Path
    until: Stage
    console: Console
    backend: Backend
    reuse: Reuse

    @classmethod
    def begin(cls, recipe: Recipe, folder: Path, until: Stage, console: Console) -> _Road:
        """Check what is asked before any work."""
        backend = load_backend(recipe.engine.backend)
        check_request(recipe, until, backend)
        reuse = Reuse(recipe=recipe, target=recipe.target or backend.target, folder=folder)
        return cls(recipe=recipe, folder=folder, until=until, console=console, backend=backend, reuse=reuse)

    @functools.cached_property
    def work(self) -> Work:
        """The stages' own work; imports PyTorch."""
        from deploy.stages import Work

        return Work(
            recipe=self.recipe, backend=self.backend, target=self.reuse.target, folder=self.folder, until=self.until,
            console=self.console, model=self.reuse.records.get(Stage.MODEL),
        )  # fmt: skip

    def look_at(self, bundle: Path) -> None:
        """Say which files of the bundle that is there were changed since; none of them is used."""
        if not (bundle / MANIFEST).is_file():
            return
        try:
            files = artifacts_of(read_manifest(bundle))
        except BundleError as error:
            self.console.warn(f"{error.message}; this run puts a bundle in its place")
            return
        for artifact in files:
            try:
                open_artifact(artifact, bundle)
            except BundleError as error:
                self.console.warn(f"{error.message}; this run puts a whole one in its place")

    def step(self, stage: Stage, make: Callable[[Work], T]) -> T | None:
        """Take a stage from an earlier run, or make it and keep it for the next one, or leave it out."""
        if stage.order > self.until.order:
            return None
        with self.console.step(stage.value) as shown, refused_writes(f"stage {stage.value}: cannot write"):
            record: T
            record, origin, warning = self.reuse.take(stage)
            if not origin.reused:
                record = make(self.work)
                origin = dataclasses.replace(origin, seconds=shown.seconds)
                warning = self.reuse.keep(stage, record, origin) or warning
            shown.note(_note(record))
            if origin.reused:
                shown.note(f"reused, {made(stage, origin)}")
            self.reuse.note(stage, record, origin)
        if warning:
            self.console.warn(warning)
        return record

    def origins(self) -> dict[str, StageOrigin]:
        """Return where the result of each stage comes from."""
        return {stage.value: origin for stage, origin in self.reuse.origins.items()}

    def seconds(self) -> dict[str, float]:
        """Return how long each stage took when it really ran."""
        return {stage.value: origin.seconds for stage, origin in self.reuse.origins.items()}

    def finish(self, record: RunRecord, out: Path) -> RunRecord:
        """Write recipe, manifest and reports, publish the bundle, and say how it went."""
        final = out if record.ok else failed_name(out)
        with storage_errors(f"cannot write the bundle {final}"):
            (self.folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            if self.until is Stage.REPORT:
                with self.console.step(Stage.REPORT.value) as shown:
                    render([record], self.folder)
                    shown.note("report.html, report.md")
        write_manifest(record, self.folder)
        publish(self.folder, final)
        show(self.reuse, self.console)
        self.console.summary(record, final)
        self.console.result(record)
        if not record.ok:
            which = "" if self.recipe.precision is Precision.FP32 else f"; effdeploy bisect {final} names the module"
            raise ParityError(record.verdict, hint=f"the evidence is in {final}; nothing was written to {out}{which}")
        return record


def check_request(recipe: Recipe, until: Stage, backend: Backend) -> None:
    """Refuse what would fail only after minutes of work.

    Raises:
        ImageError: the folder of photos, or of calibration images, cannot be used.
        BackendUnavailableError: the backend cannot build here.
    """
    if recipe.parity.images and until.order >= Stage.PARITY.order:
        find_images(recipe.parity.images, 1)
    if recipe.quantization.calib and recipe.precision.quantised and until.order >= Stage.PRECISION.order:
        check_images(recipe.quantization.calib, recipe.quantization.max_images)
    if until.order >= Stage.ENGINE.order and (reason := backend.available()):
        raise BackendUnavailableError(f"backend {backend.name}: {reason}", hint="or --backend onnxruntime")


def _verdict(parity: ParityRecord | None, until: Stage) -> tuple[bool, str]:
    if parity is None:
        return True, f"stopped after {until.value} as asked; nothing was compared with PyTorch"
    return parity.ok, parity.verdict


def _needed(record: T | None) -> T:
    if record is None:  # stages run in order, so this is a mistake in this file
        raise AssertionError("a stage ran before the one that it consumes")
    return record


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
        case ModelRecord():
            return record.weights.statement
        case (ParityRecord() as parity, _):
            return parity.verdict
        case BenchRecord():
            first = record.latencies[0]
            return f"{first.name} p50 {first.p50:.2f} ms at batch {first.batch}, {first.threads} thread(s)"
        case None:
            return "not measured: no engine of this run can run on this machine"
        case _:
            return ", ".join(engine.audit.statement if engine.runnable else engine.device for engine in record)
