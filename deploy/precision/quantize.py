"""INT8 and FP8 as QuantizeLinear and DequantizeLinear nodes, in the style of the runtime that will read them.

ONNX Runtime's CPU kernels want unsigned activations with a zero point, int32 biases, and the outputs of convolutions
quantised as well. TensorRT wants symmetric int8, no quantised bias, and the inputs of products only; what follows them
then fuses. Either refuses or slows down what was written for the other (docs/precision.md).

ONNX Runtime's own quantiser writes the nodes and rounds the weights. It would give the rounded copy of a tensor to
*all* readers, so each tensor gets a second name first, for those that shall have it: a residual, a norm or a Shape goes
on reading the tensor itself, which is both faster and more exact.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from deploy.errors import PrecisionError
from deploy.graph.io import graph_of, model_of, module_of
from deploy.graph.pipeline import AFTER_QUANTIZATION
from deploy.precision.calibrate import measure
from deploy.precision.cpu import dot_product, saturates
from deploy.precision.fp8 import as_fp8
from deploy.precision.histogram import Range, clipped, described
from deploy.precision.images import CalibrationImages
from deploy.precision.qdq import DQ, Q, lint, quantised_products
from deploy.precision.select import ACTIVATIONS, PRODUCTS, Selection, groups, select
from deploy.precision.view import GraphView, fresh_name, inferred, names_in, view_of
from deploy.records import CalibratedTensor, Calibration, Precision, Quantization, Target

STYLE: Mapping[Target, str] = {
    Target.ONNXRUNTIME: "ONNX Runtime: unsigned activations with a zero point, int32 biases, float32 rest",
    Target.TENSORRT: "TensorRT: symmetric, inputs of products only, no quantised bias, float16 rest",
}
_ACTIVATION: Mapping[Target, int] = {Target.ONNXRUNTIME: TensorProto.UINT8, Target.TENSORRT: TensorProto.INT8}
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRequest:
    """What the user and the system ask of INT8 and FP8.

    Attributes:
        images: What ranges are measured on.
        method: How they are clipped (``deploy.precision.histogram.METHODS``, or ``"minmax"``).
        percentile: Share of values, in percent, that the percentile method keeps.
        weight_bits: 7, 8 or ``"auto"``; for INT8 on ONNX Runtime.
        asked: The user's regular expressions on node names that stay out.
        kept: The system's, with their reasons.
        advance: Told how many images were done; each counts twice.
    """

    images: CalibrationImages
    method: str = "minmax"
    percentile: float = 99.99
    weight_bits: int | str = "auto"
    asked: tuple[str, ...] = ()
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    advance: Callable[[int], None] = lambda images: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantised:
    """A float32 graph with Q/DQ, how it came about, and what a reader must know."""

    model: ModelProto
    record: Quantization
    warnings: tuple[str, ...]


def quantize(
    source: ModelProto, precision: Precision, target: Target, request: QuantizationRequest, *, digest: str
) -> Quantised:
    """Write INT8 or FP8 into a float32 graph.

    Args:
        source: The patched graph.
        precision: INT8, or FP8 for TensorRT.
        target: Whose style.
        request: Calibration images, method, what stays out.
        digest: Content hash of the graph, for the calibration cache.

    Raises:
        PrecisionError: nothing can be quantised, a pattern is wrong, or FP8 was asked for ONNX Runtime.
        ImageError: too many calibration images cannot be read.
    """
    _refuse(precision, target)
    whole = inferred(source)
    view = view_of(source)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in whole.graph.value_info}
    selection = select(view, target, request.asked, request.kept, ranks)
    start = time.perf_counter()
    measured, cached = measure(
        source, _measurable(view, target), request.images, digest=digest, advance=request.advance
    )
    tensors = _quantised_tensors(view, selection, target)
    symmetric = target is Target.TENSORRT
    ranges = {
        t: clipped(measured[t], request.method, symmetric=symmetric, percentile=request.percentile) for t in tensors
    }
    calibrated = tuple(described(t, measured[t], ranges[t]) for t in sorted(tensors))
    calibration = Calibration(
        source=request.images.source, images=request.images.count,
        skipped=tuple(f"{name}: {why}" for name, why in request.images.skipped.items()),
        method=request.method, cached=cached, tensors=calibrated, seconds=time.perf_counter() - start,
    )  # fmt: skip
    bits, weights = _weights(request.weight_bits, precision, target)
    model = _tidied(_written(source, view, selection, ranges, target, bits), target)
    if precision is Precision.FP8:
        model = as_fp8(model, source)
    lint(model, target)
    record = Quantization(
        style=STYLE[target], weights=weights, nodes=len(quantised_products(model)),
        products=len(selection.nodes) + len(selection.kept), kept=groups(view, selection.kept), calibration=calibration,
    )  # fmt: skip
    return Quantised(model=model, record=record, warnings=tuple(_warnings(request.images, calibrated)))


def _refuse(precision: Precision, target: Target) -> None:
    if precision is Precision.FP8 and target is not Target.TENSORRT:
        raise PrecisionError(
            "FP8 is for TensorRT on SM 89 and newer: ONNX Runtime has no FP8 kernels, and would compute in float32",
            hint="--backend tensorrt_rtx --sm 89, or --int8 for ONNX Runtime",
        )


def _measurable(view: GraphView, target: Target) -> list[str]:
    """Name what any choice of products may need, so that another choice measures nothing again."""
    found = []
    for node in view.nodes:
        if node.op_type not in PRODUCTS or node.input[0] in view.constants or node.input[1] not in view.constants:
            continue
        found.append(node.input[0])
        if target is Target.ONNXRUNTIME and node.op_type == "Conv":
            found.append(node.output[0])
            found += [view.nodes[r].output[0] for r, _ in view.readers.get(node.output[0], ()) if _is_inside(view, r)]
    return found


def _is_inside(view: GraphView, index: int) -> bool:
    return view.nodes[index].op_type in ACTIVATIONS


def _quantised_tensors(view: GraphView, selection: Selection, target: Target) -> set[str]:
    found = {view.nodes[i].input[0] for i in selection.nodes}
    if target is Target.ONNXRUNTIME:
        found |= _handed_on(view, selection)
    return found


def _handed_on(view: GraphView, selection: Selection) -> set[str]:
    """Outputs of integer convolutions, which are integers themselves: all of their readers get the rounded tensor."""
    return {selection.output(view, i) for i in selection.nodes if view.nodes[i].op_type == "Conv"}


def _weights(asked: int | str, precision: Precision, target: Target) -> tuple[int, str]:
    """Choose the bits of weights, and say why."""
    if precision is Precision.FP8:
        return 8, "FP8 (E4M3) with one scale a tensor"
    named = "int8 with one scale an output channel"
    if target is Target.TENSORRT:
        return 8, named
    if asked != "auto":
        return int(asked), f"{named}, {asked} bits as asked"
    if saturates():
        return 7, f"{named}, 7 bits: this CPU has no 8-bit dot product (VNNI), and 8 bits overflow in its kernels"
    return 8, f"{named}, 8 bits ({dot_product() or 'no overflow on this CPU'})"


def _written(
    source: ModelProto, view: GraphView, selection: Selection, ranges: Mapping[str, Range], target: Target, bits: int
) -> ModelProto:
    """Let ONNX Runtime's quantiser write Q/DQ around the chosen products."""
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
    return _without_aliases(made, set(aliases.values()))


