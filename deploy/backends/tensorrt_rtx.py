"""TensorRT-RTX: engines built ahead of time on the CPU, one for each compute capability, and a log that proves them.

The network is strongly typed, so the types of the ONNX file are the types of the kernels; the verbose build log ends in
a listing of the final fused kernels with the type of every tensor, and the audit is read from it. A kernel is one entry
of that listing; host-side ``shape_call`` entries are not counted.

TensorRT-RTX is a product of its own (its runtime compiles further on the user's GPU): a build here is strong evidence
that TensorRT takes the graph too, but no proof of it, and says nothing about speed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.artifacts import artifact_of, storage_errors
from deploy.backends.audit import audit_engine, audited, graph_types
from deploy.backends.base import FP8_SM, BuildOptions, Runner
from deploy.backends.gpu import first_gpu
from deploy.backends.native import collector_paused, signals_deferred
from deploy.backends.trt_config import add_profiles, configure, described, monitor
from deploy.backends.trt_layers import io_from_log, kernels_from_log
from deploy.errors import BackendUnavailableError, EngineBuildError
from deploy.records import EngineRecord, Precision, Target

SUPPORTED_SM = (75, 80, 86, 89, 120)
DEFAULT_SM = (80, 89, 120)
_INSTALL = "pip install 'effdeploy[tensorrt-rtx]'"
_ERRORS = ("ERROR", "INTERNAL_ERROR")


def _runtime() -> Any:
    import tensorrt_rtx

    return tensorrt_rtx


def _collector(trt: Any) -> Any:
    """Make a logger that keeps (severity, message) pairs in ``lines`` and prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))

    return Collector()


class TensorRtRtxBackend:
    """Builds TensorRT-RTX engines on any x86-64 CPU; does not run them."""

    name = "tensorrt_rtx"
    target = Target.TENSORRT

    def available(self) -> str | None:
        """Return ``None``, or how to install TensorRT-RTX."""
        try:
            _runtime()
        except (ImportError, OSError, RuntimeError) as error:
            return f"tensorrt_rtx cannot be imported ({error}); {_INSTALL} (Linux and Windows on x86-64)"
        return None

    def check(self, options: BuildOptions) -> None:
        """Refuse what an ahead-of-time build on a CPU cannot do, each with the reason that was seen with 1.7.1.

        Raises:
            BackendUnavailableError: a compute capability without ahead-of-time builds, or an option of TensorRT alone.
        """
        if refused := sorted(set(options.sm) - set(SUPPORTED_SM)):
            raise BackendUnavailableError(
                f"TensorRT-RTX cannot build for SM {refused}: ahead-of-time builds exist for {list(SUPPORTED_SM)}",
                hint="--sm 80,89,120; for data-center GPUs such as SM 90 or 100: --backend tensorrt on that machine",
            )
        if options.precision is Precision.FP8 and (old := [sm for sm in options.sm if sm < FP8_SM]):
            raise BackendUnavailableError(
                f"FP8 runs on SM {FP8_SM} and newer, and SM {', '.join(map(str, old))} has no FP8 tensor cores; "
                "TensorRT-RTX refuses such a build",
                hint="--sm 89,120, or --int8 for older GPUs",
            )
        asked = {
            "version compatibility": options.version_compatible,  # looks for libnvinfer_lean, which no wheel has
            "hardware compatibility": options.hardware != "none",  # "unsupported in TensorRT-RTX", and ignored
            "refitting or stripping weights": options.refit or options.strip,  # its compiler then wants a GPU
        }
        if names := [name for name, wanted in asked.items() if wanted]:
            raise BackendUnavailableError(
                f"TensorRT-RTX has no {', no '.join(names)} in ahead-of-time builds",
                hint="leave the option out, or --backend tensorrt on the target machine",
            )

    def build(self, model: Path, folder: Path, options: BuildOptions) -> tuple[EngineRecord, ...]:
        """Build one ``engine-sm<NN>.rtx`` for each of ``options.sm`` (80, 89 and 120 when empty).

        Raises:
            BackendUnavailableError: the package is missing, or a compute capability that it cannot build for.
            EngineBuildError: its parser or builder refused the graph; the message holds the node and their words.
            PrecisionAuditError: the kernels do not compute in the asked precision.
        """
        if reason := self.available():
            raise BackendUnavailableError(reason, hint=_INSTALL)
        self.check(options)
        return tuple(self._build_one(model, folder, options, sm) for sm in options.sm or _default_sm(options))

    def _build_one(self, model: Path, folder: Path, options: BuildOptions, sm: int) -> EngineRecord:
        trt = _runtime()
        start = time.perf_counter()
        with signals_deferred() as cancelled, collector_paused():
            plan, log = _compile(trt, model, options, sm, cancelled)
        seconds = time.perf_counter() - start
        kernels, io = kernels_from_log(log), io_from_log(log)
        audit = audited(
            audit_engine(options.precision, graph_types(model), kernels, "build log", io), mixed=options.mixed
        )
        path = folder / f"engine-sm{sm}.rtx"
        with storage_errors(f"cannot write {path.name}"):
            path.write_bytes(plan)
        return EngineRecord(
            backend=self.name,
            backend_version=trt.__version__,
            artifact=artifact_of(path, folder),
            device=f"sm{sm}",
            runnable=False,
            reason=_not_run(sm),
            audit=audit,
            options={"sm": str(sm), "model": model.name, **described(options)},
            seconds=seconds,
        )

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> Runner:
        """Refuse: these engines run in TensorRT-RTX's own runtime, in the user's application.

        Raises:
            BackendUnavailableError: always, with the reason.
        """
        raise BackendUnavailableError(
            f"{engine.artifact.name} was built ahead of time for {engine.device.upper()} and is not run by effdeploy",
            hint="run it with NVIDIA's TensorRT-RTX runtime; to measure here: --backend onnxruntime or tensorrt",
        )


