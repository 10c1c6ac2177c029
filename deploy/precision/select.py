"""Which products are quantised, and why the others are not.

Where the time goes is products of an activation with weights: convolutions and linear layers. Everything else stays in
the higher precision, and of the products what a runtime has no kernel for, what a system keeps out by measurement, and
what the user asks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from onnx import NodeProto, helper

from deploy.errors import PrecisionError
from deploy.precision import policy
from deploy.precision.view import GraphView, attribute
from deploy.records import Kept, Target

PRODUCTS = ("Conv", "Gemm", "MatMul")
OTHER_PRODUCTS = ("ConvTranspose", "Einsum", "Attention")
ACTIVATIONS = ("Relu",)
"""What ONNX Runtime computes inside an integer convolution: the range is then that of its output."""

NARROWEST = 16
"""Channels below which INT8 tensor cores have no kernel that pays (NVIDIA ModelOpt leaves the same products out)."""

ASKED = "asked: quantization.keep_high {pattern!r}"
OPERATOR = "operator: no runtime has an integer kernel for it here"
DYNAMIC = "product of two activations: attention runs fused in 16 bits, and scores and merges do not survive 8 bits"
RANKED = "its weights have another rank than the integer kernels take"
SCALED = "a Gemm with alpha, beta or transA has no integer kernel"
FIRST = "reads the image: few channels, little time, and its rounding passes through the whole network"
NARROW = f"fewer than {NARROWEST} channels: no integer kernel that pays"
OUTPUT = "its output leaves the graph as float32"
FLAT_BIAS = "its bias is added to a matrix, which ONNX Runtime takes for a float Gemm"

_EXAMPLES = 5
_PASSES_VALUES = policy.MOVEMENT | {"Cast", "Pad", "Sub", "Mul", "Div", "Add", "Concat"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The products of a graph, by node index: quantised, or kept with the reason.

    ``activations`` maps a quantised convolution to the Relu that is computed inside it (ONNX Runtime only).
    """

    nodes: tuple[int, ...]
    kept: Mapping[int, str]
    activations: Mapping[int, int]

    def output(self, view: GraphView, index: int) -> str:
        """Name the tensor that a quantised convolution hands on."""
        return str(view.nodes[self.activations.get(index, index)].output[0])


def select(
    view: GraphView, target: Target, asked: Iterable[str], kept: Mapping[str, str], ranks: Mapping[str, int]
) -> Selection:
    """Choose the products to quantise.

    Args:
        view: The float32 graph.
        target: Runtime family.
        asked: The user's regular expressions on node names; what they find stays out.
        kept: The system's: expression -> reason. One that finds nothing belongs to another variant.
        ranks: Tensor -> number of axes, as far as it is known.

    Raises:
        PrecisionError: a pattern of the user's is malformed or finds nothing; or nothing is left to quantise.
    """
    products = [i for i, n in enumerate(view.nodes) if n.op_type in (*PRODUCTS, *OTHER_PRODUCTS)]
    reasons: dict[int, str] = {}
    for index, reason in _asked(view, products, asked):
        reasons.setdefault(index, reason)
    for pattern, why in kept.items():
        for index in (i for i in products if re.search(pattern, view.nodes[i].name)):
            reasons.setdefault(index, why)
    images = _from_images(view)
    for index in products:
        if reason := _unfit(view, index, target, images, ranks):
            reasons.setdefault(index, reason)
    chosen = tuple(i for i in products if i not in reasons)
    if not chosen:
        told = "; ".join(sorted(set(reasons.values()))[:3]) or "it has no convolution and no linear layer"
        raise PrecisionError(f"nothing in this graph can be quantised: {told}", hint="--fp16 or --fp32")
    activations = _activations(view, chosen) if target is Target.ONNXRUNTIME else {}
    return Selection(nodes=chosen, kept=reasons, activations=activations)


