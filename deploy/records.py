"""The frozen records that travel between stages, and their JSON form.

After tracing, what crosses a stage is a file with a hash (``Artifact``) plus one of these records. ``RunRecord`` is the
whole run: it is the bundle's ``manifest.json``, and reports are drawn from it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from deploy.jsonable import from_json as from_json
from deploy.jsonable import to_json as to_json
from deploy.kinds import Artifact as Artifact
from deploy.kinds import Batch as Batch
from deploy.kinds import Precision as Precision
from deploy.kinds import Stage as Stage
from deploy.kinds import Target as Target
from deploy.kinds import TensorSpec as TensorSpec
from deploy.kinds import record as record

SCHEMA_VERSION = 1


@record
class WeightsSource:
    """Where the weights came from. ``statement`` is the sentence that every output repeats."""

    kind: str  # "random" | "file" | "url" | "hub"
    statement: str
    path: str = ""  # file name, of a file
    sha256: str = ""
    layout: str = ""
    seed: int = 0
    source: str = ""  # what --weights takes to get the same file again: a URL with its hash, a repository at a commit
    revision: str = ""  # commit, of a repository

    def same_as(self, other: WeightsSource) -> bool:
        """Whether both are the same weights, wherever they lay."""
        return (self.sha256, self.seed) == (other.sha256, other.seed)


@record
class Drift:
    """Deploy form against training form, same input: largest absolute difference of the outputs.

    ``relative`` values are divided by the largest absolute output of the training form.
    """

    fp32_max_abs: float
    fp32_relative: float
    fp64_max_abs: float
    fp64_relative: float


@record
class Preprocess:
    """How an image becomes the input: fit it to the size, scale to 0..1, normalise.

    ``fit`` "crop" resizes the short edge to size / crop and takes the centre; "stretch" resizes both edges to the size.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    fit: str = "crop"
    interpolation: str = "bicubic"


@record
class ModelRecord:
    """The model as it was loaded. ``macs`` are multiply-adds per image; papers print them as FLOPs."""

    system: str
    variant: str
    task: str
    paper: str
    size: tuple[int, int]  # height, width
    parameters: int
    deploy_parameters: int
    macs: int
    weights: WeightsSource
    preprocess: Preprocess
    form: str  # the export form that was chosen for the target
    form_reason: str
    seconds: float
    drift: Drift | None = None  # measured by the parity stage


@record
class TraceRecord:
    """``10-traced.onnx``: what was exported, held against what was asked."""

    artifact: Artifact
    opset: int
    batch: Batch
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_counts: Mapping[str, int]
    checks: tuple[str, ...]  # each sentence names one thing that was verified
    seconds: float


@record
class PassRecord:
    """One graph pass: how many sites it rewrote and why it left others."""

    name: str
    reason: str
    sites: int
    declined: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    max_abs_change: float | None = None  # measured only with --verify-each


@record
class PassesRecord:
    """``20-patched.onnx``."""

    artifact: Artifact
    target: Target
    passes: tuple[PassRecord, ...]
    op_counts_before: Mapping[str, int]
    op_counts: Mapping[str, int]
    seconds: float


@record
class Kept:
    """A group of nodes that stays float32 in a reduced-precision graph, and why."""

    reason: str
    nodes: int
    examples: tuple[str, ...]


@record
class CalibratedTensor:
    """The range of one quantised activation, and what it leaves out.

    ``low`` and ``high`` were measured, ``clip_low`` and ``clip_high`` are kept; ``saturated`` is the share of measured
    values beyond them, ``levels`` how many of the 256 integer levels any value takes. A ``dead`` range says nothing
    about other images: all values are one, or hardly any level is used.
    """

    tensor: str
    low: float
    high: float
    clip_low: float
    clip_high: float
    saturated: float
    levels: int
    dead: bool


@record
class Calibration:
    """How the activations' ranges were found. ``source`` says which images, without a path."""

    source: str
    images: int
    skipped: tuple[str, ...]  # "name: reason" of images that could not be read
    method: str
    cached: bool
    tensors: tuple[CalibratedTensor, ...]
    seconds: float


@record
class Quantization:
    """The integer or 8-bit float part of a graph: ``nodes`` of its ``products`` (Conv, Gemm, MatMul) are quantised.

    ``style`` says for which runtime and how, ``kept`` which products stay out, and why.
    """

    style: str
    weights: str
    nodes: int
    products: int
    kept: tuple[Kept, ...]
    calibration: Calibration


