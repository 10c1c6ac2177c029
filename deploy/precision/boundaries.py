"""Where the error of a low precision arises: both graphs side by side, compared where activations leave a module.

One run of one graph measures many modules, so an export can afford it. It tells where an error is, not what each module
adds to the outputs: for that, ``effdeploy bisect`` switches modules one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, TensorProto

from deploy.backends.base import Feeds, Runner
from deploy.graph.io import module_of
from deploy.precision.modules import TOP, path_parts
from deploy.precision.splice import Splice
from deploy.precision.view import tensor_types
from deploy.records import BoundaryError, Precision

FLOOR = {Precision.FP16: 1e-3, Precision.BF16: 1e-2, Precision.INT8: 0.05, Precision.FP8: 0.1}
"""What rounding the inputs and weights of one module may cost: an error below is none that jumps."""

JUMP = 4.0
"""A module whose error leaves it this many times larger than it came in."""

PROBES = 48  # tensors that one comparison graph sums up

Borders = Mapping[str, tuple[str, frozenset[str]]]


def boundary_errors(
    splice: Splice,
    precision: Precision,
    open_graph: Callable[[ModelProto], Runner],
    feeds: Sequence[Feeds],
    *,
    most: int | None = None,
) -> tuple[BoundaryError, ...]:
    """Compare activations of both graphs where they leave a module, in the order of the network.

    Args:
        splice: Both graphs.
        precision: Of the low one.
        open_graph: Opens a graph of both precisions.
        feeds: The images.
        most: Compare no more tensors than this, at coarser modules where the innermost ones have more of them.
    """
    types = tensor_types(splice.high)  # a shape inference: once for all depths
    found = _borders(splice, types) if most is None else _coarser(splice, types, most)
    errors = _distances(splice, list(found), open_graph, feeds)
    made: dict[str, list[str]] = {}
    for tensor, (module, _) in found.items():
        made[module] = [*made.pop(module, ()), tensor]  # a module comes where it ends
    return tuple(_of_module(module, tensors, found, errors, precision) for module, tensors in made.items())


def _of_module(
    module: str, tensors: Sequence[str], borders: Borders, errors: Mapping[str, float], precision: Precision
) -> BoundaryError:
    worst = max(tensors, key=errors.__getitem__)
    before = max((errors[t] for t, (_, readers) in borders.items() if module in readers), default=0.0)
    after = errors[worst]
    jump = not math.isinf(before) and after > JUMP * max(before, FLOOR[precision])
    return BoundaryError(module=module, tensor=worst, before=before, after=after, jump=jump)


def _coarser(splice: Splice, types: Mapping[str, int], most: int) -> Borders:
    """Look at the innermost modules that have few enough borders; at the outermost, whatever they have."""
    deepest = max((len(path_parts(module_of(name))) for name in splice.nodes), default=1)
    for depth in range(deepest, 1, -1):
        if len(found := _borders(splice, types, depth)) <= most:
            return found
    return _borders(splice, types, 1)


def _borders(splice: Splice, types: Mapping[str, int], depth: int | None = None) -> Borders:
    """Find the float tensors that leave a module: tensor -> the module that makes it, and those that read it."""

    def module(node: str) -> str:
        return ".".join(path_parts(module_of(node))[:depth]) or TOP

    graph = splice.high.graph
    outputs = {o.name for o in graph.output}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(module(node.name))
    found = {}
    for node in graph.node:
        own = module(node.name)
        for name in node.output if node.name in splice.twins else ():
            others = readers.get(name, set()) - {own}
            if types.get(name) == TensorProto.FLOAT and (others or name in outputs):
                found[name] = (own, frozenset(others))
    return found


def _distances(
    splice: Splice, tensors: Sequence[str], open_graph: Callable[[ModelProto], Runner], feeds: Sequence[Feeds]
) -> dict[str, float]:
    """Return the relative L2 distance of both graphs' activations, over the images; infinite where not finite."""
    sums: dict[str, list[float]] = {}
    for start in range(0, len(tensors), PROBES):
        part = list(tensors[start : start + PROBES])
        total = np.zeros((len(part), 2))
        with open_graph(splice.probed(part)) as runner, np.errstate(all="ignore"):
            for given in feeds:
                total += runner.infer(given)["sums"].astype(np.float64)
        sums.update(zip(part, total.tolist(), strict=True))
    return {name: _relative(error, energy) for name, (error, energy) in sums.items()}


def _relative(error: float, energy: float) -> float:
    if not np.isfinite(error):
        return float("inf")
    return float(np.sqrt(error / energy)) if energy > 0 else (0.0 if error == 0 else float("inf"))
