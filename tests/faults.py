"""Wrong graphs, made of right ones: what a check of a detector must catch."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper


def copied(graph):
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def with_attribute(graph, operator, **attributes):
    """Change attributes of every node of an operator."""
    copy = copied(graph)
    nodes = [node for node in copy.graph.node if node.op_type == operator]
    for node in nodes:
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attributes.items())])
    assert nodes
    return copy


def with_constant(graph, ending, change):
    """Change the one constant whose name ends so."""
    copy = copied(graph)
    (found,) = [tensor for tensor in copy.graph.initializer if tensor.name.endswith(ending)]
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found)).copy(), found.name))
    return copy
