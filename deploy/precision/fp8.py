"""FP8 (E4M3): TensorRT's Q/DQ of INT8 with another type, the largest magnitude at 448 instead of 127.

Weights are rounded anew from float32, with one scale a tensor; activations keep their calibrated range.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploy.precision.qdq import DQ, Q

LARGEST = 448.0
_INT8_LARGEST = 127.0
OPSET = 19  # from which Q/DQ take float8


def as_fp8(model: ModelProto, source: ModelProto) -> ModelProto:
    """Return a TensorRT-style INT8 graph with every Q/DQ in FP8.

    Args:
        model: What ``deploy.precision.quantize`` wrote for TensorRT.
        source: The float32 graph that it was written from: its weights are rounded, not those of INT8.
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    weights = {t.name: t for t in graph.initializer}
    floats = {t.name: t for t in source.graph.initializer}
    new: dict[str, TensorProto] = {}
    for node in graph.node:
        if node.op_type == DQ and node.input[0] in weights:
            original = floats[node.input[0].removesuffix("_quantized")]
            for tensor in _weight(original, node):
                new[tensor.name] = tensor
        elif node.op_type in (Q, DQ):
            scale, zero = node.input[1], node.input[2]
            step = numpy_helper.to_array(weights[scale]) * np.float32(_INT8_LARGEST / LARGEST)
            new[scale] = numpy_helper.from_array(np.asarray(step, np.float32), scale)
            new[zero] = _zero(zero)
    kept = [t for t in graph.initializer if t.name not in new]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *new.values()])
    return made


def _weight(original: TensorProto, node: NodeProto) -> list[TensorProto]:
    """Round a weight, and let its DequantizeLinear read one scale in place of one a channel."""
    values = numpy_helper.to_array(original)
    largest = float(np.abs(values).max())
    step = np.float32(largest / LARGEST if largest > 0 else 1.0)
    rounded = np.clip(values / step, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(kept)
    tensor = helper.make_tensor(node.input[0], TensorProto.FLOAT8E4M3FN, values.shape, rounded.tobytes(), raw=True)
    return [tensor, numpy_helper.from_array(np.asarray(step), node.input[1]), _zero(node.input[2])]


def _zero(name: str) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
