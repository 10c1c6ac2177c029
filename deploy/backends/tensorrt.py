"""TensorRT 10.12 and later, and 11.x, in one strongly typed code path through polygraphy.

Precision comes from the graph alone: no precision flag, no calibrator and no per-layer precision exist in 11, so none
is used on 10 either. On 10 a network without STRONGLY_TYPED would silently choose its own types, so the flag is always
set (11 ignores it). The audit is read from the engine inspector.

Two ways to run an engine: ``infer`` is polygraphy's runner, right for accuracy and wrong for latency, because a call
includes copies and allocation; ``device_timers`` has buffers of its own and CUDA events.

Nothing in this file has run on a GPU yet: the calls are held against the bindings' recorded names, the build path ran
on TensorRT-RTX in its place, and the tests marked ``gpu`` are the same that the CPU backends pass.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deploy.artifacts import artifact_of, sha256_of, storage_errors
from deploy.backends.audit import audit_engine, audited, graph_types
from deploy.backends.base import FP8_SM, Array, BuildOptions, DeviceTimer, Feeds
from deploy.backends.feeds import check_feeds
from deploy.backends.gpu import Gpu, first_gpu
from deploy.backends.gpu_state import read_state
from deploy.backends.loading import (
    engine_bytes,
    recorded_ranges,
    require_driver,
    require_gpu,
    require_profiles,
    require_version,
    weights_file,
)
from deploy.backends.native import collector_paused, signals_deferred
from deploy.backends.timing_cache import TimingCache, cache_file
from deploy.backends.trt_config import add_profiles, choose_profile, configure, described, monitor
from deploy.backends.trt_layers import inspector_data, io_from_inspector, kernels_from_inspector
from deploy.errors import BackendUnavailableError, BenchmarkError, EffdeployError, EngineBuildError
from deploy.records import Batch, EngineRecord, Precision, Target, TensorSpec

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

    def check(self, options: BuildOptions) -> None:
        """Refuse other compute capabilities than this GPU's; what is missing here is ``available``'s answer.

        Raises:
            BackendUnavailableError: the options name another GPU.
        """
        gpu = first_gpu()
        if gpu and (foreign := sorted(set(options.sm) - {gpu.sm})):
            raise BackendUnavailableError(
                f"TensorRT builds for the GPU at hand (SM {gpu.sm}), not for SM {foreign}",
                hint="leave --sm out, or use --backend tensorrt_rtx to build ahead of time",
            )
        if gpu and gpu.sm < FP8_SM and options.precision is Precision.FP8:
            raise BackendUnavailableError(
                f"FP8 runs on SM {FP8_SM} and newer, and this GPU is SM {gpu.sm}", hint="--int8 or --fp16"
            )

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
        timings = TimingCache(
            options.timing_cache and cache_file(options.timing_cache, trt.__version__, gpu.name, gpu.sm)
        )
        plan = build_plan(model, options, timings)
        seconds = time.perf_counter() - start
        told = inspect_plan(trt, plan)
        kernels, io = kernels_from_inspector(told), io_from_inspector(told)
        audit = audited(
            audit_engine(options.precision, graph_types(model), kernels, "engine inspector", io), mixed=options.mixed
        )
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
                "driver": state.driver if (state := read_state(gpu)) else "unknown",
                "timing_cache": timings.statement,
                "model": model.name,
                **({"model_sha256": sha256_of(model)} if options.strip else {}),
                **described(options),
            },
            seconds=seconds,
        )
        return (record,)

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> TensorRtRunner:
        """Deserialise an engine; it runs with the TensorRT version and GPU that it was built with, or is compatible to.

        Raises:
            BackendUnavailableError: no package, no GPU, or the engine is of another version, GPU or newer driver.
            BundleError: the file, or the ONNX file that a stripped engine takes its weights from, is missing, was
                changed or is not in the bundle; or the engine is not the one that its record describes.
        """
        gpu = self._require(options)
        require_version(engine, str(_runtime().__version__))
        require_gpu(engine, gpu)
        require_driver(engine, state.driver if (state := read_state(gpu)) else None)
        ranges, weights = recorded_ranges(engine), weights_file(engine, folder)
        return TensorRtRunner(engine_bytes(engine, folder), ranges, weights, engine.artifact.name)

    def _require(self, options: BuildOptions) -> Gpu:
        reason, gpu = self.available(), first_gpu()
        if reason or gpu is None:
            raise BackendUnavailableError(reason or "no NVIDIA GPU", hint="--backend onnxruntime runs everywhere")
        self.check(options)
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

    def __init__(
        self, plan: bytes, ranges: tuple[Batch, ...], weights: Path | None = None, engine_name: str = "the engine"
    ) -> None:
        from polygraphy.backend.trt import TrtRunner, engine_from_bytes
        from polygraphy.datatype import DataType

        with _translated("open the engine", BackendUnavailableError):
            self._engine = engine_from_bytes(plan)
            require_profiles(self._engine, ranges, engine_name, _dynamic_inputs(_runtime(), self._engine))
            if weights is not None:
                _fill(_runtime(), self._engine, weights)
            self._runner = TrtRunner(self._engine)
            self._runner.activate()
            metadata = self._runner.get_input_metadata(use_numpy_dtypes=False)
        self._ranges, self._profile = ranges, 0
        self.inputs = tuple(
            TensorSpec(
                name=name,
                dtype=np.dtype(DataType.to_dtype(value.dtype, "numpy")).name,
                shape=tuple("batch" if not isinstance(n, int) or n < 0 else n for n in value.shape),
            )
            for name, value in metadata.items()
        )

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once.

        Raises:
            SizeError: the feeds do not fit the engine's inputs or its profile.
            EngineBuildError: the engine failed; the message holds TensorRT's words.
        """
        profile = self._choose(feeds)
        with _translated("run the engine", EngineBuildError):
            if profile != self._profile:
                self._runner.set_profile(profile)
                self._profile = profile
            values = self._runner.infer({name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return {name: np.array(value) for name, value in values.items()}  # polygraphy reuses its buffers

    @contextlib.contextmanager
    def device_timers(self, feeds: Feeds) -> Iterator[Sequence[DeviceTimer]]:
        """Put ``feeds`` into device buffers and give the ways to time the engine; see ``deploy.backends.cuda_timing``.

        Yields:
            With a CUDA graph (where capture works), without, and with the copies from and to pinned host memory.

        Raises:
            SizeError: the feeds do not fit the engine's inputs or its profile.
            BenchmarkError: CUDA or the engine failed.
        """
        from deploy.backends.cuda_timing import device_buffers, engine_timers

        profile = self._choose(feeds)
        context = self._engine.create_execution_context()
        with device_buffers(feeds) as buffers:
            context.set_optimization_profile_async(profile, buffers.stream)
            for name, value in feeds.items():
                context.set_input_shape(name, tuple(value.shape))
            for name, shape, size in _outputs(self._engine, context):
                buffers.add_output(name, shape, size)
            for name, address in buffers.addresses.items():
                context.set_tensor_address(name, address)
            with engine_timers(buffers, lambda: bool(context.execute_async_v3(buffers.stream)), first_gpu()) as timers:
                yield timers

    def _choose(self, feeds: Feeds) -> int:
        """Check the feeds and return the index of the profile that they run with."""
        sizes = [
            feeds[spec.name].shape[0]
            for spec in self.inputs
            if spec.name in feeds and "batch" in spec.shape and feeds[spec.name].ndim
        ]
        profile = choose_profile(self._ranges, sizes[0] if sizes else 0)
        check_feeds(self.inputs, feeds, self._ranges[profile])
        return profile

    def __enter__(self) -> TensorRtRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.deactivate()


def build_plan(model: Path, options: BuildOptions, timings: TimingCache | None = None) -> bytes:
    """Parse an ONNX file as a strongly typed network and build its serialised engine.

    Raises:
        EngineBuildError: parser or builder refused the graph; the message holds their words.
    """
    from polygraphy.backend.trt import NetworkFromOnnxPath

    with _translated(f"parse {model.name}", EngineBuildError):
        builder, network, _parser = NetworkFromOnnxPath(str(model), strongly_typed=True)()
    with signals_deferred() as cancelled, _translated(f"build {model.name}", EngineBuildError):
        trt = _runtime()
        config = builder.create_builder_config()
        configure(trt, config, options)
        add_profiles(builder, config, network, options.ranges)
        timings = timings or TimingCache(None)
        timings.attach(config)
        config.progress_monitor = monitor(trt, options.progress, cancelled)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("the builder gave no engine")  # its own words are in the log
        timings.save(config)
        return bytes(plan)


def _fill(trt: Any, cuda_engine: Any, model: Path) -> None:
    """Put the weights of an ONNX file into an engine that was written without them."""
    from polygraphy.backend.trt import get_trt_logger

    logger = get_trt_logger()
    refitter = trt.Refitter(cuda_engine, logger)
    onnx_refitter = trt.OnnxParserRefitter(refitter, logger)
    if not onnx_refitter.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
        raise RuntimeError(f"the weights of {model.name} do not fit the stripped engine")


def _dynamic_inputs(trt: Any, cuda_engine: Any) -> dict[str, bool]:
    """Return each input of an engine with whether its axis 0 is dynamic."""
    names = [cuda_engine.get_tensor_name(i) for i in range(cuda_engine.num_io_tensors)]
    given = [name for name in names if cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    shapes = {name: tuple(cuda_engine.get_tensor_shape(name)) for name in given}
    return {name: bool(shape) and int(shape[0]) < 0 for name, shape in shapes.items()}


def _outputs(cuda_engine: Any, context: Any) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name each output with its shape at the inputs that are set, and the bytes of one element.

    Raises:
        BenchmarkError: an output whose size depends on the data.
    """
    from polygraphy.datatype import DataType

    trt = _runtime()
    for name in (cuda_engine.get_tensor_name(i) for i in range(cuda_engine.num_io_tensors)):
        if cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise BenchmarkError(
                    f"output {name!r} has the shape {list(shape)}: its size depends on the data",
                    hint="time it on the host, or give it a fixed size",
                )
            yield name, shape, DataType.from_dtype(cuda_engine.get_tensor_dtype(name)).itemsize


def inspect_plan(trt: Any, plan: bytes) -> dict[str, Any]:
    """Return what the engine inspector says about a serialised engine, as data.

    Raises:
        EngineBuildError: the engine cannot be deserialised.
        PrecisionAuditError: the inspector gave no JSON object, or one that is cut.
    """
    from polygraphy.backend.trt import engine_from_bytes

    with _translated("inspect the engine", EngineBuildError):
        cuda_engine = engine_from_bytes(plan)
        inspector = cuda_engine.create_engine_inspector()
        text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return inspector_data(text)


@contextlib.contextmanager
def _translated(action: str, kind: type[EffdeployError]) -> Iterator[None]:
    """The one border for polygraphy's and TensorRT's exceptions; what they log becomes the message."""
    with _polygraphy_log() as lines, collector_paused():
        try:
            yield
        except EffdeployError:
            raise
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
