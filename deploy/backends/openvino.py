"""OpenVINO on the CPU: the runtime for 16 bits where the CPU multiplies them (AMX, AVX-512 BF16).

The engine is the ONNX file itself: OpenVINO compiles it when it is opened. It computes the whole network in one
precision, the hint that a network is compiled with, whatever the types of the file: a BF16 graph runs in FP32 where the
CPU has no BF16, and an FP32 graph runs in BF16 where it has, both without a word. So the hint is always given, a CPU
that cannot is refused before the build, and the audit reads from the runtime model what each kernel computed in.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deploy.artifacts import artifact_of
from deploy.backends.audit import audited, graph_types
from deploy.backends.base import Array, BuildOptions, DeviceTimer, Feeds
from deploy.backends.feeds import check_feeds, example_feeds
from deploy.backends.loading import engine_file
from deploy.backends.openvino_kernels import audit_kernels, kernels_of, products_by_name, time_by_node
from deploy.backends.openvino_trial import survive
from deploy.cpu import CPU_FEATURES, cpu_flags, usable_threads
from deploy.errors import BackendUnavailableError, EngineBuildError, SizeError
from deploy.records import Batch, EngineRecord, Precision, Target, TensorSpec

DEVICE = "CPU"
HINTS = {
    Precision.FP32: "f32",
    Precision.FP16: "f16",
    Precision.BF16: "bf16",
    Precision.INT8: "f32",  # of what is not between Q and DQ
}
# One of these flags, or OpenVINO computes the type in FP32, or emulates it (BF16 on AVX-512 without its BF16 part).
NEEDS = {
    Precision.BF16: ("amx_bf16", "avx512_bf16", "bf16"),
    Precision.FP16: ("amx_fp16", "avx512_fp16", "asimdhp"),
}
_INSTALL = "pip install 'effdeploy[openvino]'"
_TELEMETRY = "openvino_telemetry"  # sends events and keeps an identifier in the home folder from its import on


def _runtime() -> Any:
    """Import OpenVINO without its telemetry, which OpenVINO can do without."""
    if "openvino" not in sys.modules and _TELEMETRY not in sys.modules:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say: not installed
        try:
            import openvino
        finally:
            del sys.modules[_TELEMETRY]
    import openvino

    return openvino


@contextlib.contextmanager
def _translated(action: str) -> Iterator[None]:
    """The one border for OpenVINO's exceptions, which are RuntimeErrors with the way through its sources."""
    try:
        yield
    except Exception as error:
        raise EngineBuildError(
            f"OpenVINO could not {action}: {_own_words(str(error)) or type(error).__name__}",
            hint="--backend onnxruntime runs the same graph",
        ) from error


def _own_words(text: str) -> str:
    """Keep what is said about the model; drop positions in OpenVINO's sources and paths."""
    noise = ("Exception from ", "Check '", "FrontEnd API failed", "Summary:", "-- Conversion is failed")
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith(noise)]
    return re.sub(r"Check '.*?' failed at \S+:\s*", "", " ".join(line for line in lines if line))[:400]


