"""What a GPU was doing before and after a measurement: clocks, temperature, power and why it slowed down.

Read through ``nvidia-smi``, which comes with every driver of a discrete GPU: no package has to be installed, and the
path from program to figures runs in the tests without a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from deploy.backends.gpu import Gpu

_FIELDS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw",
    "clocks_event_reasons.active",
)  # fmt: skip
_SECONDS = 20
_CLOCK_CHANGE = 0.02  # of the SM clock; below, two readings of a busy GPU differ as much
# Bits of NVML's clocks event reasons (nvml.h). Idle (0x1) and application clocks (0x2) slow nothing that was asked for.
_REASONS = {
    0x04: "software power cap", 0x08: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "hardware power brake", 0x100: "display clocks",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """One reading. Clocks in MHz, degrees Celsius, watts; ``None`` where the GPU does not tell."""

    driver: str
    sm_clock: int | None
    memory_clock: int | None
    max_clock: int | None
    temperature: int | None
    power: float | None
    reasons: int  # NVML's bits

    @property
    def throttled(self) -> tuple[str, ...]:
        """Why the clocks are lower than they could be."""
        return tuple(name for bit, name in _REASONS.items() if self.reasons & bit)

    def __str__(self) -> str:
        parts = (
            ("SM", self.sm_clock, "MHz"), ("memory", self.memory_clock, "MHz"), ("", self.temperature, "C"),
            ("", self.power, "W"),
        )  # fmt: skip
        told = [f"{name} {value:g} {unit}".strip() for name, value, unit in parts if value is not None]
        return ", ".join(told) or "not told"


def read_state(gpu: Gpu | None) -> GpuState | None:
    """Read a GPU's state; ``None`` without a GPU, without ``nvidia-smi``, or where it fails."""
    program = shutil.which("nvidia-smi")
    if gpu is None or program is None:
        return None
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    command += [f"--id={gpu.uuid}"] if gpu.uuid else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_state(done.stdout)


def parse_state(text: str) -> GpuState | None:
    """Read the first line that ``nvidia-smi`` printed; a field of ``[N/A]`` or ``[Not Supported]`` is ``None``."""
    values = [part.strip() for part in text.strip().split("\n")[0].split(",")]
    if len(values) != len(_FIELDS):
        return None
    driver, sm, memory, highest, temperature, power, reasons = values
    return GpuState(
        driver=driver,
        sm_clock=_whole(sm),
        memory_clock=_whole(memory),
        max_clock=_whole(highest),
        temperature=_whole(temperature),
        power=_number(power),
        reasons=_bits(reasons),
    )


def state_warnings(before: GpuState | None, after: GpuState | None) -> tuple[str, ...]:
    """Say what makes figures of this GPU not comparable: clocks that moved, throttling, a state that was not read."""
    if before is None or after is None:
        return ("the GPU's clocks and temperature could not be read (nvidia-smi): whether it throttled is unknown",)
    found = []
    if before.sm_clock and after.sm_clock:
        change = after.sm_clock / before.sm_clock - 1
        if abs(change) > _CLOCK_CHANGE:
            found.append(
                f"the SM clock went from {before.sm_clock} to {after.sm_clock} MHz ({change:+.0%}): lock it with "
                "nvidia-smi --lock-gpu-clocks to compare figures"
            )
    if reasons := dict.fromkeys((*before.throttled, *after.throttled)):
        found.append(f"the GPU was held back by: {', '.join(reasons)}")
    return tuple(found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(text: str) -> int | None:
    value = _number(text)
    return None if value is None else round(value)


def _bits(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 0
