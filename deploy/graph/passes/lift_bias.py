"""Biases of quantised linear layers, with leading axes of one, so that ONNX Runtime's integer product survives.

```
Add(MatMul(DequantizeLinear(..), DequantizeLinear(w)), bias [N])  ->  Add(MatMul(..), bias [1,1,N])
```

Its optimiser turns MatMul + Add of a bias vector into Gemm before it looks for integer kernels, and Gemm has one only
where the bias is int32 as well: the whole layer then runs in float32 behind DequantizeLinear, slower than without
quantisation. A bias of three axes is not taken for Gemm's, and the product becomes MatMulIntegerToFloat. Same values:
the product has three axes or more.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import constant, inside, new_constant, only_consumer, producer, rank_of, require, rewrite

_AXES = 3


def _visit(graph: gs.Graph, product: gs.Node) -> bool:
    if any(producer(tensor, "DequantizeLinear") is None for tensor in product.inputs):
        return False
    add = only_consumer(graph, product.outputs[0], "Add")
    if add is None:
        return False
    place = next((i for i, tensor in enumerate(add.inputs) if isinstance(tensor, gs.Constant)), None)
    if place is None or len(add.inputs[place].shape or ()) != 1:
        return False
    values = constant(add.inputs[place])
    require(values is not None, "its bias has a type that numpy lacks")
    rank = rank_of(product.outputs[0])
    require(rank is not None and rank >= _AXES, f"the product has {rank} axes, expected {_AXES} or more")
    add.inputs[place] = new_constant(graph, inside(add, "bias"), values.reshape(1, 1, -1))  # type: ignore[union-attr]
    return True


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"MatMul"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[N,2,4] x) => (float[N,2,2] y)
        <
            float step = {0.05}, uint8 middle = {128}, int8[4,2] weight = {1, -2, 3, -4, 5, -6, 7, -8},
            float[2] steps = {0.5, 0.25}, int8[2] zeros = {0, 0}, float[2] bias = {1, -2}
        >
        {
            low = QuantizeLinear(x, step, middle)
            read = DequantizeLinear(low, step, middle)
            wide = DequantizeLinear<axis = 1>(weight, steps, zeros)
            product = MatMul(read, wide)
            y = Add(product, bias)
        }
    """)


LIFT_BIAS = GraphPass(
    name="lift_bias",
    apply=_apply,
    requires="A MatMul of two dequantised tensors with three axes or more feeds one Add of a constant vector.",
    ensures="The vector has two leading axes of one; ONNX Runtime runs the product in integers.",
    example=_example,
)
