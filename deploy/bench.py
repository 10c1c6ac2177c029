"""Latency: warm-up by time, interleaved rounds, percentiles, and ratios that survive a shared machine.

Candidates take turns, a slice of calls each, and the order changes from round to round: what drifts (clock frequency,
temperature, neighbours) drifts for all. Latencies are wall time, what a user waits for. Ratios are formed inside each
round and then summed up. When every candidate runs on one CPU thread, they use that thread's CPU time: on a shared
machine it leaves out the time in which others ran.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from deploy.backends.base import DeviceTimer
from deploy.errors import BenchmarkError, EffdeployError
from deploy.noise import MachineWatch, interval_of_median
from deploy.records import BenchRecord, Latency, Ratio

T = TypeVar("T")

COV_LIMIT = 0.025  # trtexec warns above the same value
FEW_SAMPLES = 100  # below, p99 is hardly more than the slowest call
KEPT_SAMPLES = 500

# Process CPU time beyond the calling thread's: a candidate that says one thread and uses more is not timed by one.
_HIDDEN_THREADS = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCandidate:
    """Something to be timed.

    Attributes:
        name: "engine", "eager", "compile", "naive".
        call: Runs one batch and returns when the result is there; work on a device is waited for inside.
        batch: Images per call.
        threads: CPU threads that it was set to, 0 for the runtime's default.
        device: "cpu", "cuda:0".
        build_seconds: Time to build or compile it, measured by the caller.
        peak_memory: Bytes, from ``peak_memory_of``; 0 when not measured.
        note: Shown beside its row.
        timer: Measures a call itself, by the clock of a device; the wall clock around ``call`` otherwise.
        sha256: Of the file that it runs; empty where there is none.
    """

    name: str
    call: Callable[[], object]
    batch: int
    threads: int
    device: str
    build_seconds: float = 0.0
    peak_memory: int = 0
    note: str = ""
    timer: DeviceTimer | None = None
    sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """How long to measure.

    Attributes:
        warmup_seconds: Per candidate, before anything is recorded.
        min_seconds: Recorded wall time per candidate, at least.
        min_rounds: Rounds, at least; a ratio needs several.
        max_seconds: Recorded wall time of the slowest candidate after which the rounds end although the others have
            less than asked; not below ``min_seconds``, and three rounds are always run.
        slice_seconds: Time that a candidate gets in one round; a call that takes longer gets one call.
    """

    warmup_seconds: float = 0.5
    min_seconds: float = 3.0
    min_rounds: int = 20
    max_seconds: float = 30.0
    slice_seconds: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """The three clocks, in nanoseconds; tests bring their own."""

    wall: Callable[[], int] = time.perf_counter_ns
    thread: Callable[[], int] = time.thread_time_ns
    process: Callable[[], int] = time.process_time_ns


@dataclass(kw_only=True, slots=True)
class _Track:
    """What was measured of one candidate so far."""

    candidate: BenchCandidate
    calls: int = 1  # per round
    wall: list[int] = field(default_factory=list)  # per call, ns
    round_wall: list[float] = field(default_factory=list)  # median per round, ns
    round_cpu: list[float] = field(default_factory=list)  # calling thread, mean per call and round, ns
    process_cpu: int = 0
    thread_cpu: int = 0


def measure(
    candidates: Sequence[BenchCandidate],
    options: BenchOptions | None = None,
    *,
    clocks: Clocks | None = None,
    profile: Mapping[str, float] | None = None,
    depth: int = 4,
) -> BenchRecord:
    """Time all candidates against each other.

    The first candidate of each batch size is compared with every other of that size: a ratio above 1 means that the
    first is faster.

    Args:
        candidates: What to time; (name, batch) pairs differ.
        options: How long.
        clocks: For tests.
        profile: Node name -> time, from the runtime's profiler, for ``BenchRecord.modules``.
        depth: Components of the module path to sum the profile up to.

    Raises:
        BenchmarkError: nothing to measure, a candidate that fails, or a call too short for the clock.
    """
    options, clocks = options or BenchOptions(), clocks or Clocks()
    keys = [(c.name, c.batch) for c in candidates]
    if not keys or len(set(keys)) < len(keys):
        raise BenchmarkError(f"got candidates {keys}, expected at least one and each (name, batch) once")
    start = time.perf_counter()
    tracks = [_Track(candidate=c) for c in candidates]
    watch = MachineWatch(clock=clocks.wall)
    with _without_gc():
        for track in tracks:
            _warm_up(track, options, clocks)
        _rounds(tracks, options, clocks, watch)
    cpu = _one_cpu_thread(tracks)
    return BenchRecord(
        latencies=tuple(_latency(t) for t in tracks),
        ratios=tuple(_ratio(engine, other, cpu) for engine, other in _pairs(tracks)),
        warnings=tuple(w for t in tracks for w in _warnings(t)),
        method=_method(tracks, options, cpu),
        modules=time_by_module(profile or {}, depth),
        seconds=time.perf_counter() - start,
        noise=watch.record(),
    )


def _warm_up(track: _Track, options: BenchOptions, clocks: Clocks) -> None:
    """Call until the time is over, at least three times, and choose how many calls make one slice."""
    begin = clocks.wall()
    spent: list[int] = []
    while len(spent) < 3 or clocks.wall() - begin < options.warmup_seconds * 1e9:
        spent.append(_elapsed(track.candidate, clocks))
    if (typical := statistics.median(spent)) <= 0:
        raise BenchmarkError(
            f"{track.candidate.name}: a call takes no measurable time",
            hint="time a larger batch, or check that it computes",
        )
    track.calls = max(1, min(1000, round(options.slice_seconds * 1e9 / typical)))


def _elapsed(candidate: BenchCandidate, clocks: Clocks) -> int:
    """Run one call and return its nanoseconds, by the candidate's own clock where it has one."""
    before = clocks.wall()
    result = _call(candidate)
    return clocks.wall() - before if candidate.timer is None else cast(int, result)


