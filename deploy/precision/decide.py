"""Which nodes stay float32: the operator table, the paths around it, what the user asks and what the values demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from deploy.errors import PrecisionError
from deploy.precision import policy
from deploy.precision.schema import Signature, Slot, output_type, signature_of
from deploy.precision.view import FLOAT, GraphView, attribute
from deploy.records import Precision, Target

Marks = dict[int, str]  # node -> why it stays float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The type of every float node: float32 with a reason, or low with its slots."""

    kept: Mapping[int, str]
    low: Mapping[int, Signature]


def decide(
    view: GraphView, low: Precision, target: Target, keep: Iterable[str], ranges: Mapping[str, float]
) -> Decision:
    """Give every node that makes or reads float tensors its type; the first rule that speaks gives the reason.

    Args:
        view: The float32 graph.
        low: FP16 or BF16.
        target: Runtime family; some operators are kept for one of them only.
        keep: Regular expressions, searched in node names (which follow the module path).
        ranges: Tensor -> largest absolute activation; empty when not measured.

    Raises:
        PrecisionError: a pattern is malformed or matches nothing.
    """
    floats = [i for i, n in enumerate(view.nodes) if _touches_float(view, n)]
    signatures = {i: signature_of(view.nodes[i], view.types, view.opsets, low) for i in floats}
    free = {i for i, s in signatures.items() if isinstance(s, Signature) and s.free}
    kept: Marks = {}
    rules: tuple[Callable[[], Marks], ...] = (
        lambda: _asked(view, floats, keep),
        lambda: {i: s for i, s in signatures.items() if isinstance(s, str)},
        lambda: _by_operator(view, floats, target),
        lambda: _by_path(view),
        lambda: _by_constant(view, floats, low),
        lambda: _by_range(view, floats, ranges, low),
        lambda: _between(view, set(floats) - free, kept),
    )
    for rule in rules:
        for index, reason in rule().items():
            if index in signatures:
                kept.setdefault(index, reason)
    typed = {i: s for i, s in signatures.items() if i not in kept and isinstance(s, Signature)}
    for index in sorted(free & set(typed), reverse=True):
        if not _wanted_low(view, index, typed):
            kept[index] = policy.FOLLOWS
            del typed[index]
    return Decision(kept=kept, low=typed)


def _touches_float(view: GraphView, node: NodeProto) -> bool:
    makes = any(view.types.get(n) == FLOAT for n in node.output)
    untyped = policy.UNTYPED.get(node.op_type, frozenset())
    return makes or any(view.types.get(n) == FLOAT and i not in untyped for i, n in enumerate(node.input))


