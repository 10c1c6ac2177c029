"""How large activations become: the largest absolute value of every float tensor in a real float32 run.

The maxima are taken inside the graph (Abs, ReduceMax), so that no activation is copied out and memory stays that of one
inference; the images go through two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, helper

from deploy.backends.base import Array, Feeds
from deploy.errors import PrecisionError
from deploy.precision.policy import MOVEMENT
from deploy.precision.view import FLOAT

IMAGES = 2
"""Images per run."""

_SAME_VALUES = MOVEMENT & frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


def ranges_of(model: ModelProto, types: Mapping[str, int], feeds: Feeds) -> dict[str, float]:
    """Measure the largest finite absolute value of every float32 tensor that a float32 ``model`` computes.

    Infinite values are left out: they are mask fills, and 16-bit floats hold them as well.

    Args:
        model: The model.
        types: Tensor name -> element type, from ``deploy.precision.view.tensor_types``.
        feeds: Input name -> array; images on axis 0, in multiples of a fixed batch.

    Returns:
        Tensor name -> largest value, graph inputs included; NaN where the runtime's maximum is NaN. A single NaN may be
        passed over by it: finding them all is the parity stage's business.

    Raises:
        PrecisionError: ONNX Runtime cannot run the model on these feeds.
    """
    probes, same = _probes(model, types)
    found = _maxima(model, probes, feeds, masked=False)
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        found.update(_maxima(model, odd, feeds, masked=True))
    given = {i.name for i in model.graph.input}
    found.update({n: _finite_max(array) for n, array in feeds.items() if n in given and array.dtype == np.float32})
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


def _maxima(model: ModelProto, probes: list[str], feeds: Feeds, *, masked: bool) -> dict[str, float]:
    """Run all batches and take the largest value of each probe; ``masked`` leaves infinite values out, at some cost."""
    found = dict.fromkeys(probes, 0.0)
    if not probes:
        return found
    session = _session(_probed(model, probes, masked=masked))
    for batch in _batches(model, feeds):
        for name, value in zip(probes, map(float, _run(session, batch)), strict=True):
            found[name] = value if math.isnan(value) else max(found[name], value)
    return found


def _probed(model: ModelProto, probes: list[str], *, masked: bool) -> ModelProto:
    """Copy the model with the maximum of each probe as its only outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.output[:]
    graph.initializer.append(helper.make_tensor("probe/zero", FLOAT, [], [0.0]))
    for place, name in enumerate(probes):
        graph.node.extend(_maximum(name, f"probe/{place}", masked=masked))
        graph.output.append(helper.make_tensor_value_info(f"probe/{place}", FLOAT, []))
    return copy


def _maximum(name: str, output: str, *, masked: bool) -> list[NodeProto]:
    size, infinite, finite = (f"{output}/{part}" for part in ("size", "infinite", "finite"))
    mask = [
        helper.make_node("IsInf", [size], [infinite]),
        helper.make_node("Where", [infinite, "probe/zero", size], [finite]),
    ]
    return [
        helper.make_node("Abs", [name], [size]),
        *(mask if masked else ()),
        helper.make_node("ReduceMax", [finite if masked else size], [output], keepdims=0),
    ]


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
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # one run: waiting threads only take time
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