def _call(candidate: BenchCandidate) -> object:
    try:
        return candidate.call() if candidate.timer is None else candidate.timer.call()
    except EffdeployError:
        raise
    except Exception as error:
        raise BenchmarkError(
            f"{candidate.name} failed while it was timed: {type(error).__name__}: {error}",
            hint="leave it out with --baseline, or run effdeploy verify on the bundle",
        ) from error


def _rounds(tracks: list[_Track], options: BenchOptions, clocks: Clocks, watch: MachineWatch) -> None:
    number = 0
    while _unfinished(tracks, number, options):
        first = number // 2 % len(tracks)
        order = tracks[first:] + tracks[:first]
        # Each order is followed by its mirror image, so a steady drift favours nobody.
        for track in order if number % 2 == 0 else reversed(order):
            _slice(track, clocks)
        watch.work()
        number += 1


def _unfinished(tracks: list[_Track], number: int, options: BenchOptions) -> bool:
    if number < 3:
        return True
    shortest, longest = min(sum(t.wall) for t in tracks) / 1e9, max(sum(t.wall) for t in tracks) / 1e9
    if longest >= max(options.max_seconds, options.min_seconds):
        return False
    return shortest < options.min_seconds or number < options.min_rounds


def _slice(track: _Track, clocks: Clocks) -> None:
    """Time one candidate's turn; where it has several calls, one more goes before: the others' data fill the caches."""
    if track.calls > 1:
        _call(track.candidate)
    walls = []
    process, thread = clocks.process(), clocks.thread()
    for _ in range(track.calls):
        walls.append(_elapsed(track.candidate, clocks))
    used = clocks.thread() - thread
    track.process_cpu += clocks.process() - process
    track.thread_cpu += used
    track.wall += walls
    track.round_wall.append(statistics.median(walls))
    track.round_cpu.append(used / track.calls)


def _one_cpu_thread(tracks: list[_Track]) -> bool:
    """Whether the calling thread's CPU time tells the whole story of every candidate."""
    return all(
        t.candidate.device == "cpu"
        and t.candidate.threads == 1
        and min(t.round_cpu) > 0
        and t.process_cpu <= _HIDDEN_THREADS * t.thread_cpu
        for t in tracks
    )


def _pairs(tracks: list[_Track]) -> Iterator[tuple[_Track, _Track]]:
    engines: dict[int, _Track] = {}
    for track in tracks:
        engine = engines.setdefault(track.candidate.batch, track)
        # A CPU baseline says nothing about how good an engine on a GPU is.
        if engine is not track and engine.candidate.device == track.candidate.device:
            yield engine, track


