"""ONNX Runtime: the CPU everywhere, the CUDA provider where there is a GPU that it can really use.

The engine is the ONNX file itself: sessions are compiled when they are opened, so ``build`` opens one, times it and
runs it once under the profiler to see what its kernels compute in. On the CPU most FP16 nodes have no FP16 kernel: ONNX
Runtime computes them in FP32 between casts that it inserts, and the audit says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deploy.artifacts import artifact_of
from deploy.backends.audit import audited, graph_types
from deploy.backends.base import Array, BuildOptions, DeviceTimer, Feeds
from deploy.backends.feeds import check_feeds, example_feeds
from deploy.backends.gpu import first_gpu
from deploy.backends.loading import engine_file
from deploy.backends.ort_profile import Event, audit_profile, kernels_of, node_times, read_events
from deploy.errors import BackendUnavailableError, EngineBuildError
from deploy.records import EngineRecord, Precision, Target, TensorSpec

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FATAL = 4  # ONNX Runtime's severity; what it would log below this, it also raises, and then it is our error's message
# The official wheels (1.31) upload usage events and keep a database under ~/.cache unless told before the import.
_TELEMETRY_OFF = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the other names only lose "tensor()"


def _runtime() -> Any:
    """Import ONNX Runtime without its noise; 1.23 and later warn at import on machines without a PCI graphics card."""
    if "onnxruntime" not in sys.modules:
        for name in _TELEMETRY_OFF:
            os.environ.setdefault(name, "1")
        with _native_stderr_closed():
            import onnxruntime
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Point file descriptor 2 at nothing: the runtime's C++ logger is not reachable before its import is over."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextlib.contextmanager
def _translated(action: str) -> Iterator[None]:
    """The one border for ONNX Runtime's exceptions; it has fifteen classes without a common base of their own."""
    try:
        yield
    except Exception as error:
        words = str(error).strip().split("\n")[0].removeprefix("[ONNXRuntimeError] : ")
        words = re.sub(r"Load model from .*? failed:", "", words)[:400]
        raise EngineBuildError(
            f"ONNX Runtime could not {action}: {words or type(error).__name__}",
            hint="export with --verify-each to find the pass or precision step that broke the graph",
        ) from error


class OnnxRuntimeBackend:
    """Builds and runs on ONNX Runtime."""

    name = "onnxruntime"
    target = Target.ONNXRUNTIME

    def available(self) -> str | None:
        """Return ``None``, or how to install ONNX Runtime."""
        try:
            _runtime()
        except ImportError as error:
            return f"onnxruntime cannot be imported ({error}); pip install onnxruntime-gpu, or onnxruntime off x86-64"
        return None

    def check(self, options: BuildOptions) -> None:
        """Refuse what only TensorRT has.

        Raises:
            BackendUnavailableError: FP8, BF16 on the CPU, several profiles, compatibility levels, refitting or
                stripping were asked for.
        """
        if options.precision is Precision.FP8 or options.device == "cpu":
            _refuse_untakeable(options, "cpu")
        if names := options.for_builders:
            raise BackendUnavailableError(
                f"ONNX Runtime has no {', no '.join(names)}: its engine is the ONNX file, for every batch and machine",
                hint="leave the option out, or --backend tensorrt on the target machine",
            )

    def build(self, model: Path, folder: Path, options: BuildOptions) -> tuple[EngineRecord, ...]:
        """Open a session on ``model``, run it once under the profiler and audit its kernels.

        Raises:
            BackendUnavailableError: no ONNX Runtime, no usable GPU for ``device="cuda"``, or BF16 on the CPU.
            EngineBuildError: ONNX Runtime refuses the graph or fails in its first run.
            PrecisionAuditError: the graph does not hold the asked precision.
        """
        runtime = self._require()
        graph = graph_types(model)
        wanted = _providers(runtime, options)
        if CUDA not in wanted:
            _refuse_untakeable(options, "cpu")  # the session would fail first, without a way out
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            session = _session(runtime, model, options, wanted, profile=Path(scratch) / "build")
            seconds = time.perf_counter() - start
            device = _device(session)  # the CPU also where the CUDA provider could not be loaded
            _refuse_untakeable(options, device)
            feeds = example_feeds(_inputs(session), options.batch)
            events = _profiled(session, feeds, runs=1)
        record = EngineRecord(
            backend=self.name,
            backend_version=runtime.__version__,
            artifact=artifact_of(model, folder),
            device=device,
            runnable=True,
            reason=_fallback(wanted, device),
            audit=audited(
                audit_profile(options.precision, graph, kernels_of(events, graph), device), mixed=options.mixed
            ),
            options={
                "provider": session.get_providers()[0],
                "threads": str(_threads(options) or "runtime default"),
                "optimization": "all",
                "execution": "sequential",
            },
            seconds=seconds,
        )
        return (record,)

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> OnnxRuntimeRunner:
        """Open a session on the engine's ONNX file.

        Raises:
            BackendUnavailableError: no ONNX Runtime, or no usable GPU for ``device="cuda"``.
            BundleError: the file is missing or was changed.
            EngineBuildError: ONNX Runtime refuses the graph.
        """
        runtime = self._require()
        return OnnxRuntimeRunner(runtime, engine_file(engine, folder), options)

    def _require(self) -> Any:
        if reason := self.available():
            raise BackendUnavailableError(reason, hint="pip install -e .")
        return _runtime()


