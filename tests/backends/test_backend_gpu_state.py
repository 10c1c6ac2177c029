"""The GPU's state as nvidia-smi tells it: a program of that name is really run, its answers are written here."""

from __future__ import annotations

import sys

import pytest

from deploy.backends.gpu import Gpu
from deploy.backends.gpu_state import parse_state, read_state, state_warnings

GPU = Gpu(name="pretended", sm=89, uuid="GPU-12345678-1234-1234-1234-123456789abc")
BUSY = "580.65.06, 2520, 10501, 3105, 61, 287.35, 0x0000000000000000"


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Put a program named nvidia-smi on the path that notes its arguments and prints what it is told."""

    def install(text: str, code: int = 0):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
            f"print({text!r})\nsys.exit({code})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path / "asked"

    return install


def test_a_reading(answer):
    asked = answer(BUSY)
    state = read_state(GPU)
    assert state is not None
    assert (state.driver, state.sm_clock, state.temperature, state.power) == ("580.65.06", 2520, 61, 287.35)
    assert str(state) == "SM 2520 MHz, memory 10501 MHz, 61 C, 287.35 W"
    assert f"--id={GPU.uuid}" in asked.read_text()


def test_what_a_gpu_does_not_tell_is_left_out():
    state = parse_state("580.65.06, 1980, [N/A], [Not Supported], 40, [N/A], [N/A]")
    assert state is not None
    assert (state.memory_clock, state.power, state.reasons) == (None, None, 0)
    assert str(state) == "SM 1980 MHz, 40 C"


@pytest.mark.parametrize("text", ["", "No devices were found", "Unknown Error, 1"])
def test_an_answer_that_is_none(answer, text):
    answer(text)
    assert read_state(GPU) is None


def test_a_program_that_fails_or_is_missing(answer, monkeypatch, tmp_path):
    answer(BUSY, code=9)
    assert read_state(GPU) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert read_state(GPU) is None


def test_without_a_gpu_nothing_is_asked(answer):
    asked = answer(BUSY)
    assert read_state(None) is None
    assert not asked.exists()


def changed(**values):
    fields = dict(
        zip(("driver", "sm", "memory", "max", "temperature", "power", "reasons"), BUSY.split(", "), strict=True)
    )
    return parse_state(", ".join((fields | values).values()))


def test_a_steady_gpu_gives_no_warning():
    assert state_warnings(changed(), changed(sm="2505", temperature="63")) == ()


def test_clocks_that_moved_and_throttling_are_warned_of():
    clock, held = state_warnings(changed(), changed(sm="1890", reasons="0x0000000000000024"))
    assert "from 2520 to 1890 MHz (-25%)" in clock
    assert "nvidia-smi --lock-gpu-clocks" in clock
    assert held == "the GPU was held back by: software power cap, software thermal slowdown"


def test_an_idle_gpu_is_not_throttled():
    assert state_warnings(changed(reasons="0x1"), changed(reasons="0x1")) == ()


def test_a_state_that_nobody_could_read_is_warned_of():
    assert "unknown" in state_warnings(None, changed())[0]
