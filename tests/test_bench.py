from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import deploy.bench as bench
from deploy.bench import (
    KEPT_SAMPLES,
    BenchCandidate,
    BenchOptions,
    Clocks,
    measure,
    peak_memory_of,
    time_by_module,
)
from deploy.errors import BackendUnavailableError, BenchmarkError
from deploy.records import BenchRecord, from_json, to_json
from deploy.summary import noise_line

MS = 1_000_000
QUICK = BenchOptions(warmup_seconds=0.01, min_seconds=0.2, min_rounds=8, slice_seconds=0.01)


class Machine:
    """A machine whose time passes only in calls."""

    def __init__(self) -> None:
        self.wall = self.thread = self.process = 0
        self.calls: list[str] = []

    @property
    def clocks(self) -> Clocks:
        return Clocks(wall=lambda: self.wall, thread=lambda: self.thread, process=lambda: self.process)

    def candidate(
        self,
        name: str,
        ms: float | Iterator[float],
        *,
        cpu: float = 1.0,
        workers: int = 1,
        batch: int = 1,
        threads: int = 1,
        device: str = "cpu",
    ) -> BenchCandidate:
        """Make a candidate that takes ``ms`` of wall time, ``cpu`` of it on the calling thread and on each worker."""
        times = itertools.repeat(ms) if isinstance(ms, (int, float)) else ms

        def call() -> None:
            spent = round(next(times) * MS)
            self.calls.append(name)
            self.wall += spent
            self.thread += round(spent * cpu)
            self.process += round(spent * cpu * workers)

        return BenchCandidate(name=name, call=call, batch=batch, threads=threads, device=device)


def test_a_steady_machine():
    machine = Machine()
    result = measure(
        [machine.candidate("engine", 2.0, batch=4), machine.candidate("eager", 5.0, batch=4)],
        QUICK,
        clocks=machine.clocks,
    )
    engine, eager = result.latencies
    assert (engine.name, engine.threads, engine.device, engine.batch) == ("engine", 1, "cpu", 4)
    assert engine.mean == engine.p50 == engine.p90 == engine.p95 == engine.p99 == 2.0
    assert engine.throughput == pytest.approx(4 / 0.002)
    assert engine.cov == 0
    assert eager.p50 == 5.0
    (ratio,) = result.ratios
    assert (ratio.name, ratio.baseline, ratio.batch) == ("engine", "eager", 4)
    assert ratio.median == ratio.p10 == ratio.p90 == 2.5
    assert ratio.rounds >= 8
    assert sum(eager.samples) >= 200
    assert not [w for w in result.warnings if "vary" in w]
    assert from_json(BenchRecord, to_json(result)) == result


def test_percentiles_and_their_order():
    machine = Machine()
    times = itertools.cycle([1.0] * 89 + [2.0] * 8 + [10.0] * 3)
    latency = measure(
        [machine.candidate("engine", times)], BenchOptions(min_seconds=3), clocks=machine.clocks
    ).latencies[0]
    assert latency.p50 == 1.0
    assert latency.p90 == 2.0
    assert latency.p95 == 2.0
    assert latency.p99 == 10.0
    assert latency.mean == pytest.approx(1.35, rel=0.03)


def test_a_noisy_machine_is_warned_of():
    machine = Machine()
    jitter = iter(np.random.default_rng(0).normal(10, 1, 100_000).clip(5).tolist())
    result = measure([machine.candidate("engine", jitter)], BenchOptions(), clocks=machine.clocks)
    assert result.latencies[0].cov == pytest.approx(0.1, rel=0.2)
    assert any(w.startswith("engine, batch 1: latencies vary by ") and "limit 2.5%" in w for w in result.warnings)


def test_jitter_below_the_limit_is_not_warned_of():
    machine = Machine()
    jitter = iter(np.random.default_rng(0).normal(10, 0.1, 100_000).tolist())
    assert measure([machine.candidate("engine", jitter)], BenchOptions(), clocks=machine.clocks).warnings == ()


