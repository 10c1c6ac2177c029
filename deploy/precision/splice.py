"""One graph made of two: each node as the high-precision file has it, or as the low-precision file has it.

Both files name their nodes after the modules, and ``deploy.precision`` keeps every name. So a node is found in both:

    high   x -> MatMul -> y -> Gelu -> z
    low    x -> QuantizeLinear -> DequantizeLinear -> MatMul -> y -> Cast -> Gelu -> z

What only the low file has (Q/DQ, casts) belongs to the node that reads it; what rounds the output of an integer
convolution belongs to the convolution, as its other readers get it rounded as well. Where a node and its neighbour come
from different files, a cast stands between them. Nothing is quantised or measured again: the low file is taken as it
is, with whatever is wrong in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploy.errors import PrecisionError
from deploy.graph.io import control_flow
from deploy.precision.qdq import DQ, Q
from deploy.precision.select import PRODUCTS
from deploy.precision.view import FLOAT, tensor_types

LOW = "low/"  # before the names of what comes from the low file
_FLOATS = frozenset({FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})

Place = tuple[str, int]  # node, output slot


class Splice:
    """Two files of one network, by node name.

    Args:
        high: The float32 graph (``20-patched.onnx``).
        low: The same in low precision (``30-*.onnx``).

    Raises:
        PrecisionError: nodes cannot be told apart by their names, or the low file is of another network.
    """

    def __init__(self, high: ModelProto, low: ModelProto) -> None:
        self.high, self.low = _inlined(high), _inlined(low)
        self.nodes = _by_name(self.high, "high")
        self.twins = {name: node for name, node in _by_name(self.low, "low").items() if name in self.nodes}
        self.types = tensor_types(self.low)
        self.weights = {t.name: t for t in self.low.graph.initializer}
        self.makers = {output: node for node in self.low.graph.node for output in node.output if output}
        self.places: dict[str, Place] = {  # tensor of the low file -> the node of both files that makes it
            output: (name, slot)
            for name, node in self.twins.items()
            for slot, output in enumerate(node.output)
            if output
        }
        self.origins: dict[str, Place] = {  # the same of the high file
            output: (node.name, slot)
            for node in self.high.graph.node
            for slot, output in enumerate(node.output)
            if output
        }
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.low.graph.node:
            for tensor in node.input:
                self.readers[tensor].append(node)
        self.absorbed = self._absorbed()
        self.owned = self._owned()
        self.changed = frozenset(self._changed())

    def hybrid(self, low: Collection[str]) -> ModelProto:
        """Write the network with the nodes of these names from the low file, and all others from the high one."""
        writer = _Writer(splice=self, low=self._closed(low))
        for node in self.high.graph.node:
            writer.write(node)
        for output in self.high.graph.output:
            writer.write_output(output.name)
        return writer.model(self.high.graph.output)

    def probed(self, tensors: Sequence[str]) -> ModelProto:
        """Write both networks side by side; outputs [tensors, 2] ``sums``: squares of what is apart, and of the high.

        Args:
            tensors: Float tensors of the high file.
        """
        writer = _Writer(splice=self, low=frozenset(), both=True)
        for node in self.high.graph.node:
            writer.write(node)
        for place, name in enumerate(tensors):
            writer.write_probe(name, place)
        sums = helper.make_node("Concat", [f"probe/{i}/sums" for i in range(len(tensors))], ["sums"], "probes", axis=0)
        writer.nodes.append(sums)
        return writer.model([helper.make_tensor_value_info("sums", FLOAT, [len(tensors), 2])])

    def rounded(self, name: str) -> str:
        """Name the rounded output of an integer convolution, which all of its readers get; empty: it has none."""
        node = self.twins[name]
        after = self.readers[node.output[0]]
        given = self.makers.get(node.input[0]) if node.op_type == "Conv" else None
        if given is None or given.op_type != DQ or len(after) != 1 or after[0].op_type != Q:
            return ""
        return next((n.output[0] for n in self.readers[after[0].output[0]] if n.op_type == DQ), "")

    def _closed(self, low: Collection[str]) -> frozenset[str]:
        """Leave out what the low file does not have; what an integer convolution computes inside goes with it."""
        chosen = {name for name in low if name in self.twins}
        return frozenset(chosen | {inside for inside, owner in self.absorbed.items() if owner in chosen})

    def _absorbed(self) -> dict[str, str]:
        """Find Relus that the low file computes by the zero point behind a convolution: node -> convolution."""
        makers = {output: node for node in self.high.graph.node for output in node.output}
        found = {}
        for name, node in self.nodes.items():
            if name in self.twins or node.op_type == "Constant":
                continue
            maker = makers.get(node.input[0]) if node.op_type == "Relu" else None
            if maker is None or maker.name not in self.twins:
                raise PrecisionError(
                    f"the low-precision file lacks the node {name!r} ({node.op_type}) of the float32 file",
                    hint="export the bundle again: both files must be of one run",
                )
            found[name] = maker.name
        return found

    def _owned(self) -> dict[str, str]:
        """Find the rounded outputs of integer convolutions: tensor of the low file -> that of the high one."""
        inside = {owner: name for name, owner in self.absorbed.items()}
        found = {name: self.rounded(name) for name in self.twins}
        return {r: self.nodes[inside.get(name, name)].output[0] for name, r in found.items() if r}

    def _changed(self) -> Iterable[str]:
        """Name the nodes that are not the same in both files: other types, other weights, or rounded inputs."""
        held = {t.name: t for t in self.high.graph.initializer}
        held |= {n.output[0]: n.attribute[0].t for n in self.high.graph.node if _holds(n)}
        for name, twin in self.twins.items():
            node = self.nodes[name]
            pairs = [p for p in zip(node.input, twin.input, strict=False) if self.owns(twin, p[1])]
            if any(self._differs(a, b, held) for a, b in pairs) or any(
                self.types.get(output) in _FLOATS - {FLOAT} for output in twin.output
            ):
                yield name

    def owns(self, twin: NodeProto, tensor: str) -> bool:
        """Whether what rounds an input belongs to the node: to a product always, else unless it is its maker's."""
        return tensor not in self.owned or twin.op_type in PRODUCTS

    def _differs(self, high: str, low: str, held: Mapping[str, TensorProto]) -> bool:
        if low in self.weights:
            return high not in held or not _equal(held[high], self.weights[low])
        return low in self.makers and self.makers[low].name not in self.nodes


