"""Predicates on the file and the graph as a whole: versions, names, order, data outside the file, inputs and types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, TensorProto

from deploy.linting.checks.base import Check, Hit, hit, sites
from deploy.linting.view import DEFAULT_DOMAIN, View, external_fields, type_name

GRAPH, INPUT, OUTPUT, WEIGHT = "(graph)", "(input)", "(output)", "(weight)"
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_READ_UINT8 = ("Cast", "Identity", "Equal")
_OPERATORS = frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "")


def opset_beyond(view: View, rule: Any) -> Iterator[Hit]:
    """The default opset is above ``most`` or below ``least``."""
    version = view.opsets.get("", 0)
    if version > rule.given.get("most", version) or version < rule.given.get("least", version):
        yield Hit(name="opset", operator=GRAPH, found=str(version))


def ir_beyond(view: View, rule: Any) -> Iterator[Hit]:
    """The IR version of the file is above ``most``."""
    if view.model.ir_version > rule.given["most"]:
        yield Hit(name="ir_version", operator=GRAPH, found=str(view.model.ir_version))


def made_twice(view: View, rule: Any) -> Iterator[Hit]:
    """Two nodes make, or a node and an input give, a tensor of one name; the branches of an If may share names."""
    names = {id(site.node): site for site in view.sites}
    yield from (hit(names[id(node)], name) for node, name in _made_twice(view.graph, frozenset()))


def _made_twice(graph: GraphProto, outside: frozenset[str]) -> Iterator[tuple[onnx.NodeProto, str]]:
    made = outside | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for body in _own_bodies(node):
            yield from _made_twice(body, made)
        for name in filter(None, node.output):
            if name in made:
                yield node, name
        made |= set(filter(None, node.output))


def not_made(view: View, rule: Any) -> Iterator[Hit]:
    """A node or an output names a tensor that nothing makes."""
    known = {value.name for value in view.graph.input} | set(view.initializers) | set(view.makers)
    known |= {value.name for body in _bodies(view.graph) for value in body.input}
    known |= {sparse.values.name for sparse in view.graph.sparse_initializer}
    for site in view.sites:
        if missing := [name for name in site.node.input if name and name not in known]:
            yield hit(site, missing[0])
    for value in view.graph.output:
        if value.name not in known:
            yield Hit(name=value.name, operator=OUTPUT, found=value.name)


def not_sorted(view: View, rule: Any) -> Iterator[Hit]:
    """A node of the main graph reads what a later node makes."""
    later = {name for node in view.graph.node for name in node.output if name}
    for site in view.sites:
        if site.level:
            continue
        if early := [name for name in site.node.input if name in later]:
            yield hit(site, early[0])
        later -= set(site.node.output)


def unknown_operator(view: View, rule: Any) -> Iterator[Hit]:
    """The default domain has no such operator in this opset."""
    for site in sites(view, rule):
        if view.schema(site.node) is None and (site.node.op_type not in _OPERATORS) == rule.given["in_any_opset"]:
            yield hit(site, f"{site.node.op_type} in opset {view.opsets.get('', 0)}")


def foreign_operator(view: View, rule: Any) -> Iterator[Hit]:
    """An operator of a domain that is not ``known``; ``onnx_name``: whether ONNX has one of its name, or must not."""
    known, onnx_name = rule.given.get("known", ()), rule.given.get("onnx_name")
    for site in view.sites:
        domain, operator = site.node.domain, site.node.op_type
        if domain not in (*DEFAULT_DOMAIN, *known) and onnx_name in (None, operator in _OPERATORS):
            yield hit(site, f"{domain}::{operator}")


def unknown_attribute(view: View, rule: Any) -> Iterator[Hit]:
    """A node has an attribute that its operator does not have in this opset."""
    for site in sites(view, rule):
        schema = view.schema(site.node)
        unknown = [a.name for a in site.node.attribute if schema and a.name not in schema.attributes]
        if unknown:
            yield hit(site, unknown[0])


def data_outside(view: View, rule: Any) -> Iterator[Hit]:
    """The data of a tensor lies in a file outside the model's folder (``outside``), nowhere, or is cut off."""
    for tensor in view.tensors():
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        target, fields = view.data_file(tensor), external_fields(tensor)
        if target is None:
            problem = "outside"
        elif not target.is_file():
            problem = "missing"
        else:
            end = sum(int(text) for key in ("offset", "length") if (text := fields.get(key, "0")).isdigit())
            problem = "cut off" if target.stat().st_size < end else ""
        if problem == rule.given["problem"]:
            yield Hit(name=tensor.name, operator=WEIGHT, found=repr(fields.get("location", "")))


def dynamic_axes(view: View, rule: Any) -> Iterator[Hit]:
    """An input has a dynamic axis besides the batch."""
    for value in view.inputs:
        dims = value.type.tensor_type.shape.dim
        axes = [d.dim_param or str(i) for i, d in enumerate(dims) if i and not d.HasField("dim_value")]
        if axes:
            yield Hit(name=value.name, operator=INPUT, found=", ".join(axes))


def interface_type(view: View, rule: Any) -> Iterator[Hit]:
    """An input or output has one of these types."""
    for operator, values in ((INPUT, view.inputs), (OUTPUT, view.graph.output)):
        for value in values:
            if (name := type_name(value.type.tensor_type.elem_type)) in rule.given["types"]:
                yield Hit(name=value.name, operator=operator, found=name)


