"""BatchNormalization into the Conv, ConvTranspose or Gemm before it.

```
x -> Conv(W, b) -> BatchNormalization(s, B, m, v) -> y      s' = s / sqrt(v + epsilon)
x -> Conv(W * s', (b - m) * s' + B) -> y                    s' along W's output channels
```

Exact, and computed in float64. The layer must feed the normalisation alone; weights that other layers share are not
changed, the layer gets its own. A normalisation behind an activation has nothing linear before it and stays: behind it,
a convolution's zero padding would meet the shift.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    Array,
    DeclinedError,
    bypass,
    constant,
    label,
    new_constant,
    optional_input,
    producer,
    require,
    require_private,
    rewrite,
)

_LAYERS = ("Conv", "ConvTranspose", "Gemm")


def _visit(graph: gs.Graph, norm: gs.Node) -> bool:
    require(not norm.attrs.get("training_mode", 0), "it is in training mode")
    require(len(norm.outputs) == 1, "its running statistics are outputs")
    before = norm.inputs[0].inputs[0].op if norm.inputs[0].inputs else "a graph input"
    layer = producer(norm.inputs[0], *_LAYERS)
    if layer is None:
        raise DeclinedError(f"it follows {before}, expected {', '.join(_LAYERS)}")
    require_private(graph, layer)
    scale, shift = _affine(norm)
    weight, bias = _folded(layer, scale, shift)
    name = layer.inputs[1].name
    layer.inputs = [
        layer.inputs[0],
        new_constant(graph, f"{name}_folded", weight),
        new_constant(graph, f"{name}_folded_bias", bias),
    ]
    if layer.op == "Gemm":
        layer.attrs["beta"] = 1.0  # folded into the bias
    bypass(graph, norm, layer.outputs[0])
    return True


def _affine(norm: gs.Node) -> tuple[Array, Array]:
    values = [constant(t) for t in norm.inputs[1:]]
    require(all(v is not None for v in values), "its scale, bias, mean or variance is not constant")
    gamma, beta, mean, variance = (np.asarray(v, dtype=np.float64) for v in values)
    spread = variance + norm.attrs.get("epsilon", 1e-5)
    require(bool((spread > 0).all()), "its variance plus epsilon is not positive everywhere")
    scale = gamma / np.sqrt(spread)
    return scale, beta - mean * scale


def _folded(layer: gs.Node, scale: Array, shift: Array) -> tuple[Array, Array]:
    weight = constant(layer.inputs[1])
    require(weight is not None, f"the weight of {label(layer)} is not constant")
    dtype = np.asarray(weight).dtype
    require(dtype.itemsize >= 4, f"the weights are {dtype}, which folding would round again")
    bias = _bias(layer, scale.size)
    wide = np.asarray(weight, dtype=np.float64)
    folded = wide * _per_output_channel(layer, scale, wide.shape)
    with np.errstate(over="ignore"):
        results = folded.astype(dtype), (bias * scale + shift).astype(dtype)
    require(all(np.isfinite(r).all() for r in results), f"the folded weights do not fit into {dtype}")
    return results


def _bias(layer: gs.Node, channels: int) -> Array:
    tensor = optional_input(layer, 2)
    if tensor is None:
        return np.zeros(channels)
    values = constant(tensor)
    require(values is not None, f"the bias of {label(layer)} is not constant")
    bias = np.asarray(values, dtype=np.float64)
    require(
        bias.size == 1 or bias.shape in ((channels,), (1, channels)),
        f"the bias of {label(layer)} has rows",
    )
    beta = layer.attrs.get("beta", 1.0) if layer.op == "Gemm" else 1.0
    return np.broadcast_to(bias.reshape(-1), (channels,)) * beta


def _per_output_channel(layer: gs.Node, scale: Array, shape: tuple[int, ...]) -> Array:
    """Shape the scale so that it multiplies the output channels of the layer's weight."""
    spatial = (1,) * (len(shape) - 2)
    if layer.op == "Gemm":
        return scale.reshape(-1, 1) if layer.attrs.get("transB", 0) else scale.reshape(1, -1)
    if layer.op == "Conv":
        return scale.reshape(-1, 1, *spatial)
    # ConvTranspose [C, M/group, ...]: the block of input channels that a row lies in decides which outputs it makes.
    groups = layer.attrs.get("group", 1)
    rows = np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *spatial)


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"BatchNormalization"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[1,2,3,3] x) => (float[1,3,3,3] y)
        <
            float[3,2,1,1] weight = {1, -2, 0.5, 3, -1, 2}, float[3] bias = {0.1, 0.2, 0.3},
            float[3] gamma = {1, 2, 0.5}, float[3] beta = {0, 1, -1},
            float[3] mean = {0.5, -0.5, 1}, float[3] var = {1, 4, 0.25}
        >
        {
            features = Conv(x, weight, bias)
            y = BatchNormalization(features, gamma, beta, mean, var)
        }
    """)


FUSE_BATCH_NORM = GraphPass(
    name="fuse_batch_norm",
    apply=_apply,
    requires="An inference BatchNormalization alone reads a layer; statistics and weights are constant.",
    ensures="The layer computes the normalisation; its weights are its own.",
    example=_example,
)
