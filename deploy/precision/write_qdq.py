"""Q/DQ nodes around chosen products: ONNX Runtime's quantiser writes them, and is put right where it goes wrong.

It would give the rounded copy of a tensor to *all* readers, so each tensor gets a second name first, for those that
shall have it: a residual, a norm or a Shape goes on reading the tensor itself, which is both faster and more exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from deploy.graph.io import graph_of, model_of, module_of
from deploy.graph.pipeline import AFTER_QUANTIZATION
from deploy.precision.histogram import Range
from deploy.precision.qdq import DQ, Q
from deploy.precision.select import ACTIVATIONS, PRODUCTS, Selection
from deploy.precision.view import GraphView, fresh_name, inferred, names_in
from deploy.records import Target


def handed_on(view: GraphView, selection: Selection) -> set[str]:
    """Name the outputs of integer convolutions: integers themselves, so that all of their readers get them rounded."""
    return {selection.output(view, i) for i in selection.nodes if view.nodes[i].op_type == "Conv"}


def with_qdq(
    source: ModelProto, view: GraphView, selection: Selection, ranges: Mapping[str, Range], target: Target, bits: int
) -> ModelProto:
    """Write Q/DQ around the chosen products of a float32 graph, in the style of the target.

    Args:
        source: The graph.
        view: The same, indexed.
        selection: Which products.
        ranges: Tensor -> the range that is kept.
        target: Whose style.
        bits: Of the weights: 7 or 8.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model, aliases = _prepared(source, view, selection, target)
    own = {aliases.get(tensor, tensor): ends for tensor, ends in ranges.items()}
    for index in selection.activations:  # the quantiser looks the convolution's own output up before it merges the two
        own[view.nodes[index].output[0]] = ranges[selection.output(view, index)]
    data = {t: TensorData(lowest=np.float32(low), highest=np.float32(high)) for t, (low, high) in own.items()}
    rtx = target is Target.TENSORRT
    inside = [selection.activations[i] for i in selection.nodes if i in selection.activations]
    quantiser = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if rtx else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[view.nodes[i].name for i in (*selection.nodes, *inside)],
        nodes_to_exclude=[],
        op_types_to_quantize=[*PRODUCTS, *ACTIVATIONS],
        extra_options={
            "ActivationSymmetric": rtx,
            "WeightSymmetric": True,
            "QuantizeBias": not rtx,
            "OpTypesToExcludeOutputQuantization": list(PRODUCTS) if rtx else ["MatMul", "Gemm"],
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
        },
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()  # it appends what it makes
    made = ModelProto()
    made.CopyFrom(quantiser.model.model)
    return _tidied(_without_aliases(made, set(aliases.values())), target)


def _prepared(
    source: ModelProto, view: GraphView, selection: Selection, target: Target
) -> tuple[ModelProto, dict[str, str]]:
    """Copy the graph with a name of its own for each tensor that some readers shall have rounded: tensor -> name."""
    taken = names_in(source.graph)
    apart = {view.nodes[i].input[0] for i in selection.nodes}
    if target is Target.ONNXRUNTIME:
        apart -= handed_on(view, selection)
    aliases = {tensor: fresh_name(f"{tensor}/rounded", taken) for tensor in sorted(apart)}
    chosen = set(selection.nodes)
    nodes = [helper.make_node("Identity", [t], [a]) for t, a in aliases.items() if t not in view.producer]
    for index, node in enumerate(view.nodes):
        copy = NodeProto()
        copy.CopyFrom(node)
        if index in chosen:
            copy.input[0] = aliases.get(node.input[0], node.input[0])
        for slot in _shared_residual(view, index, chosen) if target is Target.TENSORRT else ():
            copy.input[slot] = aliases.get(node.input[slot], node.input[slot])
        nodes.append(copy)
        nodes += [helper.make_node("Identity", [t], [aliases[t]]) for t in node.output if t in aliases]
    return _with_nodes(source, view, nodes, selection), aliases


def _shared_residual(view: GraphView, index: int, chosen: set[int]) -> list[int]:
    """Name the slots of an Add that take what bypasses a quantised convolution: TensorRT fuses both into one kernel."""
    node = view.nodes[index]
    if node.op_type != "Add":
        return []
    makers = [view.producer.get(name, -1) for name in node.input]
    convolved = [m in chosen and view.nodes[m].op_type == "Conv" for m in makers]
    return [slot for slot in (0, 1) if convolved[1 - slot] and not convolved[slot]]


def _with_nodes(source: ModelProto, view: GraphView, nodes: list[NodeProto], selection: Selection) -> ModelProto:
    """Put nodes in place of the source's, constants as initialisers, and each quantised layer's bias as its own."""
    model = ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    given = {i.name for i in source.graph.input}
    graph.initializer.extend(t for t in source.graph.initializer if t.name in given)
    graph.initializer.extend(view.constants.values())
    graph.node.extend(nodes)
    names = {view.nodes[i].name for i in selection.nodes}
    taken, used = names_in(graph), set()
    for node in graph.node:
        if node.name in names and node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
            if node.input[2] in used:  # its scale is that of one layer's input
                own = TensorProto()
                own.CopyFrom(view.constants[node.input[2]])
                own.name = fresh_name(own.name, taken)
                graph.initializer.append(own)
                node.input[2] = own.name
            used.add(node.input[2])
    weights = {t.name for t in graph.initializer}
    graph.value_info.extend(v for v in inferred(model).graph.value_info if v.name not in weights)
    return model


def _without_aliases(model: ModelProto, aliases: set[str]) -> ModelProto:
    """Let Q read the tensors themselves."""
    graph = model.graph
    sources = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity" and n.output[0] in aliases}
    nodes = [n for n in graph.node if not (n.op_type == "Identity" and n.output[0] in aliases)]
    for node in nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = sources.get(name, name)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _tidied(model: ModelProto, target: Target) -> ModelProto:
    """Run the target's passes for Q/DQ, and name its nodes after the modules that they serve."""
    if steps := AFTER_QUANTIZATION[target]:
        graph = graph_of(model)
        for step in steps:
            step.pass_.apply(graph)
        model = model_of(graph)
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    taken = {n.name for n in model.graph.node}
    for node in reversed(model.graph.node):  # a DQ is named before the Q above it
        if node.op_type in (Q, DQ) and readers[node.output[0]]:
            serves = module_of(readers[node.output[0]][0].name)
            node.name = fresh_name(f"{serves}/{node.op_type}" if serves else node.op_type, taken)
    return model
