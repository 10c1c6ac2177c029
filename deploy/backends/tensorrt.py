"""TensorRT 10.12 and later, and 11.x, in one strongly typed code path through polygraphy.

Precision comes from the graph alone: no precision flag, no calibrator and no per-layer precision exist in 11, so none
is used on 10 either. On 10 a network without STRONGLY_TYPED would silently choose its own types, so the flag is always
set (11 ignores it). The audit is read from the engine inspector.

The runner is polygraphy's: right for accuracy, wrong for latency, because a call includes copies and allocation.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deploy.artifacts import artifact_of, open_artifact, storage_errors
from deploy.backends.audit import audit_engine, audited, graph_types
from deploy.backends.base import Array, BuildOptions, Feeds
from deploy.backends.feeds import check_feeds
from deploy.backends.gpu import Gpu, first_gpu
from deploy.backends.native import collector_paused
from deploy.backends.trt_layers import kernels_from_inspector
from deploy.errors import BackendUnavailableError, EffdeployError, EngineBuildError
from deploy.records import Batch, EngineRecord, Target, TensorSpec

OLDEST = (10, 12)
_INSTALL = "pip install 'effdeploy[tensorrt]'"


def _runtime() -> Any:
    import tensorrt

    return tensorrt


class TensorRtBackend:
    """Builds and runs TensorRT engines on the GPU of this machine."""

    name = "tensorrt"
    target = Target.TENSORRT

    def available(self) -> str | None:
        """Return ``None``, or everything that is missing: the package, its version, the GPU."""
        missing = []
        try:
            version = str(_runtime().__version__)
            if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST:
                missing.append(f"TensorRT {version} is older than 10.12; {_INSTALL} --upgrade")
        except (ImportError, OSError, RuntimeError) as error:
            missing.append(f"tensorrt cannot be imported ({error}); {_INSTALL}")
        if first_gpu() is None:
            missing.append("no NVIDIA GPU or driver on this machine; --backend tensorrt_rtx builds without one")
        return "; ".join(missing) or None

    def build(self, model: Path, folder: Path, options: BuildOptions) -> tuple[EngineRecord, ...]:
        """Build ``engine-sm<NN>.plan`` for the GPU at hand and audit it with the engine inspector.

        Raises:
            BackendUnavailableError: no package, no GPU, or a compute capability that is not this GPU's.
            EngineBuildError: parser or builder refused the graph; the message holds their words.
            PrecisionAuditError: the engine does not compute in the asked precision.
        """
        gpu = self._require(options)
        trt = _runtime()
        start = time.perf_counter()
        plan = build_plan(model, options)
        seconds = time.perf_counter() - start
        kernels = kernels_from_inspector(inspect_plan(trt, plan))
        audit = audited(audit_engine(options.precision, graph_types(model), kernels, "engine inspector"))
        path = folder / f"engine-sm{gpu.sm}.plan"
        with storage_errors(f"cannot write {path.name}"):
            path.write_bytes(plan)
        record = EngineRecord(
            backend=self.name,
            backend_version=trt.__version__,
            artifact=artifact_of(path, folder),
            device="cuda:0",
            runnable=True,
            reason="",
            audit=audit,
            options={
                "gpu": gpu.name,
                "sm": str(gpu.sm),
                "strongly_typed": "yes",
                "batch": str(options.batch),
                "tf32": str(options.tf32),
                "level": str(options.level),
                "workspace": str(options.workspace or "no limit"),
            },
            seconds=seconds,
        )
        return (record,)

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> TensorRtRunner:
        """Deserialise an engine; it runs only with the TensorRT version and GPU that it was built with.

        Raises:
            BackendUnavailableError: no package, no GPU, or the engine is of another version.
            BundleError: the file is missing or was changed.
        """
        self._require(options)
        if engine.backend_version != (version := str(_runtime().__version__)):
            raise BackendUnavailableError(
                f"{engine.artifact.name} was built by TensorRT {engine.backend_version}, this machine has {version}",
                hint="engines are not portable: export again on this machine",
            )
        plan = open_artifact(engine.artifact, folder).read_bytes()
        return TensorRtRunner(plan, Batch.parse(engine.options["batch"]))

    def _require(self, options: BuildOptions) -> Gpu:
        reason, gpu = self.available(), first_gpu()
        if reason or gpu is None:
            raise BackendUnavailableError(reason or "no NVIDIA GPU", hint="--backend onnxruntime runs everywhere")
        if foreign := sorted(set(options.sm) - {gpu.sm}):
            raise BackendUnavailableError(
                f"TensorRT builds for the GPU at hand (SM {gpu.sm}), not for SM {foreign}",
                hint="leave --sm out, or use --backend tensorrt_rtx to build ahead of time",
            )
        return gpu


class TensorRtRunner:
    """An opened engine. Host arrays in, host arrays out, copied and allocated by polygraphy in each call.

    Attributes:
        name: ``"tensorrt"``.
        latency_note: What reports say beside a time taken through ``infer``.
        device: ``"cuda:0"``.
        inputs: What ``infer`` takes; a string axis is dynamic, within the engine's profile.
    """

    name = "tensorrt"
    device = "cuda:0"
    latency_note = "with the copies and allocations of every call: not the engine's own latency"

    def __init__(self, plan: bytes, batch: Batch) -> None:
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
        from polygraphy.datatype import DataType

        with _translated("open the engine", BackendUnavailableError):
            self._runner = TrtRunner(EngineFromBytes(plan))
            self._runner.activate()
            metadata = self._runner.get_input_metadata(use_numpy_dtypes=False)
        self.inputs = tuple(
            TensorSpec(
                name=name,
                dtype=np.dtype(DataType.to_dtype(value.dtype, "numpy")).name,
                shape=tuple("batch" if not isinstance(n, int) or n < 0 else n for n in value.shape),
            )
            for name, value in metadata.items()
        )
        self._batch = batch

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once.

        Raises:
            SizeError: the feeds do not fit the engine's inputs or its profile.
            EngineBuildError: the engine failed; the message holds TensorRT's words.
        """
        check_feeds(self.inputs, feeds, self._batch)
        with _translated("run the engine", EngineBuildError):
            values = self._runner.infer({name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return {name: np.array(value) for name, value in values.items()}  # polygraphy reuses its buffers

    def __enter__(self) -> TensorRtRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.deactivate()


def build_plan(model: Path, options: BuildOptions) -> bytes:
    """Parse an ONNX file as a strongly typed network and build its serialised engine.

    Raises:
        EngineBuildError: parser or builder refused the graph; the message holds their words.
    """
    from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, engine_bytes_from_network

    with _translated(f"parse {model.name}", EngineBuildError):
        parsed = NetworkFromOnnxPath(str(model), strongly_typed=True)()
    with _translated(f"build {model.name}", EngineBuildError):
        trt = _runtime()
        limits = {trt.MemoryPoolType.WORKSPACE: options.workspace} if options.workspace else {}
        config = CreateConfig(
            tf32=options.tf32,  # polygraphy's default is off, TensorRT's is on: always stated
            profiles=profiles(parsed[1], options.batch),
            builder_optimization_level=options.level,
            memory_pool_limits=limits,
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        )
        return bytes(engine_bytes_from_network(parsed, config=config))


def profiles(network: Any, batch: Batch) -> list[Any]:
    """Make the optimisation profile: every -1 of an input is the batch axis. No dynamic input, no profile."""
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if -1 in tuple(tensor.shape):
            low, opt, high = (
                tuple(size if n == -1 else n for n in tensor.shape) for size in (batch.min, batch.opt, batch.max)
            )
            profile.add(tensor.name, low, opt, high)
    return [profile] if profile else []


def inspect_plan(trt: Any, plan: bytes) -> dict[str, Any]:
    """Return what the engine inspector says about a serialised engine, as data.

    Raises:
        EngineBuildError: the engine cannot be deserialised, or the inspector gave no JSON.
    """
    from polygraphy.backend.trt import engine_from_bytes

    with _translated("inspect the engine", EngineBuildError):
        cuda_engine = engine_from_bytes(plan)
        inspector = cuda_engine.create_engine_inspector()
        data: dict[str, Any] = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return data


@contextlib.contextmanager
def _translated(action: str, kind: type[EffdeployError]) -> Iterator[None]:
    """The one border for polygraphy's and TensorRT's exceptions; what they log becomes the message."""
    with _polygraphy_log() as lines, collector_paused():
        try:
            yield
        except Exception as error:
            raise kind(
                f"TensorRT could not {action}: {_own_words(lines) or str(error) or type(error).__name__}",
                hint="check the node that it names; --backend onnxruntime runs the same graph",
            ) from error


@contextlib.contextmanager
def _polygraphy_log() -> Iterator[list[str]]:
    """Collect the error messages of polygraphy (and of TensorRT, which logs through it) instead of printing them."""
    from polygraphy.logger import G_LOGGER

    lines: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: lines.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
    logger = logging.getLogger("Polygraphy")
    propagate, level = logger.propagate, logger.level
    settings = {"use_python_logging_system": True, "colors": False, "letter": False}  # colours print when not installed
    before = {name: getattr(G_LOGGER, name) for name in settings}
    for name, value in settings.items():
        setattr(G_LOGGER, name, value)
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        for name, value in before.items():
            setattr(G_LOGGER, name, value)


def _own_words(lines: Sequence[str]) -> str:
    """Choose the lines that name a node, else what TensorRT said; drop source positions and polygraphy's summary."""
    named = [line for line in lines if line.startswith("In node")]
    said = [line for line in lines if not line.startswith(("ModelImporter", "Could not parse", "Invalid Engine"))]
    return "; ".join(dict.fromkeys(re.sub(r"\s*In \w+ at \S+:\d+", "", line) for line in (named or said)[:3]))[:600]


BACKEND = TensorRtBackend()