def test_medians_have_intervals_that_hold_their_spread():
    machine = Machine()
    jitter = iter(np.random.default_rng(0).normal(10, 1, 100_000).clip(5).tolist())
    result = measure(
        [machine.candidate("engine", jitter), machine.candidate("eager", 20.0)], BenchOptions(), clocks=machine.clocks
    )
    low, high = result.latencies[0].interval
    assert low < result.latencies[0].p50 < high
    assert 0.05 < high - low < 0.6  # of some 300 calls that vary by 1 ms: 2 * 1.25 / sqrt(300) = 0.14 each side
    assert result.latencies[1].interval == (20.0, 20.0)
    (ratio,) = result.ratios
    assert ratio.interval[0] < 2.0 < ratio.interval[1]
    few = measure([machine.candidate("engine", 9000.0)], BenchOptions(max_seconds=10), clocks=machine.clocks)
    assert few.latencies[0].interval is None  # three rounds


def test_the_machine_is_watched_by_work_of_its_own():
    work = BenchCandidate(name="engine", call=lambda: sum(range(20_000)), batch=1, threads=1, device="cpu", sha256="ab")
    result = measure([work], BenchOptions(warmup_seconds=0.0, min_seconds=0.1, min_rounds=7, slice_seconds=0.005))
    noise = result.noise
    assert noise.runs >= 7
    assert 0.05 < noise.p50 < 100
    assert noise.slowest >= 1
    assert noise_line(noise).startswith("machine noise: SHA-256 of 1 MiB on one thread, once a round: p50 ")
    assert result.latencies[0].sha256 == "ab"
    machine = Machine()  # whose clock moves in calls only: nothing was seen, and nothing is claimed
    assert measure([machine.candidate("engine", 1.0)], QUICK, clocks=machine.clocks).noise is None


def test_few_samples_are_warned_of():
    machine = Machine()
    slow = measure([machine.candidate("engine", 400.0)], BenchOptions(), clocks=machine.clocks)
    assert slow.warnings == (
        "engine, batch 1: p99 of 20 samples is hardly more than the slowest call; 100 or more tell",
    )


def test_drift_cancels_out_of_the_ratio():
    """The machine slows down to a third during the run; both are hit alike, and the ratio stays."""
    machine = Machine()

    def slowing(ms: float) -> Iterator[float]:
        while True:
            yield ms * (1 + 2 * min(1.0, machine.wall / (2000 * MS)))

    result = measure(
        [machine.candidate("engine", slowing(2.0)), machine.candidate("eager", slowing(6.0))],
        BenchOptions(min_seconds=1.0, warmup_seconds=0.01),
        clocks=machine.clocks,
    )
    assert result.ratios[0].median == pytest.approx(3.0, rel=0.01)
    assert result.latencies[0].cov > 0.2


def test_everyone_goes_first_and_last_in_turn():
    machine = Machine()
    names = ("a", "b", "c")
    measure(
        [machine.candidate(n, 20.0) for n in names],
        BenchOptions(warmup_seconds=0.0, slice_seconds=0.02),
        clocks=machine.clocks,
    )
    rounds = [tuple(machine.calls[i : i + 3]) for i in range(9, len(machine.calls), 3)]  # nine warm-up calls
    assert all(set(turn) == set(names) for turn in rounds)
    assert {turn[0] for turn in rounds} == {turn[-1] for turn in rounds} == set(names)
    assert len({*rounds[:6]}) == 6


def test_the_first_call_of_a_turn_finds_cold_caches_and_is_not_recorded():
    machine = Machine()

    def cooled(name: str) -> Iterator[float]:
        while True:
            yield 1.0 if machine.calls[-1:] == [name] else 6.0

    candidates = [machine.candidate(n, cooled(n)) for n in ("engine", "eager")]
    result = measure(candidates, BenchOptions(warmup_seconds=0.1), clocks=machine.clocks)
    assert [latency.p99 for latency in result.latencies] == [1.0, 1.0]


def test_cpu_time_sees_through_a_busy_machine():
    """Others take two thirds of the wall time of the engine's calls."""
    machine = Machine()
    result = measure(
        [machine.candidate("engine", 6.0, cpu=1 / 3), machine.candidate("eager", 4.0)], QUICK, clocks=machine.clocks
    )
    assert result.ratios[0].median == pytest.approx(2.0)
    assert "CPU time of the calling thread" in result.method


