"""What a graph asks of an engine: the types of its nodes, and the blocks that a good engine fuses."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from deploy.errors import EngineBuildError

# Where the arithmetic is: a precision that was asked must show in these.
MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention"})
NORM_OPS = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"})
_NO_ARITHMETIC = frozenset({"Cast", "Constant", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
# What may stand between the two products of an attention and its softmax: scale, bias, mask, casts, other shapes.
_BETWEEN = _NO_ARITHMETIC | {"Mul", "Div", "Add", "Sub", "Where", "Dropout", "Expand", "Slice"}
_DEPTH = 8  # nodes between softmax and product; attention has fewer
_FLOATS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
}
_EIGHT_BITS: Mapping[int, str] = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
    onnx.TensorProto.FLOAT8E5M2: "fp8",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTypes:
    """The floating-point types of a graph's nodes, by the type of their first output.

    Attributes:
        counts: Precision -> nodes that do arithmetic (casts, Q/DQ, constants and reshapes left out). A product of two
            dequantised tensors is ``"int8"`` or ``"fp8"``.
        matrix: Name of each matrix node -> its precision; products of constants, which are folded, are left out.
        producers: Tensor name -> name of the node that writes it.
        nodes: Name of each node that does arithmetic -> its precision.
        attention: Name of each softmax between two matrix products, and of each Attention -> precision of the products.
        norms: Name of each normalisation -> its precision.
        weights: Precision -> parameters in initialisers.
        io: Names of the inputs and outputs.
    """

    counts: Mapping[str, int]
    matrix: Mapping[str, str]
    producers: Mapping[str, str]
    nodes: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    io: tuple[str, ...] = ()


def graph_types(path: Path) -> GraphTypes:
    """Read the types of an ONNX file's nodes.

    Raises:
        EngineBuildError: not an ONNX file, or its types contradict each other.
    """
    graph, weights = _read(path)
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}
    constant = _constants(graph)
    quantised = _quantised(graph, types)
    nodes: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for node in graph.node:
        precision = _FLOATS.get(types.get(node.output[0], 0), "") if node.output else ""
        precision = quantised.get(node.name, precision)
        if precision and node.op_type not in _NO_ARITHMETIC | {_QUANTISE, _DEQUANTISE}:
            counts[precision] += 1
            nodes[node.name] = precision
    matrix = [n for n in graph.node if n.op_type in MATRIX_OPS and n.name in nodes and n.output[0] not in constant]
    given = {t.name for t in graph.initializer}
    return GraphTypes(
        counts=dict(counts),
        matrix={n.name: nodes[n.name] for n in matrix},
        producers={output: n.name for n in graph.node for output in n.output},
        nodes=nodes,
        attention={name: nodes[product] for name, product in _attention(graph, constant) if product in nodes},
        norms={n.name: nodes[n.name] for n in graph.node if n.op_type in NORM_OPS and n.name in nodes},
        weights=weights,
        io=tuple(v.name for v in (*graph.input, *graph.output) if v.name not in given),
    )


def _read(path: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    """Load a graph with its types inferred, and count its parameters."""
    try:
        model = onnx.load(path, load_external_data=False)
        weights: Counter[str] = Counter()
        for tensor in model.graph.initializer:
            named = _FLOATS.get(tensor.data_type) or _EIGHT_BITS.get(tensor.data_type)
            if named:
                weights[named] += math.prod(tensor.dims)
            if len(tensor.raw_data) > 4096:  # type inference reads shapes, never weights; copying them costs seconds
                tensor.ClearField("raw_data")
        return onnx.shape_inference.infer_shapes(model, strict_mode=False).graph, dict(weights)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineBuildError(f"{path.name} cannot be read as ONNX: {line}", hint="export again") from error


def _quantised(graph: onnx.GraphProto, types: Mapping[str, int]) -> dict[str, str]:
    """Return the products whose two operands are dequantised: node name -> the quantised type."""
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == _DEQUANTISE}
    found = {}
    for node in graph.node:
        if node.op_type in MATRIX_OPS and len(node.input) > 1 and all(name in sources for name in node.input[:2]):
            kind = _EIGHT_BITS.get(types.get(sources[node.input[0]], 0), "")
            if kind:
                found[node.name] = kind
    return found


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Name the tensors that no input reaches: a builder folds them, and their nodes show in no kernel."""
    constant = {t.name for t in graph.initializer} | {""}
    for node in graph.node:
        if all(name in constant for name in node.input) and not node.op_type.startswith("Random"):
            constant |= set(node.output)
    return constant


def _attention(graph: onnx.GraphProto, constant: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, its product) of each Attention, and of each softmax between two products of activations."""
    producer = {output: node for node in graph.node for output in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)

    def above(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [producer[name] for name in node.input if name in producer]

    def below(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [user for name in node.output for user in consumers[name]]

    for node in graph.node:
        if node.op_type == "Attention":
            yield node.name, node.name
        elif node.op_type == "Softmax":
            scores, values = (_nearest_product(node, way, constant) for way in (above, below))
            if scores is not None and values is not None:
                yield node.name, scores.name


def _nearest_product(
    node: onnx.NodeProto, way: Callable[[onnx.NodeProto], list[onnx.NodeProto]], constant: set[str], depth: int = 0
) -> onnx.NodeProto | None:
    """Walk one way from a softmax to the first product of two activations, through what may stand between."""
    for near in way(node):
        if near.op_type in ("MatMul", "Einsum") and not any(name in constant for name in near.input):
            return near
        if near.op_type in _BETWEEN and depth < _DEPTH:
            found = _nearest_product(near, way, constant, depth + 1)
            if found is not None:
                return found
    return None
