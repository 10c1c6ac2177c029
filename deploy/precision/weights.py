"""Weights in a low precision: rounded to the nearest, refused beyond its range, counted where they lose their value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from deploy.errors import PrecisionError
from deploy.precision.policy import DTYPE, LIMIT, NAME, NORMAL
from deploy.records import Precision

_SHOWN = 5
_FIRST_NORMAL = {Precision.FP16: 0x0400, Precision.BF16: 0x0080}  # bit patterns
_INFINITY = {Precision.FP16: 0x7C00, Precision.BF16: 0x7F80}
_MATERIAL = 0.01  # share of a tensor's weights; below it, what is lost is far under the tensor's own rounding error


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What rounding did to one tensor: how many of its non-zero weights became zero, or subnormal (few bits left)."""

    name: str
    size: int
    zeros: int
    subnormal: int
    beyond: float  # largest absolute weight where it does not fit, else 0


def lowered(tensor: TensorProto, name: str, low: Precision) -> tuple[TensorProto, Loss]:
    """Round a float32 tensor to the nearest (ties to even) low value; what lies beyond becomes infinite."""
    values = numpy_helper.to_array(tensor)
    bits = rounded_bits(values, low)
    made = TensorProto(name=name, data_type=DTYPE[low], dims=tensor.dims, raw_data=bits.astype("<u2").tobytes())
    size = bits & np.uint16(0x7FFF)  # without the sign, bit patterns are in the order of the values
    left = int(np.count_nonzero(size))
    return made, Loss(
        name=tensor.name,
        size=values.size,
        zeros=int(np.count_nonzero(values)) - left,
        subnormal=left - int(np.count_nonzero(size >= _FIRST_NORMAL[low])),
        beyond=_beyond(values, size, low),
    )


def _beyond(values: NDArray[np.float32], size: NDArray[np.uint16], low: Precision) -> float:
    """Largest finite weight that became infinite, or 0."""
    if size.size == 0 or size.max() < _INFINITY[low]:
        return 0.0
    lost = np.abs(values[(size == _INFINITY[low]) & np.isfinite(values)])
    return float(lost.max()) if lost.size else 0.0


def widened(tensor: TensorProto) -> TensorProto:
    """Return a low tensor in float32, value for value."""
    low = next(p for p, kind in DTYPE.items() if kind == tensor.data_type)
    stored = tensor.raw_data or np.asarray(tensor.int32_data, dtype="<u2").tobytes()
    values = to_float32(np.frombuffer(stored, dtype="<u2").astype(np.uint16), low)
    return TensorProto(
        name=tensor.name, data_type=TensorProto.FLOAT, dims=tensor.dims, raw_data=values.astype("<f4").tobytes()
    )


def rounded_bits(values: NDArray[np.float32], low: Precision) -> NDArray[np.uint16]:
    """Bit patterns of float32 values rounded to the low type."""
    if low is Precision.FP16:
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(values, dtype=np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # nearest, ties to even: bfloat16 is the upper half
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_float32(bits: NDArray[np.uint16], low: Precision) -> NDArray[np.float32]:
    """Values of low bit patterns."""
    if low is Precision.FP16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def refuse_beyond(losses: Iterable[Loss], low: Precision) -> None:
    """Refuse weights that the low type cannot hold; of scalars only bounds of Clip get here, and they may be infinite.

    Raises:
        PrecisionError: some weights are beyond its range; the message names their tensors.
    """
    beyond = [loss for loss in losses if loss.beyond and loss.size > 1]
    if not beyond:
        return
    named = "; ".join(f"{loss.name} (largest {loss.beyond:.6g})" for loss in beyond[:_SHOWN])
    rest = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    raise PrecisionError(
        f"weights beyond {NAME[low]}'s range of +-{LIMIT[low]:g}: {named}{rest}",
        hint="use --bf16, or keep these layers in float32: --set 'typing.keep_fp32=[\"<module path>\"]'",
    )


def loss_warning(losses: Iterable[Loss], low: Precision) -> str | None:
    """Say in one sentence how many weights lost their value, when in some tensor that is more than one in a hundred."""
    hit = [loss for loss in losses if loss.zeros + loss.subnormal > _MATERIAL * loss.size]
    if not hit:
        return None
    worst = max(hit, key=lambda loss: (loss.zeros + loss.subnormal) / loss.size)
    zeros, subnormal, size = (sum(getattr(h, f) for h in hit) for f in ("zeros", "subnormal", "size"))
    lost = f"{zeros} become zero in {NAME[low]} and " if zeros else ""
    return (
        f"of {size} weights in {len(hit)} tensor(s) {lost}{subnormal} become subnormal in {NAME[low]} "
        f"(below {NORMAL[low]:.2g}, few bits left); worst: {worst.name}"
    )
