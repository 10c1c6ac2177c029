"""Latency of an engine by the GPU's own clock: preallocated buffers, CUDA events, a CUDA graph, copies apart.

What is timed is what NVIDIA's trtexec times (samples/common/sampleInference.cpp): GPU compute between two events on a
stream of its own, the host's enqueue time, and the copies from and to pinned memory. Nothing is allocated, checked or
converted between the events. The CUDA runtime is called through NVIDIA's cuda-bindings.

This file has not run on a GPU yet. Its CUDA names are held against the installed cuda-bindings, and its order of calls
against a recorded stand-in (tests/backends/test_backend_cuda_timing.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deploy.backends.base import Array, DeviceTimer, Feeds
from deploy.backends.gpu import Gpu
from deploy.backends.gpu_state import GpuState, read_state, state_warnings
from deploy.errors import BackendUnavailableError, BenchmarkError

Launch = Callable[[], bool]  # enqueues one inference on the buffers' stream; False: the runtime refused

ENQUEUE_LIMIT = 0.8  # of the GPU time; above, trtexec calls a measurement bound by the host
_WARM_UP_SECONDS = 0.2  # trtexec's; an idle GPU has low clocks, which would pass for the state before the measurement


def _runtime() -> Any:
    """Import the CUDA runtime's bindings.

    Raises:
        BackendUnavailableError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendUnavailableError(
            f"the CUDA runtime cannot be called ({error})", hint="pip install 'effdeploy[tensorrt]'"
        ) from error
    return runtime


def _checked(cudart: Any, result: tuple[Any, ...]) -> Any:
    """Return what a CUDA call gave besides its status; the one border for CUDA's errors.

    Raises:
        BenchmarkError: the status is an error; the message holds CUDA's name and words for it.
    """
    status, *values = result
    if int(status) != 0:
        words = cudart.cudaGetErrorString(status)[1]
        text = words.decode(errors="replace") if isinstance(words, bytes) else str(words)
        raise BenchmarkError(
            f"CUDA: {text} ({getattr(status, 'name', status)})",
            hint="nvidia-smi shows whether the GPU and its driver work",
        )
    return values[0] if values else None


