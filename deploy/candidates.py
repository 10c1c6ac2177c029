"""What is compared and what is timed: the stages of a run, its engines and the baselines, ready to be opened.

Here PyTorch, the stage files and the engines meet; parity and bench only see things that can be called.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import torch
from onnx import ModelProto
from torch import nn

from deploy.artifacts import cache_folder, open_artifact
from deploy.backends import load_backend
from deploy.backends.base import Array, BuildOptions, DeviceTimed, DeviceTimer, Feeds, Runner
from deploy.backends.onnxruntime import open_model
from deploy.backends.timing_cache import FOLDER
from deploy.bench import BenchCandidate, peak_memory_of
from deploy.errors import BenchmarkError
from deploy.graph.io import load_model, save_model
from deploy.models import find_system
from deploy.models.base import Loaded, count_macs, input_specs, resolve_options, run_module, specialised
from deploy.models.base import load_model as load_network
from deploy.models.decisions import DecidingModel
from deploy.models.selecting import SelectingModel
from deploy.parity.compare import Candidate, Infer
from deploy.parity.decisions import DecidingFile, check_decisions
from deploy.parity.inputs import InputPack
from deploy.parity.rounding import BEST, DISTANCES, judge_rounding
from deploy.parity.selection import check_selection
from deploy.parity.validation import SelectingFile
from deploy.precision.emulate import emulated
from deploy.recipe import Recipe
from deploy.records import (
    Artifact,
    BenchRecord,
    EngineRecord,
    ParityRecord,
    Precision,
    SelectionCheck,
    Target,
    TensorSpec,
    Tolerance,
)
from deploy.trace import bare_export, quiet_torch

DEPLOY_FORM, ENGINE = "deploy form", "engine"  # names of stages


class TorchRunner:
    """A PyTorch module behind the Runner protocol."""

    name = "pytorch"
    device = "cpu"

    def __init__(self, module: nn.Module, outputs: tuple[str, ...]) -> None:
        self._module, self._outputs = module, outputs

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; arrays in input order."""
        return run_module(self._module, feeds, self._outputs)

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def build_options(recipe: Recipe) -> BuildOptions:
    """Return what a backend is asked for by this recipe."""
    return engine_options(recipe, input_specs(specialised(find_system(recipe.system), recipe), recipe))


def engine_options(recipe: Recipe, inputs: tuple[TensorSpec, ...]) -> BuildOptions:
    """Return what a backend is asked for by a recipe's precision, batch, engine and threads, for these graph inputs."""
    engine = recipe.engine
    return BuildOptions(
        precision=recipe.precision,
        batch=recipe.batch,
        inputs=inputs,
        sm=engine.sm,
        threads=recipe.bench.threads,
        level=engine.level,
        workspace=engine.workspace,
        tf32=engine.tf32,
        device=engine.device,
        profiles=engine.profiles,
        timing_cache=cache_folder() / FOLDER if engine.timing_cache else None,
        version_compatible=engine.version_compatible,
        hardware=engine.hardware,
        refit=engine.refit,
        strip=engine.strip,
    )


