"""Records of what was compared: tolerances, errors, batches, decisions, selections, and the verdict over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from deploy.kinds import record


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
    sha256: str = ""  # of the file that was compared; empty for PyTorch's forms
    top1_ties: int = 0  # images whose best class changed by no more than PyTorch's own rounding explains
    top1_gaps: tuple[float, ...] = ()  # of each image whose best class changed: how far apart the reference has both


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
    tied: int = 0  # images in which PyTorch's own scores tie at the cut, so that either query may be selected

    @property
    def unproven(self) -> str:
        """Why holding this gate proves nothing about the precision; empty where it does."""
        if self.random:
            return "weights: random"
        return "nothing to match" if self.gate == "B" and self.matched is None else ""


@record
class DrawnPhoto:
    """What an engine and PyTorch did with a photo, as an image: ``data`` is base64, ``sentence`` says what it shows."""

    photo: str
    title: str
    sentence: str
    media: str
    data: str
    width: int
    height: int


@record
class BoundaryError:
    """Relative L2 distance of both graphs' activations where they enter a module, and where they leave it."""

    module: str
    tensor: str  # the worst that leaves
    before: float
    after: float
    jump: bool


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
    pictures: tuple[DrawnPhoto, ...] = ()  # of systems that draw, on the first photo of --images
    modules: tuple[BoundaryError, ...] = ()  # of a reduced precision against the float32 graph; not judged
