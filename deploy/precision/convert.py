"""From a float32 graph to one whose every tensor has the type it is computed in: ``30-fp16.onnx``, ``30-int8.onnx``."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.checker
import onnx.inliner
from onnx import ModelProto

from deploy.artifacts import artifact_of, sha256_of
from deploy.backends.base import Feeds
from deploy.errors import PrecisionError
from deploy.graph.io import load_model, model_bytes, module_of, write_model
from deploy.precision import policy
from deploy.precision.decide import Decision, decide
from deploy.precision.opset import raise_opset
from deploy.precision.qdq import DQ, Q, quantised_products, scale_warning
from deploy.precision.quantize import Quantised, QuantizationRequest, quantize
from deploy.precision.ranges import ranges_of
from deploy.precision.rewrite import dtype_counts, typed_model
from deploy.precision.view import GraphView, inferred, opsets_of, tensor_types, types_in, view_of
from deploy.precision.weights import loss_warning, refuse_beyond
from deploy.records import Kept, Precision, PrecisionRecord, Target

_EXAMPLES = 5
MIN_QDQ_OPSET = 19
"""From which QuantizeLinear and DequantizeLinear take float16 and float8."""


def convert_precision(
    model: Path,
    precision: Precision,
    folder: Path,
    *,
    feeds: Feeds | None = None,
    keep: tuple[str, ...] = (),
    target: Target,
    quantization: QuantizationRequest | None = None,
) -> PrecisionRecord:
    """Write ``model`` in ``precision`` as ``folder/30-<precision>.onnx``; float32 is the same file, not copied.

    Inputs and outputs stay float32. Nodes are low unless ``deploy/precision/policy.py``, ``keep``, the operator's
    schema or the measured values say float32. INT8 and FP8 are of products alone; what is left computes in FP16 for
    TensorRT and in float32 for ONNX Runtime.

    Args:
        model: A float32 ONNX file.
        precision: What to compute in.
        folder: Where to write; the artifact's name is relative to it.
        feeds: Real inputs for the range check; without them it is left out, and the record says so.
        keep: Regular expressions, searched in node names; what they find stays float32.
        target: Runtime family that the file is for.
        quantization: Calibration images and settings of INT8 and FP8, which need them.

    Raises:
        PrecisionError: the precision cannot be written into this graph.
        GraphPassError: ``model`` is not a whole ONNX file.
        ImageError: calibration images cannot be read.
        StorageError: a file cannot be read or written.
    """
    start = time.perf_counter()
    source = load_model(model)
    if precision is Precision.FP32:
        return _unchanged(model, source, folder, start)
    if source.functions:
        source = onnx.inliner.inline_local_functions(source)
    quantised = _quantised(source, model, precision, target, quantization) if precision.quantised else None
    low = Precision.FP16 if quantised else precision
    if quantised and target is Target.ONNXRUNTIME:
        written = _Written(model=quantised.model)
    else:
        written = _typed(source, low, target, feeds, keep, quantised)
    types = _with_all_types(written.model)
    path = folder / f"30-{precision.value}.onnx"
    write_model(_checked(written.model), path)
    return PrecisionRecord(
        artifact=artifact_of(path, folder),
        precision=precision,
        dtype_counts=_counts(written.model, types, precision),
        casts=written.casts,
        kept=written.kept,
        warnings=(*written.warnings, *(quantised.warnings if quantised else ())),
        largest_activation=written.largest,
        seconds=time.perf_counter() - start,
        quantization=quantised.record if quantised else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """A graph in its final types, and what the record says of them."""

    model: ModelProto
    casts: int = 0
    kept: tuple[Kept, ...] = ()
    warnings: tuple[str, ...] = ()
    largest: float | None = None


def _quantised(
    source: ModelProto, path: Path, precision: Precision, target: Target, request: QuantizationRequest | None
) -> Quantised:
    if request is None:
        raise PrecisionError(
            f"{precision.value.upper()} needs images to measure ranges on, and none were given",
            hint="from Python: quantization=QuantizationRequest(images=images_of_folder(...))",
        )
    if (opset := opsets_of(source).get("", 1)) < MIN_QDQ_OPSET:
        raise PrecisionError(
            f"{precision.value.upper()} beside 16 bits needs opset {MIN_QDQ_OPSET}, the graph has {opset}",
            hint=f"--set trace.opset={MIN_QDQ_OPSET}",
        )
    return quantize(source, precision, target, request, digest=sha256_of(path))


def _typed(
    source: ModelProto,
    low: Precision,
    target: Target,
    feeds: Feeds | None,
    keep: tuple[str, ...],
    quantised: Quantised | None,
) -> _Written:
    """Type a graph, or what is not quantised of it, in 16 bits; ranges are those of the float32 graph."""
    raised = raise_opset(source, low)
    ranges = ranges_of(source, tensor_types(source), feeds) if feeds else {}
    model = quantised.model if quantised else source
    view = view_of(model)
    decision = decide(view, low, target, keep, ranges)
    _refuse_nothing_low(decision, low)
    typed = typed_model(model, view, decision, low)
    refuse_beyond(typed.losses, low)
    scales = scale_warning(typed.model) if quantised else None
    notes = (raised, loss_warning(typed.losses, low), scales, *_range_warnings(view, ranges, low))
    return _Written(
        model=typed.model,
        casts=typed.casts,
        kept=_kept(view, decision),
        warnings=tuple(note for note in notes if note),
        largest=max((v for v in ranges.values() if not math.isnan(v)), default=None),
    )


def _counts(model: ModelProto, types: dict[str, int], precision: Precision) -> dict[str, int]:
    """Count nodes by type; a product of two dequantised tensors is quantised, Q and DQ themselves are no arithmetic."""
    slim = ModelProto()
    quantised = quantised_products(model)
    slim.graph.node.extend(n for n in model.graph.node if n.op_type not in (Q, DQ) and n.name not in quantised)
    found = dtype_counts(slim, types)
    return dict(sorted({**found, precision.value: len(quantised)}.items())) if quantised else found


def _unchanged(path: Path, model: ModelProto, folder: Path, start: float) -> PrecisionRecord:
    home = folder if path.resolve().is_relative_to(folder.resolve()) else path.parent
    return PrecisionRecord(
        artifact=artifact_of(path, home),
        precision=Precision.FP32,
        dtype_counts=dtype_counts(model, tensor_types(model)),
        casts=0,
        kept=(),
        warnings=(),
        largest_activation=None,
        seconds=time.perf_counter() - start,
    )


def _refuse_nothing_low(decision: Decision, precision: Precision) -> None:
    if decision.low:
        return
    reasons = "; ".join(sorted(set(decision.kept.values()))[:3]) or "it has no floating-point node"
    raise PrecisionError(
        f"nothing in this graph can compute in {policy.NAME[precision]}: {reasons}",
        hint="--fp32, or fewer patterns in typing.keep_fp32",
    )


def _with_all_types(model: ModelProto) -> dict[str, int]:
    """Infer all types and shapes anew, strictly, write them into the model and return the types.

    Raises:
        PrecisionError: two types contradict each other: a mistake of this stage, not of the user.
    """
    whole = inferred(model)
    weights = {t.name for t in model.graph.initializer}
    del model.graph.value_info[:]
    model.graph.value_info.extend(v for v in whole.graph.value_info if v.name not in weights)
    for dim in (d for v in model.graph.value_info for d in v.type.tensor_type.shape.dim):
        if dim.dim_param.startswith("unk__"):  # made up by the inference; another run would number them anew
            dim.ClearField("dim_param")
    return types_in(whole)


def _checked(model: ModelProto) -> bytes:
    """Serialise the typed model and run the full ONNX checker on it.

    Raises:
        PrecisionError: it is not valid: a mistake of this stage, not of the user.
    """
    data = model_bytes(model)
    try:
        onnx.checker.check_model(data, full_check=True)
    except Exception as error:  # onnx raises ValidationError, InferenceError or ValueError, by check
        raise PrecisionError(
            f"the typed graph does not pass the ONNX checker: {error}",
            hint="report this with the patched file; --fp32 works meanwhile",
        ) from error
    return data


def _kept(view: GraphView, decision: Decision) -> tuple[Kept, ...]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index in sorted(decision.kept):
        groups[decision.kept[index]].append(index)
    return tuple(
        Kept(
            reason=reason,
            nodes=len(members),
            examples=tuple(view.nodes[i].name or view.nodes[i].op_type for i in members[:_EXAMPLES]),
        )
        for reason, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _range_warnings(view: GraphView, ranges: Mapping[str, float], precision: Precision) -> list[str]:
    limit, name = policy.LIMIT[precision], policy.NAME[precision]
    if not ranges:
        return (
            [f"activations were not measured: overflow of {name} was not looked for"]
            if precision is Precision.FP16
            else []
        )
    warnings = []
    if undefined := [t for t, v in ranges.items() if math.isnan(v)]:
        warnings.append(f"the float32 network itself gives NaN, first at {_place(view, undefined[0])}")
    beyond = [t for t, v in ranges.items() if v > limit]
    if beyond:
        worst = max(beyond, key=ranges.__getitem__)
        warnings.append(
            f"{len(beyond)} tensors exceed {name}'s {limit:g} and stay float32 with their nodes; "
            f"largest {ranges[worst]:.4g} at {_place(view, worst)}"
        )
    near = [t for t, v in ranges.items() if limit / policy.HEADROOM < v <= limit]
    if near:
        worst = max(near, key=ranges.__getitem__)
        warnings.append(
            f"{len(near)} tensors are within {policy.HEADROOM:g}x of {name}'s {limit:g} and other inputs may overflow; "
            f"largest {ranges[worst]:.4g} at {_place(view, worst)}"
        )
    return warnings


def _place(view: GraphView, tensor: str) -> str:
    maker = view.producer.get(tensor)
    if maker is None:
        return f"{tensor} (graph input)"
    name = view.nodes[maker].name
    return f"{tensor} ({module_of(name) or name or view.nodes[maker].op_type})"
