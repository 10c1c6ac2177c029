"""Whether an NVIDIA GPU can be used here, asked of the driver itself: no CUDA package is needed to know."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The first visible GPU: its name and compute capability, e.g. 89 for 8.9."""

    name: str
    sm: int


@functools.cache
def first_gpu() -> Gpu | None:
    """Return the first GPU that the driver lets this process use, or ``None``; ``CUDA_VISIBLE_DEVICES`` counts."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name=name.value.decode(errors="replace"), sm=capability[0] * 10 + capability[1])