def test_a_gpu_engine_is_not_compared_with_a_cpu_baseline():
    machine = Machine()
    candidates = [machine.candidate("engine", 1.0, device="cuda:0"), machine.candidate("eager", 4.0)]
    assert measure(candidates, QUICK, clocks=machine.clocks).ratios == ()


@pytest.mark.parametrize("change", [{"threads": 2}, {"workers": 2}])
def test_otherwise_ratios_use_wall_time(change):
    machine = Machine()
    candidates = [machine.candidate("engine", 6.0, cpu=1 / 3, **change), machine.candidate("eager", 4.0)]
    result = measure(candidates, QUICK, clocks=machine.clocks)
    assert result.ratios[0].median == pytest.approx(4 / 6)
    assert "(wall time, median of the turn)" in result.method
    assert any("set to one thread" in w for w in result.warnings) == ("workers" in change)


def test_a_stolen_thread_is_told_with_the_variation():
    machine = Machine()
    result = measure([machine.candidate("engine", itertools.cycle([5.0, 9.0]), cpu=0.5)], QUICK, clocks=machine.clocks)
    assert any("its thread ran 50% of the wall time" in w for w in result.warnings)


def test_only_equal_batches_are_compared():
    machine = Machine()
    result = measure(
        [machine.candidate(n, 2.0, batch=b) for b in (1, 8) for n in ("engine", "eager", "naive")],
        QUICK,
        clocks=machine.clocks,
    )
    assert [(r.name, r.baseline, r.batch) for r in result.ratios] == [
        ("engine", "eager", 1), ("engine", "naive", 1), ("engine", "eager", 8), ("engine", "naive", 8),
    ]  # fmt: skip


def test_the_record_stays_small_and_says_so():
    machine = Machine()
    latency = measure([machine.candidate("engine", 0.1)], BenchOptions(min_seconds=1), clocks=machine.clocks).latencies[
        0
    ]
    assert len(latency.samples) == KEPT_SAMPLES
    assert latency.note.startswith("500 of 10")
    assert f"500 of {latency.calls} " in latency.note


def test_a_slow_baseline_ends_the_rounds():
    machine = Machine()
    options = BenchOptions(min_seconds=3, max_seconds=10, min_rounds=1000)
    measure([machine.candidate("engine", 1.0), machine.candidate("eager", 2000.0)], options, clocks=machine.clocks)
    assert machine.calls.count("eager") == 3 + 5
    machine = Machine()
    measure([machine.candidate("eager", 9000.0)], BenchOptions(max_seconds=10), clocks=machine.clocks)
    assert machine.calls.count("eager") == 3 + 3


def test_warm_up_goes_by_time():
    machine = Machine()
    measure(
        [machine.candidate("engine", 10.0)], BenchOptions(warmup_seconds=0.5, slice_seconds=0.01), clocks=machine.clocks
    )
    assert len(machine.calls) == 50 + 300


def test_the_method_says_how():
    machine = Machine()
    candidates = [machine.candidate("engine", 2.0, threads=0), machine.candidate("eager", 50.0)]
    method = measure(candidates, QUICK, clocks=machine.clocks).method
    assert "Warm-up 0.01 s each" in method
    assert "engine (batch 1) 5, eager (batch 1) 1" in method
    assert "threads: 1, default" in method


def broken() -> None:
    raise ValueError("no")


def unavailable() -> None:
    raise BackendUnavailableError("no device")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (broken, BenchmarkError, "engine failed while it was timed: ValueError: no"),
        (unavailable, BackendUnavailableError, "no device"),
    ],
)
def test_a_candidate_that_fails(call: Callable[[], None], error, message):
    candidate = BenchCandidate(name="engine", call=call, batch=1, threads=1, device="cpu")
    with pytest.raises(error, match=message):
        measure([candidate], QUICK)
    assert gc.isenabled()


def test_candidates_that_cannot_be_told_apart():
    machine = Machine()
    with pytest.raises(BenchmarkError, match="expected at least one"):
        measure([], QUICK)
    with pytest.raises(BenchmarkError, match="each \\(name, batch\\) once"):
        measure([machine.candidate("a", 1.0), machine.candidate("a", 1.0)], QUICK, clocks=machine.clocks)