def _latency(track: _Track) -> Latency:
    c, ms = track.candidate, np.asarray(track.wall, np.float64) / 1e6
    p50, p90, p95, p99 = (float(v) for v in np.percentile(ms, (50, 90, 95, 99)))
    keep = np.unique(np.linspace(0, len(ms) - 1, min(len(ms), KEPT_SAMPLES)).round().astype(int))
    thinned = "" if len(keep) == len(ms) else f"{len(keep)} of {len(ms)} samples kept, evenly in time"
    return Latency(
        name=c.name,
        batch=c.batch,
        threads=c.threads,
        device=c.device,
        samples=tuple(round(float(v), 5) for v in ms[keep]),
        mean=float(ms.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        cov=float(ms.std() / ms.mean()),
        throughput=c.batch / (p50 / 1e3),
        peak_memory=c.peak_memory,
        build_seconds=c.build_seconds,
        note="; ".join(part for part in (c.note, c.timer.findings() if c.timer else "", thinned) if part),
        calls=len(ms),
        interval=interval_of_median(np.split(ms, len(track.round_wall))),
        sha256=c.sha256,
    )


def _ratio(engine: _Track, baseline: _Track, cpu: bool) -> Ratio:
    """Divide round by round: baseline / engine."""
    mine, other = ((t.round_cpu if cpu else t.round_wall) for t in (engine, baseline))
    ratios = np.asarray(other) / np.asarray(mine)
    p10, median, p90 = (float(v) for v in np.percentile(ratios, (10, 50, 90)))
    return Ratio(
        name=engine.candidate.name,
        baseline=baseline.candidate.name,
        batch=engine.candidate.batch,
        median=median,
        p10=p10,
        p90=p90,
        rounds=len(ratios),
        interval=interval_of_median(ratios.reshape(-1, 1)),
    )


def _warnings(track: _Track) -> Iterator[str]:
    c, wall = track.candidate, np.asarray(track.wall, np.float64)
    label = f"{c.name}, batch {c.batch}"
    yield from (f"{label}: {warning}" for warning in (c.timer.warnings() if c.timer else ()))
    if (cov := float(wall.std() / wall.mean())) > COV_LIMIT:
        busy = track.thread_cpu / float(wall.sum())
        load = (
            f"; its thread ran {busy:.0%} of the wall time"
            if c.device == "cpu" and c.threads == 1 and busy < 0.98
            else ""
        )
        yield f"{label}: latencies vary by {cov:.1%} (CoV, limit {COV_LIMIT:.1%}){load}"
    if c.device == "cpu" and c.threads > (cores := _cores()):
        yield f"{label}: was set to {c.threads} threads, this process has {cores} cores: they wait for each other"
    if len(wall) < FEW_SAMPLES:
        yield f"{label}: p99 of {len(wall)} samples is hardly more than the slowest call; {FEW_SAMPLES} or more tell"
    if c.device == "cpu" and c.threads == 1 and track.process_cpu > _HIDDEN_THREADS * track.thread_cpu:
        yield (
            f"{label}: was set to one thread, but the process used {track.process_cpu / max(track.thread_cpu, 1):.1f}x "
            "the CPU time of the calling thread; ratios use wall time"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _method(tracks: list[_Track], options: BenchOptions, cpu: bool) -> str:
    threads = ", ".join(sorted({str(t.candidate.threads or "default") for t in tracks}))
    calls = ", ".join(f"{t.candidate.name} (batch {t.candidate.batch}) {t.calls}" for t in tracks)
    device = (
        " (of a candidate on a device: the time that its note names)" if any(t.candidate.timer for t in tracks) else ""
    )
    clock = "CPU time of the calling thread, mean of the turn" if cpu else "wall time, median of the turn"
    return (
        f"Warm-up {options.warmup_seconds:g} s each; then {len(tracks[0].round_wall)} rounds in which the candidates "
        f"take turns, the order rotated and reversed from round to round; calls a turn: {calls}, after one unrecorded "
        f"call where there is more than one. Latency: wall time of one call, host to host{device}, garbage collection "
        f"off, threads: {threads}. Ratio: formed in each round ({clock}), then the median over the rounds with p10 and "
        "p90. Intervals: 95 %, of the median, from drawing whole rounds again."
    )


@contextmanager
def _without_gc() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def time_by_module(profile: Mapping[str, float], depth: int) -> dict[str, float]:
    """Sum a profile up by module.

    Args:
        profile: Node name (``<module path>/<OpType>``) -> time in any unit.
        depth: Components of the module path that are kept: 2 turns ``stages.2.blocks.5.mlp/Gemm`` into ``stages.2``.

    Returns:
        Module path -> share of the whole time, largest first. What has no module path (nodes that the runtime added) is
        under ``(runtime)``.
    """
    sums: dict[str, float] = {}
    for node, spent in profile.items():
        path, slash, _ = node.partition("/")
        module = ".".join(path.split(".")[:depth]) if slash and path else "(runtime)"
        sums[module] = sums.get(module, 0.0) + spent
    total = math.fsum(sums.values())
    ranked = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return {module: spent / total for module, spent in ranked} if total > 0 else {}


def peak_memory_of(action: Callable[[], T]) -> tuple[T, int]:
    """Run ``action`` and measure by how many bytes it raised the resident memory of this process at its peak.

    Freed memory is handed back to the system first, then the kernel's high-water mark is reset (Linux only). Memory
    that the process already held and ``action`` used again is not seen, nor is device memory.

    Returns:
        What ``action`` returned, and the bytes; 0 where the system does not tell.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS") if _reset_high_water() else None
    result = action()
    after = _status("VmHWM")
    return result, max(0, after - before) if before is not None and after is not None else 0


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    """Read a line of ``/proc/self/status`` in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None
