"""What the ONNX operator schemas say about a node's types: which slots follow a low precision and which do not."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto
from onnx.defs import OpSchema

from deploy.precision import policy
from deploy.precision.view import FLOAT, attribute, bodies
from deploy.records import Precision

_TYPE = {Precision.FP16: "tensor(float16)", Precision.BF16: "tensor(bfloat16)"}


class Slot(enum.Enum):
    """What a float tensor at this place becomes when its node is low."""

    LOW = "low"
    FLOAT32 = "float32"
    ANY = "any"  # takes whatever it is given


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Slots of a node, were it low. ``free``: it reads no float, so that its readers may choose its output type."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    free: bool


def schema_of(node: NodeProto, opsets: Mapping[str, int]) -> OpSchema | None:
    """Return the schema of a node at the model's opset, or ``None`` for a custom operator."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return None


def signature_of(
    node: NodeProto, types: Mapping[str, int], opsets: Mapping[str, int], low: Precision
) -> Signature | str:
    """Return the slots of a node, or the reason why it cannot be low."""
    if bodies(node):
        return policy.STRUCTURE
    schema = schema_of(node, opsets)
    if schema is None or any(name and name not in types for name in (*node.input, *node.output)):
        return policy.UNKNOWN  # a tensor without a tensor type is a sequence, or made by a custom operator
    inputs = tuple(_input_slot(node, schema, i, types) for i in range(len(node.input)))
    variables = {
        _formal(schema.inputs, i).type_str
        for i, (name, slot) in enumerate(zip(node.input, inputs, strict=True))
        if slot is Slot.LOW and types.get(name) == FLOAT
    }
    outputs = tuple(_output_slot(node, schema, i, variables) for i in range(len(node.output)))
    variables |= {
        _formal(schema.outputs, i).type_str
        for i, slot in enumerate(outputs)
        if slot is Slot.LOW and types.get(node.output[i]) == FLOAT
    }
    if any(not _takes(schema, variable, _TYPE[low]) for variable in variables):
        return policy.SCHEMA.format(dtype=policy.NAME[low], opset=opsets.get("", 1))
    free = node.op_type in policy.OUTPUT_TYPE and not any(types.get(name) == FLOAT for name in node.input)
    return Signature(inputs=inputs, outputs=outputs, free=free)


def output_type(node: NodeProto) -> int | None:
    """Return the element type that an attribute gives to the output, ``None`` where no attribute decides."""
    held = attribute(node, policy.OUTPUT_TYPE.get(node.op_type, ""))
    if held is None:
        return FLOAT if node.op_type == "ConstantOfShape" else None
    return held.t.data_type if held.type == onnx.AttributeProto.TENSOR else held.i


def _input_slot(node: NodeProto, schema: OpSchema, index: int, types: Mapping[str, int]) -> Slot:
    if index in policy.UNTYPED.get(node.op_type, ()):
        return Slot.ANY
    literal = _formal(schema.inputs, index).type_str.startswith("tensor(")
    pinned = literal or index in policy.PINNED.get(node.op_type, ())
    return Slot.FLOAT32 if pinned or types.get(node.input[index]) != FLOAT else Slot.LOW


def _output_slot(node: NodeProto, schema: OpSchema, index: int, variables: set[str]) -> Slot:
    if node.op_type in policy.OUTPUT_TYPE:
        return Slot.LOW
    if node.op_type == "DequantizeLinear":  # from opset 23 its output has a variable of its own: the scale's type
        return Slot.FLOAT32 if attribute(node, "output_dtype") else Slot.LOW
    return Slot.LOW if _formal(schema.outputs, index).type_str in variables else Slot.FLOAT32


def _formal(formals: Sequence[OpSchema.FormalParameter], index: int) -> OpSchema.FormalParameter:
    return formals[min(index, len(formals) - 1)]  # the last one may be variadic


def _takes(schema: OpSchema, variable: str, kind: str) -> bool:
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == variable), (variable,))
    return kind in allowed
