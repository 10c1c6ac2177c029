"""SmoothQuant: outliers of a norm's channels move into the weights behind it, where each output has its own scale.

Xiao et al., SmoothQuant, ICML 2023 (arXiv 2211.10438). A channel j of a norm's output is divided by s_j, inside its
scale and offset, and row j of every linear layer that reads it is multiplied by s_j: the same function in float32. With

    s_j = max|x_j| ** a / max|W_j| ** (1 - a)

the strength a says how far. It is searched for each norm: the one whose expected squared error of the layers' outputs
is least, with rounding of activations and weights taken as uniform. A norm is left alone unless that halves the error:
without outliers the estimate is finer than what it estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploy.precision.calibrate import open_session, run_session
from deploy.precision.images import CalibrationImages
from deploy.precision.select import Selection
from deploy.precision.view import FLOAT, GraphView

STRENGTHS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)
"""What is tried; 0 leaves a norm as it is."""

GAIN = 0.5
"""A strength must bring the expected error below this share."""

_ACTIVATION_LEVELS, _SMALLEST = 255.0, 1e-5

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A norm all of whose readers are quantised linear layers.

    Attributes:
        norm: Node index of the LayerNormalization.
        readers: Node indices of the MatMuls that read it.
    """

    norm: int
    readers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """What each channel of a norm's output took over all images [channels]: extremes and mean square."""

    low: Floats
    high: Floats
    square: Floats

    @property
    def largest(self) -> Floats:
        """Largest absolute values."""
        return np.maximum(-self.low, self.high)


def sites_of(view: GraphView, selection: Selection) -> list[Site]:
    """Find the norms that a strength can be folded into: nobody else reads them, or the layers' weights."""
    chosen, found = set(selection.nodes), []
    for index, node in enumerate(view.nodes):
        if node.op_type != "LayerNormalization" or len(node.input) < 2 or node.output[0] in view.outputs:
            continue
        readers = view.readers.get(node.output[0], ())
        constants = all(name in view.constants for name in node.input[1:] if name)
        ours = all(i in chosen and slot == 0 and view.nodes[i].op_type == "MatMul" for i, slot in readers)
        own = all(len(view.readers[view.nodes[i].input[1]]) == 1 for i, _ in readers) if ours else False
        if readers and constants and own:
            found.append(Site(norm=index, readers=tuple(i for i, _ in readers)))
    return found


def channels_of(
    model: ModelProto, view: GraphView, sites: Sequence[Site], images: CalibrationImages
) -> dict[int, Channels]:
    """Measure the channels of each norm over all images."""
    session = open_session(_probed(model, view, sites))
    low, high, squares = ([np.zeros(1)] * len(sites) for _ in range(3))
    batches = 0
    for feeds in images.batches():
        values = [v.astype(np.float64) for v in run_session(session, None, feeds)]
        batches += 1
        low = [np.minimum(a, b) for a, b in zip(low, values[::3], strict=True)]
        high = [np.maximum(a, b) for a, b in zip(high, values[1::3], strict=True)]
        squares = [a + b for a, b in zip(squares, values[2::3], strict=True)]
    found = zip(sites, low, high, squares, strict=True)
    return {site.norm: Channels(low=a, high=b, square=total / batches) for site, a, b, total in found}


def _probed(model: ModelProto, view: GraphView, sites: Sequence[Site]) -> ModelProto:
    """Copy the model with three vectors of channels for each norm as its only outputs: extremes, mean square."""
    probed = ModelProto()
    probed.CopyFrom(model)
    graph = probed.graph
    del graph.output[:]
    graph.initializer.append(helper.make_tensor("smooth/axis", TensorProto.INT64, [1], [0]))
    for place, site in enumerate(sites):
        output, width = view.nodes[site.norm].output[0], _width(view, site)
        rows, square, shape = (f"smooth/{place}/{part}" for part in ("rows", "square", "shape"))
        graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [2], [-1, width]))
        graph.node.append(helper.make_node("Reshape", [output, shape], [rows]))
        graph.node.append(helper.make_node("Mul", [rows, rows], [square]))
        for op, source in (("ReduceMin", rows), ("ReduceMax", rows), ("ReduceMean", square)):
            name = f"smooth/{place}/{op}"
            graph.node.append(helper.make_node(op, [source, "smooth/axis"], [name], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, FLOAT, None))
    return probed


