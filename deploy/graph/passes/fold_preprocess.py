"""What scales and shifts pixels, into the convolution behind it.

```
uint8 -> Cast -> [Transpose] -> Mul, Div, Add, Sub by channel -> Conv(W, b) -> y        s * x + t
uint8 -> Cast -> [Transpose] -> Conv(W * s, b + sum(W * t)) -> y                        no padding, or t = 0
uint8 -> Cast -> [Transpose] -> Sub(x, -t / s) -> Conv(W * s, b) -> y                   zeros around the image
```

Exact, and computed in float64: s along W's input channels, and every product of a shift with its weight summed up into
the bias. A convolution that pads with zeros pads *normalised* zeros: a folded shift would turn the border into the mean
colour. There the scale folds alone and one subtraction stays; the sentence that says so is among the declined.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    Array,
    become,
    constant,
    inside,
    is_op,
    label,
    new_constant,
    optional_input,
    producer,
    rank_of,
    require,
    require_private,
    rewrite,
)

_STEPS = ("Add", "Sub", "Mul", "Div")


def _visit(graph: gs.Graph, layer: gs.Node) -> bool:
    chain = _chain(layer.inputs[0])
    if not chain:
        return False
    pixels = _data(chain[-1])
    if not _of_integers(pixels):
        return False
    weight = constant(layer.inputs[1])
    require(weight is not None, "its weight is not constant")
    wide = np.asarray(weight, np.float64)
    require(np.asarray(weight).dtype == np.float32, f"its weight is {np.asarray(weight).dtype}, expected float32")
    require(layer.attrs.get("group", 1) == 1, "it has groups, whose input channels are not the image's")
    scale, shift = _affine(chain, wide.shape[1])
    padded = any(layer.attrs.get("pads", ())) or layer.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if padded and shift.any():
        return _fold_scale(graph, layer, chain, wide, scale, shift)
    bias = optional_input(layer, 2)
    before = np.zeros(wide.shape[0]) if bias is None else constant(bias)
    require(before is not None, "its bias is not constant")
    added = np.asarray(before, np.float64) + np.einsum("oihw,i->o", wide, shift)
    _set(graph, layer, pixels, wide * scale[:, None, None], added if bias is not None or shift.any() else None)
    return True


def _fold_scale(graph: gs.Graph, layer: gs.Node, chain: list[gs.Node], wide: Array, scale: Array, shift: Array) -> bool:
    """Fold the scale alone; the first step's result is then shifted pixels."""
    left = "it pads with zeros, which a folded shift would turn into the mean colour: one subtraction stays before it"
    require(not (len(chain) == 1 and chain[0].op == "Sub" and bool((scale == 1).all())), left)
    require(bool((scale != 0).all()), "a channel is scaled by zero")
    last = chain[0]
    require_private(graph, last)
    mean = (-shift / scale).reshape(1, -1, 1, 1).astype(np.float32)
    become(graph, last, "Sub", [_data(chain[-1]), new_constant(graph, inside(last, "mean"), mean)])
    _set(graph, layer, layer.inputs[0], wide * scale[:, None, None], None)
    return True


def _set(graph: gs.Graph, layer: gs.Node, source: gs.Tensor, weight: Array, bias: Array | None) -> None:
    name = layer.inputs[1].name
    inputs = [source, new_constant(graph, f"{name}_of_pixels", weight.astype(np.float32))]
    if bias is not None:
        inputs.append(new_constant(graph, f"{name}_of_pixels_bias", bias.astype(np.float32)))
    else:
        inputs += layer.inputs[2:]
    layer.inputs = inputs


def _chain(tensor: gs.Tensor) -> list[gs.Node]:
    """Return the steps by constants that end in ``tensor``, the last one first."""
    steps: list[gs.Node] = []
    while (step := producer(tensor, *_STEPS)) is not None and _constant_of(step) is not None:
        steps.append(step)
        tensor = _data(step)
    return steps


def _data(step: gs.Node) -> gs.Tensor:
    first, second = step.inputs
    return second if isinstance(first, gs.Constant) else first


def _constant_of(step: gs.Node) -> Array | None:
    """Return a step's constant where it is one value, or one for each channel of [N, C, H, W]."""
    first, second = step.inputs
    if isinstance(first, gs.Constant) and step.op in ("Sub", "Div"):
        return None  # no scale and shift of the data
    values = constant(first if isinstance(first, gs.Constant) else second)
    if values is None or values.dtype != np.float32 or values.ndim > 4:
        return None
    shape = (1,) * (4 - values.ndim) + values.shape
    return values.reshape(-1) if shape == (1, values.size, 1, 1) else None


def _of_integers(pixels: gs.Tensor) -> bool:
    """Whether a tensor of four axes is a graph input of pixels, cast and maybe transposed."""
    moved = producer(pixels, "Transpose")
    cast = producer(moved.inputs[0] if moved is not None else pixels, "Cast")
    if cast is None or cast.inputs[0].inputs or rank_of(pixels) != 4:
        return False
    return bool(cast.inputs[0].dtype == np.uint8)


def _affine(chain: list[gs.Node], channels: int) -> tuple[Array, Array]:
    """Compose the steps into one scale and one shift a channel."""
    scale, shift = np.ones(channels), np.zeros(channels)
    for step in reversed(chain):
        values = np.asarray(_constant_of(step), np.float64)
        require(values.size in (1, channels), f"{label(step)} has {values.size} values for {channels} channels")
        if is_op(step, "Add", "Sub"):
            shift = shift + values if step.op == "Add" else shift - values
        else:
            require(step.op == "Mul" or bool((values != 0).all()), f"{label(step)} divides by zero")
            factor = values if step.op == "Mul" else 1 / values
            scale, shift = scale * factor, shift * factor
    return scale, shift


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"Conv"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (uint8[N,2,2,3] x) => (float[N,2,1,1] y)
        <
            float[2,3,2,2] weight = {
                0.1, 0.2, -0.3, 0.4, -0.5, 0.6, 0.7, -0.8, 0.9, 0.1, -0.2, 0.3,
                -0.4, 0.5, 0.6, 0.7, 0.8, -0.9, 0.1, 0.2, 0.3, -0.4, -0.5, 0.6
            },
            float[2] bias = {0.5, -0.25}, float full = {255},
            float[1,3,1,1] mean = {0.485, 0.456, 0.406}, float[1,3,1,1] std = {0.229, 0.224, 0.225}
        >
        {
            wide = Cast<to = 1>(x)
            first = Transpose<perm = [0, 3, 1, 2]>(wide)
            shares = Div(first, full)
            centred = Sub(shares, mean)
            images = Div(centred, std)
            y = Conv(images, weight, bias)
        }
    """)


FOLD_PREPROCESS = GraphPass(
    name="fold_preprocess",
    apply=_apply,
    requires="A convolution reads uint8 pixels, cast to float32 and scaled and shifted by channel.",
    ensures="Its weights hold the scale, and its bias the shift, unless zeros around the image keep one subtraction.",
    example=_example,
)
