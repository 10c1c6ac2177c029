"""Predicates on values: weights beyond a type's range, and the scales and zero points of quantised graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from deploy.linting.checks.base import Check, Hit, has, hit, sites
from deploy.linting.checks.structure import WEIGHT
from deploy.linting.view import View

_SMALLEST_NORMAL = 2.0**-14  # of float16; smaller scales lose digits
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


def weight_range(view: View, rule: Any) -> Iterator[Hit]:
    """A weight is beyond ``most`` in size, or infinite."""
    for tensor in view.initializers.values():
        values = view.values(tensor) if tensor.data_type in _FLOATS else None
        if values is None or not values.size:
            continue
        largest = max(float(np.nanmax(values)), -float(np.nanmin(values))) if not np.isnan(values).all() else 0.0
        if largest > rule.given["most"]:
            yield Hit(name=tensor.name, operator=WEIGHT, found=f"{largest:.4g}")


def weight_nan(view: View, rule: Any) -> Iterator[Hit]:
    """A weight is not a number."""
    for tensor in view.initializers.values():
        values = view.values(tensor) if tensor.data_type in (*_FLOATS, TensorProto.FLOAT16) else None
        if values is not None and (count := int(np.isnan(values).sum())):
            yield Hit(name=tensor.name, operator=WEIGHT, found=str(count))


def zero_point(view: View, rule: Any) -> Iterator[Hit]:
    """A zero point is not zero."""
    for site in sites(view, rule):
        values = view.value(site.node.input[2]) if has(site, 2) else None
        if values is not None and (wrong := values.reshape(-1)[values.reshape(-1) != 0]).size:
            yield hit(site, wrong[0])


def scale_positive(view: View, rule: Any) -> Iterator[Hit]:
    """A scale is zero, negative, infinite or not a number."""
    for site in sites(view, rule):
        values = _scales(view, site.node)
        if values is not None and (wrong := values[~(np.isfinite(values) & (values > 0))]).size:
            yield hit(site, f"{wrong[0]:g}")


def scale_subnormal(view: View, rule: Any) -> Iterator[Hit]:
    """A float16 scale is below the smallest number with all digits."""
    for site in sites(view, rule):
        values = _scales(view, site.node) if view.type_of(site.node, 1) == TensorProto.FLOAT16 else None
        if values is not None and (small := values[(values > 0) & (values < _SMALLEST_NORMAL)]).size:
            yield hit(site, f"{small[0]:.3g}")


def scale_by_channel(view: View, rule: Any) -> Iterator[Hit]:
    """An activation, which is no constant, has a scale for each channel."""
    for site in sites(view, rule):
        values = _scales(view, site.node)
        if values is not None and values.size > 1 and not _quantised_constant(view, site.node):
            yield hit(site, values.size)


def scale_axis(view: View, rule: Any) -> Iterator[Hit]:
    """The scales of a weight lie along another axis than the outputs of its product: Conv and Gemm 0 or 1, MatMul 1."""
    for site in sites(view, rule):
        maker = view.makers.get(site.node.input[1]) if has(site, 1) else None
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        values = _scales(view, maker)
        if values is None or values.size < 2:
            continue
        shape = view.shape_of(maker, 0) or ()
        axis = int(view.attribute(maker, "axis", 1))
        axis = axis % len(shape) if shape else axis
        if axis != (wanted := _output_axis(view, site.node)):
            yield hit(site, f"{axis}, not {wanted}")


def _scales(view: View, node: NodeProto) -> Any:
    """Return the scales of a Q or DQ in float32, flat; ``None`` where they are computed."""
    values = view.value(node.input[1]) if len(node.input) > 1 else None
    return None if values is None else values.astype(np.float32).reshape(-1)


def _quantised_constant(view: View, node: NodeProto) -> bool:
    """Whether what a Q or DQ works on is a weight: a constant, or a DQ of one."""
    name = node.input[0]
    return name in view.constants


def _output_axis(view: View, node: NodeProto) -> int:
    if node.op_type == "Gemm":
        return 0 if view.attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, 1)


NUMBERS: dict[str, Check] = {
    check.__name__: check
    for check in (
        weight_range, weight_nan, zero_point, scale_positive, scale_subnormal, scale_by_channel, scale_axis,
    )
}  # fmt: skip
