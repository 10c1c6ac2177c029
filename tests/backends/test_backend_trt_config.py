"""What the builder is told, held against the recorded names of both TensorRT versions; no TensorRT runs here."""

from __future__ import annotations

import signal
import stat
import sys
import threading

import pytest
from recorded_api import SURFACES, RecordedModule

from deploy.backends.base import BuildOptions
from deploy.backends.native import signals_deferred
from deploy.backends.timing_cache import TimingCache, cache_file
from deploy.backends.trt_config import (
    add_profiles,
    choose_profile,
    configure,
    described,
    monitor,
    ranges_of,
)
from deploy.candidates import build_options
from deploy.errors import EngineBuildError
from deploy.records import Batch
from deploy.resolve import resolve_recipe

ranges = [Batch.parse(text) for text in ("1", "1:8:32", "16:16:64")]


@pytest.fixture(params=SURFACES, ids=lambda path: path.stem)
def trt(request):
    return RecordedModule(request.param)


def flags(config) -> dict[str, str]:
    return {call[1].removeprefix("BuilderFlag."): call[0] for call in config.calls if call[0].endswith("_flag")}


def test_the_defaults_are_stated(trt):
    config = trt.new("IBuilderConfig")
    configure(trt, config, BuildOptions())
    assert flags(config) == {"TF32": "clear_flag"}  # TensorRT's own default is on
    assert config.values == {
        "profiling_verbosity": "ProfilingVerbosity.DETAILED",
        "builder_optimization_level": 3,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tf32": True}, {"TF32": "set_flag"}),
        ({"version_compatible": True}, {"TF32": "clear_flag", "VERSION_COMPATIBLE": "set_flag"}),
        ({"refit": True}, {"TF32": "clear_flag", "REFIT": "set_flag"}),
        ({"strip": True}, {"TF32": "clear_flag", "STRIP_PLAN": "set_flag", "REFIT_IDENTICAL": "set_flag"}),
        ({"strip": True, "refit": True}, {"TF32": "clear_flag", "STRIP_PLAN": "set_flag", "REFIT": "set_flag"}),
    ],
)
def test_each_option_sets_its_flags(trt, options, expected):
    config = trt.new("IBuilderConfig")
    configure(trt, config, BuildOptions(**options))
    assert flags(config) == expected


def test_sizes_and_levels(trt):
    config = trt.new("IBuilderConfig")
    configure(trt, config, BuildOptions(level=5, workspace=1 << 32, hardware="ampere_plus"))
    assert ("set_memory_pool_limit", "MemoryPoolType.WORKSPACE", 1 << 32) in config.calls
    assert config.values["builder_optimization_level"] == 5
    assert config.values["hardware_compatibility_level"] == "HardwareCompatibilityLevel.AMPERE_PLUS"


def test_the_stand_in_refuses_what_11_dropped():
    newest = RecordedModule(SURFACES[-1])
    with pytest.raises(AttributeError):
        _ = newest.BuilderFlag.FP16
    with pytest.raises(AttributeError, match="int8_calibrator"):
        newest.new("IBuilderConfig").int8_calibrator = None
    assert RecordedModule(SURFACES[0]).BuilderFlag.FP16


def network(trt, *shapes):
    tensors = []
    for number, shape in enumerate(shapes):
        tensor = trt.new("ITensor")
        object.__setattr__(tensor, "shape", shape)
        object.__setattr__(tensor, "name", f"in{number}")
        tensors.append(tensor)
    made = trt.new("INetworkDefinition", get_input=lambda i: tensors[i])
    object.__setattr__(made, "num_inputs", len(tensors))
    return made


def test_each_range_is_a_profile_for_every_dynamic_input(trt):
    profiles = []
    builder = trt.new(
        "Builder", create_optimization_profile=lambda: profiles.append(trt.new("IOptimizationProfile")) or profiles[-1]
    )
    config = trt.new("IBuilderConfig")
    add_profiles(builder, config, network(trt, (-1, 3, 8, 8), (-1, 2), (5,)), (Batch(), Batch(min=1, opt=8, max=32)))
    assert [profile.calls for profile in profiles] == [
        [("set_shape", "in0", (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)), ("set_shape", "in1", (1, 2), (1, 2), (1, 2))],
        [
            ("set_shape", "in0", (1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8)),
            ("set_shape", "in1", (1, 2), (8, 2), (32, 2)),
        ],
    ]
    assert [call[0] for call in config.calls] == ["add_optimization_profile"] * 2


def test_a_fixed_graph_has_no_profile_and_refuses_a_range(trt):
    config = trt.new("IBuilderConfig")
    add_profiles(trt.new("Builder"), config, network(trt, (4, 3, 8, 8)), (Batch(min=4, opt=4, max=4),))
    assert config.calls == []
    with pytest.raises(EngineBuildError, match=r"1:8:32, but the graph is fixed: in0 \[4, 3, 8, 8\]"):
        add_profiles(trt.new("Builder"), config, network(trt, (4, 3, 8, 8)), (Batch(min=1, opt=8, max=32),))