def test_a_call_below_the_clock():
    machine = Machine()
    with pytest.raises(BenchmarkError, match="no measurable time"):
        measure([machine.candidate("engine", 0.0)], BenchOptions(warmup_seconds=0.0), clocks=machine.clocks)


def test_garbage_collection_is_off_while_timing():
    seen = []
    candidate = BenchCandidate(name="a", call=lambda: seen.append(gc.isenabled()), batch=1, threads=1, device="cpu")
    measure([candidate], BenchOptions(warmup_seconds=0.0, min_seconds=0.0, min_rounds=3, slice_seconds=0.0))
    assert set(seen) == {False}
    assert gc.isenabled()


def test_four_times_the_work_takes_longer():
    data = np.random.default_rng(0).standard_normal(20_000)

    def work(times: int) -> Callable[[], None]:
        return lambda: [np.sort(data) for _ in range(times)] and None

    def candidate(name: str, times: int) -> BenchCandidate:
        return BenchCandidate(name=name, call=work(times), batch=1, threads=1, device="cpu")

    options = BenchOptions(warmup_seconds=0.1, min_seconds=0.4, min_rounds=10, slice_seconds=0.02)
    result = measure([candidate("engine", 1), candidate("four", 4), candidate("same", 1)], options)
    four, same = result.ratios
    assert 2.5 < four.median < 6
    assert 0.7 < same.median < 1.4
    assert "CPU time" in result.method


def test_time_by_module():
    profile = {
        "stages.2.blocks.5.mlp.fc1/Gemm": 30.0,
        "stages.2.blocks.5.norm/GroupNormalization": 10.0,
        "stages.2.blocks.4.mlp.fc1/Gemm": 20.0,
        "stem/Conv": 35.0,
        "ReorderInput": 5.0,
    }
    assert time_by_module(profile, 4) == pytest.approx(
        {"stages.2.blocks.5": 0.4, "stem": 0.35, "stages.2.blocks.4": 0.2, "(runtime)": 0.05}
    )
    assert list(time_by_module(profile, 2)) == ["stages.2", "stem", "(runtime)"]
    assert sum(time_by_module(profile, 1).values()) == pytest.approx(1)
    assert time_by_module({}, 3) == {}
    machine = Machine()
    result = measure([machine.candidate("engine", 1.0)], QUICK, clocks=machine.clocks, profile=profile, depth=2)
    assert result.modules["stages.2"] == pytest.approx(0.6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory_counts_what_is_freed_again():
    size = 64 << 20
    _, high = peak_memory_of(lambda: np.ones(size // 8).sum())
    assert high == pytest.approx(size, rel=0.1)
    _, low = peak_memory_of(lambda: 1)
    assert low < size / 10  # the earlier peak was reset


def test_peak_memory_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(bench, "_reset_high_water", lambda: False)
    assert peak_memory_of(lambda: "result") == ("result", 0)


class Timer:
    """Half of a call's wall time is the device's."""

    name, note = "", "device time"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def call(self) -> int:
        self.machine.wall += 4 * MS
        return 2 * MS

    def warnings(self) -> tuple[str, ...]:
        return ("the clock moved",)

    def findings(self) -> str:
        return "enqueue p50 0.1 ms"


def test_a_timer_of_a_device_replaces_the_wall_clock():
    machine = Machine()
    timer = Timer(machine)
    engine = BenchCandidate(
        name="engine", call=timer.call, batch=4, threads=1, device="cuda:0", timer=timer, note=timer.note
    )
    host = machine.candidate("engine, from the host", 5.0, batch=4, device="cuda:0")
    record = measure([engine, host], QUICK, clocks=machine.clocks)
    on_device, from_host = record.latencies
    assert (on_device.p50, from_host.p50) == (2.0, 5.0)
    assert on_device.throughput == pytest.approx(4 / 0.002)
    assert on_device.note.startswith("device time; enqueue p50 0.1 ms")
    assert "engine, batch 4: the clock moved" in record.warnings
    assert record.ratios[0].median == 2.5
    assert "of a candidate on a device: the time that its note names" in record.method
    assert "on a device" not in measure([host], QUICK, clocks=machine.clocks).method
