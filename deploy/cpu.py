"""What the CPU at hand can do: its vector and matrix extensions, as the system lists them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

# What the CPU kernels of ONNX Runtime, OpenVINO and oneDNN look for; names of /proc/cpuinfo.
CPU_FEATURES: Mapping[str, str] = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C (FP16 storage)", "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI (INT8)", "avx_vnni": "AVX-VNNI (INT8)", "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16", "amx_bf16": "AMX BF16", "amx_int8": "AMX INT8", "amx_fp16": "AMX FP16",
    "asimd": "NEON", "asimdhp": "NEON FP16", "asimddp": "NEON dot product (INT8)", "i8mm": "I8MM", "bf16": "BF16",
    "sve": "SVE",
}  # fmt: skip


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the CPU's feature flags; empty where the system does not list them."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def cpu_features() -> tuple[str, ...]:
    """Return what ``CPU_FEATURES`` calls the CPU's flags, in its order; empty where the system does not list them."""
    flags = cpu_flags()
    return tuple(label for flag, label in CPU_FEATURES.items() if flag in flags)


def usable_threads(asked: int) -> int:
    """Return a number of threads for this process: what was asked, else the cores that it may use.

    0, the runtime's own choice, where it may use all: runtimes count cores that a container does not have.
    """
    if asked or not hasattr(os, "sched_getaffinity"):
        return asked
    usable = len(os.sched_getaffinity(0))
    return 0 if usable == os.cpu_count() else usable