@pytest.mark.parametrize(("size", "chosen"), [(1, 0), (2, 1), (8, 1), (16, 2), (20, 2), (64, 2), (65, 0)])
def test_a_batch_runs_with_the_profile_that_is_tuned_nearest(size, chosen):
    assert choose_profile(tuple(ranges), size) == chosen


def test_profiles_survive_the_record():
    options = BuildOptions(profiles=tuple(ranges), workspace=3 << 29, tf32=True)
    told = described(options)
    assert ranges_of(told) == options.ranges
    assert (told["workspace"], told["tf32"], told["refit"]) == ("1536 MiB", "True", "no")
    assert described(BuildOptions(strip=True))["refit"] == "identical weights only"


def test_progress_is_told_by_phase_and_a_cancelled_build_ends(trt):
    told, stop = [], []
    watch = monitor(trt, lambda *event: told.append(event), lambda: bool(stop))
    watch.phase_start("outer", None, 2)
    watch.phase_start("inner", "outer", 3)
    assert watch.step_complete("inner", 0)
    watch.step_complete("inner", 2)  # the last step: told by the end of the phase
    watch.phase_finish("inner")
    watch.step_complete("outer", 0)
    stop.append(True)
    assert not watch.step_complete("outer", 1)
    watch.phase_finish("outer")
    assert told == [
        ("outer", 0, 2), ("inner", 0, 3), ("inner", 1, 3), ("inner", 3, 3), ("outer", 1, 2), ("outer", 2, 2),
    ]  # fmt: skip


def test_nothing_leaves_a_callback(trt):
    def broken(phase, done, steps):
        raise BrokenPipeError

    watch = monitor(trt, broken, lambda: False)
    watch.phase_start("outer", None, 2)
    assert watch.step_complete("outer", 0)
    watch.phase_finish("outer")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_the_native_call(number):
    def ended(got, frame):
        raise KeyboardInterrupt(got)

    before = signal.signal(number, ended)
    seen = []

    def native_call():
        with signals_deferred() as cancelled:
            seen.append(cancelled())
            signal.raise_signal(number)
            seen.append(cancelled())

    try:
        with pytest.raises(KeyboardInterrupt):
            native_call()
        assert signal.getsignal(number) is ended
    finally:
        signal.signal(number, before)
    assert seen == [False, True]


def test_signals_are_left_alone_in_other_threads():
    seen = []

    def work():
        with signals_deferred() as cancelled:
            seen.append(cancelled())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


class Cache:
    """A timing cache that is its text."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def combine(self, other, ignore_mismatch) -> None:
        self.blob += b"+" + other.blob

    def serialize(self) -> bytes:
        return self.blob


def config_of(trt, made=lambda blob: Cache(blob), after=b"timed"):
    return trt.new(
        "IBuilderConfig",
        create_timing_cache=made,
        set_timing_cache=lambda cache, ignore: True,
        get_timing_cache=lambda: Cache(after),
    )


def test_timings_are_kept_by_version_and_device_and_combined(trt, tmp_path):
    path = cache_file(tmp_path / "new" / "folder", trt.__version__, "NVIDIA RTX 4090", 89)
    assert path.name == f"tensorrt-{trt.__version__}-sm89-nvidia-rtx-4090.cache"
    cache = TimingCache(path)
    cache.attach(config_of(trt))
    assert cache.statement == f"{path.name}, new"
    cache.save(config_of(trt))
    assert path.read_bytes() == b"timed"
    again = TimingCache(path)
    again.attach(config_of(trt))
    assert again.statement == f"{path.name}, 5 bytes loaded"
    again.save(config_of(trt, after=b"more"))
    assert path.read_bytes() == b"more+timed"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_cache_is_begun_anew(trt, tmp_path):
    path = tmp_path / "a.cache"
    path.write_bytes(b"junk")
    cache = TimingCache(path)
    cache.attach(config_of(trt, made=lambda blob: None if blob == b"junk" else Cache(blob)))
    assert cache.statement == "a.cache, damaged, begun anew"


def test_a_cache_that_cannot_be_written_never_stops_a_build(trt, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = TimingCache(tmp_path / "file" / "a.cache")
    cache.attach(config_of(trt))
    cache.save(config_of(trt))
    assert "not saved: File exists" in cache.statement
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)


def test_without_a_file_the_builder_is_left_alone(trt):
    config = config_of(trt)
    cache = TimingCache(None)
    cache.attach(config)
    cache.save(config)
    assert config.calls == []
    assert cache.statement == "off"


def test_the_cache_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFDEPLOY_CACHE", str(tmp_path))
    recipe = resolve_recipe("riformer", {"variant": ("--variant", "tiny")})
    assert build_options(recipe).timing_cache == tmp_path / "tensorrt-timing"
    off = resolve_recipe("riformer", {"variant": ("--variant", "tiny"), "engine.timing_cache": ("", False)})
    assert build_options(off).timing_cache is None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_that_the_process_ignores_cancels_nothing():
    """As under nohup, or behind ``&`` in a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_deferred() as cancelled:
            signal.raise_signal(signal.SIGINT)
            assert not cancelled()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