def _prepared(
    source: ModelProto, view: GraphView, selection: Selection, target: Target
) -> tuple[ModelProto, dict[str, str]]:
    """Copy the graph with a name of its own for each tensor that some readers shall have rounded: tensor -> name."""
    taken = names_in(source.graph)
    apart = {view.nodes[i].input[0] for i in selection.nodes}
    if target is Target.ONNXRUNTIME:
        apart -= _handed_on(view, selection)
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


def _warnings(images: CalibrationImages, tensors: tuple[CalibratedTensor, ...]) -> list[str]:
    found = list(images.warnings)
    if images.skipped:
        found.append(f"{len(images.skipped)} calibration images were left out: {', '.join(images.skipped)}")
    if images.flat:
        flat = len(images.flat)
        found.append(
            f"{flat} of {images.count} calibration images are of one colour: ranges from them do not hold on photos"
        )
    if dead := [t for t in tensors if t.dead]:
        some = ", ".join(f"{t.tensor} ({t.levels} levels from {t.low:.3g} to {t.high:.3g})" for t in dead[:_SHOWN])
        found.append(f"{len(dead)} of {len(tensors)} tensors have dead ranges, their values are hardly apart: {some}")
    if clipped_ := [t for t in tensors if t.saturated > 0.01]:
        worst = max(clipped_, key=lambda t: t.saturated)
        found.append(
            f"{len(clipped_)} tensors saturate in more than 1 % of their values, most {worst.tensor} "
            f"({100 * worst.saturated:.2g} %)"
        )
    return found