def _default_sm(options: BuildOptions) -> tuple[int, ...]:
    return tuple(sm for sm in DEFAULT_SM if sm >= FP8_SM or options.precision is not Precision.FP8)


def _not_run(sm: int) -> str:
    if first_gpu() is None:
        return f"built ahead of time for SM{sm} on a machine without a GPU; not run"
    return f"built ahead of time for SM{sm}; TensorRT-RTX engines are not run by effdeploy"


def _compile(trt: Any, model: Path, options: BuildOptions, sm: int, cancelled: Callable[[], bool]) -> tuple[bytes, str]:
    """Parse and build; return the serialised engine and the whole log."""
    log = _collector(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, network, model, log)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    configure(trt, config, options)
    add_profiles(builder, config, network, options.ranges)
    config.progress_monitor = monitor(trt, options.progress, cancelled)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineBuildError(
            f"TensorRT-RTX could not build {model.name} for SM {sm}: {_complaint(log.lines)}",
            hint="the message names the node; --backend onnxruntime runs the same graph",
        )
    return bytes(plan), "\n".join(message for _, message in log.lines)


def parse(trt: Any, network: Any, model: Path, log: Any) -> None:
    """Parse an ONNX file into a network; the one border for the parser's errors.

    Raises:
        EngineBuildError: with the node, its op and the parser's words.
    """
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(model)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    words = "; ".join(_describe(error) for error in errors[:3]) or _complaint(log.lines)
    raise EngineBuildError(
        f"TensorRT-RTX's parser refused {model.name}: {words}",
        hint="every input of a node must have one type and every op must be one that TensorRT has",
    )


def _describe(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{_own_words(error.desc())} [{error.code().name}]"


def _own_words(text: str) -> str:
    """Keep what the parser says; drop its source positions and the missing driver, which is no error in a CPU build."""
    lines = [line for line in text.splitlines() if "cudaError" not in line and not line.startswith("Invalid Node")]
    return re.sub(r"\s*In \w+ at \S+:\d+", "", " ".join(lines) or text).strip()[:400]


def _complaint(lines: Sequence[tuple[str, str]]) -> str:
    said = [_own_words(message) for severity, message in lines if severity in _ERRORS and "cudaError" not in message]
    return "; ".join(dict.fromkeys(said[:3])) or "it gave no reason"


BACKEND = TensorRtRtxBackend()