def groups(view: GraphView, kept: Mapping[int, str]) -> tuple[Kept, ...]:
    """Group what stays out by reason, the largest group first."""
    found: dict[str, list[int]] = defaultdict(list)
    for index in sorted(kept):
        found[kept[index]].append(index)
    return tuple(
        Kept(reason=reason, nodes=len(m), examples=tuple(view.nodes[i].name for i in m[:_EXAMPLES]))
        for reason, m in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _asked(view: GraphView, products: list[int], patterns: Iterable[str]) -> Iterator[tuple[int, str]]:
    for pattern in patterns:
        try:
            found = [i for i in products if re.search(pattern, view.nodes[i].name)]
        except re.error as error:
            raise PrecisionError(
                f"quantization.keep_high {pattern!r} is not a regular expression: {error}",
                hint="escape dots and brackets: \\.",
            ) from error
        if not found:
            some = ", ".join(repr(view.nodes[i].name) for i in products[:: max(1, len(products) // 3)][:3])
            raise PrecisionError(
                f"quantization.keep_high {pattern!r} matches no product; node names look like {some}",
                hint="effdeploy export ... --until passes, then look the names up in 20-patched.onnx",
            )
        yield from ((i, ASKED.format(pattern=pattern)) for i in found)


def _unfit(view: GraphView, index: int, target: Target, images: set[str], ranks: Mapping[str, int]) -> str:
    """Say why no integer kernel takes a product; empty where one does."""
    node = view.nodes[index]
    if node.op_type not in PRODUCTS:
        return OPERATOR
    weight = view.constants.get(node.input[1])
    if weight is None or node.input[0] in view.constants:
        return DYNAMIC
    if len(weight.dims) != (4 if node.op_type == "Conv" else 2):
        return RANKED
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = values.get("alpha", 1) == values.get("beta", 1) == 1 and not values.get("transA", 0)
    if node.op_type == "Gemm" and not plain:
        return SCALED
    if node.input[0] in images:
        return FIRST
    if target is Target.TENSORRT:
        return NARROW if min(_channels(node, tuple(weight.dims))) < NARROWEST else ""
    if node.op_type == "Conv" and _handed_on(view, node) in view.outputs:
        return OUTPUT
    return FLAT_BIAS if node.op_type == "MatMul" and _flat_bias(view, node, ranks) else ""


def _channels(node: NodeProto, dims: tuple[int, ...]) -> tuple[int, ...]:
    if node.op_type != "Conv":
        return dims
    held = attribute(node, "group")
    return dims[0], dims[1] * (held.i if held is not None else 1)


def _from_images(view: GraphView) -> set[str]:
    """Name the tensors that hold the graph's inputs, moved or normalised."""
    made = {name for node in view.nodes for name in node.output}
    found = {name for node in view.nodes for name in node.input if name and name not in made | set(view.constants)}
    for node in view.nodes:
        reads = [name for name in node.input if name and name not in view.constants]
        if node.op_type in _PASSES_VALUES and reads and all(name in found for name in reads):
            found.update(node.output)
    return found


def _activations(view: GraphView, chosen: tuple[int, ...]) -> dict[int, int]:
    found = {}
    for index in chosen:
        node = view.nodes[index]
        readers = view.readers.get(node.output[0], ())
        inside = len(readers) == 1 and view.nodes[readers[0][0]].op_type in ACTIVATIONS
        if node.op_type == "Conv" and inside and node.output[0] not in view.outputs:
            found[index] = readers[0][0]
    return found


def _handed_on(view: GraphView, node: NodeProto) -> str:
    readers = view.readers.get(node.output[0], ())
    if len(readers) == 1 and view.nodes[readers[0][0]].op_type in ACTIVATIONS:
        return str(view.nodes[readers[0][0]].output[0])
    return str(node.output[0])


def _flat_bias(view: GraphView, node: NodeProto, ranks: Mapping[str, int]) -> bool:
    """Whether a bias is added to a product of two axes; of three, ``lift_bias`` keeps the two apart."""
    adds = [view.nodes[i] for i, _ in view.readers.get(node.output[0], ()) if view.nodes[i].op_type == "Add"]
    return ranks.get(node.output[0], 0) < 3 and any(n in view.constants for add in adds for n in add.input)
