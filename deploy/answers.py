"""The records that commands give back and no stage takes on: what there is, what would be done, what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from deploy.records import Artifact, BoundaryError, ModelRecord, Stage, record


@record
class VariantRecord:
    """One size of a system. ``macs`` are multiply-adds per image at ``size`` (height, width)."""

    name: str
    parameters: int
    macs: int
    size: tuple[int, int]
    summary: str


@record
class SystemRecord:
    """A system that can be exported, and its variants."""

    name: str
    task: str
    paper: str
    variants: tuple[VariantRecord, ...]


@record
class CatalogueRecord:
    """What ``effdeploy list`` shows."""

    systems: tuple[SystemRecord, ...]


@record
class FilesRecord:
    """Files that a command wrote."""

    files: tuple[str, ...]


@record
class Prediction:
    """A class with its score, and for a detection its box: left, top, right, bottom in the photo's pixels."""

    label: int
    name: str
    score: float
    box: tuple[float, ...] = ()


@record
class PredictionRecord:
    """What an engine sees on a photo, best first. ``file`` is the picture, empty where none was asked for."""

    bundle: str
    photo: str
    found: tuple[Prediction, ...]
    file: str


@record
class PackageRecord:
    """A model in a server's repository; ``files`` are named from the repository's folder."""

    model: str
    version: int
    backend: str
    files: tuple[Artifact, ...]


@record
class PlannedFile:
    """A file that a run would write; ``size`` in bytes is an estimate from ``basis``, ``None``: not known before."""

    name: str
    size: int | None
    basis: str


@record
class PlannedStage:
    """A stage of a run that has not run; ``seconds`` is what ``evidence`` measured on this machine, or ``None``."""

    stage: Stage
    action: str  # "run" | "reuse"
    seconds: float | None
    evidence: str
    files: tuple[PlannedFile, ...]


@record
class PlanRecord:
    """What an export would do. ``needed`` and ``free`` are bytes on the file system of ``out``."""

    name: str
    out: str
    until: Stage
    recipe: Mapping[str, Any]
    model: ModelRecord
    backend: str
    backend_note: str  # why the backend cannot build here; empty when it can, or when no engine was asked for
    stages: tuple[PlannedStage, ...]
    needed: int
    free: int
    warnings: tuple[str, ...]


@record
class ConversionRecord:
    """A checkpoint that was written in another layout. ``max_relative`` compares the outputs of both files."""

    source: str
    source_sha256: str
    source_layout: str
    layout: str
    artifact: Artifact
    tensors: int
    parameters: int
    max_relative: float
    seconds: float


@record
class PanelRecord:
    """One picture of ``effdeploy show``; ``agreement`` of its run with the other one, 0 to 1."""

    run: str
    title: str
    agreement: float | None


@record
class ShowRecord:
    """A photo with what an engine and PyTorch did with it."""

    bundle: str
    photo: str
    file: str
    what: str
    panels: tuple[PanelRecord, ...]


@record
class LayerLatency:
    """What one layer took in one measured engine: ``before`` elements come in, ``taken`` of them do not leave."""

    schedule: str
    layer: int
    before: int
    taken: int
    milliseconds: float


@record
class TunedSchedule:
    """A schedule that was built and timed against the one that takes nothing away, and its drift from that one.

    ``drift`` is the relative L2 distance of the outputs over the images, ``top1`` the share with the same best class.
    """

    name: str
    schedule: tuple[int, ...]
    left: int
    milliseconds: float
    speedup: float
    p10: float
    p90: float
    drift: float
    top1: float | None
    front: bool
    chosen: bool


@record
class TuneRecord:
    """What ``effdeploy tune`` found. ``recipe`` is empty where no schedule does what was asked."""

    system: str
    variant: str
    what: str
    batch: int
    images: int
    weights: str
    target_speedup: float | None
    max_drift: float | None
    schedules: tuple[TunedSchedule, ...]
    layers: tuple[LayerLatency, ...]
    gain: bool  # whether any schedule is faster than none, beyond the noise
    verdict: str
    recipe: str
    plot: str
    seconds: float


@record
class ScoredRun:
    """What one run, an engine or PyTorch, scored on labelled images: metric to a share of 1; -1: nothing to score."""

    run: str
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of 95 %, where they are known


@record
class EvalRecord:
    """What ``effdeploy eval`` found. ``runs`` are the engine's and PyTorch's; ``drops`` how much lower the engine is.

    ``objects`` is what the labels count: boxes, or images where each has one class. ``agreement`` is the share of what
    both runs say that the other one says as well; ``None``: neither said anything.
    """

    bundle: str
    dataset: str
    images: int
    objects: int
    what: str  # "COCO average precision"
    weights: str
    runs: tuple[ScoredRun, ...]
    drops: Mapping[str, float]
    agreement: float | None
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()  # images that were left out


@record
class Apart:
    """How far outputs are from those of the float32 graph over ``images``; NaN or infinity give an infinite ``error``.

    ``error`` is the relative L2 distance of the worst output, ``cosine`` that of the worst image, ``top1`` the share of
    images with the same best class, ``matched`` that of detections above 0.5 with a partner; ``None``: there are none.
    """

    images: int
    error: float
    cosine: float
    top1: float | None = None
    matched: float | None = None


@record
class StageError:
    """A stage's file against the traced graph."""

    stage: str
    apart: Apart


@record
class ModuleError:
    """A module switched between the float32 and the low-precision graph: it ``alone`` is low, or ``without`` it all is.

    ``nodes`` counts those that differ in the two graphs.
    """

    module: str
    depth: int
    nodes: int
    alone: Apart
    without: Apart


@record
class BisectRecord:
    """Where the error of a reduced-precision bundle comes from. ``jump`` names the first module whose error jumps."""

    bundle: str
    precision: str
    backend: str
    images: str
    whole: Apart
    stages: tuple[StageError, ...]
    boundaries: tuple[BoundaryError, ...]
    modules: tuple[ModuleError, ...]
    jump: str
    worst: str
    verdict: str
    plot: str
    runs: int  # graphs that were run; the others were known from an earlier search
    seconds: float


@record
class BudgetPoint:
    """A choice of modules that stay high, with its drift and, where it can be timed here, its latency.

    ``speedup`` is over FP32, the median of interleaved rounds; ``None``: not timed.
    """

    name: str
    kept: int
    apart: Apart
    meets: bool
    milliseconds: float | None = None
    speedup: float | None = None
    p10: float | None = None
    p90: float | None = None
    front: bool = False
    chosen: bool = False


@record
class Sensitivity:
    """A module, and what the network loses when it alone is in low precision."""

    module: str
    apart: Apart


@record
class BudgetRecord:
    """What ``--budget`` found: ``kept`` modules of ``modules`` stay high. ``recipe`` is empty where none meets it."""

    system: str
    variant: str
    precision: str
    budget: str
    images: str
    modules: int
    kept: tuple[str, ...]
    order: tuple[Sensitivity, ...]  # the most sensitive first; empty where nothing had to be searched
    points: tuple[BudgetPoint, ...]
    advice: str  # what is better here; empty where the chosen one is
    verdict: str
    recipe: str
    plot: str
    runs: int
    seconds: float
