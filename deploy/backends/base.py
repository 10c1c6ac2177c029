"""What a backend is: a module with one ``BACKEND`` that says whether it is available, builds engines and opens them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deploy.records import Batch, EngineRecord, Precision, Target, TensorSpec

Array = NDArray[np.generic]
Feeds = Mapping[str, Array]
Progress = Callable[[str, int, int], None]  # phase of a build, steps done, steps in all; done == all: the phase ended


FP8_SM = 89  # the first compute capability with FP8 tensor cores


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What a build is asked for.

    Attributes:
        precision: What the graph was typed to; the audit holds the engine against it.
        batch: Fixed size or profile range of axis 0 of every input.
        inputs: Graph inputs; a string axis is dynamic and takes ``batch``.
        sm: CUDA compute capabilities for ahead-of-time builds, e.g. ``(80, 89)``; empty means the device at hand.
        threads: Intra-operator CPU threads, 0 for the runtime's default.
        level: TensorRT builder optimisation level 0..5.
        workspace: TensorRT workspace limit in bytes, 0 for no limit.
        tf32: Whether FP32 matrix products may use TF32 on the GPU. Stated, never defaulted by the runtime.
        device: ``"auto"`` (the GPU when the runtime really has one, else the CPU), ``"cpu"`` or ``"cuda"``.
        profiles: TensorRT optimisation profiles, each a range of batch sizes; empty means one, ``batch``.
        timing_cache: Folder of TensorRT's timing caches, ``None`` for no cache.
        version_compatible: Whether later minor versions of the same TensorRT may load the engine.
        hardware: TensorRT hardware compatibility: ``"none"``, ``"ampere_plus"`` or ``"same_compute_capability"``.
        refit: Whether the weights of the built engine can be replaced.
        strip: Whether the engine is written without its weights; it is filled from the ONNX file when it is opened.
        integer_kernels: Whether ONNX Runtime may run Q/DQ in its integer kernels; without them it rounds as the graph
            says and multiplies in float32, which is how a graph for TensorRT is judged.
        mixed: Whether the graph mixes precisions on purpose (``effdeploy bisect``): the audit is told, not enforced.
        progress: Told how far a build is, where the runtime says so; called from the runtime's own thread.
    """

    precision: Precision = Precision.FP32
    batch: Batch = field(default_factory=Batch)
    inputs: tuple[TensorSpec, ...] = ()
    sm: tuple[int, ...] = ()
    threads: int = 0
    level: int = 3
    workspace: int = 0
    tf32: bool = False
    device: str = "auto"
    profiles: tuple[Batch, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware: str = "none"
    refit: bool = False
    strip: bool = False
    integer_kernels: bool = True
    mixed: bool = False
    progress: Progress | None = field(default=None, compare=False, repr=False)

    @property
    def ranges(self) -> tuple[Batch, ...]:
        """The batch ranges that an engine is tuned for, one a profile."""
        return self.profiles or (self.batch,)

    @property
    def for_builders(self) -> list[str]:
        """What was asked that only a runtime with a builder has; a runtime that opens the ONNX file refuses it."""
        asked = {
            "compute capabilities": bool(self.sm),
            "optimisation profiles": len(self.profiles) > 1,
            "version compatibility": self.version_compatible,
            "hardware compatibility": self.hardware != "none",
            "refitting or stripping weights": self.refit or self.strip,
        }
        return [name for name, wanted in asked.items() if wanted]


class Runner(Protocol):
    """An opened engine. Use as a context manager."""

    name: str
    device: str

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; host arrays in, host arrays out."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class DeviceTimer(Protocol):
    """One way to run an engine on fixed inputs, timed without what its users do not wait for on the device.

    Attributes:
        name: What sets it apart from the engine's own latency: ``""``, ``"no CUDA graph"``, ``"with copies"``.
        note: What its figures hold, shown beside them.
    """

    name: str
    note: str

    def call(self) -> int:
        """Run one batch, wait for it, and return the time it took, in nanoseconds.

        Raises:
            BenchmarkError: the device failed.
        """

    def warnings(self) -> Sequence[str]:
        """Return what a reader must know about the calls since the timer was made."""

    def findings(self) -> str:
        """Return what else was measured since the timer was made, as a sentence; may be empty."""


@runtime_checkable
class DeviceTimed(Protocol):
    """A runner whose engine can be timed on its device: preallocated buffers, copies apart."""

    def device_timers(self, feeds: Feeds) -> AbstractContextManager[Sequence[DeviceTimer]]:
        """Put ``feeds`` on the device and give the ways to time the engine, its own latency first."""


class Backend(Protocol):
    """A runtime that builds and runs engines."""

    name: str
    target: Target

    def available(self) -> str | None:
        """Return ``None`` when engines can be built here, else what is missing and how to get it."""

    def check(self, options: BuildOptions) -> None:
        """Refuse at once what this backend cannot build on this machine, before anything is traced.

        Raises:
            BackendUnavailableError: what cannot be, and what can.
        """

    def build(self, model: Path, folder: Path, options: BuildOptions) -> tuple[EngineRecord, ...]:
        """Build ``model`` (an ONNX file inside ``folder``) into engines that lie in ``folder``.

        Raises:
            BackendUnavailableError: ``available()`` gave a reason, or ``check`` refuses.
            EngineBuildError: parser or builder refused the graph; the message holds its own words.
            PrecisionAuditError: the engine does not have the asked precision.
        """

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> Runner:
        """Load an engine for inference.

        Raises:
            BackendUnavailableError: it cannot run on this machine.
        """
