"""Decomposed layer normalisation back to one LayerNormalization.

```
mean = ReduceMean(x)    d = Sub(x, mean)    variance = ReduceMean(Pow(d, 2) | Mul(d, d))
y = Div(d, Sqrt(Add(variance, epsilon)))  |  Mul(d, Reciprocal(Sqrt(...)))         [Mul(y, gain)] [Add(., bias)]
-> LayerNormalization(x, gain | ones, bias | zeros)
```

Both means must run over the same last axes and keep them. Gain and bias are always written out, because old TensorRT
importers read a missing one as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    Array,
    become,
    constant,
    inside,
    is_close,
    label,
    new_constant,
    only_consumer,
    producer,
    rank_of,
    reduction_axes,
    require,
    require_float32,
    require_private,
    rewrite,
    scalar,
    scalar_operand,
    shape_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Core:
    """The part without gain and bias; ``inner`` are the nodes whose results nobody else may need."""

    x: gs.Tensor
    epsilon: float
    means: tuple[gs.Node, gs.Node]
    inner: tuple[gs.Node, ...]


def _visit(graph: gs.Graph, node: gs.Node) -> bool:
    core = _core(node)
    if core is None:
        return False
    require(graph.opset >= 17, f"opset {graph.opset} has no LayerNormalization, expected 17 or later")
    require_float32(core.x)
    normalised = _normalised_shape(core)
    for inner in core.inner:
        require_private(graph, inner)
    last, gain, bias = _affine(graph, node, normalised)
    inputs = [
        core.x,
        new_constant(graph, inside(last, "gain"), np.ones(normalised, np.float32) if gain is None else gain),
        new_constant(graph, inside(last, "bias"), np.zeros(normalised, np.float32) if bias is None else bias),
    ]
    become(graph, last, "LayerNormalization", inputs, axis=-len(normalised), epsilon=core.epsilon, stash_type=1)
    return True


def _core(node: gs.Node) -> _Core | None:
    difference, root, inner = _quotient(node)
    if difference is None or root is None:
        return None
    add = producer(root.inputs[0], "Add")
    variance = _operand_from(add, "ReduceMean")
    if add is None or variance is None:
        return None
    epsilon = scalar_operand(add, variance.outputs[0])
    square = producer(variance.inputs[0], "Pow", "Mul")
    other = _squared(square)
    mean = producer(difference.inputs[1], "ReduceMean")
    if epsilon is None or square is None or other is None or mean is None:
        return None
    x = difference.inputs[0]
    if mean.inputs[0] is not x or other.inputs[0] is not x or other.inputs[1] is not mean.outputs[0]:
        return None
    return _Core(x=x, epsilon=epsilon, means=(mean, variance), inner=(*inner, root, add, variance, square))


def _quotient(node: gs.Node) -> tuple[gs.Node | None, gs.Node | None, tuple[gs.Node, ...]]:
    """Read ``Div(d, Sqrt)`` or ``Mul(d, Reciprocal(Sqrt))``: the Sub that makes d, the Sqrt, and what lies between."""
    if node.op == "Div":
        return producer(node.inputs[0], "Sub"), producer(node.inputs[1], "Sqrt"), ()
    inverse = _operand_from(node, "Reciprocal")
    if inverse is None:
        return None, None, ()
    difference = node.inputs[1 if node.inputs[0] is inverse.outputs[0] else 0]
    return producer(difference, "Sub"), producer(inverse.inputs[0], "Sqrt"), (inverse,)


def _operand_from(node: gs.Node | None, op: str) -> gs.Node | None:
    found = [producer(t, op) for t in node.inputs] if node is not None else []
    return next((n for n in found if n is not None), None)


def _squared(square: gs.Node | None) -> gs.Node | None:
    """Return the Sub whose square this is; exporters write the subtraction once or twice."""
    if square is None:
        return None
    twice = (
        square.inputs[0] is square.inputs[1]
        if square.op == "Mul"
        else is_close(scalar(square.inputs[1], rank_of(square.inputs[0])), 2.0)
    )
    return producer(square.inputs[0], "Sub") if twice else None


def _normalised_shape(core: _Core) -> tuple[int, ...]:
    """Return the sizes of the last axes that both means run over, after the guards on them."""
    first, second = (_axes(mean, rank_of(core.x)) for mean in core.means)
    require(first == second, f"mean and variance run over different axes: {list(first)} and {list(second)}")
    require(all(m.attrs.get("keepdims", 1) for m in core.means), "a ReduceMean has keepdims=0")
    require(first == tuple(range(-len(first), 0)), f"it runs over axes {list(first)}, expected the last ones")
    sizes = (shape_of(core.x) or ())[-len(first) :]
    known = tuple(d for d in sizes if isinstance(d, int))
    require(len(known) == len(first), "the sizes of the normalised axes are not known")
    return known


def _axes(mean: gs.Node, rank: int | None) -> tuple[int, ...]:
    axes = reduction_axes(mean)
    require(bool(axes), f"the axes of {label(mean)} are not constant")
    require(rank is not None, "the rank of its input is unknown")
    return tuple(sorted(a if a < 0 else a - (rank or 0) for a in axes or ()))


def _affine(graph: gs.Graph, node: gs.Node, normalised: tuple[int, ...]) -> tuple[gs.Node, Array | None, Array | None]:
    """Take in a following gain and bias if they lie on the normalised axes; return the last node that was taken."""
    multiply = only_consumer(graph, node.outputs[0], "Mul")
    gain = None if multiply is None else _per_element(multiply, node.outputs[0], normalised)
    last = node if multiply is None or gain is None else multiply
    add = only_consumer(graph, last.outputs[0], "Add")
    bias = None if add is None else _per_element(add, last.outputs[0], normalised)
    return (last if add is None or bias is None else add), gain, bias


def _per_element(node: gs.Node, normal: gs.Tensor, normalised: tuple[int, ...]) -> Array | None:
    values = constant(node.inputs[0 if node.inputs[1] is normal else 1])
    if values is None or values.ndim > (rank_of(normal) or 0):
        return None
    outer, inner = values.shape[: -len(normalised)], values.shape[-len(normalised) :]
    if any(size != 1 for size in outer):
        return None
    return np.array(np.broadcast_to(values.reshape(inner), normalised))


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"Div", "Mul"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,3,4] x) => (float[2,3,4] y)
        <
            int64[1] last = {-1}, float two = {2}, float epsilon = {1e-5},
            float[4] gain = {1, 2, 0.5, -1}, float[4] bias = {0, 1, -1, 0.5}
        >
        {
            mean = ReduceMean(x, last)
            difference = Sub(x, mean)
            square = Pow(difference, two)
            variance = ReduceMean(square, last)
            shifted = Add(variance, epsilon)
            deviation = Sqrt(shifted)
            normal = Div(difference, deviation)
            scaled = Mul(normal, gain)
            y = Add(scaled, bias)
        }
    """)


FUSE_LAYER_NORM = GraphPass(
    name="fuse_layer_norm",
    apply=_apply,
    requires="Mean and variance of one float32 tensor over the same, last, statically known axes; opset 17 or later.",
    ensures="One LayerNormalization with explicit gain and bias; its statistics stay float32 in a float16 graph.",
    example=_example,
)