@record
class PrecisionRecord:
    """``30-<precision>.onnx``, or the patched file itself for FP32.

    ``dtype_counts`` counts the floating-point nodes of the graph by the type of their first output, quantised products
    as int8 or fp8; the ``casts`` between float types are not among them, nor are QuantizeLinear and DequantizeLinear.
    """

    artifact: Artifact
    precision: Precision
    dtype_counts: Mapping[str, int]
    casts: int
    kept: tuple[Kept, ...]
    warnings: tuple[str, ...]
    largest_activation: float | None
    seconds: float
    quantization: Quantization | None = None  # of INT8 and FP8


@record
class Audit:
    """What the engine really computes in, held against what was asked.

    ``evidence`` says where the figures come from (graph, session, build log, engine inspector). ``kernels`` counts
    kernels by precision, ``fused`` counts fused kernels by kind (attention, norm, ...), ``expected`` the blocks of
    the graph that should be fused. ``weights`` (parameters) and ``microseconds`` (one run) are by precision, and empty
    where the evidence has none.
    """

    asked: Precision
    evidence: str
    kernels: Mapping[str, int]
    fused: Mapping[str, int]
    ok: bool
    statement: str
    weights: Mapping[str, int] = field(default_factory=dict)
    microseconds: Mapping[str, float] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@record
class EngineRecord:
    """One built engine. ``runnable`` is False with a reason where this machine can build but not run it."""

    backend: str
    backend_version: str
    artifact: Artifact
    device: str  # "cpu", "cuda:0", "sm89"
    runnable: bool
    reason: str
    audit: Audit
    options: Mapping[str, str]
    seconds: float


@record
class BuildRecord:
    """An engine that was built from an ONNX file; the engine's name with ``.<backend>.json`` holds it."""

    schema_version: int
    effdeploy: str
    created: str  # ISO 8601, UTC
    model: Artifact
    inputs: tuple[TensorSpec, ...]
    engine: EngineRecord
    environment: Environment


@record
class Tolerance:
    """Parity limits of one precision; ``None``: not judged. Relative values are to the reference's largest output."""

    max_relative: float | None = None  # max |a - b| / max |reference|
    cosine: float | None = None  # at least
    snr_db: float | None = None  # at least
    top1: float | None = None  # at least, share of images
    top5: float | None = None  # at least
    overlap: float | None = None  # of detectors, at least: share of the selected queries (deploy.parity.selection)
    margin: float | None = None  # at most: how far from the cut a query is that only one of both selected
    matched: float | None = None  # at least: share of detections above 0.5 with a partner, in both directions
    score: float | None = None  # at most: difference of the scores of matched detections

    @property
    def decides(self) -> bool:
        """Whether it judges what a detector decides instead of the distance of outputs."""
        return any(v is not None for v in (self.overlap, self.margin, self.matched, self.score))

    @property
    def unbounded(self) -> bool:
        """Whether it does not limit the distance of outputs."""
        return all(v is None for v in (self.max_relative, self.cosine, self.snr_db, self.top1, self.top5))


@record
class Comparison:
    """One output of one stage against the float32 PyTorch reference, over all parity inputs."""

    stage: str  # "deploy form", "traced", "patched", "fp16", "engine"
    output: str
    images: int
    max_abs: float
    mean_abs: float
    max_relative: float
    relative_l2: float
    cosine: float
    snr_db: float
    top1: float | None
    top5: float | None
    passed: bool
    failures: tuple[str, ...]
    per_input: Mapping[str, float] = field(default_factory=dict)  # input group -> max_relative
    precision: str = ""  # the key of ParityRecord.tolerances that judged it
    top1_ties: int = 0  # images whose best class flipped between scores that max_relative allows to trade places


@record
class BatchCheck:
    """One check of the batch suite on one stage at one batch size: its worst output and row.

    ``error`` is a share of the largest output (a count of elements for integers), infinite where a value is lost.
    """

    stage: str
    check: str  # "runs", "alone", "permuted", "duplicated", "neighbour", "repeated"
    batch: int
    output: str
    row: int
    error: float
    limit: float
    ok: bool
    detail: str = ""  # "row 3 is NaN", or why the stage does not run at this size


@record
class BatchRecord:
    """Whether rows of a batch leave each other alone, stage by stage, at each of ``sizes``."""

    ok: bool
    verdict: str
    checks: tuple[BatchCheck, ...]
    sizes: tuple[int, ...]
    notes: tuple[str, ...]
    seconds: float


