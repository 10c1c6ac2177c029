"""The exporter's group normalisation back to one GroupNormalization, for TensorRT.

```
Reshape(x, [N, G, -1]) -> InstanceNormalization(scale[G], bias[G]) -> Reshape(., shape of x) [-> Mul(gain) -> Add(bias)]
-> GroupNormalization(x, gain[C], bias[C], num_groups=G)
```

Only from opset 21 on: before it, the operator has one gain per group, not per channel. ONNX Runtime computes the
operator as a function and is slower with it, so this pass is on TensorRT's list alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    Array,
    Dim,
    become,
    constant,
    inside,
    label,
    new_constant,
    only_consumer,
    producer,
    rank_of,
    require,
    require_float32,
    require_private,
    reshape_target,
    rewrite,
    shape_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Core:
    """``x`` [N, C, ...], split into ``groups``; ``gain`` and ``bias`` per group, shape [G]."""

    x: gs.Tensor
    channels: int
    groups: int
    gain: Array
    bias: Array


def _visit(graph: gs.Graph, norm: gs.Node) -> bool:
    split = producer(norm.inputs[0], "Reshape")
    join = only_consumer(graph, norm.outputs[0], "Reshape")
    if split is None or join is None:
        return False
    require(
        graph.opset >= 21, f"GroupNormalization has a gain per channel from opset 21 on, the graph has {graph.opset}"
    )
    require_private(graph, split)
    core = _core(norm, split, join)
    require_float32(core.x)
    repeats = core.channels // core.groups
    gain, bias = (np.repeat(v, repeats) for v in (core.gain, core.bias))
    last, factor, shift = _affine(graph, join, core.channels)
    gain, bias = gain * factor, bias * factor + shift
    inputs = [
        core.x,
        new_constant(graph, inside(last, "gain"), gain.astype(np.float32)),
        new_constant(graph, inside(last, "bias"), bias.astype(np.float32)),
    ]
    epsilon = norm.attrs.get("epsilon", 1e-5)
    become(graph, last, "GroupNormalization", inputs, num_groups=core.groups, epsilon=epsilon, stash_type=1)
    return True


def _core(norm: gs.Node, split: gs.Node, join: gs.Node) -> _Core:
    x = split.inputs[0]
    shape, grouped = shape_of(x) or (), reshape_target(split)
    require(len(shape) >= 3 and isinstance(shape[1], int), f"the number of channels of {x.name!r} is not known")
    require(grouped is not None and len(grouped) == 3, f"{label(split)} does not give [N, groups, -1]")
    batch, groups, _ = grouped or (None, None, None)
    channels = shape[1]
    require(batch is not None and batch == shape[0], f"{label(split)} does not keep axis 0")
    require(
        isinstance(groups, int) and isinstance(channels, int) and groups > 0 and channels % groups == 0,
        f"{label(split)} does not split the {channels} channels evenly",
    )
    require(_restores(join, x, grouped), f"{label(join)} does not restore the shape of {x.name!r}")
    gain, bias = constant(norm.inputs[1]), constant(norm.inputs[2])
    require(gain is not None and bias is not None, "its scale or bias is not constant")
    return _Core(
        x=x,
        channels=int(channels or 0),
        groups=int(groups or 0),
        gain=np.asarray(gain, dtype=np.float64),
        bias=np.asarray(bias, dtype=np.float64),
    )


def _restores(join: gs.Node, x: gs.Tensor, grouped: tuple[Dim, ...] | None) -> bool:
    measured = producer(join.inputs[1], "Shape")
    if (
        measured is not None
        and measured.inputs[0] is x
        and not measured.attrs.get("start", 0)
        and "end" not in measured.attrs
    ):
        return True
    shape = shape_of(x)
    target = reshape_target(join, copied=grouped, sized=shape)
    return target is not None and target == shape and sum(d is None for d in target) == 0


def _affine(graph: gs.Graph, join: gs.Node, channels: int) -> tuple[gs.Node, Array, Array]:
    """Take in a following gain and bias if they lie on the channels; return the last node that was taken."""
    last, factor, shift = join, np.ones(channels), np.zeros(channels)
    multiply = only_consumer(graph, last.outputs[0], "Mul")
    if multiply is not None and (values := _per_channel(multiply, last.outputs[0], channels)) is not None:
        last, factor = multiply, values
    add = only_consumer(graph, last.outputs[0], "Add")
    if add is not None and (values := _per_channel(add, last.outputs[0], channels)) is not None:
        last, shift = add, values
    return last, factor, shift


def _per_channel(node: gs.Node, normal: gs.Tensor, channels: int) -> Array | None:
    values, rank = constant(node.inputs[0 if node.inputs[1] is normal else 1]), rank_of(normal)
    if values is None or rank is None or values.ndim > rank:
        return None
    full = (1,) * (rank - values.ndim) + values.shape
    if any(size != 1 for axis, size in enumerate(full) if axis != 1) or full[1] not in (1, channels):
        return None
    return np.array(np.broadcast_to(values.reshape(-1), (channels,)), dtype=np.float64)


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"InstanceNormalization"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example(
        """
        example (float[N,4,3,3] x) => (float[N,4,3,3] y)
        <
            int64[3] grouped = {0, 2, -1}, float[2] ones = {1, 1}, float[2] zeros = {0, 0},
            float[4,1,1] gain = {1, 2, 0.5, -1}, float[4,1,1] bias = {0, 1, -1, 0.5}
        >
        {
            groups = Reshape(x, grouped)
            normal = InstanceNormalization<epsilon = 1e-5>(groups, ones, zeros)
            shape = Shape(x)
            restored = Reshape(normal, shape)
            scaled = Mul(restored, gain)
            y = Add(scaled, bias)
        }
        """,
        opset=21,
    )


FUSE_GROUP_NORM = GraphPass(
    name="fuse_group_norm",
    apply=_apply,
    requires="A float32 [N, C, ...] goes to [N, G, -1], through an instance norm and back; opset 21 or later.",
    ensures="One GroupNormalization with gain and bias per channel, which TensorRT runs as one kernel.",
    example=_example,
)
