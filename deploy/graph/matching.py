"""What passes share: reading a graph, guarding a site, rewriting it in place.

A pass hands ``rewrite`` a function that looks at one node. It returns True when it rewrote a site there, False when
there is none, and says ``require(fact, reason)`` for each guard: the first that fails declines the site, by name.

Nodes stay in topological order because a site collapses into its *last* node (``become``): all inputs exist by then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from deploy.graph.base import PassResult
from deploy.graph.io import module_of

Array = NDArray[Any]
Dim = int | str | None


class DeclinedError(Exception):
    """A place that looks like a site and is left alone; its text is the reason. Never leaves ``rewrite``."""


def require(fact: bool, reason: str) -> None:
    """Decline the site that is being looked at unless ``fact`` holds."""
    if not fact:
        raise DeclinedError(reason)


def rewrite(graph: gs.Graph, ops: Collection[str], visit: Callable[[gs.Graph, gs.Node], bool]) -> PassResult:
    """Visit every node whose operator is in ``ops``, in order; after a rewrite, remove what no output needs any more.

    A graph with control flow is left alone: a subgraph may read any tensor of the graph around it by name.
    """
    if (refused := refuse_control_flow(graph)) is not None:
        return refused
    sites, declined = 0, []
    for node in list(graph.nodes):
        if is_op(node, *ops) and node.outputs:  # a node that an earlier site removed has no outputs
            try:
                sites += visit(graph, node)
            except DeclinedError as reason:
                declined.append(f"{label(node)}: {reason}")
    if sites:
        sweep(graph)
    return PassResult(sites=sites, declined=tuple(declined))


def refuse_control_flow(graph: gs.Graph) -> PassResult | None:
    """Decline a graph that holds a subgraph (If, Loop, Scan), else return ``None``."""
    for node in graph.nodes:
        if next(node.subgraphs(), None) is not None:
            return PassResult(
                sites=0, declined=(f"{label(node)}: {node.op} holds a subgraph; the whole graph is left alone",)
            )
    return None


def sweep(graph: gs.Graph) -> int:
    """Remove the nodes that no graph output needs; return how many there were."""
    needed, live = {id(t) for t in graph.outputs}, []
    for node in reversed(graph.nodes):
        if any(id(t) in needed for t in node.outputs):
            live.append(node)
            needed.update(id(t) for t in node.inputs)
        else:
            detach(node)
    removed = len(graph.nodes) - len(live)
    graph.nodes = live[::-1]
    return removed


def detach(node: gs.Node) -> None:
    """Take a node's tensors from it, so that nobody counts it as their consumer."""
    node.inputs.clear()
    node.outputs.clear()


def label(node: gs.Node) -> str:
    """Name a node in a sentence; files of other tools leave names empty."""
    outputs = [t.name for t in node.outputs]
    return node.name or f"{node.op} that makes {', '.join(outputs)}"


def is_op(node: gs.Node | None, *ops: str) -> bool:
    """Whether a node is one of these operators of the default domain."""
    return node is not None and node.op in ops and node.domain in (None, "", "ai.onnx")