def parity_candidates(
    loaded: Loaded, recipe: Recipe, folder: Path, stages: Mapping[str, Artifact], engines: Sequence[EngineRecord]
) -> list[Candidate]:
    """List what is compared with PyTorch, in the order of the road.

    ONNX stages run on ONNX Runtime's CPU provider whatever the target is. A typed stage that no engine here runs is
    compared twice: as ONNX Runtime runs it, which computes FP16 in FP32 between casts, and with every FP16
    tensor rounded.

    Args:
        loaded: The reference and its deploy form.
        recipe: Tolerances' precision and threads.
        folder: Where the stage files lie.
        stages: Stage name ("traced", "patched", "fp16") to file.
        engines: Built engines; those that cannot run here are left out.
    """
    outputs = loaded.outputs
    found = [Candidate(stage=DEPLOY_FORM, precision=Precision.FP32, open=lambda: TorchRunner(loaded.deploy, outputs))]
    options = build_options(recipe)
    on_cpu = _for_judging(options, loaded)
    ran = {engine.artifact.name for engine in engines if engine.runnable}
    for stage, artifact in stages.items():
        precision = Precision(stage) if stage in set(Precision) else Precision.FP32
        path = open_artifact(artifact, folder)
        if artifact.name not in ran and precision is not Precision.BF16:
            opening = partial(open_model, path, on_cpu)
            found.append(Candidate(stage=stage, precision=precision, open=opening, sha256=artifact.sha256))
        if _has_16_bits(precision, loaded):
            found.append(
                Candidate(
                    stage=f"{stage}, rounded",
                    precision=precision,
                    open=partial(_emulated, path, on_cpu),
                    sha256=artifact.sha256,
                )
            )
    for engine in engines:
        if engine.runnable:
            found.append(
                Candidate(
                    stage=engine_name(engine, engines),
                    precision=recipe.precision,
                    open=_engine(engine, folder, options),
                    sha256=engine.artifact.sha256,
                )
            )
    return found


def batch_candidates(candidates: Sequence[Candidate], *, every: bool) -> list[Candidate]:
    """Choose what the batch suite checks: every stage file and engine, or only what ships.

    What ships are the engines that run here, or the last stage file where none does. PyTorch's forms are never
    checked: they define the function.
    """
    files = [candidate for candidate in candidates if candidate.stage != DEPLOY_FORM]
    engines = [candidate for candidate in files if candidate.stage.startswith(ENGINE)]
    return files if every else engines or files[-1:]


def prove_decisions(
    loaded: Loaded,
    recipe: Recipe,
    folder: Path,
    stages: Mapping[str, Artifact],
    inputs: InputPack,
    failed: Collection[str] = (),
) -> ParityRecord | None:
    """Compare stage files with PyTorch's decisions imposed: the last one, and those that ``failed`` when run freely.

    A typed file is checked as ONNX Runtime runs it and with every low tensor rounded, as in ``parity_candidates``.

    Returns:
        ``None`` where the network decides nothing.
    """
    model = DecidingModel(loaded, loaded.system.decisions) if loaded.system.decisions else None
    if model is None or not model.modules:
        return None
    files, last = list[DecidingFile](), list(stages)[-1]
    for stage in (name for name in stages if name == last or name in failed):
        precision = Precision(stage) if stage in set(Precision) else Precision.FP32
        load = partial(load_model, open_artifact(stages[stage], folder))
        if precision is not Precision.BF16:
            files.append(DecidingFile(stage=stage, precision=precision, load=load))
        if _has_16_bits(precision, loaded):
            low = partial(_rounded, load)
            files.append(DecidingFile(stage=f"{stage}, rounded", precision=precision, load=low))
    traced = load_model(open_artifact(next(iter(stages.values())), folder))
    on_cpu = _for_judging(build_options(recipe), loaded)
    return check_decisions(model, traced, files, inputs, lambda p: open_model(p, on_cpu), loaded.system.task)


def prove_rounding(
    loaded: Loaded, parity: ParityRecord, candidates: Sequence[Candidate], inputs: InputPack
) -> ParityRecord:
    """Judge what failed again by PyTorch's own rounding: noise and near ties.

    Distances of a network that chooses have a judgement of their own (``deploy.parity.decisions``).
    """
    if parity.ok or loaded.system.task != "classification":
        return parity
    excused = (BEST,) if loaded.system.decisions else (*DISTANCES, BEST)
    return judge_rounding(parity, loaded.run, partial(_in_type, loaded), candidates, inputs, excused=excused)