def tensor_type(view: View, rule: Any) -> Iterator[Hit]:
    """A tensor anywhere has one of these types: inputs and weights by name, others by the node that makes them."""
    refused = rule.given["types"]
    for value in view.graph.input:
        if (name := type_name(value.type.tensor_type.elem_type)) in refused:
            yield Hit(name=value.name, operator=INPUT, found=name)
    for tensor in view.initializers.values():
        if (name := type_name(tensor.data_type)) in refused:
            yield Hit(name=tensor.name, operator=WEIGHT, found=name)
    for site in view.sites:
        names = [type_name(view.types.get(output, 0)) for output in site.node.output]
        if found := [name for name in names if name in refused]:
            yield hit(site, found[0])


def uint8_inside(view: View, rule: Any) -> Iterator[Hit]:
    """A UINT8 tensor is more than an input that is cast, or an output that a cast made; Q/DQ are let be."""
    outputs = {value.name for value in view.graph.output}
    for site in view.sites:
        node = site.node
        if node.op_type in _QUANTISERS:
            continue
        reads = any(view.type_of(node, place) == TensorProto.UINT8 for place in range(len(node.input)))
        makes = any(view.types.get(name) == TensorProto.UINT8 for name in node.output)
        between = makes and not (set(node.output) <= outputs and not any(view.consumers.get(o) for o in node.output))
        if (reads and node.op_type not in _READ_UINT8) or (makes and node.op_type not in _READ_UINT8) or between:
            yield hit(site)


def types_disagree(view: View, rule: Any) -> Iterator[Hit]:
    """Inputs that the operator's schema binds to one type have several."""
    for site in sites(view, rule):
        bound: dict[str, list[str]] = {}
        for name, parameter in _parameters(view, site.node):
            if parameter.is_homogeneous and (number := view.types.get(name)):
                bound.setdefault(parameter.type_str, []).append(type_name(number))
        for found in bound.values():
            if len(set(found)) > 1:
                yield hit(site, " and ".join(dict.fromkeys(found)))
                break


def type_not_allowed(view: View, rule: Any) -> Iterator[Hit]:
    """An input has a type that the operator's schema does not list in this opset."""
    for site in sites(view, rule):
        for name, parameter in _parameters(view, site.node):
            number = view.types.get(name)
            kind = TensorProto.DataType.Name(number).lower() if number in TensorProto.DataType.values() else ""
            if kind and parameter.types and f"tensor({kind})" not in parameter.types:
                yield hit(site, type_name(number or 0))
                break


def weights_as_inputs(view: View, rule: Any) -> Iterator[Hit]:
    """Initialisers are listed as inputs, so nothing may be folded."""
    named = [value.name for value in view.graph.input if value.name in view.initializers]
    if named:
        yield Hit(name=named[0], operator=INPUT, found=str(len(named)))


def unread_input(view: View, rule: Any) -> Iterator[Hit]:
    """No node and no output reads an input."""
    outputs = {value.name for value in view.graph.output}
    for value in view.inputs:
        if not view.consumers.get(value.name) and value.name not in outputs:
            yield Hit(name=value.name, operator=INPUT)


def names_shared(view: View, rule: Any) -> Iterator[Hit]:
    """Several nodes of the main graph have one name, so reports by node cannot tell them apart."""
    counts = Counter(node.name for node in view.graph.node if node.name)
    for name, count in counts.items():
        if count > 1:
            operator = next(node.op_type for node in view.graph.node if node.name == name)
            yield Hit(name=name, operator=operator, found=str(count))


def branch_ranks(view: View, rule: Any) -> Iterator[Hit]:
    """The branches of an If give tensors of different ranks."""
    for site in sites(view, rule):
        for pair in zip(*(body.output for body in _own_bodies(site.node)), strict=False):
            ranks = [len(view.shapes[value.name]) for value in pair if value.name in view.shapes]
            if len(set(ranks)) > 1:
                yield hit(site, " and ".join(map(str, ranks)))
                break


def _bodies(graph: GraphProto) -> Iterator[GraphProto]:
    for body in (body for node in graph.node for body in _own_bodies(node)):
        yield body
        yield from _bodies(body)


def _own_bodies(node: onnx.NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def _parameters(view: View, node: onnx.NodeProto) -> Iterator[tuple[str, onnx.defs.OpSchema.FormalParameter]]:
    """Pair the inputs of a node with what its schema says of them; the last parameter may stand for many."""
    schema = view.schema(node)
    if schema is None or not schema.inputs:
        return
    for place, name in enumerate(node.input):
        if name:
            yield name, schema.inputs[min(place, len(schema.inputs) - 1)]


STRUCTURE: dict[str, Check] = {
    check.__name__: check
    for check in (
        opset_beyond, ir_beyond, made_twice, not_made, not_sorted, unknown_operator, foreign_operator,
        unknown_attribute, data_outside, dynamic_axes, interface_type, tensor_type, uint8_inside, types_disagree,
        type_not_allowed, weights_as_inputs, unread_input, names_shared, branch_ranks,
    )
}  # fmt: skip
