"""Whether an NVIDIA GPU can be used here, asked of the driver itself: no CUDA package is needed to know."""

from __future__ import annotations

import ctypes
import functools
import sys
import uuid
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The first visible GPU: its name, compute capability (89 for 8.9), and the UUID that tools know it by."""

    name: str
    sm: int
    uuid: str = ""


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
    return Gpu(
        name=name.value.decode(errors="replace"), sm=capability[0] * 10 + capability[1], uuid=_uuid(driver, device)
    )


def sm_here() -> tuple[int, ...]:
    """Return the first GPU's compute capability (89 for 8.9); empty without a GPU."""
    gpu = first_gpu()
    return (gpu.sm,) if gpu else ()


def _uuid(driver: ctypes.CDLL, device: ctypes.c_int) -> str:
    """Ask for the UUID: CUDA's number of a GPU and nvidia-smi's differ under ``CUDA_VISIBLE_DEVICES``."""
    value = (ctypes.c_ubyte * 16)()
    ask = getattr(driver, "cuDeviceGetUuid_v2", None) or getattr(driver, "cuDeviceGetUuid", None)
    if ask is None or ask(value, device):
        return ""
    return f"GPU-{uuid.UUID(bytes=bytes(value))}"