class OpenVinoBackend:
    """Builds and runs on OpenVINO's CPU device."""

    name = "openvino"
    target = Target.ONNXRUNTIME

    def available(self) -> str | None:
        """Return ``None``, or how to install OpenVINO."""
        try:
            _runtime()
        except (ImportError, OSError, RuntimeError) as error:
            return f"openvino cannot be imported ({error}); {_INSTALL}"
        return None

    def check(self, options: BuildOptions) -> None:
        """Refuse what only TensorRT has, other devices, and a precision that this CPU would not really compute in.

        Raises:
            BackendUnavailableError: so.
        """
        if names := options.for_builders:
            raise BackendUnavailableError(
                f"OpenVINO has no {', no '.join(names)} here: its engine is the ONNX file",
                hint="leave the option out, or --backend tensorrt on the target machine",
            )
        if options.device not in ("auto", "cpu"):
            raise BackendUnavailableError(
                f"device: got {options.device!r}, expected auto or cpu: effdeploy runs OpenVINO on the CPU only",
                hint="--device cpu",
            )
        if reason := cannot_compute(options.precision):
            raise BackendUnavailableError(reason, hint=_WAYS_OUT.get(options.precision, "--int8 or --fp32 here"))

    def build(self, model: Path, folder: Path, options: BuildOptions) -> tuple[EngineRecord, ...]:
        """Compile ``model``, run it once and audit its kernels; first in a child, which may crash.

        Raises:
            BackendUnavailableError: no OpenVINO, or ``check`` refuses.
            EngineBuildError: OpenVINO refuses the graph, or fails or crashes in its first run.
            PrecisionAuditError: the graph or the kernels do not have the asked precision.
        """
        runtime = self._require()
        self.check(options)
        graph = graph_types(model)
        survive(model, (options.batch.min, options.batch.max), _settings(options, counted=True))
        start = time.perf_counter()
        compiled, _ = _compiled(runtime, model, options, counted=True)
        seconds = time.perf_counter() - start
        with _translated("run the graph"):
            compiled.create_infer_request().infer(dict(example_feeds(_inputs(compiled), options.batch)))
            kernels = kernels_of(compiled.get_runtime_model(), products_by_name(model))
        return (
            EngineRecord(
                backend=self.name,
                backend_version=str(runtime.__version__).split("-")[0],
                artifact=artifact_of(model, folder),
                device="cpu",
                runnable=True,
                reason="",
                audit=audited(audit_kernels(options.precision, graph, kernels), mixed=options.mixed),
                options={
                    "device": DEVICE,
                    "precision hint": HINTS[options.precision],
                    "threads": str(compiled.get_property("INFERENCE_NUM_THREADS")),
                    "streams": "1",
                },
                seconds=seconds,
            ),
        )

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> OpenVinoRunner:
        """Compile the engine's ONNX file.

        Raises:
            BackendUnavailableError: no OpenVINO, or ``check`` refuses.
            BundleError: the file is missing or was changed.
            EngineBuildError: OpenVINO refuses the graph.
        """
        runtime = self._require()
        self.check(options)
        return OpenVinoRunner(runtime, engine_file(engine, folder), options)

    def _require(self) -> Any:
        if reason := self.available():
            raise BackendUnavailableError(reason, hint=_INSTALL)
        return _runtime()


_WAYS_OUT = {
    Precision.BF16: "--fp32 here, or a CPU with AMX or AVX-512 BF16 (effdeploy doctor lists what this one has)",
    Precision.FP16: "--fp32 here; --backend onnxruntime takes FP16 as a smaller file",
}


def cannot_compute(precision: Precision) -> str:
    """Say why OpenVINO would not really compute in a precision on this CPU; empty where it does.

    Raises:
        BackendUnavailableError: there is no OpenVINO to ask.
    """
    if precision not in HINTS:
        return f"{precision.value.upper()} would not really run: OpenVINO has no such kernels for the CPU"
    if precision not in NEEDS:
        return ""
    label, flags = precision.value.upper(), cpu_flags()
    wanted = " or ".join(CPU_FEATURES[flag] for flag in NEEDS[precision])
    if flags and not flags & set(NEEDS[precision]):
        return f"{label} would not really run: this CPU has none of {wanted}, and OpenVINO would compute in FP32"
    if label not in _runtime().Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
        return f"{label} would not really run: OpenVINO does not list it for this CPU, and would compute in FP32"
    return ""


