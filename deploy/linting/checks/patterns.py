"""Predicates that look at several nodes: attention's operands, norms and activations that were taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from deploy.linting.checks.base import Check, Hit, has, hit, sites
from deploy.linting.view import Site, View, type_name

_FOUR = 4  # rank of Q, K and V with an axis for heads


def attention_type(view: View, rule: Any) -> Iterator[Hit]:
    """An Attention computes in a refused type, and its operands are not what the builder can take apart."""
    for site in sites(view, rule):
        name = type_name(view.type_of(site.node, 0))
        if name in rule.given["refused"] and not _decomposable(view, site):
            yield hit(site, name)


def head_size(view: View, rule: Any) -> Iterator[Hit]:
    """The size of an Attention's heads is known and not within ``least`` and ``most``; as above."""
    for site in sites(view, rule):
        size = _head_size(view, site.node, 0, "q_num_heads")
        known = size is not None and not rule.given["least"] <= size <= rule.given["most"]
        if known and not _decomposable(view, site):
            yield hit(site, size)


def value_size(view: View, rule: Any) -> Iterator[Hit]:
    """An Attention's values have heads of another size than its queries."""
    for site in sites(view, rule):
        queries = _head_size(view, site.node, 0, "q_num_heads")
        values = _head_size(view, site.node, 2, "kv_num_heads")
        if queries is not None and values is not None and queries != values:
            yield hit(site, f"{queries} and {values}")


def mask_type(view: View, rule: Any) -> Iterator[Hit]:
    """An Attention's mask is neither boolean nor of the type of its queries."""
    for site in sites(view, rule):
        mask, queries = view.type_of(site.node, 3), view.type_of(site.node, 0)
        if has(site, 3) and mask and queries and mask not in (TensorProto.BOOL, queries):
            yield hit(site)


def split_layer_norm(view: View, rule: Any) -> Iterator[Hit]:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps)`` in single operators; the Sqrt stands for it."""
    for site in sites(view, rule):
        added = _maker(view, site.node.input[0] if site.node.input else "", "Add")
        mean = None if added is None else next(_makers(view, added, "ReduceMean"), None)
        square = None if mean is None else next(_makers(view, mean, "Pow", "Mul"), None)
        centred = None if square is None else next(_makers(view, square, "Sub"), None)
        if centred is not None and next(_makers(view, centred, "ReduceMean"), None) is not None:
            yield hit(site)


def split_gelu(view: View, rule: Any) -> Iterator[Hit]:
    """``x / 2 * (1 + erf(x / sqrt(2)))`` in single operators; the Erf stands for it."""
    for site in sites(view, rule):
        after = [n for name in site.node.output for n in view.consumers.get(name, ()) if n.op_type == "Add"]
        before = _maker(view, site.node.input[0] if site.node.input else "", "Div", "Mul")
        if before is not None and any(_reads(view, node, 1.0) for node in after):
            yield hit(site)


def filtered_convolution(view: View, rule: Any) -> Iterator[Hit]:
    """Winograd's F(4x4, 3x3) in single operators (RT-DETR's form for CPUs); the outputs' transform stands for it."""
    for site in sites(view, rule):
        name = site.node.input[0] if site.node.input else ""
        if name in view.constants and view.shape_of(site.node, 0) == (16, 36):
            yield hit(site)


def _decomposable(view: View, site: Site) -> bool:
    """Whether TensorRT-RTX 1.7.1 takes the node apart where it has no kernel.

    It does where nothing is masked, and queries, keys and values are [B,S,H*D] or were made of it by Reshape and
    Transpose.
    """
    masked = has(site, 3) or view.attribute(site.node, "is_causal", 0)
    return not masked and all(_is_flat(view, site.node, place) for place in range(3))


def _is_flat(view: View, node: NodeProto, place: int) -> bool:
    if len(view.shape_of(node, place) or ()) == _FOUR - 1:
        return True
    heads = _maker(view, node.input[place], "Transpose") if place < len(node.input) else None
    split = None if heads is None else _maker(view, heads.input[0], "Reshape")
    if heads is None or split is None or len(view.shape_of(split, 0) or ()) != _FOUR - 1:
        return False
    return list(view.attribute(heads, "perm", ())) == [0, 2, 1, 3]


def _head_size(view: View, node: NodeProto, place: int, heads: str) -> int | None:
    """Return the size of one head: the last axis, or of three axes its share."""
    shape = view.shape_of(node, place)
    if not shape or not isinstance(shape[-1], int):
        return None
    if len(shape) == _FOUR:
        return shape[-1]
    count = view.attribute(node, heads, 0)
    return shape[-1] // count if count else None


def _maker(view: View, name: str, *operators: str) -> NodeProto | None:
    node = view.makers.get(name)
    return node if node is not None and node.op_type in operators else None


def _makers(view: View, node: NodeProto, *operators: str) -> Iterator[NodeProto]:
    """Yield the makers of a node's inputs of these operators, through casts."""
    for name in node.input:
        cast = _maker(view, name, "Cast")
        found = _maker(view, cast.input[0] if cast is not None and cast.input else name, *operators)
        if found is not None:
            yield found


def _reads(view: View, node: NodeProto, number: float) -> bool:
    values = [view.value(name) for name in node.input]
    return any(v is not None and v.size == 1 and bool(np.all(v == number)) for v in values)


PATTERNS: dict[str, Check] = {
    check.__name__: check
    for check in (
        attention_type,
        head_size,
        value_size,
        mask_type,
        split_layer_norm,
        split_gelu,
        filtered_convolution,
    )
}
