"""The work of each stage: what ``deploy.pipeline.run`` calls where a stage cannot be taken from an earlier run.

Here PyTorch and the runtimes are imported, so a run that takes everything from earlier ones never pays for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from deploy.backends import load_backend
from deploy.backends.base import Backend, Feeds
from deploy.backends.gpu import sm_here
from deploy.bench import measure
from deploy.candidates import (
    batch_candidates,
    bench_candidates,
    build_options,
    parity_candidates,
    plain_of,
    prove_decisions,
    prove_rounding,
    prove_selection,
)
from deploy.console import Console
from deploy.errors import CheckpointError, EngineBuildError, PrecisionError
from deploy.graph.io import load_model as load_graph
from deploy.graph.pipeline import run_passes
from deploy.graph.plugins import for_builder
from deploy.known_bad import warn_of_traps
from deploy.labels import read_labels
from deploy.linting.build import check_before_build, with_lint
from deploy.models import find_system
from deploy.models.base import Loaded, System, load_model, measure_drift, resolve_options, specialised
from deploy.parity.batch import check_batches, with_batches
from deploy.parity.compare import check_parity, with_drift
from deploy.parity.decisions import with_decisions
from deploy.parity.inputs import InputPack
from deploy.parity.metrics import furthest
from deploy.parity.selection import with_selection
from deploy.pictures import drawn_photo, draws
from deploy.precision.boundaries import PROBES, boundary_errors
from deploy.precision.convert import convert_precision
from deploy.precision.quantize import QuantizationRequest
from deploy.precision.splice import Splice
from deploy.preprocess import find_images
from deploy.recipe import Recipe
from deploy.records import (
    Artifact,
    BenchRecord,
    BoundaryError,
    DrawnPhoto,
    Drift,
    EngineRecord,
    ModelRecord,
    ParityRecord,
    PassesRecord,
    Precision,
    PrecisionRecord,
    Stage,
    Target,
    TraceRecord,
    to_json,
)
from deploy.resolve import bench_options, calibration_images, parity_inputs, sample_feeds, tolerances
from deploy.sensitivity import how_to_judge
from deploy.trace import TraceRequest, choose_opset, onnx_from_torch

_RANGE_IMAGES = 2  # enough to see an FP16 overflow coming, cheap enough to be on the road


@dataclass(kw_only=True)
class Work:
    """Everything that a run does itself; the model and the inputs are made when a stage first asks for them.

    Attributes:
        recipe: What is asked for.
        backend: The runtime of the engine.
        target: What the graph is lowered for.
        folder: Where files are written.
        until: Last stage of the run.
        console: Where the progress of long steps goes.
        model: The record of a model stage that was taken from an earlier run.
    """

    recipe: Recipe
    backend: Backend
    target: Target
    folder: Path
    until: Stage
    console: Console
    model: ModelRecord | None = None
    system: System = field(init=False)

    def __post_init__(self) -> None:
        self.system = specialised(find_system(self.recipe.system), self.recipe)
        if self.until.order >= Stage.ENGINE.order:
            self.backend.check(build_options(self.recipe))

    @functools.cached_property
    def loaded(self) -> Loaded:
        """The reference and its deploy form.

        Raises:
            CheckpointError: the weights are not those that the run began with.
        """
        loaded = load_model(self.system, self.recipe, self.target, self.console)
        got, want = loaded.record.weights, self.model.weights if self.model else loaded.record.weights
        if (got.kind, got.sha256, got.seed) != (want.kind, want.sha256, want.seed):
            raise CheckpointError(
                f"the weights changed during the run: {got.statement}, expected {want.statement}",
                hint="export again when the file is whole",
            )
        return loaded

    @functools.cached_property
    def inputs(self) -> InputPack:
        """The parity inputs."""
        return parity_inputs(self.system, self.recipe)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The classes' names, where the recipe has a file of them."""
        return read_labels(self.recipe.labels, self.recipe.classes) if self.recipe.labels else ()

    def load(self) -> ModelRecord:
        """Load the reference and its deploy form."""
        names = self.names  # before minutes of loading
        return dataclasses.replace(self.loaded.record, names=names)

    def trace(self) -> TraceRecord:
        """Export the deploy form."""
        section = self.recipe.trace
        request = TraceRequest(
            inputs=self.loaded.inputs,
            outputs=self.loaded.outputs,
            batch=self.recipe.batch,
            opset=choose_opset(section.opset, self.target, section.attention_op),
            apart=partial(furthest, self.system.task),
            metadata=metadata(self.loaded.record, self.names),
        )
        return onnx_from_torch(self.loaded.deploy, request, self.folder)

    def patch(self, traced: TraceRecord) -> PassesRecord:
        """Run the target's graph passes."""
        verify = dict(self.inputs.chunks[0].feeds) if self.recipe.passes.verify_each else None
        return run_passes(self.folder / traced.artifact.name, self.target, self.folder, verify=verify)

    def type(self, patched: PassesRecord) -> PrecisionRecord:
        """Write the precision into the graph."""
        kept = self.system.keep_fp32(resolve_options(self.system, self.recipe))
        with contextlib.ExitStack() as stack:
            return convert_precision(
                self.folder / patched.artifact.name,
                self.recipe.precision,
                self.folder,
                feeds=None if self.recipe.precision is Precision.FP32 else self.sample(),
                keep=(*self.recipe.typing.keep_fp32, *kept),
                target=self.target,
                quantization=self._quantization(stack) if self.recipe.precision.quantised else None,
            )

    def _quantization(self, stack: contextlib.ExitStack) -> QuantizationRequest:
        """Return what INT8 and FP8 are asked for; images are read, with a progress bar, when they are measured."""
        section, images = self.recipe.quantization, calibration_images(self.system, self.recipe)
        twice = 2 * len(images.names)  # two passes
        return QuantizationRequest(
            images=images,
            advance=stack.enter_context(self.console.progress(twice, "calibration images, in two passes")),
            method=section.method,
            percentile=section.percentile,
            weight_bits=section.weight_bits,
            smooth=section.smooth,
            asked=section.keep_high,
            kept=self.system.keep_high(resolve_options(self.system, self.recipe)),
        )

    def build(self, typed: PrecisionRecord) -> tuple[EngineRecord, ...]:
        """Warn of what this version is known for, lint the graph, build the engines, and audit what they compute in."""
        warn_of_traps(
            self.console, self.backend.name, self.folder / typed.artifact.name,
            model=f"{self.recipe.system} {self.recipe.variant}", sm=self.recipe.engine.sm or sm_here(),
        )  # fmt: skip
        model = for_builder(self.folder / typed.artifact.name, self.folder, self.backend.name)
        engine = self.recipe.engine
        stop = engine.lint == "stop"
        lint = check_before_build(model, self.backend.name, engine.device, self.console, stop=stop)
        return with_lint(self.backend.build(model, self.folder, build_options(self.recipe)), lint)

    def prove(
        self, traced: TraceRecord, patched: PassesRecord, typed: PrecisionRecord, engines: Sequence[EngineRecord]
    ) -> tuple[ParityRecord, Drift]:
        """Compare every stage with PyTorch, and the rows of a batch of what ships with each other."""
        files = self._stage_files(traced, patched, typed)
        candidates = parity_candidates(self.loaded, self.recipe, self.folder, files, engines)
        limits, task = tolerances(self.recipe), self.system.task
        calibrated = self.recipe.quantization.calib is not None
        parity = check_parity(self.loaded.run, candidates, self.inputs, limits, task=task, calibrated=calibrated)
        parity = prove_rounding(self.loaded, parity, candidates, self.inputs)
        failed = {comparison.stage for comparison in parity.comparisons if not comparison.passed}
        if decisions := prove_decisions(self.loaded, self.recipe, self.folder, files, self.inputs, failed):
            parity = with_decisions(parity, decisions)
        if found := prove_selection(self.loaded, self.recipe, self.folder, files, engines, self.inputs, limits):
            parity = with_selection(parity, found)
        shipped = batch_candidates(candidates, every=False)
        batches = check_batches(shipped, self.inputs, self.recipe.batch, limits, task=task)
        approximate = self.loaded.approximate
        sample = self.sample() if approximate else None
        drift = measure_drift(self.loaded, partial(furthest, task), sample)
        parity = with_drift(parity, drift, self.recipe.parity.max_drift, approximate=approximate)
        modules, why_not = self._modules(patched, typed)
        parity = dataclasses.replace(with_batches(parity, batches), modules=modules, pictures=self._pictures(engines))
        return dataclasses.replace(parity, notes=(*parity.notes, *why_not)), drift

    def _modules(
        self, patched: PassesRecord, typed: PrecisionRecord
    ) -> tuple[tuple[BoundaryError, ...], tuple[str, ...]]:
        """Compare a reduced precision with the float32 graph module by module; else a note that says why not."""
        precision = self.recipe.precision
        if precision is Precision.FP32:
            return (), ()
        high, low = (self.folder / record.artifact.name for record in (patched, typed))
        how = how_to_judge(precision, self.target, build_options(self.recipe))
        with tempfile.TemporaryDirectory() as scratch:
            opened = partial(how.open, folder=Path(scratch))
            try:
                splice = Splice(load_graph(high), load_graph(low))
                return boundary_errors(splice, precision, opened, self._batches(), most=PROBES), ()
            except (PrecisionError, EngineBuildError) as error:
                return (), (f"error by module was not measured: {error.message}",)

    def _pictures(self, engines: Sequence[EngineRecord]) -> tuple[DrawnPhoto, ...]:
        """Draw the first engine that runs here on the first photo, where the system has something to draw."""
        running, folder = [engine for engine in engines if engine.runnable], self.recipe.parity.images
        if not running or folder is None or not draws(self.loaded):
            return ()
        engine, options = running[0], build_options(self.recipe)
        name = f"{engine.backend}, {self.recipe.precision.value}"
        with load_backend(engine.backend).open(engine, self.folder, options) as runner:
            return tuple(drawn_photo(photo, self.recipe, self.loaded, runner, name) for photo in find_images(folder, 1))

    def time(self, engines: Sequence[EngineRecord]) -> BenchRecord | None:
        """Time the engines against the baselines; ``None`` where no engine can run here."""
        if not any(engine.runnable for engine in engines):
            return None
        feeds = self.sample(self.recipe.batch.opt)
        loaded = self.loaded if self.recipe.bench.baselines else None
        plain = plain_of(self.recipe) if self.backend.name == "onnxruntime" else None
        with bench_candidates(self.recipe, self.folder, engines, feeds, loaded, plain) as found:
            candidates, profile = found
            record = measure(candidates, bench_options(self.recipe), profile=profile)
        return plain.judged(record) if plain else record

    def sample(self, count: int = 0) -> Feeds:
        """Return feeds of natural-looking images: ``count`` of them, or a few in multiples of the smallest batch."""
        batch = self.recipe.batch.min
        return sample_feeds(self.inputs, count or batch * math.ceil(_RANGE_IMAGES / batch))

    def _batches(self) -> list[Feeds]:
        """Return the sample in the smallest batches that the graph takes."""
        step, sample = self.recipe.batch.min, self.sample()
        images = len(next(iter(sample.values())))
        return [{name: a[i : i + step] for name, a in sample.items()} for i in range(0, images, step)]

    def _stage_files(self, traced: TraceRecord, patched: PassesRecord, typed: PrecisionRecord) -> dict[str, Artifact]:
        """Name the ONNX files of the stages; a file of two stages comes once."""
        named = {"traced": traced.artifact, "patched": patched.artifact, self.recipe.precision.value: typed.artifact}
        files: dict[str, Artifact] = {}
        for name, artifact in named.items():
            if artifact not in files.values():
                files[name] = artifact
        return files


def metadata(model: ModelRecord, names: Sequence[str] = ()) -> dict[str, str]:
    """Return what travels in the ONNX files, as JSON by key: the preprocessing, and the classes' names where known."""
    spec = model.preprocess
    images = "uint8 [N, height, width, 3], RGB" if spec.embed else "float32 [N, 3, height, width], RGB"
    about = {"images": images, "size": model.size, **to_json(spec)}
    return {"preprocess": json.dumps(about)} | ({"names": json.dumps(names)} if names else {})
