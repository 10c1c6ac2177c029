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
from deploy.judgements import BatchCheck as BatchCheck
from deploy.judgements import BatchRecord as BatchRecord
from deploy.judgements import BoundaryError as BoundaryError
from deploy.judgements import Comparison as Comparison
from deploy.judgements import DecisionCheck as DecisionCheck
from deploy.judgements import DrawnPhoto as DrawnPhoto
from deploy.judgements import ParityRecord as ParityRecord
from deploy.judgements import SelectionCheck as SelectionCheck
from deploy.judgements import Tolerance as Tolerance
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
    ``embed``: the graph itself scales and normalises; its images are uint8 [N, height, width, 3], fitted only.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    fit: str = "crop"
    interpolation: str = "bicubic"
    embed: bool = False


@record
class ModelRecord:
    """The model as it was loaded. ``macs`` are multiply-adds per image; papers print them as FLOPs.

    ``names`` are those of the classes; empty where none were given.
    """

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
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what its options come to, where that is not what was asked


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
    smoothed: Mapping[str, float] = field(default_factory=dict)  # norm -> strength (deploy.precision.smooth)


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
class Finding:
    """What one lint rule found in an ONNX file: the nodes, and what that means for each goal.

    ``nodes`` names the first of ``count`` places: nodes, or inputs, outputs and weights where ``operator`` says so.
    """

    rule: str
    operator: str
    nodes: tuple[str, ...]
    count: int
    severities: Mapping[str, str]  # goal ("tensorrt==11.4") -> "error" | "warning"
    what: str
    fix: str
    source: str
    known_bad: bool = False  # of the table of known-bad versions, which a build warns of by itself


@record
class LintRecord:
    """An ONNX file held against the rules of what runtimes take."""

    model: str
    opset: int
    nodes: int
    goals: tuple[str, ...]
    rules: int  # that are about any of the goals
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()  # what could not be checked, and why

    def count(self, severity: str, goal: str = "") -> int:
        """Return how many findings are errors or warnings, for one goal or for any."""
        return sum(severity in ((f.severities.get(goal),) if goal else f.severities.values()) for f in self.findings)


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
    lint: LintRecord | None = None  # of the file that it was built from; None in older bundles


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
class MachineNoise:
    """What the machine did during a measurement, seen by the same work once a round.

    ``p50`` in milliseconds; ``slowest`` as a multiple of it; ``stolen`` is the share of CPU time that a hypervisor gave
    to others, the loads are processes that ran or waited over a minute. ``None``: the system does not tell.
    """

    work: str
    runs: int
    p50: float
    cov: float
    slowest: float
    stolen: float | None
    load_before: float | None
    load_after: float | None


@record
class Latency:
    """Latency of one candidate at one batch size. Times are milliseconds for one call.

    ``interval`` is the 95 % interval of p50 (``deploy.noise``); ``None`` with too few rounds, and in older bundles.
    ``sha256`` is that of the file that was timed; empty for what has none, such as PyTorch.
    """

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
    interval: tuple[float, float] | None = None
    sha256: str = ""


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
    interval: tuple[float, float] | None = None  # of 95 %, of the median


@record
class BenchRecord:
    """All latencies of a run, with the warnings that a reader must see."""

    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]
    method: str
    modules: Mapping[str, float]  # module path -> share of time, from the runtime's profiler; empty when there is none
    seconds: float
    noise: MachineNoise | None = None


@record
class BackendTried:
    """What ``--backend auto`` found of one backend.

    ``reason`` says why it could not be taken, and is empty where it could; ``used`` is the share of ``limit``, the
    tightest of the tolerance, that it used up (1 is the limit itself). ``None``: not compared, not timed.
    """

    backend: str
    version: str
    ok: bool
    reason: str
    used: float | None = None
    limit: str = ""
    milliseconds: float | None = None  # p50 of one batch, in turns with the others
    interval: tuple[float, float] | None = None  # of 95 %, of p50


@record
class BackendChoice:
    """The backend that ``--backend auto`` took, why, and what it was taken from."""

    backend: str
    reason: str
    tried: tuple[BackendTried, ...]


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
    choice: BackendChoice | None = None  # of --backend auto
