"""Whether this CPU multiplies 8-bit integers without overflow in between.

ONNX Runtime's kernels for x86 without VNNI add pairs of products of an unsigned and a signed byte in 16 bits
(``vpmaddubsw``), and 255 * 127 * 2 is twice what fits: large values saturate, and accuracy is lost without a word.
Weights of 7 bits (255 * 64 * 2 = 32640) cannot overflow.
"""

from __future__ import annotations

import platform
from collections.abc import Set

from deploy.cpu import cpu_flags

DOT_PRODUCTS = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX", "asimddp": "NEON dot product"}
_X86 = ("x86_64", "amd64", "i686")


def dot_product(flags: Set[str] | None = None) -> str:
    """Name the CPU's 8-bit dot product that accumulates in 32 bits; empty where it has none, or does not say.

    Args:
        flags: Feature flags; default: this CPU's.
    """
    found = cpu_flags() if flags is None else flags
    return next((name for flag, name in DOT_PRODUCTS.items() if flag in found), "")


def saturates(flags: Set[str] | None = None, machine: str | None = None) -> bool:
    """Whether products of full-range bytes may overflow in ONNX Runtime's kernels on this, or the named, CPU."""
    return (machine or platform.machine()).lower() in _X86 and not dot_product(flags)
