"""What stays float32 in a reduced-precision graph, as data: each entry with its reason.

The rules err on the side of float32 where that is free: TensorRT computes the statistics of norms and softmax in
float32 anyway and fuses the casts, so that the kernel count does not change (measured with TensorRT-RTX builds,
``tests/precision/test_precision_rtx.py``). Matrix products and convolutions, where the time goes, are never listed
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx

from deploy.records import Precision, Target

NORM = "normalisation: mean and variance leave float16's range long before the values do"
SOFTMAX = "softmax: exponentials and their sum; fused attention keeps them float32 as well"
SUM = "reduction: a sum or a norm over many values overflows or loses its small terms"
LOG = "logarithm: its argument near 0 or 1 has few bits left (inverse sigmoid, log-size bias)"
POWER = "power: a square leaves float16 at 256"
ANGLE = "angle: arguments of position encodings reach hundreds, where float16 steps by 0.25"
SELECT = "selection: rounded scores tie, and ties reorder queries and tokens"
BOX = "boxes: coordinates need more than 11 bits"
INDEX = "index arithmetic: whole numbers beyond 2048 are not exact in float16"
GRID = "sampling grid: coordinates need more than 11 bits; only the finished grid is rounded"
SCATTER = "accumulation: a scatter that adds has no float16 kernel in ONNX Runtime"
STRUCTURE = "control flow: the bodies are left as they are"
SCHEMA = "type: the operator does not take {dtype} at opset {opset}"
UNKNOWN = "type: no ONNX schema says what the operator takes"
RANGE = "range: a value beyond {dtype}'s largest, {limit:g}"
TINY = "range: a constant that becomes zero in {dtype}"
ASKED = "asked: typing.keep_fp32 {pattern!r}"
BETWEEN = "between float32 nodes: a cast down and up again would only lose bits"
FOLLOWS = "feeds float32 nodes only"

KEPT_OPS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "RMSNormalization", "LpNormalization"), NORM),
        **dict.fromkeys(("GroupNormalization", "MeanVarianceNormalization", "LRN"), NORM),
        **dict.fromkeys(("Softmax", "LogSoftmax"), SOFTMAX),
        **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"), SUM),
        **dict.fromkeys(("ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "CumSum"), SUM),
        "Log": LOG,
        "Pow": POWER,
        **dict.fromkeys(("Sin", "Cos", "Tan"), ANGLE),
        **dict.fromkeys(("TopK", "ArgMax", "ArgMin"), SELECT),
        **dict.fromkeys(("RoiAlign", "NonMaxSuppression"), BOX),
        "Range": INDEX,
    }
)
"""Operators that stay float32 wherever they are."""

FLOAT32_INSIDE: Mapping[Target, frozenset[str]] = MappingProxyType(
    {Target.TENSORRT: frozenset({"GroupNormalization"}), Target.ONNXRUNTIME: frozenset()}
)
"""Norms that are low after all: the runtime has the operator and computes its statistics in float32 (stash_type 1).

TensorRT maps GroupNormalization to one kernel. Float32 around it changes nothing in the values (what it reads was
rounded before, what it writes is rounded after) nor in the kernel count (RIFormer-S12 at opset 21: 93 and 93), but 51
of the 93 kernels then read float32, twice the traffic; in float16 one does. ONNX Runtime expands the operator.
"""

ACCUMULATING = frozenset({"ScatterElements", "ScatterND"})
"""Kept when their ``reduction`` is not ``none``."""

PINNED: Mapping[str, frozenset[int]] = MappingProxyType({"Resize": frozenset({1, 2})})
"""Input slots that stay float32 in a low node: Resize's region and scales are coordinates, not data."""

UNTYPED: Mapping[str, frozenset[int]] = MappingProxyType(
    {"Cast": frozenset({0}), "Shape": frozenset({0}), "Size": frozenset({0}), "EyeLike": frozenset({0})}
)
"""Input slots that take whatever type the tensor has, so that no cast is ever put before them."""

OUTPUT_TYPE: Mapping[str, str] = MappingProxyType({"Cast": "to", "ConstantOfShape": "value", "EyeLike": "dtype"})
"""Operators whose output type is an attribute: the attribute is rewritten with the type."""

MOVEMENT = frozenset(
    {
        "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather", "GatherElements",
        "GatherND", "Split", "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
    }
)  # fmt: skip
"""Operators whose outputs hold values of their first input and nothing else."""

ELEMENTWISE = MOVEMENT | frozenset(
    {
        "Abs", "Add", "And", "Ceil", "Clip", "Concat", "Div", "Equal", "Erf", "Exp", "Floor", "Greater",
        "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Pad", "Pow",
        "ReduceMax", "ReduceMin",
        "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sqrt", "Sub", "Sum", "Tanh", "Where",
    }
)  # fmt: skip
"""Operators that a path rule may walk through: each output value comes from one place, no sum is taken over many."""

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})
"""Where a walk up the score path ends: the product that makes the scores belongs to it."""

REDUCTIONS = frozenset(op for op, reason in KEPT_OPS.items() if op.startswith("Reduce"))

DTYPE: Mapping[Precision, int] = MappingProxyType(
    {Precision.FP16: onnx.TensorProto.FLOAT16, Precision.BF16: onnx.TensorProto.BFLOAT16}
)
"""ONNX element type of a low precision."""

LIMIT: Mapping[Precision, float] = MappingProxyType({Precision.FP16: 65504.0, Precision.BF16: 3.3895313892515355e38})
"""Largest finite value."""

SMALLEST: Mapping[Precision, float] = MappingProxyType({Precision.FP16: 2.0**-24, Precision.BF16: 2.0**-133})
"""Smallest positive value, a subnormal; half of it and less becomes zero."""

NORMAL: Mapping[Precision, float] = MappingProxyType({Precision.FP16: 2.0**-14, Precision.BF16: 2.0**-126})
"""Smallest positive value with full precision."""

HEADROOM = 4.0
"""An activation above ``LIMIT / HEADROOM`` is warned about: other images may go further than the ones measured."""

NAME: Mapping[Precision, str] = MappingProxyType({Precision.FP16: "float16", Precision.BF16: "bfloat16"})
"""What messages call the type."""