def open_model(model: Path, options: BuildOptions) -> OnnxRuntimeRunner:
    """Open any ONNX file for inference, without a build and its audit: stage files, baselines.

    Raises:
        BackendUnavailableError: no ONNX Runtime.
        EngineBuildError: ONNX Runtime refuses the graph.
    """
    return OnnxRuntimeRunner(BACKEND._require(), model, options)


class OnnxRuntimeRunner:
    """An opened session. Host arrays in, host arrays out.

    Attributes:
        name: ``"onnxruntime"``.
        device: ``"cpu"`` or ``"cuda:0"``: where the session really runs.
        inputs: What ``infer`` takes; a string axis is dynamic.
        threads: Intra-operator threads, 0 for ONNX Runtime's own choice.
    """

    name = "onnxruntime"

    def __init__(self, runtime: Any, model: Path, options: BuildOptions) -> None:
        self._runtime, self._model, self._options = runtime, model, options
        self._session = _session(runtime, model, options, _providers(runtime, options))
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.device = _device(self._session)
        self.inputs = _inputs(self._session)
        self.threads = _threads(options)

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once.

        Raises:
            SizeError: the feeds do not fit the engine's inputs.
            EngineBuildError: a kernel failed; the message holds ONNX Runtime's words.
        """
        check_feeds(self.inputs, feeds)
        with _translated("run the graph"):
            values = self._session.run(self._outputs, dict(feeds))
        return dict(zip(self._outputs, values, strict=True))

    @contextlib.contextmanager
    def device_timers(self, feeds: Feeds) -> Iterator[Sequence[DeviceTimer]]:
        """Bind ``feeds`` and the outputs to the device that the session runs on, and give one way to time it.

        Raises:
            SizeError: the feeds do not fit the engine's inputs.
            EngineBuildError: ONNX Runtime cannot bind or run.
        """
        check_feeds(self.inputs, feeds)
        place = self.device.split(":")[0]
        with _translated("bind inputs and outputs"):
            binding = self._session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, self._runtime.OrtValue.ortvalue_from_numpy(value, place, 0))
            for name in self._outputs:
                binding.bind_output(name, place, 0)
        yield [_BoundTimer(self._session, binding)]

    def profile(self, feeds: Feeds, runs: int = 5) -> dict[str, float]:
        """Return node name -> median microseconds over ``runs``, from ONNX Runtime's profiler in a session of its own.

        Fused kernels go by the name of the last node in them; what the runtime adds itself (layout changes, pieces of a
        decomposed op) keeps the runtime's name.
        """
        check_feeds(self.inputs, feeds)
        graph = graph_types(self._model)
        with tempfile.TemporaryDirectory() as scratch:
            providers = _providers(self._runtime, self._options)
            session = _session(self._runtime, self._model, self._options, providers, profile=Path(scratch) / "run")
            events = _profiled(session, feeds, runs=runs + 1)
        return node_times(events, graph)

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session  # frees its memory pools now; the next candidate is measured in the same process


class _BoundTimer:
    """Wall time of a run whose inputs and outputs stay on the device; its end is waited for."""

    name = ""
    note = "inputs and outputs bound to the device, copies left out; wall time until the device is done"

    def __init__(self, session: Any, binding: Any) -> None:
        self._session, self._binding = session, binding

    def call(self) -> int:
        """Run once and return the nanoseconds.

        Raises:
            EngineBuildError: a kernel failed.
        """
        with _translated("run the graph"):
            before = time.perf_counter_ns()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return time.perf_counter_ns() - before

    def warnings(self) -> tuple[str, ...]:
        """Return nothing: ONNX Runtime shows no more than the time."""
        return ()

    def findings(self) -> str:
        """Return nothing: ONNX Runtime shows no more than the time."""
        return ""


def _refuse_untakeable(options: BuildOptions, device: str) -> None:
    if options.precision is Precision.FP8:
        raise BackendUnavailableError(
            "ONNX Runtime has no FP8 kernels: it would compute this graph in float32 between conversions",
            hint="--backend tensorrt_rtx --sm 89 for FP8, or --int8 for integer kernels here",
        )
    if options.precision is Precision.INT8 and device != "cpu":
        raise BackendUnavailableError(
            "ONNX Runtime's CUDA provider has no INT8 kernels: it would compute this graph in float32",
            hint="--backend tensorrt for INT8 on a GPU, or --device cpu",
        )
    if options.precision is Precision.BF16 and device == "cpu":
        raise BackendUnavailableError(
            "ONNX Runtime's CPU provider has no BF16 kernels for these graphs",
            hint="--backend tensorrt_rtx or --backend tensorrt for BF16, or --fp16 for a smaller file here",
        )


def _threads(options: BuildOptions) -> int:
    """Choose intra-operator threads; ONNX Runtime's own default pins to cores that a container may not have."""
    if options.threads or not hasattr(os, "sched_getaffinity"):
        return options.threads
    usable = len(os.sched_getaffinity(0))
    return 0 if usable == os.cpu_count() else usable