def _in_type(loaded: Loaded, name: str) -> Infer:
    """Return the reference in another type of PyTorch; NaN where PyTorch cannot compute in it."""
    dtype: torch.dtype = getattr(torch, name)
    module = copy.deepcopy(loaded.deploy if loaded.approximate else loaded.reference).to(dtype)

    def infer(feeds: Feeds) -> dict[str, Array]:
        given = (torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values())
        try:
            with torch.inference_mode():
                found = module(*(t.to(dtype) if t.is_floating_point() else t for t in given))
        except RuntimeError:  # no kernel for this type
            return {key: np.full(value.shape, np.nan) for key, value in loaded.run(feeds).items()}
        tensors = found if isinstance(found, tuple) else (found,)
        return {key: t.double().numpy() for key, t in zip(loaded.outputs, tensors, strict=True)}

    return infer


def _rounded(load: Callable[[], ModelProto]) -> ModelProto:
    return emulated(load())


def prove_selection(
    loaded: Loaded, recipe: Recipe, folder: Path, stages: Mapping[str, Artifact], engines: Sequence[EngineRecord],
    inputs: InputPack, limits: Mapping[str, Tolerance],
) -> tuple[SelectionCheck, ...]:  # fmt: skip
    """Put a detector's last float32 file through gate A, and what is in reduced precision through gate B.

    A typed file is checked as ONNX Runtime runs it and with every low tensor rounded, as in ``parity_candidates``; an
    engine that is not such a file by its outputs. Nothing where the network selects no queries.
    """
    if loaded.system.selection is None:
        return ()
    paths = {stage: open_artifact(artifact, folder) for stage, artifact in stages.items()}
    stage, path = [(s, p) for s, p in paths.items() if s not in set(Precision) or s == Precision.FP32.value][-1]
    same = [engine_name(e, engines) for e in engines if e.runnable and e.artifact.name == path.name]
    float32 = SelectingFile(stage=(*same, stage)[0], precision=Precision.FP32, load=partial(load_model, path))
    files: list[SelectingFile | Candidate] = [float32]
    if recipe.precision is not Precision.FP32:
        files += _low_files(recipe.precision, paths[recipe.precision.value], loaded)
    on_file = {artifact.name for artifact in stages.values()}
    options = build_options(recipe)
    files += [
        Candidate(stage=engine_name(engine, engines), precision=recipe.precision, open=_engine(engine, folder, options))
        for engine in engines
        if engine.runnable and engine.artifact.name not in on_file and recipe.precision is not Precision.FP32
    ]
    on_cpu = _for_judging(options, loaded)
    model = SelectingModel(loaded, loaded.system.selection)
    random = loaded.record.weights.kind == "random"
    # Photos are what the engine will see; generated images are for ranges that were measured on such images, and for
    # want of photos.
    photos = recipe.quantization.calib is not None and "photos" in inputs.counts
    ranges = ("photos",) if photos else ("natural", "photos")
    return check_selection(
        model, load_model(path), files, inputs, lambda p: open_model(p, on_cpu), limits, random=random, ranges=ranges
    )


def _low_files(precision: Precision, path: Path, loaded: Loaded) -> list[SelectingFile]:
    typed = partial(load_model, path)
    rounded = SelectingFile(
        stage=f"{precision.value}, rounded", precision=precision, load=lambda: emulated(load_model(path)), typed=typed
    )
    if precision is Precision.BF16:
        return [rounded]
    as_it_runs = SelectingFile(stage=precision.value, precision=precision, load=typed)
    return [as_it_runs, rounded] if _has_16_bits(precision, loaded) else [as_it_runs]


def _has_16_bits(precision: Precision, loaded: Loaded) -> bool:
    """Whether a graph of this precision has 16-bit tensors; beside INT8, ONNX Runtime computes in float32."""
    if precision.quantised:
        return loaded.target is Target.TENSORRT
    return precision is not Precision.FP32