def producer(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """Return the node that makes ``tensor`` if it is one of ``ops``."""
    node = tensor.inputs[0] if tensor.inputs else None
    return node if is_op(node, *ops) else None


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is an output of the graph."""
    return any(tensor is output for output in graph.outputs)


def only_consumer(graph: gs.Graph, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """Return the one node that reads ``tensor``, once, if it is one of ``ops`` and nobody else needs the tensor."""
    if len(tensor.outputs) != 1 or is_output(graph, tensor):
        return None
    return tensor.outputs[0] if is_op(tensor.outputs[0], *ops) else None


def require_private(graph: gs.Graph, node: gs.Node) -> None:
    """Decline unless the first output of ``node`` is read by exactly one node and is no graph output."""
    tensor = node.outputs[0]
    require(not is_output(graph, tensor), f"{label(node)} makes the graph output {tensor.name!r}")
    require(len(tensor.outputs) == 1, f"the result of {label(node)} has {len(tensor.outputs)} consumers")


def constant(tensor: gs.Tensor) -> Array | None:
    """Return the values of an initialiser; ``None`` for a variable or a type that numpy lacks (bfloat16, float8, int4).

    The array may be a view of the model's bytes: never write to it.
    """
    if (
        not isinstance(tensor, gs.Constant)
        or isinstance(tensor.dtype, int)
        or np.dtype(tensor.dtype).kind not in "biuf"
    ):
        return None
    values = tensor._values
    if isinstance(values, np.ndarray):
        return values
    # Not `tensor.values`: that would replace the weights by a copy, which the export copies once more.
    return onnx.numpy_helper.to_array(values.tensor) if type(values) is LazyValues else None


def scalar(tensor: gs.Tensor, rank: int | None = 0) -> float | None:
    """Return a constant of one element that broadcasting does not let raise a tensor of ``rank`` axes."""
    values = constant(tensor) if not tensor.shape or len(tensor.shape) <= (rank or 0) else None
    return float(values.reshape(())) if values is not None and values.size == 1 else None


def scalar_operand(node: gs.Node, other: gs.Tensor) -> float | None:
    """Return the scalar that a commutative ``node`` combines with ``other``, if that is what it does."""
    for index in (0, 1):
        if node.inputs[index] is other:
            return scalar(node.inputs[1 - index], rank_of(other))
    return None


def is_close(value: float | None, expected: float) -> bool:
    """Whether a constant is ``expected`` to float32 accuracy."""
    return value is not None and abs(value - expected) <= 4e-7 * abs(expected)


def shape_of(tensor: gs.Tensor) -> tuple[Dim, ...] | None:
    """Return a tensor's shape, or ``None``; a string in it is a named dynamic axis, ``None`` one that is not known."""
    return None if tensor.shape is None else tuple(d if isinstance(d, str) and d else _size(d) for d in tensor.shape)


def _size(dim: object) -> int | None:
    return dim if isinstance(dim, int) and dim >= 0 else None


def static_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Return a tensor's shape if every axis is a known number."""
    shape = shape_of(tensor)
    sizes = tuple(d for d in shape or () if isinstance(d, int))
    return sizes if shape is not None and len(sizes) == len(shape) else None


def rank_of(tensor: gs.Tensor) -> int | None:
    """Return a tensor's number of axes, or ``None``."""
    return None if tensor.shape is None else len(tensor.shape)


def reshape_target(
    node: gs.Node, copied: tuple[Dim, ...] | None = None, sized: tuple[Dim, ...] | None = None
) -> tuple[Dim, ...] | None:
    """Return the shape that a Reshape gives, 0 and -1 resolved as far as known; ``None`` for a computed target.

    Args:
        node: The Reshape.
        copied: Shape that a 0 copies from, when more is known than the graph says of the input.
        sized: Shape of any tensor with as many elements, from which -1 follows.
    """
    target, shape = constant(node.inputs[1]), shape_of(node.inputs[0])
    if target is None:
        return None
    source, copies = copied or shape or (), not node.attrs.get("allowzero", 0)
    dims: list[Dim] = []
    for axis, size in enumerate(int(d) for d in target):
        dims.append((source[axis] if axis < len(source) else None) if size == 0 and copies else size)
    if -1 in dims:
        index = dims.index(-1)
        dims[index] = _remaining(sized or shape, dims[:index] + dims[index + 1 :])
    return tuple(dims)


def _remaining(shape: tuple[Dim, ...] | None, others: Sequence[Dim]) -> Dim:
    """Divide a shape by the other axes of a Reshape's target; named axes cancel."""
    if shape is None or None in shape or None in others:
        return None
    names = Counter(d for d in shape if isinstance(d, str))
    names.subtract(d for d in others if isinstance(d, str))
    whole, part = (math.prod(d for d in dims if isinstance(d, int)) for dims in (shape, others))
    left = [name for name, count in names.items() if count]
    if part == 0 or whole % part or any(count < 0 for count in names.values()):
        return None
    if not left:
        return whole // part
    return left[0] if len(left) == 1 and names[left[0]] == 1 and whole == part else None


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Return a tensor's numpy type, or ``None`` when it is unknown or numpy has none."""
    return None if tensor.dtype is None or isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)


def require_float32(tensor: gs.Tensor) -> None:
    """Decline unless the tensor is float32: fused operators compute other types in float32, so results would move."""
    got = dtype_of(tensor)
    require(got == np.float32, f"its input is {got or 'of unknown type'}, expected float32")


def optional_input(node: gs.Node, index: int) -> gs.Tensor | None:
    """Return an input that may be absent: cut off at the end, or named ``""``."""
    return node.inputs[index] if index < len(node.inputs) and not node.inputs[index].is_empty() else None


def reduction_axes(node: gs.Node) -> tuple[int, ...] | None:
    """Return the constant axes of a Reduce*, Squeeze or Unsqueeze (input or, in old opsets, attribute), or ``None``."""
    if "axes" in node.attrs:
        return tuple(int(a) for a in node.attrs["axes"])
    tensor = optional_input(node, 1)
    values = None if tensor is None else constant(tensor)
    return None if values is None else tuple(int(a) for a in values.reshape(-1))


def become(graph: gs.Graph, node: gs.Node, op: str, inputs: Sequence[gs.Tensor], **attrs: object) -> None:
    """Turn the last node of a site into the operator that replaces the site; it keeps its place, outputs and module."""
    node.name = unused_name({n.name for n in graph.nodes if n is not node}, inside(node, op))
    node.op, node.attrs = op, dict(attrs)
    node.inputs = list(inputs)


def inside(node: gs.Node, name: str) -> str:
    """Put a name into the module of a node: ``norm1/Div``, ``gain`` -> ``norm1/gain``."""
    module = module_of(node.name)
    return f"{module}/{name}" if module else name


def new_constant(graph: gs.Graph, name: str, values: Array) -> gs.Constant:
    """Make an initialiser with a name that no tensor has yet."""
    return gs.Constant(unused_name(graph.tensors(), name), np.ascontiguousarray(values))


def unused_name(taken: Collection[str], name: str) -> str:
    """Return ``name``, or ``name_1``, ``name_2``, ... if it is taken."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> None:
    """Remove a node whose first output equals ``source``; a graph output keeps its name, type and shape.

    Declines when the node stands between a graph input or weight, or a second graph output, and a graph output.
    """
    output = node.outputs[0]
    if not is_output(graph, output):
        redirect(output, source)
        detach(node)
        return
    maker = source.inputs[0] if source.inputs else None
    if maker is None or is_output(graph, source):
        raise DeclinedError("it makes a graph output and nothing else could")
    detach(node)
    redirect(source, output)
    index = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
    maker.outputs[index] = output


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of ``old`` read ``new``."""
    for consumer in list(old.outputs):
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = new