@record
class DecisionCheck:
    """What one module of one stage chose, against PyTorch in float32 (``deploy.parity.decisions``).

    ``flips`` and ``margin`` are of the run with PyTorch's choices imposed on every earlier module: choices that differ,
    and the widest preference of PyTorch's scores for its own. ``same`` is the share of elements that ended in the same
    place when the stage ran freely: information, not judged.
    """

    stage: str
    module: str
    what: str  # "merges"
    images: int
    flips: int
    margin: float
    limit: float
    same: float
    ok: bool


@record
class SelectionCheck:
    """One stage of a detector that selects queries, in gate A or B (``deploy.parity.selection``).

    Rows are aligned by the position that they were selected from: ``median`` and ``largest`` difference of logits,
    ``boxes`` in 0..1. ``margin`` is the largest distance from the cut of a query that only one of both selected, in
    PyTorch's scores; ``rank`` the best place of a lost one. ``elementwise`` compares logits row by row and is no
    criterion where rows ``moved``. ``None``: the stage shows only its outputs, or there is nothing to measure.
    """

    stage: str
    gate: str  # "A": float32 with PyTorch; "B": decisions in reduced precision
    images: int
    moved: float | None  # share of rows at another place
    overlap: float | None  # share of PyTorch's selection; in gate B over images that are no extremes
    lost: int | None
    margin: float | None
    rank: int | None
    median: float | None
    largest: float | None
    boxes: float | None
    elementwise: float | None
    matched: float | None  # share of detections above 0.5 with a partner, in both directions
    matches: str
    score: float | None
    random: bool  # random weights: only what holds for any weights was judged
    ok: bool
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


@record
class ParityRecord:
    """The verdict on every stage. ``ok`` is the verdict of the run."""

    ok: bool
    verdict: str
    tolerances: Mapping[str, Tolerance]  # precision -> limits
    comparisons: tuple[Comparison, ...]
    inputs: Mapping[str, int]  # input group ("noise", "natural", "extremes", "photos") -> images
    notes: tuple[str, ...]
    seconds: float
    batches: BatchRecord | None = None  # the batch suite; None in bundles that were made before there was one
    decisions: tuple[DecisionCheck, ...] = ()  # of systems that choose; empty where nothing is chosen
    selection: tuple[SelectionCheck, ...] = ()  # of detectors that select queries


@record
class Latency:
    """Latency of one candidate at one batch size. Times are milliseconds for one call."""

    name: str
    batch: int
    threads: int
    device: str
    samples: tuple[float, ...]
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    cov: float  # standard deviation / mean
    throughput: float  # images per second, batch / p50
    peak_memory: int  # bytes by which opening it and the first call raised the process; 0 when not measured
    build_seconds: float
    note: str = ""
    calls: int = 0  # calls that were timed; ``samples`` may hold fewer


@record
class Ratio:
    """Interleaved comparison: how many times faster ``name`` is than ``baseline``, from the ratios of the rounds."""

    name: str
    baseline: str
    batch: int
    median: float
    p10: float
    p90: float
    rounds: int


@record
class BenchRecord:
    """All latencies of a run, with the warnings that a reader must see."""

    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]
    method: str
    modules: Mapping[str, float]  # module path -> share of time, from the runtime's profiler; empty when there is none
    seconds: float


@record
class Environment:
    """The machine and the versions. Never holds a path or a host name."""

    python: str
    platform: str
    cpu: str
    cores: int
    gpu: str
    packages: Mapping[str, str]
    cpu_features: tuple[str, ...] = ()  # as deploy.cpu.CPU_FEATURES calls them; empty in older bundles


@record
class StageOrigin:
    """Where the result of a stage comes from: this run, or an earlier one that consumed the same."""

    key: str  # sha256 of what the stage consumed
    reused: bool
    made: str  # ISO 8601, UTC: when the stage really ran
    seconds: float  # that it took then
    why: str  # it was not reused; empty when it was
    consumed: Mapping[str, str]


@record
class RunRecord:
    """A whole run; the bundle's ``manifest.json``."""

    schema_version: int
    effdeploy: str
    name: str
    created: str  # ISO 8601, UTC
    until: Stage
    ok: bool
    verdict: str
    recipe: Mapping[str, Any]
    environment: Environment
    model: ModelRecord
    trace: TraceRecord | None = None
    passes: PassesRecord | None = None
    precision: PrecisionRecord | None = None
    engines: tuple[EngineRecord, ...] = ()
    parity: ParityRecord | None = None
    bench: BenchRecord | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    origins: Mapping[str, StageOrigin] = field(default_factory=dict)  # stage -> where its result comes from
