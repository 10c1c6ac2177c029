"""Axes that TensorRT can read: omitted or computed axes of Squeeze, Unsqueeze and Reduce* become initialisers.

```
Squeeze(x: [2,1,4])         -> Squeeze(x, axes=[1])
ReduceMean(x: [2,1,4])      -> ReduceMean(x, axes=[0,1,2])
Unsqueeze(x, Neg(Const(1))) -> Unsqueeze(x, axes=[-1])
```

A dynamic axis may turn out to be 1 when the engine runs and would then be squeezed as well: such a Squeeze declines.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.evaluate import known_value
from deploy.graph.matching import inside, new_constant, optional_input, rank_of, require, rewrite, static_shape

_REDUCTIONS = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"}
    | {"ReduceSum", "ReduceSumSquare"}
)


def _visit(graph: gs.Graph, node: gs.Node) -> bool:
    if "axes" in node.attrs:
        return False
    given = optional_input(node, 1)
    if isinstance(given, gs.Constant) and list(given.shape) != [0]:
        return False
    axes = _omitted_axes(node) if given is None else _computed_axes(graph, node, given)
    if not _takes_axes_as_input(node.op, graph.opset):
        node.attrs["axes"] = [int(a) for a in axes]
        return True
    values = new_constant(graph, inside(node, "axes"), np.array(axes, dtype=np.int64))
    node.inputs = [node.inputs[0], values]
    return True


def _takes_axes_as_input(op: str, opset: int) -> bool:
    return opset >= (13 if op in ("Squeeze", "Unsqueeze", "ReduceSum") else 18)


def _omitted_axes(node: gs.Node) -> list[int]:
    data = node.inputs[0]
    if node.op == "Squeeze":
        shape = static_shape(data)
        require(shape is not None, f"it squeezes every axis of size 1 and the shape of {data.name!r} is dynamic")
        return [axis for axis, size in enumerate(shape or ()) if size == 1]
    require(not node.attrs.get("noop_with_empty_axes", 0), "no axes and noop_with_empty_axes=1: it reduces nothing")
    rank = rank_of(data)
    require(rank is not None, f"it reduces every axis and the rank of {data.name!r} is unknown")
    return list(range(rank or 0))


def _computed_axes(graph: gs.Graph, node: gs.Node, given: gs.Tensor) -> list[int]:
    values = known_value(given, graph.opset)
    require(values is not None, f"its axes {given.name!r} are computed from an input")
    axes = [] if values is None else [int(a) for a in values.reshape(-1)]
    if axes or node.op == "Unsqueeze":
        return axes
    require(node.op != "Squeeze", "its list of axes is empty, which runtimes read in two ways")
    return _omitted_axes(node)


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, _REDUCTIONS | {"Squeeze", "Unsqueeze"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,1,4] x) => (float[4,2] y, float[1,1,1] z)
        <int64[1] one = {1}>
        {
            last = Neg(one)
            flat = Squeeze(x)
            column = Unsqueeze(flat, last)
            swapped = Transpose<perm = [2,1,0]>(column)
            zero = Sub(one, one)
            y = Squeeze(swapped, zero)
            z = ReduceMean(x)
        }
    """)


CONSTANT_AXES = GraphPass(
    name="constant_axes",
    apply=_apply,
    requires="Omitted axes follow from a known shape (Squeeze: a static one), computed axes from constants.",
    ensures="Squeeze, Unsqueeze and Reduce* have their axes as an initialiser (as an attribute before opset 13 or 18).",
    example=_example,
)
