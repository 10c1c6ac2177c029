"""How large activations become: the largest absolute value of every float tensor in a real float32 run.

The maxima are taken inside the graph (Abs, ReduceMax), so that no activation is copied out and memory stays that of one
inference; the images go through two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from deploy.backends.base import Array, Feeds
from deploy.errors import PrecisionError
from deploy.graph.io import load_model
from deploy.precision.policy import MOVEMENT
from deploy.precision.view import FLOAT, tensor_types

IMAGES = 2
"""Images per run."""

_SAME_VALUES = MOVEMENT & frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


def activation_ranges(model: Path, feeds: Feeds) -> dict[str, float]:
    """Measure the largest finite absolute value of every float32 tensor that ``model`` computes.

    Infinite values are left out: they are mask fills, and 16-bit floats hold them as well.

    Args:
        model: A float32 ONNX file.
        feeds: Input name -> array; images on axis 0, in multiples of a fixed batch.

    Returns:
        Tensor name -> largest value, graph inputs included; NaN where the network itself gives NaN.

    Raises:
        PrecisionError: ONNX Runtime cannot run the model on these feeds.
    """
    loaded = load_model(model)
    return ranges_of(loaded, tensor_types(loaded), feeds)


def ranges_of(model: ModelProto, types: Mapping[str, int], feeds: Feeds) -> dict[str, float]:
    """Do the same for a model in memory whose tensor types are known."""
    probes, same = _probes(model, types)
    found = dict.fromkeys(probes, 0.0)
    if probes:
        session = _session(_probed(model, probes))
        for batch in _batches(model, feeds):
            for name, value in zip(probes, map(float, _run(session, batch)), strict=True):
                found[name] = value if math.isnan(value) else max(found[name], value)
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        found.update(_finite_ranges(model, odd, feeds))
    given = {i.name for i in model.graph.input}
    found.update(
        {name: _finite_max(array) for name, array in feeds.items() if name in given and array.dtype == np.float32}
    )
    for name, origin in same.items():
        if origin in found:
            found[name] = found[origin]
    return found


def _probes(model: ModelProto, types: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
    """Tensors to measure, and those that hold the values of another one."""
    probes: list[str] = []
    same: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _SAME_VALUES and types.get(node.output[0]) == FLOAT:
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        elif node.op_type != "Constant":
            probes += [name for name in node.output if name and types.get(name) == FLOAT]
    return probes, same


def _probed(model: ModelProto, probes: list[str]) -> ModelProto:
    """Copy the model with the maximum of each probe as its only outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.node.extend(node for place, name in enumerate(probes) for node in _maximum(name, place))
    for place in range(len(probes)):
        copy.graph.output.append(helper.make_tensor_value_info(f"probe/{place}", FLOAT, []))
    return copy


def _maximum(name: str, place: int) -> list[NodeProto]:
    size = f"probe/abs/{place}"
    return [
        helper.make_node("Abs", [name], [size]),
        helper.make_node("ReduceMax", [size], [f"probe/{place}"], keepdims=0),
    ]


def _finite_ranges(model: ModelProto, names: list[str], feeds: Feeds) -> dict[str, float]:
    """Look at the few tensors that hold infinities or NaN one by one; only this copies activations out."""
    found: dict[str, float] = {}
    for name in names:
        copy = ModelProto()
        copy.CopyFrom(model)
        del copy.graph.output[:]
        copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        session = _session(copy)
        values = [_finite_max(_run(session, batch)[0]) for batch in _batches(model, feeds)]
        found[name] = math.nan if any(math.isnan(v) for v in values) else max(values, default=0.0)
    return found


def _finite_max(values: Array) -> float:
    size = np.abs(values)
    if np.isnan(size).any():
        return math.nan
    finite = size[np.isfinite(size)]
    return float(finite.max()) if finite.size else 0.0


def _batches(model: ModelProto, feeds: Feeds) -> Iterator[Feeds]:
    """Split the feeds along axis 0 into the model's fixed batch, or two images at a time where it is dynamic."""
    steps = {}
    for given in model.graph.input:
        dims = given.type.tensor_type.shape.dim
        array = feeds.get(given.name)
        if array is None or not array.ndim or not dims:
            continue
        step = dims[0].dim_value if dims[0].HasField("dim_value") else IMAGES
        if step < len(array):
            steps[given.name] = step
    runs = max((math.ceil(len(feeds[name]) / step) for name, step in steps.items()), default=1)
    for i in range(runs):
        yield {n: array[i * steps[n] : (i + 1) * steps[n]] if n in steps else array for n, array in feeds.items()}


def _session(model: ModelProto) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Every value must be there to be measured; optimisation would cost more than it gives in one run.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        raise PrecisionError(f"the range check cannot load the graph in ONNX Runtime: {error}") from error


def _run(session: object, feeds: Feeds) -> list[Array]:
    try:
        return session.run(None, dict(feeds))  # type: ignore[attr-defined, no-any-return]
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
        raise PrecisionError(f"the range check cannot run the graph on {shapes}: {error}") from error