def _for_judging(options: BuildOptions, loaded: Loaded) -> BuildOptions:
    """Run on the CPU; what was quantised for TensorRT as it is written, not in ONNX Runtime's own integer kernels."""
    return dataclasses.replace(options, device="cpu", integer_kernels=loaded.target is not Target.TENSORRT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """A network whose layers take nothing away ("unmerged"), beside one whose layers do; its weights are random."""

    name: str
    taking: str
    note: str
    loaded: Loaded

    def judged(self, record: BenchRecord) -> BenchRecord:
        """Add a warning where taking elements away gains nothing."""
        told = [
            f"{self.taking} gains nothing at batch {r.batch}: {r.median:.2f}x ({r.p10:.2f} to {r.p90:.2f}) the speed "
            f"of the {self.name} network"
            for r in record.ratios
            if r.baseline == self.name and r.p10 <= 1
        ]
        return dataclasses.replace(record, warnings=(*record.warnings, *told))


def plain_of(recipe: Recipe) -> Plain | None:
    """Return what a recipe's network is without its schedule; ``None`` where it has none, or one that takes nothing."""
    system = specialised(find_system(recipe.system), recipe)
    tuning, options = system.tuning, resolve_options(system, recipe)
    if tuning is None or not any(schedule := tuning.schedule(options, recipe.size)):
        return None
    nothing = {**recipe.options, tuning.option: [0] * len(schedule)}
    unscheduled = recipe.model_copy(update={"options": nothing, "weights": "random"})
    loaded = load_network(system, unscheduled, Target.ONNXRUNTIME)
    ratio = loaded.record.macs / count_macs(system, options, recipe.size)
    note = f"{tuning.plain}: bare torch.onnx.export, float32; {ratio:.2f}x the multiply-adds"
    return Plain(name=tuning.plain, taking=tuning.taking, note=note, loaded=loaded)


def engine_name(engine: EngineRecord, engines: Sequence[EngineRecord]) -> str:
    """Name an engine in tables: "engine", or "engine sm89" among several."""
    return ENGINE if len(engines) == 1 else f"{ENGINE} {engine.device}"


def _emulated(path: Path, options: BuildOptions) -> Runner:
    """Open a float32 copy of a typed graph in which every low-precision tensor is rounded."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / path.name
        save_model(emulated(load_model(path)), copy)
        return open_model(copy, options)


@contextlib.contextmanager
def bench_candidates(
    recipe: Recipe,
    folder: Path,
    engines: Sequence[EngineRecord],
    feeds: Feeds,
    loaded: Loaded | None = None,
    plain: Plain | None = None,
) -> Iterator[tuple[list[BenchCandidate], Mapping[str, float]]]:
    """Open the engines, and the recipe's baselines of ``loaded``, for timing; everything is closed at the end.

    ``plain``, where ONNX Runtime runs the engine too, is one more baseline: its bare export.

    Yields:
        Candidates, engines first, and the first engine's profile (node name to microseconds).

    Raises:
        BenchmarkError: no engine can run on this machine.
    """
    usable = [engine for engine in engines if engine.runnable]
    if not usable:
        raise BenchmarkError("no engine of this run can be timed on this machine", hint="bench it where it can run")
    options = build_options(recipe)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(recipe.bench.threads))
        opened = [_open_for_timing(stack, _engine(engine, folder, options), feeds) for engine in usable]
        found: list[BenchCandidate] = []
        for engine, once in zip(usable, opened, strict=True):
            timed = _engine_candidates(stack, engine_name(engine, engines), once, feeds, options)
            found += [dataclasses.replace(candidate, sha256=engine.artifact.sha256) for candidate in timed]
        for name in recipe.bench.baselines if loaded else ():
            make = partial(BASELINES[name], cast(Loaded, loaded), options, feeds)
            once = _open_for_timing(stack, make, feeds)
            found.append(_bench_candidate(name, once, feeds, options, note=_NOTES[name]))
        if plain and recipe.engine.backend == "onnxruntime":
            once = _open_for_timing(stack, partial(_naive, plain.loaded, options, feeds), feeds)
            found.append(_bench_candidate(plain.name, once, feeds, options, note=plain.note))
        profile = getattr(opened[0].runner, "profile", None)
        yield found, profile(feeds) if profile else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A runner that has run once, with the seconds to open it and the memory that opening and running took."""

    runner: Runner
    seconds: float
    memory: int


def _open_for_timing(stack: contextlib.ExitStack, make: Callable[[], Runner], feeds: Feeds) -> _Opened:
    def open_and_run() -> tuple[Runner, float]:
        start = time.perf_counter()
        runner = make()
        seconds = time.perf_counter() - start
        runner.infer(feeds)
        return runner, seconds

    (runner, seconds), memory = peak_memory_of(open_and_run)
    return _Opened(runner=stack.enter_context(runner), seconds=seconds, memory=memory)


def _bench_candidate(name: str, opened: _Opened, feeds: Feeds, options: BuildOptions, note: str = "") -> BenchCandidate:
    """Wrap an opened runner for timing on fixed feeds."""
    runner = opened.runner
    return BenchCandidate(
        name=name,
        call=lambda: runner.infer(feeds),
        batch=len(next(iter(feeds.values()))),
        threads=options.threads,
        device=runner.device,
        build_seconds=opened.seconds,
        peak_memory=opened.memory,
        note=note or getattr(runner, "latency_note", ""),
    )


def _engine_candidates(
    stack: contextlib.ExitStack, name: str, opened: _Opened, feeds: Feeds, options: BuildOptions
) -> list[BenchCandidate]:
    """Time an engine by its device's clock where it runs on a GPU and can be timed so; else from host to host."""
    from_host = _bench_candidate(name, opened, feeds, options)
    if opened.runner.device == "cpu" or not isinstance(opened.runner, DeviceTimed):
        return [from_host]
    timers = stack.enter_context(opened.runner.device_timers(feeds))
    on_device = [_on_device(from_host, timer) for timer in timers]
    return [*on_device, dataclasses.replace(from_host, name=f"{name}, from the host")]


def _on_device(candidate: BenchCandidate, timer: DeviceTimer) -> BenchCandidate:
    name = f"{candidate.name}, {timer.name}" if timer.name else candidate.name
    return dataclasses.replace(candidate, name=name, call=timer.call, timer=timer, note=timer.note)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Give PyTorch the same number of CPU threads as every other candidate."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _eager(loaded: Loaded, options: BuildOptions, feeds: Feeds) -> Runner:
    return TorchRunner(loaded.reference, loaded.outputs)


def _compiled(loaded: Loaded, options: BuildOptions, feeds: Feeds) -> Runner:
    runner = TorchRunner(cast(nn.Module, torch.compile(loaded.reference)), loaded.outputs)
    try:
        with quiet_torch():
            runner.infer(feeds)  # compiles
    except Exception as error:  # torch.compile raises what its code generator and the C++ compiler raise
        raise BenchmarkError(
            f"baseline compile: torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            hint="it needs a C++ compiler; leave it out: --baseline eager,naive",
        ) from error
    return runner


def _naive(loaded: Loaded, options: BuildOptions, feeds: Feeds) -> Runner:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "naive.onnx"
        arguments = tuple(torch.from_numpy(array) for array in feeds.values())
        bare_export(loaded.reference, arguments, path, names=tuple(feeds))
        return open_model(path, options)


Baseline = Callable[[Loaded, BuildOptions, Feeds], Runner]
BASELINES: Mapping[str, Baseline] = {"eager": _eager, "compile": _compiled, "naive": _naive}
_NOTES = {
    "eager": "PyTorch, training form, float32",
    "compile": "torch.compile of the training form, float32; the build time is the first call",
    "naive": "training form through bare torch.onnx.export, float32, on ONNX Runtime",
}


def _engine(engine: EngineRecord, folder: Path, options: BuildOptions) -> Callable[[], Runner]:
    return lambda: load_backend(engine.backend).open(engine, folder, options)
