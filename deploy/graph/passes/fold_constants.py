"""Constant folding and clean-up: what is known before the first image is computed once, here.

```
Constant ------------------> initialiser          Identity(x) ------------> x
Add(c1, c2), Concat(c...) -> initialiser          Dropout(x), inference --> x
Shape(x), x static --------> initialiser          node nobody reads ------> gone
```

A result much larger than what it is made of is left to the runtime: folding the Expand of one row into a position table
would blow the file up. Quantised weights are never folded back to floats.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.evaluate import FOLDABLE, node_value
from deploy.graph.matching import (
    bypass,
    constant,
    detach,
    is_output,
    optional_input,
    refuse_control_flow,
    require,
    rewrite,
    sweep,
)

_VISITED = frozenset({"Constant", "Identity", "Dropout", "Shape"}) | FOLDABLE


def _apply(graph: gs.Graph) -> PassResult:
    if (refused := refuse_control_flow(graph)) is not None:
        return refused
    dead = sweep(graph)
    result = rewrite(graph, _VISITED, _visit)
    return PassResult(sites=dead + result.sites, declined=result.declined)


def _visit(graph: gs.Graph, node: gs.Node) -> bool:
    if node.op == "Identity":
        bypass(graph, node, node.inputs[0])
    elif node.op == "Dropout":
        _require_inference(graph, node)
        bypass(graph, node, node.inputs[0])
    else:
        return _materialised(graph, node)
    return True


def _require_inference(graph: gs.Graph, node: gs.Node) -> None:
    training = optional_input(node, 2)
    mode = None if training is None else constant(training)
    require(
        training is None or (mode is not None and not mode.any()), "it is in training mode, or its mode is not constant"
    )
    require(not any(t.outputs or is_output(graph, t) for t in node.outputs[1:]), "its mask is used")


def _materialised(graph: gs.Graph, node: gs.Node) -> bool:
    raw = node.attrs.get("value") if node.op == "Constant" else None
    # A Constant's tensor moves as it lies in the file: weights are not copied, types that numpy lacks survive.
    values = raw._values if isinstance(raw, gs.Constant) else node_value(node, graph.opset)
    if values is None:
        return False
    output = node.outputs[0]
    require(not is_output(graph, output), f"its value is the graph output {output.name!r}")
    detach(node)
    output.to_constant(values)
    return True


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,6] x) => (float[2,6] y)
        <float[6] weight = {1, 2, 3, 4, 5, 6}>
        {
            gain = Constant<value_floats = [0.5, 1.5]>()
            three = Constant<value = int64[1] {3}>()
            tiled = Tile(gain, three)
            scale = Mul(weight, tiled)
            scaled = Mul(x, scale)
            kept = Dropout(scaled)
            y = Identity(kept)
            unused = Neg(x)
        }
    """)


FOLD_CONSTANTS = GraphPass(
    name="fold_constants",
    apply=_apply,
    requires="A node's inputs are constant and its result is at most 4 times as large as they are (or below 64 KiB).",
    ensures="No Constant, Identity, inference Dropout or unread node is left, and no small constant expression.",
    example=_example,
)
