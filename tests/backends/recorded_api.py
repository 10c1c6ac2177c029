"""Stand-ins made from recorded names: they take every call that the real API has, keep it, and refuse all others.

They show which calls are made and in which order. They compute nothing and prove nothing about a GPU.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any, ClassVar

SURFACES = sorted((Path(__file__).parents[1] / "data" / "tensorrt-api").glob("*.json"))


class Recorded:
    """An object of a class of the API."""

    def __init__(self, kind: str, members: list[str], answers: dict[str, Any] | None = None) -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "answers", answers or {})
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "values", {})

    def __getattr__(self, name: str) -> Any:
        if name not in self.members:
            raise AttributeError(f"{self.kind} has no {name}")

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name)
            return answer(*arguments) if callable(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.members:
            raise AttributeError(f"{self.kind} has no {name}")
        self.values[name] = value


class RecordedModule:
    """The module ``tensorrt`` as far as one version's names go; an enum's member is its name."""

    def __init__(self, path: Path) -> None:
        surface = json.loads(path.read_text(encoding="utf-8"))
        self._classes, self._enums = surface["classes"], surface["enums"]
        self.__version__ = surface["version"]

    def new(self, kind: str, **answers: Any) -> Recorded:
        """Make an object of a class; ``answers`` are what its methods return, or functions of their arguments."""
        return Recorded(kind, self._classes[kind], answers)

    def __getattr__(self, name: str) -> Any:
        if name in self._enums:
            members = self._enums[name]
            return type(name, (), {member: f"{name}.{member}" for member in members})
        if name in self._classes:
            return type(name, (), {"__init__": lambda self: None})
        raise AttributeError(f"tensorrt has no {name}")


class RecordedCuda:
    """``cuda.bindings.runtime`` as far as its names go: each call succeeds, or fails where it is told to.

    Args:
        real: The installed module; names and enums are taken from it.
        elapsed: Milliseconds that consecutive pairs of events are apart.
        failing: Functions that return an error.
    """

    def __init__(self, real: Any, elapsed: float = 1.0, failing: tuple[str, ...] = ()) -> None:
        self._real, self._elapsed, self._failing = real, elapsed, failing
        self.calls: list[str] = []
        self.live: set[tuple[str, int]] = set()
        self._kept: list[Any] = []
        self._next = 1 << 20

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)  # an unknown name is an error here as there
        if not name.startswith("cuda") or isinstance(real, (int, type)) or not callable(real):
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name == "cudaGetErrorString":
                return self._real.cudaGetErrorString(*arguments)
            if name in self._failing:
                return (self._real.cudaError_t.cudaErrorMemoryAllocation, None)
            return (self._real.cudaError_t.cudaSuccess, *self._answer(name, arguments))

        return call

    MAKES: ClassVar = {
        "cudaStreamCreateWithFlags": "stream", "cudaEventCreate": "event", "cudaMalloc": "device",
        "cudaMallocHost": "host", "cudaStreamEndCapture": "graph", "cudaGraphInstantiate": "instance",
    }  # fmt: skip
    ENDS: ClassVar = {
        "cudaStreamDestroy": "stream", "cudaEventDestroy": "event", "cudaFree": "device", "cudaFreeHost": "host",
        "cudaGraphDestroy": "graph", "cudaGraphExecDestroy": "instance",
    }  # fmt: skip

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in self.MAKES:
            self._next += 1
            handle = self._memory(arguments[0]) if name == "cudaMallocHost" else self._next
            self.live.add((self.MAKES[name], handle))
            return (handle,)
        if name in self.ENDS:
            self.live.remove((self.ENDS[name], int(arguments[0])))
        return (self._elapsed,) if name == "cudaEventElapsedTime" else ()

    def _memory(self, size: int) -> int:
        self._kept.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(self._kept[-1])
