"""Values of constant expressions, computed with ONNX's own reference operators: no session is built for a shape.

Only operators with one deterministic meaning are listed; each is held against ONNX Runtime in
``tests/graph/test_graph_evaluate.py``. Quantize and Dequantize are left out on purpose: folding them undoes a
quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from deploy.graph.matching import Array, DeclinedError, constant, dtype_of, is_op, require, shape_of

_BROADCASTING = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "Or", "Pow", "Sub", "Where"}
)
_KEEPING = frozenset(
    {
        "Abs",
        "Cast",
        "Ceil",
        "Concat",
        "Flatten",
        "Floor",
        "Neg",
        "Not",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
    }
    | {"ReduceProd", "ReduceSum", "Reshape", "Slice", "Sqrt", "Squeeze", "Transpose", "Trilu", "Unsqueeze"}
)
FOLDABLE = frozenset(_BROADCASTING | _KEEPING | {"ConstantOfShape", "Expand", "Gather", "Range", "Tile"})

# A folded result may be this many times as large as what it is made of; below the floor it may always.
MAX_GROWTH = 4
ALWAYS_BYTES = 64 << 10


_CONSTANT_TYPES = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}

Reader = Callable[[gs.Tensor], Array | None]


def known_value(tensor: gs.Tensor, opset: int) -> Array | None:
    """Return the values of a tensor that is constant or is computed from constants only, else ``None``.

    Raises:
        DeclinedError: it is, but ``node_value`` declines.
    """
    if (values := constant(tensor)) is not None:
        return values
    return node_value(tensor.inputs[0], opset, lambda t: known_value(t, opset)) if tensor.inputs else None


def node_value(node: gs.Node, opset: int, read: Reader = constant) -> Array | None:
    """Return the only output of a node all of whose inputs ``read`` knows, else ``None``.

    Raises:
        DeclinedError: the result would be much larger than its inputs, or the reference implementation refuses them.
    """
    if is_op(node, "Constant"):
        return _constant_node_value(node)
    if is_op(node, "Identity"):
        return read(node.inputs[0])
    if is_op(node, "Shape"):
        return _static_dims(node)
    if not is_op(node, *FOLDABLE):
        return None
    inputs = [None if t.is_empty() else read(t) for t in node.inputs]
    if not inputs or any(v is None and not t.is_empty() for v, t in zip(inputs, node.inputs, strict=True)):
        return None
    times = _growth(node, [i for i in inputs if i is not None])
    require(times <= MAX_GROWTH, f"its result is {times:.0f} times as large as its inputs, the limit is {MAX_GROWTH}")
    values = _evaluate(node, opset, inputs)
    expected = dtype_of(node.outputs[0])
    require(expected in (None, values.dtype), f"the reference computes {values.dtype}, expected {expected}")
    return values


def _growth(node: gs.Node, inputs: list[Array]) -> float:
    """Bound from above how many times larger than its inputs a result is, 0 for a small one; nothing is computed."""
    dtype = dtype_of(node.outputs[0])
    itemsize = max(i.itemsize for i in inputs) if dtype is None else dtype.itemsize
    size = _result_size(node.op, inputs) * itemsize
    return 0.0 if size <= ALWAYS_BYTES else size / max(1, sum(i.nbytes for i in inputs))


def _evaluate(node: gs.Node, opset: int, inputs: list[Array | None]) -> Array:
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        try:
            proto = OnnxExporter.export_node(node)
            feeds = {name: array for name, array in zip(proto.input, inputs, strict=True) if array is not None}
            model = onnx.helper.make_model(
                onnx.helper.make_graph(
                    [proto],
                    "node",
                    [onnx.helper.make_empty_tensor_value_info(name) for name in feeds],
                    [onnx.helper.make_empty_tensor_value_info(proto.output[0])],
                ),
                opset_imports=[onnx.helper.make_opsetid("", opset)],
            )
            return np.asarray(next(iter(ReferenceEvaluator(model).run(None, feeds))))
        except Exception as error:  # the reference raises whatever numpy and its own checks raise
            raise DeclinedError(f"{node.op} cannot be computed: {error}") from error


def _static_dims(node: gs.Node) -> Array | None:
    """Return what a Shape node gives, if every axis that it reports is a known number."""
    shape = shape_of(node.inputs[0])
    if shape is None:
        return None
    dims = shape[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    known = [d for d in dims if isinstance(d, int)]
    return np.array(known, dtype=np.int64) if len(known) == len(dims) else None


def _constant_node_value(node: gs.Node) -> Array | None:
    (name, value), *_ = node.attrs.items()
    if name == "value":
        return constant(value)
    dtype = _CONSTANT_TYPES.get(name)
    return None if dtype is None else np.array(value, dtype=dtype)


def _result_size(op: str, inputs: list[Array]) -> int:
    first, last = inputs[0], inputs[-1]
    if op in _BROADCASTING:
        return math.prod(np.broadcast_shapes(*(i.shape for i in inputs)))
    if op == "ConstantOfShape":
        return math.prod(int(d) for d in first)
    if op == "Expand":
        return math.prod(np.broadcast_shapes(first.shape, tuple(int(d) for d in last)))
    if op == "Tile":
        return first.size * math.prod(int(d) for d in last)
    if op == "Range":
        return max(0, math.ceil((float(inputs[1]) - float(first)) / float(last)))
    if op == "Gather":
        return first.size * max(1, last.size)
    return sum(i.size for i in inputs)
