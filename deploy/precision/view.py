"""A float32 ONNX graph as the precision stage reads it: who makes, who reads and what type each tensor has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from deploy.errors import PrecisionError

FLOAT = TensorProto.FLOAT
CAPTURED = -1
"""The slot of a tensor that a node's body reads from the graph around it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphView:
    """Indices over one graph; nodes are named by their position.

    Attributes:
        nodes: In topological order; ``Constant`` nodes that hold a tensor are not among them but in ``constants``.
        constants: Initialisers, then constant nodes, in order. An initialiser that is also an input is an input.
        types: Element type of every tensor whose type is known.
        producer: Tensor -> node.
        readers: Tensor -> (node, input slot) pairs; the slot is ``CAPTURED`` for a body's use.
        outputs: Names of the graph outputs.
        opsets: Domain -> version.
    """

    nodes: tuple[NodeProto, ...]
    constants: Mapping[str, TensorProto]
    types: Mapping[str, int]
    producer: Mapping[str, int]
    readers: Mapping[str, tuple[tuple[int, int], ...]]
    outputs: frozenset[str]
    opsets: Mapping[str, int]

    def floats_in(self, index: int) -> list[str]:
        """Float32 tensors that a node computes from: its inputs that are not constants."""
        return [n for _, n in uses(self.nodes[index]) if self.types.get(n) == FLOAT and n not in self.constants]

    def floats_out(self, index: int) -> list[str]:
        """Float32 tensors that a node makes."""
        return [n for n in self.nodes[index].output if self.types.get(n) == FLOAT]

    def makers(self, index: int) -> list[int]:
        """Nodes that make a node's float inputs."""
        return [self.producer[n] for n in self.floats_in(index) if n in self.producer]


def view_of(model: ModelProto) -> GraphView:
    """Index a float32 model.

    Raises:
        PrecisionError: its types cannot be inferred, or it holds 16-bit floats already.
    """
    graph = model.graph
    types = tensor_types(model)
    _refuse_typed(types)
    given = {i.name for i in graph.input}
    constants = {t.name: t for t in graph.initializer if t.name not in given}
    nodes = []
    for node in graph.node:
        held = _constant_of(node)
        if held is None:
            nodes.append(node)
        else:
            constants[held.name] = held
    readers: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for slot, name in uses(node):
            readers[name].append((index, slot))
    return GraphView(
        nodes=tuple(nodes),
        constants=constants,
        types=types,
        producer={name: index for index, node in enumerate(nodes) for name in node.output if name},
        readers={name: tuple(pairs) for name, pairs in readers.items()},
        outputs=frozenset(o.name for o in graph.output),
        opsets=opsets_of(model),
    )


def opsets_of(model: ModelProto) -> dict[str, int]:
    """Domain -> opset version; the default domain is ``""``."""
    return {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Element type of every tensor of the main graph.

    Raises:
        PrecisionError: ONNX shape inference refuses the graph.
    """
    return types_in(inferred(model))


def types_in(model: ModelProto) -> dict[str, int]:
    """Element type of every tensor that an inferred model declares."""
    graph = model.graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    known.update((t.name, t.data_type) for t in graph.initializer)
    return {name: kind for name, kind in known.items() if kind != TensorProto.UNDEFINED}


def inferred(model: ModelProto) -> ModelProto:
    """Run strict ONNX shape and type inference on the structure of ``model``; large weights are left out of the copy.

    Raises:
        PrecisionError: inference refuses the graph; the message holds its words.
    """
    try:
        return onnx.shape_inference.infer_shapes(_without_weights(model), strict_mode=True, data_prop=True)
    except Exception as error:  # onnx raises its own InferenceError, ValueError or RuntimeError, by version
        raise PrecisionError(
            f"ONNX shape inference refuses the graph: {error}", hint="run again with --verify-each to find the pass"
        ) from error


def uses(node: NodeProto) -> Iterator[tuple[int, str]]:
    """Yield (slot, tensor) for every tensor that a node reads, its bodies' captures included."""
    yield from ((slot, name) for slot, name in enumerate(node.input) if name)
    for body in bodies(node):
        yield from ((CAPTURED, name) for name in sorted(_captured(body)))


def bodies(node: NodeProto) -> list[GraphProto]:
    """Sub-graphs of a control-flow node."""
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in node.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs]


def names_in(graph: GraphProto) -> set[str]:
    """Every tensor and node name of a graph and its bodies."""
    names = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        names.update((node.name, *node.input, *node.output))
        for body in bodies(node):
            names |= names_in(body)
    return names


def fresh_name(name: str, taken: set[str]) -> str:
    """Return ``name``, numbered when it is taken, and take it."""
    fresh, count = name, 0
    while fresh in taken:
        count += 1
        fresh = f"{name}_{count}"
    taken.add(fresh)
    return fresh


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """Return a node's attribute by name."""
    return next((a for a in node.attribute if a.name == name), None)


def _captured(body: GraphProto) -> set[str]:
    made = {v.name for v in (*body.input, *body.initializer)} | {n for node in body.node for n in node.output}
    read = {o.name for o in body.output} | {name for node in body.node for _, name in uses(node)}
    return read - made


def _constant_of(node: NodeProto) -> TensorProto | None:
    """Return what a dense ``Constant`` node holds, named like its output; strings and sparse tensors stay nodes."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    held = node.attribute[0]
    if held.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(held.t)
        tensor.name = node.output[0]
        return tensor
    kinds = {
        "value_float": (FLOAT, [held.f], []),
        "value_floats": (FLOAT, list(held.floats), [len(held.floats)]),
        "value_int": (TensorProto.INT64, [held.i], []),
        "value_ints": (TensorProto.INT64, list(held.ints), [len(held.ints)]),
    }
    if held.name not in kinds:
        return None
    kind, values, shape = kinds[held.name]
    return helper.make_tensor(node.output[0], kind, shape, values)


def _without_weights(model: ModelProto) -> ModelProto:
    """Copy the structure: float initialisers of some size become inputs, since inference reads only their type.

    A copy with the weights would be serialised twice, which for 100 MB costs more than the whole conversion.
    """
    slim = ModelProto()
    slim.opset_import.extend(model.opset_import)
    slim.ir_version = model.ir_version
    slim.functions.extend(model.functions)
    source, graph = model.graph, slim.graph
    graph.name = source.name
    for part in ("input", "output", "value_info", "sparse_initializer"):
        getattr(graph, part).extend(getattr(source, part))
    graph.node.extend(_inferable(node) for node in source.node)
    given = {i.name for i in source.input}
    for tensor in source.initializer:
        if len(tensor.raw_data) <= 1024:
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return slim


def _inferable(node: NodeProto) -> NodeProto:
    """Stand Identity in for the two norms that onnx has no inference for: their output is like their first input."""
    if node.op_type not in ("GroupNormalization", "MeanVarianceNormalization") or node.domain:
        return node
    return helper.make_node("Identity", node.input[:1], node.output[:1], name=node.name)


def _refuse_typed(types: Mapping[str, int]) -> None:
    low = sorted(n for n, t in types.items() if t in (TensorProto.FLOAT16, TensorProto.BFLOAT16))
    if low:
        raise PrecisionError(
            f"the graph holds {len(low)} 16-bit float tensors already ({', '.join(low[:3])}), expected a float32 graph",
            hint="give the patched float32 file (20-patched.onnx)",
        )
