"""What records are made of: the decorator, the names of stages, targets and precisions, files, tensors, batches."""

from __future__ import annotations

import enum
import typing
from dataclasses import dataclass
from typing import TypeVar

from deploy.errors import RecipeError

T = TypeVar("T")

if typing.TYPE_CHECKING:  # type checkers know a dataclass by its decorator's name only
    from typing_extensions import dataclass_transform

    @dataclass_transform(kw_only_default=True, frozen_default=True)
    def record(cls: type[T]) -> type[T]:
        """Make a frozen, keyword-only, slotted dataclass."""
else:
    record = dataclass(frozen=True, kw_only=True, slots=True)


class Stage(str, enum.Enum):
    """The stages of the road, in order."""

    MODEL = "model"
    TRACE = "trace"
    PASSES = "passes"
    PRECISION = "precision"
    ENGINE = "engine"
    PARITY = "parity"
    LATENCY = "latency"
    REPORT = "report"

    @property
    def order(self) -> int:
        """Position on the road, from 0."""
        return list(Stage).index(self)


class Target(str, enum.Enum):
    """The runtime family that a graph is lowered for; its forms are not interchangeable (docs/architecture.md)."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class Precision(str, enum.Enum):
    """What the network computes in; inputs and outputs stay float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"  # products in INT8; the rest in FP16 for TensorRT, in FP32 for ONNX Runtime
    FP8 = "fp8"  # products in FP8 (E4M3), the rest in FP16; TensorRT on SM 89 and newer

    @property
    def quantised(self) -> bool:
        """Whether it is written as scales in QuantizeLinear and DequantizeLinear, which need calibration."""
        return self in (Precision.INT8, Precision.FP8)


@record
class Artifact:
    """A file of the bundle: name relative to the bundle, content hash and size in bytes."""

    name: str
    sha256: str
    size: int


@record
class TensorSpec:
    """A graph input or output. A string in ``shape`` is a dynamic axis, e.g. ``"batch"``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@record
class Batch:
    """Batch sizes of an engine: fixed when ``min == opt == max``, else a range with the size to tune for."""

    min: int = 1
    opt: int = 1
    max: int = 1

    @property
    def dynamic(self) -> bool:
        """Whether more than one batch size runs."""
        return self.min != self.max

    @classmethod
    def parse(cls, text: str | int) -> Batch:
        """Read ``"4"`` or ``"1:8:32"`` (min:opt:max).

        Raises:
            RecipeError: not one or three positive whole numbers in ascending order.
        """
        parts = str(text).split(":")
        if len(parts) not in (1, 3) or not all(p.isascii() and p.isdigit() for p in parts):
            raise RecipeError(
                f"batch: got {text!r}, expected one number or min:opt:max", hint="--batch 4 or --batch 1:8:32"
            )
        low, opt, high = (int(p) for p in (parts * 3 if len(parts) == 1 else parts))
        if not 1 <= low <= opt <= high:
            raise RecipeError(f"batch: got {text!r}, expected 1 <= min <= opt <= max", hint="--batch 1:8:32")
        return cls(min=low, opt=opt, max=high)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}" if self.dynamic else str(self.opt)
