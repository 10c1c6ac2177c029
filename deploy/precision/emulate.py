"""A float32-computing twin of a typed graph that rounds every low tensor, so that a CPU can judge low precision.

ONNX Runtime's CPU provider has no bfloat16 kernels, and runs a float16 graph in float32 with far fewer roundings than a
GPU makes. The twin computes each operator in float32 (as tensor cores accumulate) and rounds its result through the
low type by a pair of casts, which ONNX Runtime's optimiser leaves alone
(``tests/precision/test_precision_emulate.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx import ModelProto, NodeProto, TensorProto, helper

from deploy.precision.policy import MOVEMENT, OUTPUT_TYPE
from deploy.precision.view import FLOAT, attribute, fresh_name, names_in, tensor_types
from deploy.precision.weights import widened

_LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def emulated(model: ModelProto) -> ModelProto:
    """Return the twin of a typed float16 or bfloat16 graph: same inputs and outputs, all float tensors float32.

    Args:
        model: What ``convert_precision`` wrote; a graph without low tensors comes back as it is.

    Raises:
        PrecisionError: its types cannot be inferred.
    """
    types = {n: t for n, t in tensor_types(model).items() if t in _LOW}
    twin = ModelProto()
    twin.CopyFrom(model)
    taken = names_in(twin.graph)
    weights = [widened(t) if t.data_type in _LOW else t for t in model.graph.initializer]
    del twin.graph.initializer[:]
    twin.graph.initializer.extend(weights)
    nodes = [new for node in model.graph.node for new in _rounded(node, types, taken)]
    del twin.graph.node[:]
    twin.graph.node.extend(nodes)
    for value in twin.graph.value_info:
        if value.name in types:
            value.type.tensor_type.elem_type = FLOAT
    return twin


def _rounded(node: NodeProto, types: Mapping[str, int], taken: set[str]) -> Iterator[NodeProto]:
    """Yield the node computing in float32, and the pair of casts behind each low output that holds new values."""
    copy = NodeProto()
    copy.CopyFrom(node)
    low_outputs = [(i, name) for i, name in enumerate(node.output) if name in types]
    if low_outputs:
        _widen_attribute(copy)
    pairs = []
    for place, name in low_outputs:
        if node.op_type in MOVEMENT:
            continue
        raw, low = fresh_name(f"{name}/exact", taken), fresh_name(f"{name}/rounded", taken)
        copy.output[place] = raw
        pairs.append(helper.make_node("Cast", [raw], [low], name=f"{low}/Cast", to=types[name]))
        pairs.append(helper.make_node("Cast", [low], [name], name=f"{low}/Cast_fp32", to=FLOAT))
    yield copy
    yield from pairs


def _widen_attribute(node: NodeProto) -> None:
    held = attribute(node, OUTPUT_TYPE.get(node.op_type, "value" if node.op_type == "Constant" else ""))
    if held is None:
        return
    if held.HasField("t"):
        held.t.CopyFrom(widened(held.t))
    else:
        held.i = FLOAT
