"""Decomposed GELU back to one Gelu (opset 20).

```
e = Add(Erf(Div(x, sqrt 2) | Mul(x, 1/sqrt 2)), 1)                      approximate = none
e = Add(Tanh(Mul(Add(x, Mul(x^3, 0.044715)), sqrt(2/pi))), 1)           approximate = tanh
Mul(Mul(x, e), 0.5)  |  Mul(x, Mul(e, 0.5))  |  Mul(Mul(x, 0.5), e)  -> Gelu(x)
```

ONNX Runtime fuses the order that the TorchScript exporter writes, not the one of torch.export. Below
opset 20 there is no operator to fuse into.
"""

from __future__ import annotations

import math

import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    become,
    is_close,
    is_op,
    producer,
    rank_of,
    require,
    require_float32,
    require_private,
    rewrite,
    scalar,
    scalar_operand,
)


def _visit(graph: gs.Graph, curve: gs.Node) -> bool:
    x = _inside_erf(curve) if curve.op == "Erf" else _inside_tanh(curve)
    gate = _reader(curve, "Add")
    if x is None or gate is None or not is_close(scalar_operand(gate, curve.outputs[0]), 1.0):
        return False
    product = _product(gate, x)
    if product is None:
        return False
    last, inner = product
    for node in (curve, gate, *inner):
        require_private(graph, node)
    require(graph.opset >= 20, f"opset {graph.opset} has no Gelu; trace with opset 20 or later")
    require_float32(x)
    become(graph, last, "Gelu", [x], approximate="none" if curve.op == "Erf" else "tanh")
    return True


def _inside_erf(erf: gs.Node) -> gs.Tensor | None:
    scaling = producer(erf.inputs[0], "Div", "Mul")
    if scaling is None:
        return None
    if scaling.op == "Div":
        divisor = scalar(scaling.inputs[1], rank_of(scaling.inputs[0]))
        return scaling.inputs[0] if is_close(divisor, math.sqrt(2)) else None
    return _scaled_by(scaling, math.sqrt(0.5))


def _inside_tanh(tanh: gs.Node) -> gs.Tensor | None:
    argument = producer(tanh.inputs[0], "Mul")
    total = None if argument is None else _scaled_by(argument, math.sqrt(2 / math.pi))
    add = None if total is None else producer(total, "Add")
    if add is None:
        return None
    for x, cubic in (add.inputs, list(add.inputs)[::-1]):
        scaling = producer(cubic, "Mul")
        cube = None if scaling is None else _scaled_by(scaling, 0.044715)
        if cube is not None and _is_cube(cube, x):
            return x
    return None


def _is_cube(cube: gs.Tensor, x: gs.Tensor) -> bool:
    node = producer(cube, "Pow", "Mul")
    if node is None:
        return False
    if node.op == "Pow":
        return node.inputs[0] is x and is_close(scalar(node.inputs[1], rank_of(x)), 3.0)
    square = _other(node, x)
    maker = None if square is None else producer(square, "Mul")
    return maker is not None and all(t is x for t in maker.inputs)


def _product(gate: gs.Node, x: gs.Tensor) -> tuple[gs.Node, tuple[gs.Node, ...]] | None:
    """Find the multiplications of gate, x and one half: the last one, and those before it."""
    first = _reader(gate, "Mul")
    other = None if first is None else _other(first, gate.outputs[0])
    if first is None or other is None:
        return None
    half = producer(other, "Mul")
    if half is not None and _scaled_by(half, 0.5) is x:
        return first, (half,)
    last = _reader(first, "Mul")
    if last is None:
        return None
    if other is x:
        found = is_close(scalar_operand(last, first.outputs[0]), 0.5)
    else:
        found = is_close(scalar(other, rank_of(x)), 0.5) and _other(last, first.outputs[0]) is x
    return (last, (first,)) if found else None


def _reader(node: gs.Node, op: str) -> gs.Node | None:
    """Return the first consumer that is an ``op``; that there is no second one is checked once the site is whole."""
    return next((n for n in node.outputs[0].outputs if is_op(n, op)), None)


def _other(node: gs.Node, operand: gs.Tensor) -> gs.Tensor | None:
    first, second = node.inputs
    if first is operand:
        return second
    return first if second is operand else None


def _scaled_by(node: gs.Node, factor: float) -> gs.Tensor | None:
    """Return what a Mul multiplies with the constant ``factor``, or ``None``."""
    for tensor in node.inputs:
        if is_close(scalar_operand(node, tensor), factor):
            return tensor
    return None


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"Erf", "Tanh"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,8] x) => (float[2,8] y)
        <float root = {1.41421356}, float one = {1}, float half = {0.5}>
        {
            scaled = Div(x, root)
            curve = Erf(scaled)
            gate = Add(curve, one)
            halved = Mul(half, gate)
            y = Mul(x, halved)
        }
    """)


FUSE_GELU = GraphPass(
    name="fuse_gelu",
    apply=_apply,
    requires="The erf or tanh form of GELU on a float32 tensor, no other reader in between; opset 20 or later.",
    ensures="One Gelu, exact or with approximate=tanh as it was written.",
    example=_example,
)