def takes_gpu(device: str) -> bool:
    """Whether sessions of a device go to a GPU here, as far as that can be known without opening one.

    Raises:
        BackendUnavailableError: no ONNX Runtime, or no usable GPU for ``device="cuda"``.
    """
    return _providers(BACKEND._require(), BuildOptions(device=device))[0] == CUDA


def _providers(runtime: Any, options: BuildOptions) -> list[str]:
    """Choose providers: CUDA only where the wheel has it and the driver has a GPU."""
    if options.device not in ("auto", "cpu", "cuda"):
        raise BackendUnavailableError(
            f"device: got {options.device!r}, expected auto, cpu or cuda", hint="--device cpu"
        )
    if options.device == "cpu":
        return [CPU]
    missing = []
    if CUDA not in runtime.get_available_providers():
        missing.append("this onnxruntime has no CUDA provider (pip install onnxruntime-gpu)")
    if first_gpu() is None:
        missing.append("the driver shows no NVIDIA GPU")
    if not missing:
        return [CUDA, CPU]
    if options.device == "cuda":
        raise BackendUnavailableError("device cuda: " + "; ".join(missing), hint="--device cpu")
    return [CPU]


def _session(
    runtime: Any, model: Path, options: BuildOptions, providers: list[str], profile: Path | None = None
) -> Any:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = _threads(options)
    settings.inter_op_num_threads = 1
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = _FATAL
    if not options.integer_kernels:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    with _translated(f"open {model.name}"):
        if CUDA in providers:
            session = _cuda_session(runtime, model, settings, options)
        else:
            session = runtime.InferenceSession(str(model), settings, providers=providers)
    if options.device == "cuda" and session.get_providers()[0] != CUDA:
        raise BackendUnavailableError(
            "device cuda: ONNX Runtime could not load its CUDA provider and fell back to the CPU",
            hint="pip install 'onnxruntime-gpu[cuda,cudnn]', or --device cpu",
        )
    return session


def _cuda_session(runtime: Any, model: Path, settings: Any, options: BuildOptions) -> Any:
    # The provider's missing libraries are reported by print and by the native logger; get_providers() tells it better.
    with _native_stderr_closed(), contextlib.redirect_stdout(None):
        runtime.preload_dlls()
        cuda = (CUDA, {"use_tf32": str(int(options.tf32))})
        return runtime.InferenceSession(str(model), settings, providers=[cuda, CPU])


def _device(session: Any) -> str:
    return "cuda:0" if session.get_providers()[0] == CUDA else "cpu"


def _fallback(wanted: Sequence[str], device: str) -> str:
    return "the CUDA provider could not be loaded; runs on the CPU" if CUDA in wanted and device == "cpu" else ""


def _inputs(session: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=i.name,
            dtype=_DTYPES.get(i.type, i.type.removeprefix("tensor(").removesuffix(")")),
            shape=tuple(n if isinstance(n, int) else str(n or "?") for n in i.shape),
        )
        for i in session.get_inputs()
    )


def _profiled(session: Any, feeds: Feeds, runs: int) -> list[Event]:
    """Run under the profiler and return its kernel events, in order."""
    with _translated("run the graph"):
        for _ in range(runs):
            session.run(None, {name: np.asarray(value) for name, value in feeds.items()})
    return read_events(Path(session.end_profiling()))


BACKEND = OnnxRuntimeBackend()
