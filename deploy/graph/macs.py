"""Multiply-adds of ONNX nodes, from their shapes.

What is counted is what papers count: convolutions, matrix products and attention. Norms, activations, softmax, resizing
and pooling are not multiply-adds and count nothing. Biases are left out, as ``torch.utils.flop_counter`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx
import onnx.helper

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]


class UnknownShapeError(LookupError):
    """A shape that the count needs was not inferred."""


def macs_of(node: onnx.NodeProto, inputs: Shapes, outputs: Shapes) -> int:
    """Return the multiply-adds of one node; 0 for an operator that has none.

    Raises:
        UnknownShapeError: a shape that the rule needs is missing, or the shapes do not fit the operator.
    """
    rule = RULES.get(node.op_type)
    if rule is None:
        return 0
    try:
        return rule(node, inputs, outputs)
    except (IndexError, KeyError, ValueError) as error:
        raise UnknownShapeError(f"{node.op_type} {node.name}: {error}") from error


def is_opaque(node: onnx.NodeProto) -> bool:
    """Whether a node may hold multiply-adds that no rule here sees: control flow, recurrence, unknown domains."""
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        return True
    known_domain = node.domain in ("", "ai.onnx")
    return node.op_type in ("LSTM", "GRU", "RNN") or (not known_domain and node.op_type not in RULES)


def _known(shapes: Shapes, index: int) -> Shape:
    shape = shapes[index]
    if shape is None:
        raise UnknownShapeError(f"shape {index} is unknown")
    return shape


def _attribute(node: onnx.NodeProto, name: str, default: int | str) -> int | str:
    for attribute in node.attribute:
        if attribute.name == name:
            value = onnx.helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else int(value)
    return default


def _convolution(weight: int) -> Callable[[onnx.NodeProto, Shapes, Shapes], int]:
    """Return the rule of a convolution whose weight [out, in / groups, *kernel] is input ``weight``."""
    return lambda node, inputs, outputs: math.prod(_known(outputs, 0)) * math.prod(_known(inputs, weight)[1:])


def _transposed_convolution(node: onnx.NodeProto, inputs: Shapes, outputs: Shapes) -> int:
    """Every input value meets weight [in, out / groups, *kernel] once."""
    return math.prod(_known(inputs, 0)) * math.prod(_known(inputs, 1)[1:])


def _product(left: int, transposed: str = "") -> Callable[[onnx.NodeProto, Shapes, Shapes], int]:
    """Return the rule of a matrix product whose left operand is input ``left``."""

    def rule(node: onnx.NodeProto, inputs: Shapes, outputs: Shapes) -> int:
        shape = _known(inputs, left)
        axis = -2 if transposed and _attribute(node, transposed, 0) else -1
        return math.prod(_known(outputs, 0)) * shape[axis]

    return rule


def _einsum(node: onnx.NodeProto, inputs: Shapes, outputs: Shapes) -> int:
    """Contract the operands from left to right; indices that nobody needs any more are summed away at once."""
    equation = str(_attribute(node, "equation", "")).replace(" ", "")
    left, _, output = equation.partition("->")
    sizes: dict[str, int] = {}
    operands = [_indices(term, _known(inputs, i), sizes) for i, term in enumerate(left.split(","))]
    dots = max((sum(k.startswith(".") for k in keys) for keys in operands), default=0)
    letters = [c for term in left.split(",") for c in term if c.isalpha()]
    if "->" not in equation:
        output = "..." + "".join(c for c in letters if letters.count(c) == 1)
    kept = {c for c in output if c.isalpha()} | ({f".{i}" for i in range(1, dots + 1)} if "..." in output else set())
    total, current = 0, operands[0]
    for position, operand in enumerate(operands[1:], start=1):
        met = current | operand
        total += math.prod(sizes[k] for k in met)
        current = met & kept.union(*operands[position + 1 :])
    return total


def _indices(term: str, shape: Shape, sizes: dict[str, int]) -> set[str]:
    """Name the axes of one operand, those of an ellipsis from the right; fills ``sizes`` with the broadcast sizes."""
    before, dots, after = term.partition("...")
    hidden = len(shape) - len(before) - len(after)
    if hidden < 0 or (hidden and not dots):
        raise ValueError(f"{term!r} does not fit a shape of {len(shape)} axes")
    names = [*before, *(f".{hidden - i}" for i in range(hidden)), *after]
    for name, size in zip(names, shape, strict=True):
        sizes[name] = max(size, sizes.get(name, 1))
    return set(names)


def _attention(node: onnx.NodeProto, inputs: Shapes, outputs: Shapes) -> int:
    """Both products of ONNX's Attention: queries with keys, probabilities with values."""
    query, key, value = (_known(inputs, i) for i in range(3))
    past = _known(inputs, 4)[2] if len(node.input) > 4 and node.input[4] else 0
    keys = key[-2] + past
    if len(query) == 3:  # [batch, sequence, heads * size]
        heads, groups = int(_attribute(node, "q_num_heads", 1)), int(_attribute(node, "kv_num_heads", 1))
        width = query[-1] + heads * (value[-1] // groups)
        return query[0] * query[1] * keys * width
    return query[0] * query[1] * query[2] * keys * (query[3] + value[3])


Rule = Callable[[onnx.NodeProto, Shapes, Shapes], int]
RULES: Mapping[str, Rule] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "DeformConv": _convolution(1),
    "FusedConv": _convolution(1),  # com.microsoft
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product(0),
    "MatMulInteger": _product(0),
    "QLinearMatMul": _product(0),
    "FusedMatMul": _product(0, "transA"),  # com.microsoft
    "Gemm": _product(0, "transA"),
    "FusedGemm": _product(0, "transA"),  # com.microsoft
    "Einsum": _einsum,
    "Attention": _attention,
}