class OpenVinoRunner:
    """A compiled network. Host arrays in, host arrays out.

    Attributes:
        name: ``"openvino"``.
        device: ``"cpu"``.
        inputs: What ``infer`` takes; a string axis takes the batch range that it was compiled for.
    """

    name, device = "openvino", "cpu"

    def __init__(self, runtime: Any, model: Path, options: BuildOptions) -> None:
        self._runtime, self._model, self._options = runtime, model, options
        self._compiled, self._outputs = _compiled(runtime, model, options)
        self._request = self._compiled.create_infer_request()
        self.inputs = _inputs(self._compiled)

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once.

        Raises:
            SizeError: the feeds do not fit the inputs or the batch range.
            EngineBuildError: a kernel failed; the message holds OpenVINO's words.
        """
        self._check(feeds)
        with _translated("run the graph"):
            values = self._request.infer(_contiguous(feeds), share_inputs=True)
            return {name: values[index] for index, name in enumerate(self._outputs)}

    @contextlib.contextmanager
    def device_timers(self, feeds: Feeds) -> Iterator[Sequence[DeviceTimer]]:
        """Bind ``feeds`` to a request of its own, and give one way to time it.

        Raises:
            SizeError: the feeds do not fit the inputs or the batch range.
            EngineBuildError: OpenVINO cannot bind.
        """
        self._check(feeds)
        held = _contiguous(feeds)
        with _translated("bind inputs"):
            request = self._compiled.create_infer_request()
            for name, value in held.items():
                request.set_tensor(name, self._runtime.Tensor(value, shared_memory=True))
        yield [_BoundTimer(request)]

    def profile(self, feeds: Feeds, runs: int = 5) -> dict[str, float]:
        """Return node name -> median microseconds over ``runs``, from OpenVINO's counters in a network of its own.

        Fused kernels go by the name of the last node in them; what OpenVINO adds itself keeps OpenVINO's name.
        """
        self._check(feeds)
        compiled, _ = _compiled(self._runtime, self._model, self._options, counted=True)
        times: dict[str, list[float]] = defaultdict(list)
        with _translated("run the graph"):
            request = compiled.create_infer_request()
            for run in range(runs + 1):
                request.infer(_contiguous(feeds), share_inputs=True)
                for item in request.profiling_info if run else ():  # the first run warms up
                    times[item.node_name].append(item.real_time.total_seconds() * 1e6)
            kernels = kernels_of(compiled.get_runtime_model(), {})
        medians = {name: statistics.median(values) for name, values in times.items()}
        return time_by_node(kernels, medians, graph_types(self._model))

    def _check(self, feeds: Feeds) -> None:
        check_feeds(self.inputs, feeds, self._options.batch)  # outside the range OpenVINO runs, and may crash

    def __enter__(self) -> OpenVinoRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._request, self._compiled  # frees their memory now; the next candidate is measured in the same process


class _BoundTimer:
    """Wall time of a run whose inputs are read where they lie and whose outputs stay in the request."""

    name = ""
    note = "inputs and outputs in place, copies left out"

    def __init__(self, request: Any) -> None:
        self._request = request

    def call(self) -> int:
        """Run once and return the nanoseconds.

        Raises:
            EngineBuildError: a kernel failed.
        """
        with _translated("run the graph"):
            before = time.perf_counter_ns()
            self._request.infer()
            return time.perf_counter_ns() - before

    def warnings(self) -> tuple[str, ...]:
        """Return nothing: OpenVINO shows no more than the time."""
        return ()

    def findings(self) -> str:
        """Return nothing: OpenVINO shows no more than the time."""
        return ""


def _compiled(
    runtime: Any, model: Path, options: BuildOptions, *, counted: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """Compile for the batch range; ``counted`` with performance counters, without which no runtime model has times.

    Returns:
        The network, and its outputs' names in the file: compiled, it calls them by any tensor merged into them.
    """
    with _translated(f"read {model.name}"):
        core = runtime.Core()
        network = core.read_model(model)
        outputs = tuple(result.get_friendly_name().rpartition("/")[0] for result in network.get_results())
        free = {port: port.partial_shape for port in network.inputs if port.partial_shape.is_dynamic}
    _require_batch_axis({port.any_name: shape for port, shape in free.items()})
    with _translated(f"compile {model.name}"):
        if free:
            network.reshape({port: _ranged(runtime, shape, options.batch) for port, shape in free.items()})
        return core.compile_model(network, DEVICE, _settings(options, counted=counted)), outputs


def _settings(options: BuildOptions, *, counted: bool) -> dict[str, str]:
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[options.precision],
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",  # cores are the container's or the user's to choose
        "PERF_COUNT": "YES" if counted else "NO",
    }
    if threads := usable_threads(options.threads):
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    return settings


def _require_batch_axis(shapes: dict[str, Any]) -> None:
    wrong = [name for name, shape in shapes.items() if any(axis.is_dynamic for axis in list(shape)[1:])]
    if wrong:
        raise SizeError(
            f"only axis 0, the batch, may be dynamic; got {', '.join(f'{name} {shapes[name]}' for name in wrong)}",
            hint="export with --size HEIGHTxWIDTH",
        )


def _ranged(runtime: Any, shape: Any, batch: Batch) -> Any:
    return runtime.PartialShape([runtime.Dimension(batch.min, batch.max), *list(shape)[1:]])


def _inputs(compiled: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=port.any_name,
            dtype=np.dtype(port.element_type.to_dtype()).name,
            shape=tuple("batch" if axis.is_dynamic else axis.get_length() for axis in port.partial_shape),
        )
        for port in compiled.inputs
    )


def _contiguous(feeds: Feeds) -> dict[str, Array]:
    return {name: np.ascontiguousarray(value) for name, value in feeds.items()}


BACKEND = OpenVinoBackend()
