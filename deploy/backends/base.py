"""What a backend is: a module with one ``BACKEND`` that says whether it is available, builds engines and opens them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploy.records import Batch, EngineRecord, Precision, Target, TensorSpec

Array = NDArray[np.generic]
Feeds = Mapping[str, Array]


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


class Backend(Protocol):
    """A runtime that builds and runs engines."""

    name: str
    target: Target

    def available(self) -> str | None:
        """Return ``None`` when engines can be built here, else what is missing and how to get it."""

    def build(self, model: Path, folder: Path, options: BuildOptions) -> tuple[EngineRecord, ...]:
        """Build ``model`` (an ONNX file inside ``folder``) into engines that lie in ``folder``.

        Raises:
            BackendUnavailableError: ``available()`` gave a reason.
            EngineBuildError: parser or builder refused the graph; the message holds its own words.
            PrecisionAuditError: the engine does not have the asked precision.
        """

    def open(self, engine: EngineRecord, folder: Path, options: BuildOptions) -> Runner:
        """Load an engine for inference.

        Raises:
            BackendUnavailableError: it cannot run on this machine.
        """