def strengths_of(
    view: GraphView, sites: Sequence[Site], channels: Mapping[int, Channels], *, bits: int, symmetric: bool
) -> dict[int, float]:
    """Search the strength of each norm; norms that stay as they are, are left out.

    Args:
        view: The graph.
        sites: Its norms.
        channels: What was measured of them.
        bits: Of the weights.
        symmetric: Whether zero is the middle of an activation's range.
    """
    found = {}
    for site in sites:
        weights = [_weight(view, i) for i in site.readers]
        errors = {a: _error(channels[site.norm], weights, a, bits, symmetric) for a in STRENGTHS}
        best = min(errors, key=lambda a: errors[a])
        if errors[best] < GAIN * errors[0.0]:
            found[site.norm] = best
    return found


def smoothed(
    model: ModelProto,
    view: GraphView,
    sites: Sequence[Site],
    channels: Mapping[int, Channels],
    strengths: Mapping[int, float],
) -> ModelProto:
    """Fold strengths into norms and weights; outputs stay equal in float32."""
    changed: dict[str, TensorProto] = {}
    made = ModelProto()
    made.CopyFrom(model)
    by_name = {node.name: node for node in made.graph.node}
    for site in (s for s in sites if s.norm in strengths):
        factors = factors_of(channels[site.norm], [_weight(view, i) for i in site.readers], strengths[site.norm])
        norm = view.nodes[site.norm]
        for slot, name in enumerate(norm.input):
            if slot > 0 and name:  # scale and offset may be shared between norms: each gets its own
                own = f"{name}/smooth/{site.norm}"
                changed[own] = _scaled(view.constants[name], own, 1 / factors)
                by_name[norm.name].input[slot] = own
        for index in site.readers:
            name = view.nodes[index].input[1]
            changed[name] = _scaled(view.constants[name], name, factors[:, None])
    kept = [t for t in made.graph.initializer if t.name not in changed]
    del made.graph.initializer[:]
    made.graph.initializer.extend([*kept, *changed.values()])
    return made


def factors_of(channels: Channels, weights: Sequence[Floats], strength: float) -> Floats:
    """Return what each channel is divided by [channels], of geometric mean 1; dead channels are left as they are."""
    if strength == 0:
        return np.ones_like(channels.largest)
    rows = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
    alive = (channels.largest > _SMALLEST) & (rows > _SMALLEST)
    safe_x, safe_w = np.where(alive, channels.largest, 1.0), np.where(alive, rows, 1.0)
    factors = np.where(alive, safe_x**strength / safe_w ** (1 - strength), 1.0)
    mean = np.exp(np.log(factors[alive]).mean()) if alive.any() else 1.0
    return np.where(alive, factors / mean, 1.0)


def _error(channels: Channels, weights: Sequence[Floats], strength: float, bits: int, symmetric: bool) -> float:
    """Expected squared error of the layers' outputs: steps of activations and weights, rounded uniformly."""
    factors = factors_of(channels, weights, strength)
    low, high = min((channels.low / factors).min(), 0.0), max((channels.high / factors).max(), 0.0)
    step = (2 * max(-low, high) if symmetric else high - low) / _ACTIVATION_LEVELS
    square = channels.square / factors**2
    total = 0.0
    for weight in weights:
        scaled = weight * factors[:, None]
        weight_steps = np.abs(scaled).max(axis=0) / (2 ** (bits - 1) - 1)
        total += (step**2 / 12 * (scaled**2).sum() + (weight_steps**2).sum() / 12 * square.sum()).item()
    return float(total)


def _weight(view: GraphView, index: int) -> Floats:
    return numpy_helper.to_array(view.constants[view.nodes[index].input[1]]).astype(np.float64)


def _scaled(tensor: TensorProto, name: str, factors: Floats) -> TensorProto:
    values = numpy_helper.to_array(tensor).astype(np.float64) * factors
    return numpy_helper.from_array(values.astype(np.float32), name)


def _width(view: GraphView, site: Site) -> int:
    """Channels of a norm's output: those of its scale."""
    return int(view.constants[view.nodes[site.norm].input[1]].dims[-1])