@dataclass(kw_only=True)
class _Writer:
    """Nodes of one graph in the making; names of the low file get ``LOW`` before them."""

    splice: Splice
    low: frozenset[str]
    both: bool = False  # whether every node is written twice
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    def write(self, node: NodeProto) -> None:
        """Write a node of the high file, as it is or as the low file has it."""
        if self.both:
            self.nodes.append(node)
            if node.name in self.splice.twins:
                self._write_low(self.splice.twins[node.name])
        elif node.name in self.splice.absorbed and node.name in self.low:
            return
        elif node.name in self.low:
            self._write_low(self.splice.twins[node.name])
        else:
            copy = NodeProto()
            copy.CopyFrom(node)
            for slot, name in enumerate(node.input):
                copy.input[slot] = self._as_high(name)
            self.nodes.append(copy)

    def write_output(self, name: str) -> None:
        """Give a graph output its name where the low file makes it."""
        value = self._as_high(name)
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))

    def write_probe(self, name: str, place: int) -> None:
        """Sum the squares of what is apart in a tensor, and of the tensor."""
        value, stem = self._as_high(name), f"probe/{place}"
        self.nodes += [
            helper.make_node("Sub", [value, name], [f"{stem}/apart"], f"{stem}/Sub"),
            helper.make_node("ReduceSumSquare", [f"{stem}/apart"], [f"{stem}/error"], f"{stem}/error", keepdims=0),
            helper.make_node("ReduceSumSquare", [name], [f"{stem}/energy"], f"{stem}/energy", keepdims=0),
            helper.make_node("Reshape", [f"{stem}/error", "probe/pair"], [f"{stem}/0"], f"{stem}/Reshape"),
            helper.make_node("Reshape", [f"{stem}/energy", "probe/pair"], [f"{stem}/1"], f"{stem}/Reshape_1"),
            helper.make_node("Concat", [f"{stem}/0", f"{stem}/1"], [f"{stem}/sums"], f"{stem}/Concat", axis=1),
        ]
        self.weights["probe/pair"] = numpy_helper.from_array(np.array([1, 1], np.int64), "probe/pair")

    def model(self, outputs: Iterable[onnx.ValueInfoProto]) -> ModelProto:
        """Return what was written, with these outputs."""
        made, high = ModelProto(), self.splice.high
        made.ir_version = max(high.ir_version, self.splice.low.ir_version)
        made.opset_import.extend(self.splice.low.opset_import)  # the higher one, where typing raised it
        graph = made.graph
        graph.name = high.graph.name
        graph.input.extend(high.graph.input)
        graph.output.extend(outputs)
        used = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(t for t in high.graph.initializer if t.name in used)
        graph.initializer.extend(self.weights.values())
        graph.node.extend(self.nodes)
        return made

    def _write_low(self, twin: NodeProto) -> None:
        """Write a node as the low file has it, what rounds its inputs before it."""
        copy = NodeProto()
        copy.CopyFrom(twin)
        for slot, name in enumerate(twin.input):
            given = self._given(twin, name)
            copy.input[slot] = self._as_low(name) if given is None else given
        for slot, name in enumerate(twin.output):
            copy.output[slot] = LOW + name if name else ""
        copy.name = LOW + twin.name
        self.nodes.append(copy)

    def _given(self, twin: NodeProto, name: str) -> str | None:
        """Name what a node reads, rounds not, and the high file makes; ``None``: it reads as in the low file."""
        source = None if self.splice.owns(twin, name) else self.splice.owned[name]
        if source is None or self._low_place(source) is not None:
            return None
        return self._cast(source, f"{LOW}{name}/given", FLOAT, self.splice.types.get(name, FLOAT))

    def _as_low(self, name: str) -> str:
        """Name a tensor of the low file in this graph, made where it is not there yet."""
        splice, alias = self.splice, LOW + name
        if not name or alias in self.made:
            return alias if name else name
        if name in splice.weights:
            tensor = TensorProto()
            tensor.CopyFrom(splice.weights[name])
            tensor.name = alias
            self.weights[alias] = tensor
        elif name in splice.places:
            maker, slot = splice.places[name]
            if self.both or maker in self.low:
                return alias
            return self._cast(splice.nodes[maker].output[slot], f"{alias}/given", FLOAT, splice.types.get(name, FLOAT))
        elif name in splice.makers:
            self._write_low(splice.makers[name])  # Q, DQ or Cast
        else:
            return name  # an input of the graph
        self.made.add(alias)
        return alias

    def _as_high(self, name: str) -> str:
        """Name the float32 form of a tensor of the high file, whichever file makes it."""
        place = self._low_place(name)
        if place is None:
            return name
        tensor = self.splice.twins[place[0]].output[place[1]]
        rounded = self.splice.rounded(place[0])
        if rounded and self.splice.owned[rounded] == name:  # not of what a Relu inside makes something else of
            return self._cast(self._as_low(rounded), f"{name}/high", self.splice.types.get(rounded, FLOAT), FLOAT)
        return self._cast(LOW + tensor, f"{name}/high", self.splice.types.get(tensor, FLOAT), FLOAT)

    def _low_place(self, name: str) -> Place | None:
        """Find the node of the low file that makes a tensor of the high file; ``None`` where the high file's does."""
        maker = self.splice.origins.get(name)
        if maker is None:
            return None
        owner = self.splice.absorbed.get(maker[0])
        if not (self.both or maker[0] in self.low) or (owner or maker[0]) not in self.splice.twins:
            return None
        return (owner, 0) if owner else maker

    def _cast(self, name: str, alias: str, kind: int, wanted: int) -> str:
        """Return a tensor in another float type; other types are the same in both files."""
        if kind == wanted or kind not in _FLOATS or wanted not in _FLOATS:
            return name
        if alias not in self.made:
            self.made.add(alias)
            self.nodes.append(helper.make_node("Cast", [name], [alias], name=f"{alias}/Cast", to=wanted))
        return alias


def _inlined(model: ModelProto) -> ModelProto:
    if place := control_flow(model):
        raise PrecisionError(
            f"{place} holds a graph of its own: its nodes cannot be switched", hint="compare whole files with verify"
        )
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _by_name(model: ModelProto, which: str) -> dict[str, NodeProto]:
    found = {node.name: node for node in model.graph.node}
    if len(found) < len(model.graph.node) or "" in found:
        raise PrecisionError(
            f"the {which}-precision file has nodes without a name of their own, which names no module",
            hint="export again with this version",
        )
    return found


def _holds(node: NodeProto) -> bool:
    return node.op_type == "Constant" and node.attribute[0].name == "value"


def _equal(a: TensorProto, b: TensorProto) -> bool:
    if (a.data_type, list(a.dims)) != (b.data_type, list(b.dims)):
        return False
    return np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