def _asked(view: GraphView, floats: list[int], keep: Iterable[str]) -> Marks:
    marks: Marks = {}
    for pattern in keep:
        try:
            found = [i for i in floats if re.search(pattern, view.nodes[i].name)]
        except re.error as error:
            raise PrecisionError(
                f"typing.keep_fp32 {pattern!r} is not a regular expression: {error}",
                hint="escape dots and brackets: \\.",
            ) from error
        if not found:
            examples = ", ".join(repr(view.nodes[i].name) for i in floats[:: max(1, len(floats) // 3)][:3])
            raise PrecisionError(
                f"typing.keep_fp32 {pattern!r} matches no floating-point node; node names look like {examples}",
                hint="effdeploy export ... --until passes, then look the names up in 20-patched.onnx",
            )
        for index in found:
            marks.setdefault(index, policy.ASKED.format(pattern=pattern))
    return marks


def _by_operator(view: GraphView, floats: list[int], target: Target) -> Marks:
    marks: Marks = {}
    for index in floats:
        node = view.nodes[index]
        mode = attribute(node, "reduction")
        if node.op_type in policy.ACCUMULATING and mode is not None and mode.s != b"none":
            marks[index] = policy.SCATTER
        elif node.op_type in policy.KEPT_OPS and not _float32_inside(view, node, target):
            marks[index] = policy.KEPT_OPS[node.op_type]
    return marks


def _float32_inside(view: GraphView, node: NodeProto, target: Target) -> bool:
    """Whether the runtime has this norm as one operator with float32 statistics, which opset 21 made explicit."""
    stash = attribute(node, "stash_type")
    explicit = view.opsets.get("", 1) >= 21 and (stash is None or stash.i == FLOAT)
    return explicit and node.op_type in policy.FLOAT32_INSIDE[target]


def _by_path(view: GraphView) -> Marks:
    marks: Marks = {}
    for index, node in enumerate(view.nodes):
        found: Iterable[int] = ()
        reason = ""
        if node.op_type in ("TopK", "ArgMax", "ArgMin"):
            found, reason = _upstream(view, node.input[0], _is_elementwise, ends=_is_product), policy.SELECT
        elif node.op_type == "GridSample":
            found, reason = _upstream(view, node.input[1], _is_elementwise), policy.GRID
        elif node.op_type == "Log":
            found, reason = _inverse_sigmoid(view, index), policy.LOG
        elif node.op_type in policy.REDUCTIONS:
            found, reason = _upstream(view, node.input[0], _prepares_sum), policy.SUM
        elif node.op_type in ("Div", "Reciprocal", "Sqrt"):
            found, reason = _normaliser(view, index), policy.SUM
        elif node.op_type == "Cast" and output_type(node) in (TensorProto.INT32, TensorProto.INT64):
            found, reason = _upstream(view, node.input[0], _is_elementwise), policy.INDEX
        for i in found:
            marks.setdefault(i, reason)
    for i in _from_integers(view):
        marks.setdefault(i, policy.INDEX)
    return marks


Predicate = Callable[[NodeProto], bool]


def _is_elementwise(node: NodeProto) -> bool:
    return node.op_type in policy.ELEMENTWISE


def _is_product(node: NodeProto) -> bool:
    return node.op_type in policy.PRODUCTS


def _prepares_sum(node: NodeProto) -> bool:
    """Squares, and the difference or exponential that a variance or a hand-written softmax sums."""
    square = node.op_type == "Mul" and node.input[0] == node.input[1]
    return square or node.op_type in ("Pow", "Abs", "Exp", "Sub")


def _upstream(view: GraphView, tensor: str, through: Predicate, ends: Predicate = lambda node: False) -> set[int]:
    """Nodes above ``tensor`` that satisfy ``through``, and those that satisfy ``ends``, where the walk stops."""
    found: set[int] = set()
    todo = [view.producer[tensor]] if tensor in view.producer else []
    while todo:
        index = todo.pop()
        node = view.nodes[index]
        if index in found or not (through(node) or ends(node)):
            continue
        found.add(index)
        if not ends(node):
            todo.extend(view.makers(index))
    return found


def _normaliser(view: GraphView, index: int) -> set[int]:
    """A division by what a reduction made, or the root of it: the reduction's chain and the division itself."""
    node = view.nodes[index]
    start = node.input[1] if node.op_type == "Div" else node.input[0]
    scalar = frozenset({"Add", "Sqrt", "Clip", "Max", "Pow", "Reciprocal", "Expand", "Unsqueeze", "Reshape", "Mul"})
    chain = _upstream(view, start, lambda n: n.op_type in scalar, ends=lambda n: n.op_type in policy.REDUCTIONS)
    reduced = any(view.nodes[i].op_type in policy.REDUCTIONS for i in chain)
    return chain | {index} if reduced else set()


def _inverse_sigmoid(view: GraphView, index: int) -> set[int]:
    """What a logarithm is computed from, and the sum and sigmoid that follow it."""
    found = _upstream(view, view.nodes[index].input[0], _is_elementwise)
    for adder in _readers_of(view, index, ("Add", "Sub")):
        found |= {adder} | set(_readers_of(view, adder, ("Add", "Sub")))
        found |= {s for a in tuple(found) for s in _readers_of(view, a, ("Sigmoid",))}
    return found


def _readers_of(view: GraphView, index: int, ops: tuple[str, ...]) -> list[int]:
    return [i for name in view.floats_out(index) for i, _ in view.readers.get(name, ()) if view.nodes[i].op_type in ops]


def _from_integers(view: GraphView) -> list[int]:
    """Element-wise arithmetic on nothing but whole numbers and constants."""
    found: list[int] = []
    whole: set[str] = set()
    for index, node in enumerate(view.nodes):
        inputs = view.floats_in(index)
        if node.op_type == "Cast":
            source = view.types.get(node.input[0])
            if source in (TensorProto.INT32, TensorProto.INT64):
                whole.update(node.output)
        elif _is_elementwise(node) and inputs and whole.issuperset(inputs):
            whole.update(node.output)
            found.append(index)
    return found


def _by_constant(view: GraphView, floats: list[int], low: Precision) -> Marks:
    """Scalars that the low type cannot hold: an epsilon that becomes zero, a mask fill that becomes infinity.

    A bound of Clip may become infinite: no finite low value is beyond it.
    """
    marks: Marks = {}
    scalars = {name: held for name, t in view.constants.items() if (held := _scalar(t)) is not None}
    for index in floats:
        node = view.nodes[index]
        pinned = policy.PINNED.get(node.op_type, frozenset())
        read = [scalars[name] for slot, name in enumerate(node.input) if name in scalars and slot not in pinned]
        fill = attribute(node, "value") if node.op_type == "ConstantOfShape" else None
        for value in read if fill is None else [_scalar(fill.t)]:
            if value is None:
                continue
            if 0 < value <= policy.SMALLEST[low] / 2:
                marks.setdefault(index, policy.TINY.format(dtype=policy.NAME[low]))
            elif value > policy.LIMIT[low] and np.isfinite(value) and node.op_type != "Clip":
                marks.setdefault(index, _range_reason(low))
    return marks


def _scalar(tensor: TensorProto) -> float | None:
    if tensor.data_type != FLOAT or int(np.prod(tensor.dims)) != 1:
        return None
    return float(np.abs(numpy_helper.to_array(tensor)).item())


def _by_range(view: GraphView, floats: list[int], ranges: Mapping[str, float], low: Precision) -> Marks:
    beyond = {name for name, value in ranges.items() if value > policy.LIMIT[low]}
    if not beyond:
        return {}
    marks: Marks = {}
    for index in floats:
        node = view.nodes[index]
        if beyond.intersection(node.input) or beyond.intersection(node.output):
            marks[index] = _range_reason(low)
    return marks


def _range_reason(low: Precision) -> str:
    return policy.RANGE.format(dtype=policy.NAME[low], limit=policy.LIMIT[low])


def _between(view: GraphView, typed: set[int], kept: Mapping[int, str]) -> Marks:
    """Element-wise nodes that compute from float32 alone and whose results are read as float32 alone."""
    group = {i for i in typed if i not in kept and _is_elementwise(view.nodes[i]) and view.floats_in(i)}
    shrinking = True
    while shrinking:
        lost = typed - set(kept) - group
        closed = {i for i in group if lost.isdisjoint(_neighbours(view, i))}
        shrinking = len(closed) < len(group)
        group = closed
    return dict.fromkeys(sorted(group), policy.BETWEEN)


def _neighbours(view: GraphView, index: int) -> list[int]:
    readers = [i for name in view.floats_out(index) for i, _ in view.readers.get(name, ())]
    return view.makers(index) + readers


def _wanted_low(view: GraphView, index: int, typed: Mapping[int, Signature]) -> bool:
    """Whether all readers of a free node's output are low."""
    for name in view.nodes[index].output:
        if name in view.outputs:
            return False
        for reader, slot in view.readers.get(name, ()):
            if reader not in typed or slot < 0 or typed[reader].inputs[slot] is not Slot.LOW:
                return False
    return True
