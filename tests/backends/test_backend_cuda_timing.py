"""The order of CUDA calls, on a stand-in that has the names of the installed cuda-bindings and no others.

No GPU is timed here: that is what the tests marked ``gpu`` in tests/contracts/test_backends.py do.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
from pathlib import Path

import numpy as np
import pytest
from recorded_api import RecordedCuda

from deploy.backends import cuda_timing
from deploy.backends.gpu import first_gpu
from deploy.errors import BenchmarkError

runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install cuda-bindings")
FEEDS = {"images": np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)}
COPY, LAUNCH = "cudaMemcpyAsync", "launch"


@pytest.fixture
def on(monkeypatch):
    """Return a function that opens buffers and timers on a stand-in."""
    monkeypatch.setattr(cuda_timing, "_WARM_UP_SECONDS", 0.0)

    @contextlib.contextmanager
    def timers(cuda: RecordedCuda, launch=lambda: True):
        monkeypatch.setattr(cuda_timing, "_runtime", lambda: cuda)

        def run() -> bool:
            cuda.calls.append(LAUNCH)
            return launch()

        with cuda_timing.device_buffers(FEEDS) as buffers:
            buffers.add_output("logits", (1, 10), 4)
            with cuda_timing.engine_timers(buffers, run, None) as made:
                yield made

    return timers


def test_the_three_ways_to_time_and_that_everything_is_freed(on):
    cuda = RecordedCuda(runtime, elapsed=0.5)
    with on(cuda) as timers:
        assert [timer.name for timer in timers] == ["", "no CUDA graph", "with copies"]
        assert [timer.call() for timer in timers] == [500_000, 500_000, 1_500_000]
        assert timers[2].findings() == "H2D p50 0.500 ms, GPU p50 0.500 ms, D2H p50 0.500 ms"
        assert "enqueue p50" in timers[0].findings()
    assert cuda.live == set()


def test_what_lies_between_the_events(on):
    cuda = RecordedCuda(runtime)
    with on(cuda) as (graph, plain, copies):
        for timer, between in (
            (graph, ["cudaGraphLaunch"]),
            (plain, [LAUNCH]),
            (copies, [COPY, "cudaEventRecord", "cudaGraphLaunch", "cudaEventRecord", COPY]),
        ):
            cuda.calls.clear()
            timer.call()
            marks = [i for i, name in enumerate(cuda.calls) if name == "cudaEventRecord"]
            assert cuda.calls[marks[0] + 1 : marks[-1]] == between
            assert cuda.calls[marks[-1] + 1] == "cudaEventSynchronize"


def test_the_engine_runs_before_it_is_captured(on):
    cuda = RecordedCuda(runtime)
    with on(cuda):
        begin = cuda.calls.index("cudaStreamBeginCapture")
        assert cuda.calls[:begin].count(LAUNCH) == 2
        assert cuda.calls[begin - 1] == "cudaStreamSynchronize"
        assert cuda.calls[begin + 1 : begin + 3] == [LAUNCH, "cudaStreamEndCapture"]


def test_the_inputs_are_in_pinned_memory(monkeypatch):
    monkeypatch.setattr(cuda_timing, "_runtime", lambda: RecordedCuda(runtime))
    with cuda_timing.device_buffers(FEEDS) as buffers:
        (host, _, size), *_ = buffers._inputs
        np.testing.assert_array_equal(np.frombuffer(ctypes.string_at(host, size), np.float32), FEEDS["images"].ravel())
        assert set(buffers.addresses) == {"images"}


def test_an_engine_that_cannot_be_captured_is_timed_without_a_graph(on):
    cuda = RecordedCuda(runtime, failing=("cudaStreamEndCapture",))
    with on(cuda) as timers:
        assert [timer.name for timer in timers] == ["", "with copies"]
        assert "no CUDA graph: CUDA: out of memory (cudaErrorMemoryAllocation)" in timers[0].note
    assert cuda.live == set()


@pytest.mark.parametrize("failing", ["cudaMalloc", "cudaMallocHost", "cudaEventCreate", COPY])
def test_an_error_of_cuda_is_ours_and_leaks_nothing(on, failing):
    cuda = RecordedCuda(runtime, failing=(failing,))
    with pytest.raises(BenchmarkError, match=r"CUDA: out of memory \(cudaErrorMemoryAllocation\)"):
        _enter_and_leave(on(cuda))
    assert cuda.live == set()


def _enter_and_leave(opened):
    with opened:
        pass


def test_an_engine_that_refuses_is_an_error(on):
    with pytest.raises(BenchmarkError, match="could not be enqueued"):
        _enter_and_leave(on(RecordedCuda(runtime), launch=lambda: False))


def test_a_measurement_bound_by_the_host_is_warned_of(on):
    with on(RecordedCuda(runtime, elapsed=1e-6)) as timers:
        timers[1].call()
        (warning,) = timers[1].warnings()
        assert "the GPU waits for the host; see the figures with a CUDA graph" in warning
    with on(RecordedCuda(runtime, elapsed=1e6)) as timers:
        timers[1].call()
        assert timers[1].warnings() == ()


def test_a_state_that_is_unknown_is_said(on):
    with on(RecordedCuda(runtime, elapsed=1e6)) as timers:
        timers[0].call()
        assert "could not be read" in timers[0].warnings()[0]
        assert "GPU before: unknown; after: unknown" in timers[0].findings()


@pytest.mark.skipif(first_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_real_runtime_says_so():
    with pytest.raises(BenchmarkError, match="CUDA: ") as caught, cuda_timing.device_buffers(FEEDS):
        pass
    assert "nvidia-smi" in caught.value.hint


def names_in(source: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cudart"
    } | {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "cudart"
    }


def test_every_name_of_cuda_exists():
    names = names_in(Path(cuda_timing.__file__).read_text(encoding="utf-8"))
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaEventElapsedTime", "cudaMemcpyKind"} <= names
    assert [name for name in names if not hasattr(runtime, name)] == []
    assert not hasattr(runtime, next(iter(names_in("cudart.cudaNoSuchCall()"))))
