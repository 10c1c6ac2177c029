"""QuantizeLinear and DequantizeLinear in a graph, read and held against what a runtime takes.

TensorRT builds a graph whose Q/DQ it does not understand into something slower or worse without a word, or refuses it
with a node's name. So each style's rules are checked here, before a builder sees the file. Rules of TensorRT: NvInfer.h
(IQuantizeLayer, IDequantizeLayer), and what the parser of TensorRT-RTX 1.7 said to graphs that break them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploy.errors import PrecisionError
from deploy.precision.view import attribute
from deploy.records import Target

Q, DQ = "QuantizeLinear", "DequantizeLinear"
INTEGER = frozenset({TensorProto.INT8, TensorProto.UINT8})
FLOAT8 = frozenset({TensorProto.FLOAT8E4M3FN})
SMALLEST_NORMAL = 2.0**-14
"""Smallest float16 number with full precision: a scale below it loses digits when it becomes float16."""

_WEIGHT_AXIS = {"Conv": 0, "MatMul": 1}  # Gemm's follows transB
_READS_SHAPES = frozenset({"Shape", "Size"})
_SHOWN = 3


def quantised_products(model: ModelProto) -> dict[str, int]:
    """Return the products that read two dequantised tensors: node name -> type of the first, e.g. INT8."""
    makers = {output: node for node in model.graph.node for output in node.output}
    types = _types(model.graph)
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        sources = [makers.get(name) for name in node.input[:2]]
        if all(source is not None and source.op_type == DQ for source in sources):
            found[node.name] = _kind(sources[0], types)  # type: ignore[arg-type]
    return found


def lint(model: ModelProto, target: Target) -> None:
    """Refuse Q/DQ that the target's builder would refuse, or would quietly not run in integers.

    Raises:
        PrecisionError: lists what is wrong, by node.
    """
    found = list(_mistakes(model, target))
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise PrecisionError(
            f"Q/DQ that {target.value} cannot run: {'; '.join(found[:_SHOWN])}{more}",
            hint="quantise the float32 file anew: effdeploy export ... --int8 --target " + target.value,
        )


def scale_warning(model: ModelProto) -> str | None:
    """Say how many scales lose digits as float16 numbers; ``None`` where none does."""
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    names = {node.input[1] for node in graph.node if node.op_type in (Q, DQ) and len(node.input) > 1}
    small = [
        name
        for name in sorted(names)
        if name in constants
        and constants[name].data_type == TensorProto.FLOAT16
        and (numpy_helper.to_array(constants[name]).astype(np.float32) < SMALLEST_NORMAL).any()
    ]
    if not small:
        return None
    return f"{len(small)} scales are below float16's smallest full-precision number, first {small[0]}: few digits left"


def _mistakes(model: ModelProto, target: Target) -> Iterator[str]:
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    types = _types(graph)
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in (Q, DQ):
            yield from _scale_mistakes(node, constants)
            yield from _kind_mistakes(node, constants, types, target)
        elif node.op_type in _READS_SHAPES and target is Target.TENSORRT and _reads(node, makers, DQ):
            yield f"{node.name} reads the shape of a dequantised tensor, expected the tensor itself"
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            yield from _axis_mistakes(node, makers, constants)


def _reads(node: NodeProto, makers: Mapping[str, NodeProto], op: str) -> bool:
    maker = makers.get(node.input[0])
    return maker is not None and maker.op_type == op


def _scale_mistakes(node: NodeProto, constants: Mapping[str, TensorProto]) -> Iterator[str]:
    held = constants.get(node.input[1])
    if held is None:
        yield f"{node.name} has a computed scale, expected a constant"
        return
    values = numpy_helper.to_array(held).astype(np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        worst = float(values.reshape(-1)[np.argmin(np.nan_to_num(values.reshape(-1), nan=-1.0))])
        yield f"{node.name} has the scale {worst:g}, expected a positive finite number"


def _kind_mistakes(
    node: NodeProto, constants: Mapping[str, TensorProto], types: Mapping[str, int], target: Target
) -> Iterator[str]:
    kind = _kind(node, types)
    name = TensorProto.DataType.Name(kind)
    bias = target is Target.ONNXRUNTIME and node.op_type == DQ and kind == TensorProto.INT32
    allowed = INTEGER if target is Target.ONNXRUNTIME else frozenset({TensorProto.INT8}) | FLOAT8
    if kind not in allowed and not bias:
        what = "a quantised bias" if kind == TensorProto.INT32 else "a tensor of this type"
        yield f"{node.name} works on {name}: {target.value} takes no such Q/DQ ({what})"
    held = constants.get(node.input[2]) if len(node.input) > 2 else None
    if held is not None and target is Target.TENSORRT and kind in INTEGER and numpy_helper.to_array(held).any():
        point = int(numpy_helper.to_array(held).reshape(-1)[0])
        yield f"{node.name} has the zero point {point}, expected 0: TensorRT is symmetric"


def _axis_mistakes(
    node: NodeProto, makers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto]
) -> Iterator[str]:
    """Find per-channel activations, and weights whose scales lie on another axis than the products' outputs."""
    for place, name in enumerate(node.input[:2]):
        maker = makers.get(name)
        if maker is None or maker.op_type != DQ:
            continue
        held = constants.get(maker.input[1])
        if held is None or sum(1 for d in held.dims if d != 1) == 0:
            continue
        axis = _attribute(maker, "axis", 1)
        wanted = _WEIGHT_AXIS.get(node.op_type, 0 if _attribute(node, "transB", 0) else 1)
        if place == 0:
            yield f"{maker.name} scales the activation of {node.name} by channel, expected one scale"
        elif axis != wanted:
            yield f"{maker.name} scales the weights of {node.name} along axis {axis}, expected {wanted}"


def _kind(node: NodeProto, types: Mapping[str, int]) -> int:
    """Type of the quantised side of a Q or DQ."""
    if node.op_type == DQ:
        return types.get(node.input[0], TensorProto.UNDEFINED)
    if len(node.input) > 2 and node.input[2]:
        return types.get(node.input[2], TensorProto.UNDEFINED)
    return _attribute(node, "output_dtype", 0) or TensorProto.UINT8


def _types(graph: GraphProto) -> dict[str, int]:
    """Element types of constants and of what Q makes: enough to read Q/DQ without inference."""
    types = {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        if node.op_type == Q:
            types[node.output[0]] = _kind(node, types)
    return types


def _attribute(node: NodeProto, name: str, default: int) -> int:
    held = attribute(node, name)
    return default if held is None else int(helper.get_attribute_value(held))
