"""Raising a graph's opset by its label alone, where the operators only learnt new types in between.

Opset 22 taught Conv, the poolings, InstanceNormalization and GridSample bfloat16 and changed nothing else of them, so a
graph traced at 20 or 21 means the same at 22. Each operator's two schemas are compared; what else changed is refused.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto
from onnx.defs import OpSchema

from deploy.errors import PrecisionError
from deploy.precision import policy
from deploy.precision.schema import signature_of
from deploy.precision.view import bodies, opsets_of, tensor_types
from deploy.records import Precision

BF16_OPSET = 22
# From here on the schemas tell all that changed; before, GridSample's modes changed their names without a trace there.
_OLDEST = 20


def raise_opset(model: ModelProto, low: Precision) -> str | None:
    """Raise the opset in place where an operator needs it to take ``low``, and say so; ``None`` when there is no need.

    Raises:
        PrecisionError: the operators cannot be relabelled.
    """
    now = opsets_of(model).get("", 1)
    if low is not Precision.BF16 or now >= BF16_OPSET:
        return None
    eager = sorted(_would_gain(model, low))
    if not eager:
        return None
    changed = sorted({n.op_type for n in model.graph.node if not _only_new_types(n.op_type, n.domain, now)})
    if now < _OLDEST or changed or any(bodies(n) for n in model.graph.node):
        why = f"{', '.join(changed)} changed since" if changed else f"only {_OLDEST} and later can be relabelled"
        raise PrecisionError(
            f"{', '.join(eager)} take {policy.NAME[low]} from opset {BF16_OPSET}, the graph has opset {now} and {why}",
            hint=f"--set trace.opset={BF16_OPSET}",
        )
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = BF16_OPSET
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(list(model.opset_import), True))
    return f"opset raised from {now} to {BF16_OPSET}, from which {', '.join(eager)} take {policy.NAME[low]}"


def _would_gain(model: ModelProto, low: Precision) -> set[str]:
    """Operators that refuse ``low`` at the model's opset and take it at ``BF16_OPSET``."""
    types, now = tensor_types(model), opsets_of(model)
    later = {**now, "": BF16_OPSET}
    return {
        node.op_type
        for node in model.graph.node
        if node.op_type not in policy.KEPT_OPS
        and isinstance(signature_of(node, types, now, low), str)
        and not isinstance(signature_of(node, types, later, low), str)
    }


def _only_new_types(op_type: str, domain: str, now: int) -> bool:
    if domain not in ("", "ai.onnx"):
        return True
    try:
        old, new = (onnx.defs.get_schema(op_type, version, "") for version in (now, BF16_OPSET))
    except onnx.defs.SchemaError:
        return False
    return old.since_version == new.since_version or (_interface(old) == _interface(new) and not new.deprecated)


def _interface(schema: OpSchema) -> tuple[object, ...]:
    attributes = {
        n: (str(a.type), a.required, a.default_value.SerializeToString()) for n, a in schema.attributes.items()
    }
    formals = [[(f.name, f.type_str, str(f.option)) for f in side] for side in (schema.inputs, schema.outputs)]
    return attributes, formals
