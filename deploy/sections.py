"""The sections of a recipe: every setting with its type, its limits and its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)  # fmt: skip

from deploy import units
from deploy.errors import RecipeError
from deploy.records import Batch, Precision, Preprocess, Tolerance


def _parse_batch(value: Any) -> Batch:
    if isinstance(value, Batch):
        return value
    try:
        return Batch.parse(value)
    except RecipeError as error:
        raise ValueError(error.message.removeprefix("batch: ")) from error


Size = Annotated[
    tuple[int, int],
    BeforeValidator(units.size_of, json_schema_input_type=int | str),
    PlainSerializer(lambda s: f"{s[0]}x{s[1]}", return_type=str),
]
Bytes = Annotated[int, BeforeValidator(units.bytes_of, json_schema_input_type=int | str)]
BatchField = Annotated[
    Batch, BeforeValidator(_parse_batch, json_schema_input_type=int | str), PlainSerializer(str, return_type=str)
]


class Section(BaseModel):
    """Settings that belong together: frozen, unknown keys and infinite numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TraceSection(Section):
    """How PyTorch is exported."""

    opset: int | None = Field(None, ge=18, le=25, description="ONNX opset; default: what the target prefers")
    attention_op: bool = Field(False, description="allow opset 23+, where the exporter writes the Attention op")


class PassesSection(Section):
    """How the graph is patched."""

    verify_each: bool = Field(False, description="compare outputs before and after every pass")


class PrecisionSection(Section):
    """What stays float32 in a reduced-precision graph, besides the documented policy."""

    keep_fp32: tuple[str, ...] = Field((), description="regular expressions on node names (module path/OpType)")


class QuantizationSection(Section):
    """How ``int8`` and ``fp8`` find the ranges of activations, and what stays out."""

    calib: Path | None = Field(None, description="folder of calibration images; without it a small generated set")
    method: Literal["minmax", "entropy", "percentile", "mse"] = Field("minmax", description="how ranges are clipped")
    percentile: float = Field(99.99, gt=50, le=100, description="share of values, in percent, that percentile keeps")
    max_images: int = Field(512, ge=1, le=100_000, description="at most this many calibration images")
    weight_bits: Literal["auto", 7, 8] = Field(
        "auto", description="of INT8 weights for ONNX Runtime; auto: 7 where 8 would overflow this CPU's kernels"
    )
    smooth: bool | None = Field(
        None, description="move outliers of norms into the weights behind them (SmoothQuant); default: for TensorRT"
    )
    keep_high: tuple[str, ...] = Field(
        (), description="regular expressions on node names that stay out of INT8 and FP8"
    )


class EngineSection(Section):
    """Which runtime builds the engine, and how. CPU threads are ``bench.threads``: what is timed is what was built."""

    backend: str = Field("onnxruntime", description="onnxruntime, openvino, tensorrt, tensorrt_rtx, or auto for a CPU")
    sm: tuple[int, ...] = Field((), description="CUDA compute capabilities for ahead-of-time builds, e.g. [80, 89]")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where ONNX Runtime runs; auto: CUDA if usable")
    level: int = Field(3, ge=0, le=5, description="TensorRT builder optimisation level")
    workspace: Bytes = Field(0, description="TensorRT workspace limit, e.g. 4GiB; 0: no limit")
    tf32: bool = Field(False, description="let FP32 matrix products use TF32 on a GPU")
    profiles: tuple[BatchField, ...] = Field((), description="TensorRT optimisation profiles; none: one, the batch")
    timing_cache: bool = Field(True, description="keep TensorRT's timings in the user's cache folder")
    version_compatible: bool = Field(False, description="an engine for later minor versions of TensorRT too")
    hardware: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        "none", description="TensorRT hardware compatibility, at a cost in speed"
    )
    refit: bool = Field(False, description="an engine whose weights can be replaced")
    strip: bool = Field(False, description="an engine without its weights, filled from the ONNX file when it is opened")
    lint: Literal["stop", "warn"] = Field("stop", description="what lint errors do before a build")

    @model_validator(mode="after")
    def _sm_fits(self) -> EngineSection:
        if len(set(self.sm)) < len(self.sm):
            raise ValueError(f"sm: got {list(self.sm)}, expected each capability once")
        if self.sm and self.backend in ("onnxruntime", "openvino", "auto"):
            raise ValueError(f"sm: {self.backend} builds for no compute capability; add --backend tensorrt_rtx")
        return self


class ToleranceSection(Section):
    """Parity limits of one precision; an absent value is not judged."""

    max_relative: float | None = Field(None, gt=0, lt=1, description="max|difference| / max|reference|")
    cosine: float | None = Field(None, gt=0, le=1)
    snr_db: float | None = Field(None, gt=0)
    top1: float | None = Field(None, ge=0, le=1, description="share of images with the same best class")
    top5: float | None = Field(None, ge=0, le=1)
    overlap: float | None = Field(None, ge=0, le=1, description="of detectors: share of the selected queries")
    margin: float | None = Field(None, gt=0, description="of detectors: distance of a lost query from the cut")
    matched: float | None = Field(None, ge=0, le=1, description="of detectors: detections above 0.5, both directions")
    score: float | None = Field(None, gt=0, le=1, description="of detectors: difference of matched scores")

    def record(self) -> Tolerance:
        """Return the record that travels."""
        return Tolerance(**self.model_dump())


class ParitySection(Section):
    """How outputs are compared with PyTorch."""

    images: Path | None = Field(None, description="folder of real photos, added to the deterministic pack")
    max_images: int = Field(32, ge=1, description="at most this many photos")
    seed: int = Field(0, ge=0)
    max_drift: float | None = Field(
        None, gt=0, lt=1, description="max|deploy form - training form| / max|training form|; absent: not judged"
    )
    tolerances: Mapping[Precision, ToleranceSection] = Field(default_factory=dict)


class BenchSection(Section):
    """How latency is measured."""

    warmup_seconds: float = Field(0.5, ge=0, le=600)
    seconds: float = Field(3.0, gt=0, le=3600, description="at least this long per candidate")
    rounds: int = Field(20, ge=3, le=100000, description="at least this many interleaved rounds")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of every candidate")
    baselines: tuple[Literal["eager", "compile", "naive"], ...] = ()

    @field_validator("baselines")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"got {list(names)}, expected each baseline once")
        return names


class PreprocessSection(Section):
    """How an image becomes the input."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = Field(0.875, gt=0, le=1)
    fit: Literal["crop", "stretch"] = Field("crop", description="stretch: the whole image, whatever its proportions")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    embed: bool = Field(False, description="the graph takes uint8 NHWC images of its size and normalises them itself")

    def record(self) -> Preprocess:
        """Return the record that travels."""
        return Preprocess(**self.model_dump())
