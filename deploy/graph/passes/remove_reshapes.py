"""Movements of data that lead nowhere: identity transposes and reshapes, pairs and chains.

```
Transpose(x, perm = 0,1,2..)                 -> x
Transpose(Transpose(x, p), q)                -> Transpose(x, p[q]), or x when p[q] is the identity
Reshape(x, the shape that x has)             -> x
Reshape(Reshape | Flatten | Squeeze | Unsqueeze(x), s) -> Reshape(x, s)
```

A 0 in ``s`` copies an axis of the tensor between, so it is written out as a number first, or the chain is left alone.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    bypass,
    constant,
    inside,
    is_output,
    label,
    new_constant,
    producer,
    rank_of,
    require,
    reshape_target,
    rewrite,
    shape_of,
)


def _visit(graph: gs.Graph, node: gs.Node) -> bool:
    return _transpose(graph, node) if node.op == "Transpose" else _reshape(graph, node)


def _transpose(graph: gs.Graph, node: gs.Node) -> bool:
    perm = _perm(node)
    if perm is None:
        return False
    if perm == sorted(perm):
        bypass(graph, node, node.inputs[0])
        return True
    first = producer(node.inputs[0], "Transpose")
    before = None if first is None else _perm(first)
    if first is None or before is None:
        return False
    both = [before[axis] for axis in perm]
    if both == sorted(both):
        bypass(graph, node, first.inputs[0])
        return True
    require(_is_private(graph, first), f"{label(first)} is needed elsewhere, so joining the two saves nothing")
    node.attrs["perm"] = both
    node.inputs = [first.inputs[0]]
    return True


def _perm(node: gs.Node) -> list[int] | None:
    rank = rank_of(node.inputs[0])
    given = node.attrs.get("perm")
    return [int(a) for a in given] if given else None if rank is None else list(range(rank))[::-1]


def _reshape(graph: gs.Graph, node: gs.Node) -> bool:
    source = node.inputs[0]
    if _keeps_shape(node):
        bypass(graph, node, source)
        return True
    first = producer(source, "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    if first is None or not _is_private(graph, first):
        return False
    target = constant(node.inputs[1])
    require(target is not None, f"it follows {label(first)} and its target shape is not constant")
    sizes = [int(d) for d in np.asarray(target)]
    if 0 in sizes:
        require(not node.attrs.get("allowzero", 0), "its target has an empty axis")
        sizes = _without_zeros(sizes, shape_of(source) or ())
        node.inputs = [first.inputs[0], new_constant(graph, inside(node, "shape"), np.array(sizes, dtype=np.int64))]
    else:
        node.inputs = [first.inputs[0], node.inputs[1]]
    return True


def _keeps_shape(node: gs.Node) -> bool:
    source = node.inputs[0]
    measured = producer(node.inputs[1], "Shape")
    if measured is not None and measured.inputs[0] is source:
        return not measured.attrs.get("start", 0) and "end" not in measured.attrs
    shape, target = shape_of(source), reshape_target(node)
    if shape is None or target is None or len(shape) != len(target):
        return False
    # One axis of unknown size is the same when all others are; two are not.
    return shape == target and sum(d is None for d in shape) == 0


def _without_zeros(sizes: list[int], shape: tuple[object, ...]) -> list[int]:
    copied = [shape[axis] if size == 0 and axis < len(shape) else size for axis, size in enumerate(sizes)]
    known = [d for d in copied if isinstance(d, int)]
    require(0 not in known, "its target has an empty axis")
    if len(known) == len(copied):
        return known
    require(
        len(known) == len(copied) - 1 and -1 not in known,
        "a 0 in its target copies a dynamic axis of the tensor between",
    )
    return [d if isinstance(d, int) else -1 for d in copied]


def _is_private(graph: gs.Graph, node: gs.Node) -> bool:
    return len(node.outputs[0].outputs) == 1 and not is_output(graph, node.outputs[0])


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"Transpose", "Reshape"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,3,4] x) => (float[4,6] y)
        <int64[2] flat = {6, -1}, int64[3] cube = {0, 2, 2}, int64[2] rows = {0, -1}, int64[2] same = {4, 6}>
        {
            same_axes = Transpose<perm = [0, 1, 2]>(x)
            channels_last = Transpose<perm = [0, 2, 1]>(same_axes)
            channels_first = Transpose<perm = [0, 2, 1]>(channels_last)
            positive = Abs(channels_first)
            flattened = Reshape(positive, flat)
            parts = Reshape(flattened, cube)
            turned = Transpose<perm = [1, 2, 0]>(parts)
            joined = Reshape(turned, same)
            kept = Reshape(joined, rows)
            y = Neg(kept)
        }
    """)


REMOVE_RESHAPES = GraphPass(
    name="remove_reshapes",
    apply=_apply,
    requires="The permutations or target shapes are constant and nobody else reads the tensor between.",
    ensures="No identity Transpose or Reshape, no Transpose pair that cancels, no chain of two that one can do.",
    example=_example,
)
