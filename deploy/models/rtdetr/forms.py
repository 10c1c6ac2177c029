"""Which form of RT-DETR each target takes unless told otherwise, and what the report says of the one that was taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.models.base import Form
from deploy.records import Target

CONVOLUTIONS = {Target.ONNXRUNTIME: "winograd", Target.TENSORRT: "direct"}
SAMPLING = {Target.ONNXRUNTIME: "grid_sample", Target.TENSORRT: "gather"}
_SAMPLED = {"grid_sample": "GridSample", "gather": "sampling by Gather", "plugin": "sampling by TensorRT's plugin"}
_SAMPLED_FOR = {
    Target.ONNXRUNTIME: "with sampling by Gather r18 took 1.05 times the CPU time on ONNX Runtime "
    "(benchmarks/rtdetr.py); not timed on OpenVINO",
    Target.TENSORRT: "GridSample engines of some TensorRT versions build, run and detect something else "
    "(deploy/data/known_bad.yaml), and the version that will build is not known here; a Gather form needs none of "
    "it, and takes 162 kernels instead of 170 (r18, FP16, TensorRT-RTX; not timed)",
}
_CONVOLVED = {"winograd": "filtered convolutions", "direct": "plain convolutions"}
_CONVOLVED_FOR = {
    "winograd": "with plain convolutions r18 took 1.13 times the CPU time, 1.08 times the wall time; on a machine "
    "without a GPU, --set convolutions=direct exports for one",
    "direct": "convolutions are filtered for float32 on ONNX Runtime's CPU alone",
}


def forms(options: Mapping[str, Any]) -> dict[Target, Form]:
    """Return the form of each target under these options, with its measured reason."""
    return {target: _form(options, target) for target in Target}


def _form(options: Mapping[str, Any], target: Target) -> Form:
    names, reasons = [], []
    if options["part"] == "all":
        name, reason = _sampled(options, target)
        names += ["composed projections", "boxes as logits", name]
        reasons.append(reason)
    if target is Target.ONNXRUNTIME:
        asked = options["convolutions"]
        form = CONVOLUTIONS[target] if asked == "auto" else asked
        names += ["sums for concatenations", _CONVOLVED[form]]
        reasons.append(_CONVOLVED_FOR[form])
    return Form(name=", ".join(names) or "batch norms folded", reason="; ".join(reasons))


def _sampled(options: Mapping[str, Any], target: Target) -> tuple[str, str]:
    if options["discrete"]:
        return "sampling of pixels", "the checkpoints of this variant take the nearest pixel and do not interpolate"
    if (asked := options["sampling"]) != "auto":
        return _SAMPLED[asked], f"options.sampling={asked} asks for it"
    return _SAMPLED[SAMPLING[target]], _SAMPLED_FOR[target]
