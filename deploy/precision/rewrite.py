"""Writing a decision into the graph: one type a tensor, one cast per tensor and type, one copy per weight and type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from deploy.precision.decide import Decision
from deploy.precision.policy import DTYPE
from deploy.precision.schema import Slot, output_type
from deploy.precision.view import CAPTURED, FLOAT, GraphView, bodies, fresh_name, names_in, uses
from deploy.precision.weights import Loss, lowered
from deploy.records import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Typed:
    """A typed graph with what was counted while it was written."""

    model: ModelProto
    casts: int
    losses: tuple[Loss, ...]


def typed_model(model: ModelProto, view: GraphView, decision: Decision, low: Precision) -> Typed:
    """Write ``decision`` into a copy of ``model``; its inputs and outputs keep their names, types and order."""
    return _Writer(model, view, decision, low).write()


class _Writer:
    def __init__(self, model: ModelProto, view: GraphView, decision: Decision, low: Precision) -> None:
        self.source, self.view, self.decision, self.low = model, view, decision, low
        self.kind = DTYPE[low]
        self.suffix = {self.kind: low.value, FLOAT: Precision.FP32.value}
        self.taken = names_in(model.graph)
        self.nodes: list[NodeProto] = []
        self.actual: dict[str, int] = {}  # tensor -> type that its maker gives it
        self.names: dict[tuple[str, int], str] = {}  # (tensor, type) -> name in the typed graph
        self.weights: list[TensorProto] = []
        self.losses: list[Loss] = []
        self.casts = 0

    def write(self) -> Typed:
        for tensor in self.source.graph.input:
            self._made(tensor.name, self.view.types.get(tensor.name, 0), tensor.name)
        for index, node in enumerate(self.view.nodes):
            for name in self._low_outputs(index, node):
                self.actual[name] = self.kind
        self._write_constants()
        for index, node in enumerate(self.view.nodes):
            self._write_node(index, node)
        return Typed(model=self._model(), casts=self.casts, losses=tuple(self.losses))

    def _low_outputs(self, index: int, node: NodeProto) -> list[str]:
        signature = self.decision.low.get(index)
        if signature is None:
            return []
        pairs = zip(node.output, signature.outputs, strict=True)
        return [name for name, slot in pairs if slot is Slot.LOW and self.view.types.get(name) == FLOAT]

    def _wanted(self, index: int, slot: int, name: str) -> int | None:
        """Type that a node wants at a slot; ``None`` when any will do, or the tensor is no float."""
        if self.view.types.get(name) != FLOAT:
            return None
        signature = self.decision.low.get(index)
        if signature is None:
            untyped = index not in self.decision.kept
            return None if untyped and slot != CAPTURED else FLOAT
        kinds = {Slot.LOW: self.kind, Slot.FLOAT32: FLOAT, Slot.ANY: None}
        return kinds[signature.inputs[slot]]

    def _write_constants(self) -> None:
        """Write each constant once per type that is asked for, and not at all when nobody reads it."""
        demands: dict[str, set[int | None]] = defaultdict(set)
        for name, readers in self.view.readers.items():
            if name in self.view.constants:
                demands[name] = {self._wanted(index, slot, name) for index, slot in readers}
        for name, tensor in self.view.constants.items():
            wanted = demands[name] | ({FLOAT} if name in self.view.outputs else set())
            if not wanted:
                continue
            whole = self.kind not in wanted or FLOAT in wanted
            if whole:
                self.weights.append(tensor)
                self._made(name, tensor.data_type, name)
            if self.kind in wanted:
                alias = fresh_name(f"{name}_{self.low.value}", self.taken) if whole else name
                made, loss = lowered(tensor, alias, self.low)
                self.weights.append(made)
                self.losses.append(loss)
                if not whole:
                    self.actual[name] = self.kind
                self.names[name, self.kind] = alias

    def _write_node(self, index: int, node: NodeProto) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        for slot, name in enumerate(node.input):
            if name:
                copy.input[slot] = self._read(name, self._wanted(index, slot, name), node)
        captured = {name for slot, name in uses(node) if slot == CAPTURED}
        renamed = {n: self._read(n, self._wanted(index, CAPTURED, n), node) for n in sorted(captured)}
        for body in bodies(copy):
            _rename(body, {old: new for old, new in renamed.items() if old != new})
        self._retype_attribute(copy, node)
        self.nodes.append(copy)
        for place, name in enumerate(node.output):
            if name:
                copy.output[place] = self._name_output(name)
        for name in node.output:
            if name in self.view.outputs and self.actual.get(name) == self.kind:
                self._cast(name, FLOAT, name, node)

    def _name_output(self, name: str) -> str:
        """A graph output keeps its name for the float32 form; its low form gets another."""
        kind = self.actual.get(name, self.view.types.get(name, 0))
        low_output = kind == self.kind and name in self.view.outputs
        self._made(name, kind, fresh_name(f"{name}_{self.low.value}", self.taken) if low_output else name)
        return self.names[name, kind]

    def _made(self, name: str, kind: int, alias: str) -> None:
        self.actual[name] = kind
        self.names[name, kind] = alias

    def _read(self, name: str, wanted: int | None, reader: NodeProto) -> str:
        """Name of a tensor in the wanted type, cast where that form does not exist yet."""
        if name not in self.actual:
            return name  # an outer name that only a body knows, or a sparse initialiser
        kind = self.actual[name] if wanted is None else wanted
        if (name, kind) not in self.names:
            self._cast(name, kind, fresh_name(f"{name}_{self.suffix[kind]}", self.taken), reader)
        return self.names[name, kind]

    def _cast(self, name: str, kind: int, alias: str, serves: NodeProto) -> None:
        """Cast from the tensor's own form, never from another cast."""
        path = serves.name.rpartition("/")[0] or serves.name or name
        title = fresh_name(f"{path}/Cast_{self.suffix[kind]}", self.taken)
        source = self.names[name, self.actual[name]]
        self.nodes.append(helper.make_node("Cast", [source], [alias], name=title, to=kind))
        self.names[name, kind] = alias
        self.casts += 1

    def _retype_attribute(self, copy: NodeProto, node: NodeProto) -> None:
        kind = self.actual.get(node.output[0], FLOAT) if node.output else FLOAT
        if output_type(node) not in (None, FLOAT) or self.view.types.get(node.output[0]) != FLOAT:
            return
        if node.op_type in ("Cast", "EyeLike"):  # EyeLike without the attribute would follow its input's type
            name = "to" if node.op_type == "Cast" else "dtype"
            _set(copy, name, kind)
        elif node.op_type == "ConstantOfShape" and kind == self.kind:
            held = next((a.t for a in node.attribute if a.name == "value"), None)
            fill = held if held is not None else helper.make_tensor("value", FLOAT, [1], [0.0])
            _set(copy, "value", lowered(fill, fill.name, self.low)[0])

    def _model(self) -> ModelProto:
        made = ModelProto()
        for field, value in self.source.ListFields():
            if field.name != "graph":
                _assign(made, field.name, value)
        graph, source = made.graph, self.source.graph
        for field, value in source.ListFields():
            if field.name not in ("node", "initializer", "value_info"):
                _assign(graph, field.name, value)
        given = {i.name for i in source.input}
        graph.initializer.extend(t for t in source.initializer if t.name in given)
        graph.initializer.extend(self.weights)
        graph.node.extend(self.nodes)
        graph.value_info.extend(self._value_infos(source.value_info))
        return made

    def _value_infos(self, infos: Iterable[ValueInfoProto]) -> list[ValueInfoProto]:
        """Keep the exporter's shapes, which inference alone cannot always find, under the tensors' new types."""
        made = []
        for info in infos:
            kind = self.actual.get(info.name)
            if kind is None or info.name in self.view.constants or info.name in self.view.outputs:
                continue
            copy = ValueInfoProto()
            copy.CopyFrom(info)
            if info.type.HasField("tensor_type"):
                copy.type.tensor_type.elem_type = kind
            made.append(copy)
        return made


def dtype_counts(model: ModelProto, types: dict[str, int]) -> dict[str, int]:
    """Count nodes by the float type of their first output (fp32, fp16, bf16); casts between floats are left out."""
    names: dict[int, str] = {FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    counted = (n for n in model.graph.node if n.output and not (n.op_type == "Cast" and types.get(n.input[0]) in names))
    kinds = (types.get(n.output[0], 0) for n in counted)
    return dict(sorted(Counter(names[k] for k in kinds if k in names).items()))


def _rename(body: GraphProto, names: dict[str, str]) -> None:
    for node in body.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = names.get(name, name)
        for inner in bodies(node):
            _rename(inner, names)
    for output in body.output:
        output.name = names.get(output.name, output.name)


def _set(node: NodeProto, name: str, value: object) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _assign(message: object, name: str, value: object) -> None:
    """Copy a protobuf field of any shape."""
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(value)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, name, value)
