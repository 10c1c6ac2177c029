"""The guards around passes: structure after each one, outputs before and after it, the ONNX checker at the end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from deploy.errors import GraphPassError
from deploy.graph.io import model_bytes, model_of

Feeds = Mapping[str, NDArray[np.generic]]
Interface = tuple[tuple[tuple[str, str, tuple[object, ...]], ...], ...]

# Largest change of an output that a pass may cause, relative to the largest absolute output: fp32 rounding, no more.
MAX_RELATIVE_CHANGE = 1e-5


def interface_of(graph: gs.Graph) -> Interface:
    """Return names, types and shapes of a graph's inputs and outputs."""
    return tuple(
        tuple((t.name, str(t.dtype), tuple(t.shape) if t.shape is not None else ()) for t in tensors)
        for tensors in (graph.inputs, graph.outputs)
    )


def check_structure(graph: gs.Graph, expected: Interface, culprit: str) -> None:
    """Hold a rewritten graph against its interface, single assignment and topological order.

    Raises:
        GraphPassError: naming ``culprit``, the pass that ran last.
    """
    if (got := interface_of(graph)) != expected:
        raise GraphPassError(f"pass {culprit} changed the inputs or outputs: got {got}, expected {expected}")
    made = {t.name for t in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if not (tensor.is_empty() or tensor.name in made or isinstance(tensor, gs.Constant)):
                raise GraphPassError(f"pass {culprit}: {node.name} ({node.op}) reads {tensor.name!r} before it is made")
        for name in (t.name for t in node.outputs if not t.is_empty()):
            if name in made:
                raise GraphPassError(
                    f"pass {culprit}: {name!r} is made twice, the second time by {node.name} ({node.op})"
                )
            made.add(name)
    for tensor in graph.outputs:
        if tensor.name not in made and not isinstance(tensor, gs.Constant):
            raise GraphPassError(f"pass {culprit}: nothing makes the output {tensor.name!r} any more")


def check_model(data: bytes) -> None:
    """Run the ONNX checker with full type and shape inference over a serialised model.

    Raises:
        GraphPassError: the checker refuses it.
    """
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphPassError(
            f"the rewritten graph is not valid ONNX: {str(error).strip()}",
            hint="run again with --verify-each to name the pass",
        ) from error


class OutputWatch:
    """Runs the graph after each pass on ONNX Runtime, its own optimisations off, and compares with the run before."""

    def __init__(self, graph: gs.Graph, feeds: Feeds) -> None:
        self._feeds = feeds
        self._data = model_bytes(model_of(graph))
        self._outputs = _run(self._data, feeds, "before any pass")

    def compare(self, graph: gs.Graph, culprit: str) -> float:
        """Return the largest absolute change that the pass caused.

        Raises:
            GraphPassError: naming ``culprit``: the graph does not run any more, or an output moved too far.
        """
        data = model_bytes(model_of(graph))
        if data == self._data:
            return 0.0
        outputs = _run(data, self._feeds, f"after pass {culprit}")
        change = max((_change(name, old, outputs[name], culprit) for name, old in self._outputs.items()), default=0.0)
        self._data, self._outputs = data, outputs
        return change


def _run(data: bytes, feeds: Feeds, when: str) -> dict[str, NDArray[np.generic]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        results = session.run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime raises classes of its own that share no base but Exception
        raise GraphPassError(f"ONNX Runtime cannot run the graph {when}: {error}") from error
    return {output.name: np.asarray(result) for output, result in zip(session.get_outputs(), results, strict=True)}


def _change(name: str, old: NDArray[np.generic], new: NDArray[np.generic], culprit: str) -> float:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        raise GraphPassError(
            f"pass {culprit} turned output {name!r} from {old.dtype}{list(old.shape)} into {new.dtype}{list(new.shape)}"
        )
    if old.size == 0 or np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
        return 0.0
    before, after = old.astype(np.float64), new.astype(np.float64)
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    change = float(np.max(np.where(same, 0.0, np.abs(after - before))))
    finite = np.abs(before[np.isfinite(before)])
    limit = MAX_RELATIVE_CHANGE * float(finite.max(initial=0.0)) if old.dtype.kind == "f" else 0.0
    if not change <= limit:  # NaN is beyond every limit
        raise GraphPassError(
            f"pass {culprit} moved output {name!r} by {change:.3g}, at most {limit:.3g} is rounding",
            hint=f"export without {culprit} and report the graph",
        )
    return change
