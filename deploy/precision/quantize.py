"""INT8 and FP8 as QuantizeLinear and DequantizeLinear nodes, in the style of the runtime that will read them.

ONNX Runtime's CPU kernels want unsigned activations with a zero point, int32 biases, and the outputs of convolutions
quantised as well. TensorRT wants symmetric int8, no quantised bias, and the inputs of products only; what follows them
then fuses. Either refuses or slows down what was written for the other (docs/precision.md).

What is done here is to choose, to measure and to record; ``deploy.precision.write_qdq`` writes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx import ModelProto

from deploy.errors import PrecisionError
from deploy.precision.calibrate import measure
from deploy.precision.cpu import dot_product, saturates
from deploy.precision.fp8 import as_fp8
from deploy.precision.histogram import clipped, described
from deploy.precision.images import CalibrationImages
from deploy.precision.qdq import lint, quantised_products
from deploy.precision.select import ACTIVATIONS, PRODUCTS, Selection, groups, select
from deploy.precision.smooth import channels_of, sites_of, smoothed, strengths_of
from deploy.precision.view import GraphView, inferred, view_of
from deploy.precision.write_qdq import handed_on, with_qdq
from deploy.records import CalibratedTensor, Calibration, Precision, Quantization, Target

STYLE: Mapping[Target, str] = {
    Target.ONNXRUNTIME: "ONNX Runtime: unsigned activations with a zero point, int32 biases, float32 rest",
    Target.TENSORRT: "TensorRT: symmetric, inputs of products only, no quantised bias, float16 rest",
}
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRequest:
    """What the user and the system ask of INT8 and FP8.

    Attributes:
        images: What ranges are measured on.
        method: How they are clipped (``deploy.precision.histogram.METHODS``, or ``"minmax"``).
        percentile: Share of values, in percent, that the percentile method keeps.
        weight_bits: 7, 8 or ``"auto"``; for INT8 on ONNX Runtime.
        smooth: Whether outliers of norms may move into the weights behind them (``deploy.precision.smooth``); ``None``:
            for TensorRT, whose symmetric ranges suffer most from them.
        asked: The user's regular expressions on node names that stay out.
        kept: The system's, with their reasons.
        advance: Told how many images were done; each counts twice.
    """

    images: CalibrationImages
    method: str = "minmax"
    percentile: float = 99.99
    weight_bits: int | str = "auto"
    smooth: bool | None = None
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
    bits, weights = _weights(request.weight_bits, precision, target)
    strengths: dict[str, float] = {}
    if target is Target.TENSORRT if request.smooth is None else request.smooth:
        source, strengths = _smoothed(source, view, selection, request.images, bits, target)
        view, digest = view_of(source), f"{digest} smoothed {sorted(strengths.items())}"
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
    model = with_qdq(source, view, selection, ranges, target, bits)
    if precision is Precision.FP8:
        model = as_fp8(model, source)
    lint(model, target)
    record = Quantization(
        style=STYLE[target], weights=weights, nodes=len(quantised_products(model)),
        products=len(selection.nodes) + len(selection.kept), kept=groups(view, selection.kept), calibration=calibration,
        smoothed=strengths,
    )  # fmt: skip
    return Quantised(model=model, record=record, warnings=tuple(_warnings(request.images, calibrated)))


def _smoothed(
    source: ModelProto, view: GraphView, selection: Selection, images: CalibrationImages, bits: int, target: Target
) -> tuple[ModelProto, dict[str, float]]:
    """Fold the strengths that pay into norms and weights; return the graph, and strength by norm."""
    sites = sites_of(view, selection)
    if not sites:
        return source, {}
    channels = channels_of(source, view, sites, images)
    strengths = strengths_of(view, sites, channels, bits=bits, symmetric=target is Target.TENSORRT)
    named = {view.nodes[norm].name: strength for norm, strength in strengths.items()}
    return smoothed(source, view, sites, channels, strengths) if strengths else source, named


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
        found |= handed_on(view, selection)
    return found


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


def _warnings(images: CalibrationImages, tensors: tuple[CalibratedTensor, ...]) -> list[str]:
    found = list(images.warnings)
    if images.skipped:
        found.append(
            f"{len(images.skipped)} of {len(images.names)} calibration images cannot be read and were left out: "
            f"{', '.join(images.skipped)}"
        )
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