class DeviceBuffers:
    """Inputs and outputs of one inference, on the device and in pinned host memory, with the stream that they use.

    Attributes:
        addresses: Tensor name -> device address.
        stream: The CUDA stream, as a number.
    """

    def __init__(self, cudart: Any, cleanup: contextlib.ExitStack) -> None:
        self.cudart, self._cleanup = cudart, cleanup
        stream = _checked(cudart, cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        cleanup.callback(cudart.cudaStreamDestroy, stream)
        self.stream = int(stream)
        self.addresses: dict[str, int] = {}
        self._inputs: list[tuple[int, int, int]] = []  # host address, device address, bytes
        self._outputs: list[tuple[int, int, int]] = []

    def add_input(self, name: str, value: Array) -> None:
        """Make room for an input and put its values into pinned memory."""
        value = np.ascontiguousarray(value)
        host, device = self._allocate(name, value.nbytes)
        ctypes.memmove(host, value.ctypes.data, value.nbytes)
        self._inputs.append((host, device, value.nbytes))

    def add_output(self, name: str, shape: tuple[int, ...], itemsize: int) -> None:
        """Make room for an output of ``shape`` with elements of ``itemsize`` bytes."""
        size = math.prod(shape) * itemsize
        host, device = self._allocate(name, size)
        self._outputs.append((host, device, size))

    def copy_in(self) -> None:
        """Enqueue the copies of all inputs to the device."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        for host, device, size in self._inputs:
            _checked(self.cudart, self.cudart.cudaMemcpyAsync(device, host, size, kind, self.stream))

    def copy_out(self) -> None:
        """Enqueue the copies of all outputs to the host."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for host, device, size in self._outputs:
            _checked(self.cudart, self.cudart.cudaMemcpyAsync(host, device, size, kind, self.stream))

    def wait(self) -> None:
        """Wait for everything that was enqueued."""
        _checked(self.cudart, self.cudart.cudaStreamSynchronize(self.stream))

    def _allocate(self, name: str, size: int) -> tuple[int, int]:
        size = max(size, 1)
        host = _checked(self.cudart, self.cudart.cudaMallocHost(size))
        self._cleanup.callback(self.cudart.cudaFreeHost, host)
        device = _checked(self.cudart, self.cudart.cudaMalloc(size))
        self._cleanup.callback(self.cudart.cudaFree, device)
        self.addresses[name] = int(device)
        return int(host), int(device)


@contextlib.contextmanager
def device_buffers(feeds: Feeds) -> Iterator[DeviceBuffers]:
    """Put feeds into pinned host memory with room for them on the device; outputs are added by the caller.

    Raises:
        BackendUnavailableError: cuda-bindings is not installed.
        BenchmarkError: no GPU, no memory, or another error of CUDA.
    """
    cudart = _runtime()
    with contextlib.ExitStack() as cleanup:
        buffers = DeviceBuffers(cudart, cleanup)
        for name, value in feeds.items():
            buffers.add_input(name, value)
        yield buffers


@contextlib.contextmanager
def engine_timers(buffers: DeviceBuffers, launch: Launch, gpu: Gpu | None) -> Iterator[Sequence[DeviceTimer]]:
    """Give the ways to time an engine whose tensors lie in ``buffers``.

    Yields:
        With a CUDA graph where the engine can be captured, without one, and with the copies.

    Raises:
        BenchmarkError: the engine cannot be enqueued, or CUDA failed.
    """
    eager = _accepted(launch)
    with contextlib.ExitStack() as cleanup:
        buffers.copy_in()
        for _ in range(2):  # TensorRT sets itself up in the first run after shapes were set; capture must not see it
            eager()
        buffers.wait()
        replay, refused = _captured(buffers, eager, cleanup)
        plain = EventTimer(buffers, eager, cleanup, name="no CUDA graph" if replay else "", note=_NOTE + refused)
        graph = [EventTimer(buffers, replay, cleanup, name="", note=f"{_NOTE}, CUDA graph")] if replay else []
        on_gpu = [*graph, plain]
        _warm_up(on_gpu[0])
        on_gpu[0].watch(gpu)
        yield [*on_gpu, CopiesTimer(buffers, replay or eager, cleanup)]


_NOTE = "GPU time between CUDA events, inputs on the device, copies left out"


def _accepted(launch: Launch) -> Callable[[], None]:
    def run() -> None:
        if not launch():
            raise BenchmarkError(
                "the engine could not be enqueued", hint="effdeploy verify runs it and shows what it says"
            )

    return run


def _captured(
    buffers: DeviceBuffers, run: Callable[[], None], cleanup: contextlib.ExitStack
) -> tuple[Callable[[], None] | None, str]:
    """Record one run as a CUDA graph; return its launch, or ``None`` and why not."""
    cudart = buffers.cudart
    try:
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(cudart, cudart.cudaStreamBeginCapture(buffers.stream, mode))
        try:
            run()
        finally:  # a stream left in capture would refuse everything after
            ended = cudart.cudaStreamEndCapture(buffers.stream)
        graph = _checked(cudart, ended)
        instance = _checked(cudart, cudart.cudaGraphInstantiate(graph, 0))
        _checked(cudart, cudart.cudaGraphDestroy(graph))
    except BenchmarkError as error:
        cudart.cudaGetLastError()  # clears it
        return None, f"; no CUDA graph: {error.message}"
    cleanup.callback(cudart.cudaGraphExecDestroy, instance)

    def replay() -> None:
        _checked(cudart, cudart.cudaGraphLaunch(instance, buffers.stream))

    return replay, ""


def _warm_up(timer: EventTimer) -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < _WARM_UP_SECONDS:
        timer.call()
    timer.forget()


class EventTimer:
    """Times what one launch does on the GPU; the host's time to enqueue it is kept beside."""

    def __init__(
        self, buffers: DeviceBuffers, run: Callable[[], None], cleanup: contextlib.ExitStack, *, name: str, note: str
    ) -> None:
        self.name, self.note = name, note
        self._buffers, self._run = buffers, run
        self._start, self._end = _event(buffers, cleanup), _event(buffers, cleanup)
        self._gpu: list[float] = []  # ms
        self._enqueue: list[float] = []  # ms
        self._device: Gpu | None = None
        self._before: GpuState | None = None
        self._after: GpuState | None = None
        self._watching = False

    def watch(self, gpu: Gpu | None) -> None:
        """Remember the state of the GPU; ``findings`` and ``warnings`` compare it with the one they find."""
        self._device, self._before, self._watching = gpu, read_state(gpu), True

    def forget(self) -> None:
        """Drop what was measured so far."""
        self._gpu.clear()
        self._enqueue.clear()

    def call(self) -> int:
        """Run once and return the GPU's time in nanoseconds.

        Raises:
            BenchmarkError: CUDA or the engine failed.
        """
        cudart, stream = self._buffers.cudart, self._buffers.stream
        _checked(cudart, cudart.cudaEventRecord(self._start, stream))
        before = time.perf_counter_ns()
        self._run()
        enqueued = time.perf_counter_ns() - before
        _checked(cudart, cudart.cudaEventRecord(self._end, stream))
        _checked(cudart, cudart.cudaEventSynchronize(self._end))
        spent = float(_checked(cudart, cudart.cudaEventElapsedTime(self._start, self._end)))
        self._after = None  # whatever was read before is not the end of the measurement
        self._gpu.append(spent)
        self._enqueue.append(enqueued / 1e6)
        return round(spent * 1e6)

    def warnings(self) -> tuple[str, ...]:
        """Say where the host, not the GPU, was measured, and what the GPU did meanwhile."""
        found = list(state_warnings(self._before, self._state())) if self._watching else []
        if self._gpu and (ratio := statistics.median(self._enqueue) / statistics.median(self._gpu)) > ENQUEUE_LIMIT:
            found.append(
                f"enqueueing takes {ratio:.1f}x the GPU time (limit {ENQUEUE_LIMIT}): the GPU waits for the host"
                + ("" if self.name == "" else "; see the figures with a CUDA graph")
            )
        return tuple(found)

    def findings(self) -> str:
        """Give the median enqueue time and the GPU's state before and after."""
        parts = [f"enqueue p50 {statistics.median(self._enqueue):.3f} ms"] if self._enqueue else []
        if self._watching:
            parts += [f"GPU before: {self._before or 'unknown'}; after: {self._state() or 'unknown'}"]
        return "; ".join(parts)

    def _state(self) -> GpuState | None:
        """Read the GPU's state once after the last call."""
        self._after = self._after or read_state(self._device)
        return self._after


class CopiesTimer:
    """Times an inference from pinned host memory to pinned host memory; each part has its own events."""

    name = "with copies"
    note = "copies from and to pinned memory included, by CUDA events"

    def __init__(self, buffers: DeviceBuffers, run: Callable[[], None], cleanup: contextlib.ExitStack) -> None:
        self._buffers, self._run = buffers, run
        self._events = [_event(buffers, cleanup) for _ in range(4)]
        self._parts: Mapping[str, list[float]] = {"H2D": [], "GPU": [], "D2H": []}

    def call(self) -> int:
        """Run once and return the time from the first copy to the last, in nanoseconds.

        Raises:
            BenchmarkError: CUDA or the engine failed.
        """
        cudart, stream = self._buffers.cudart, self._buffers.stream
        _checked(cudart, cudart.cudaEventRecord(self._events[0], stream))
        for event, step in zip(
            self._events[1:], (self._buffers.copy_in, self._run, self._buffers.copy_out), strict=True
        ):
            step()
            _checked(cudart, cudart.cudaEventRecord(event, stream))
        _checked(cudart, cudart.cudaEventSynchronize(self._events[-1]))
        for part, start, end in zip(self._parts.values(), self._events, self._events[1:], strict=False):
            part.append(float(_checked(cudart, cudart.cudaEventElapsedTime(start, end))))
        return round(sum(part[-1] for part in self._parts.values()) * 1e6)

    def warnings(self) -> tuple[str, ...]:
        """Return nothing: the timers of the engine alone say what is to be said."""
        return ()

    def findings(self) -> str:
        """Give the medians of the parts."""
        told = {name: statistics.median(part) for name, part in self._parts.items() if part}
        return ", ".join(f"{name} p50 {value:.3f} ms" for name, value in told.items())


def _event(buffers: DeviceBuffers, cleanup: contextlib.ExitStack) -> Any:
    event = _checked(buffers.cudart, buffers.cudart.cudaEventCreate())
    cleanup.callback(buffers.cudart.cudaEventDestroy, event)
    return event
