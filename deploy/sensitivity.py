"""What a network loses when some of its nodes are in low precision: graphs of both files, run against the float32 one.

Every measurement is kept in the store by the content of both files, the nodes, the images and the runtime: a search
that was interrupted goes on where it was, and one that is repeated runs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto

from deploy.answers import Apart
from deploy.artifacts import environment, open_artifact, sha256_of
from deploy.backends import load_backend
from deploy.backends.base import BuildOptions, Feeds, Runner
from deploy.backends.onnxruntime import open_model
from deploy.console import Console
from deploy.errors import BundleError, ImageError
from deploy.graph.io import load_model, save_model
from deploy.parity.detection import Matches, match_detections, match_overlap
from deploy.parity.metrics import TASKS, concatenate, pool
from deploy.precision.emulate import emulated
from deploy.precision.images import CalibrationImages
from deploy.precision.splice import Splice
from deploy.records import PassesRecord, Precision, PrecisionRecord, RunRecord, Target, from_json, to_json
from deploy.store import Entry, Store, code_version, key_of

Outputs = Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]

_DETECTIONS = ("labels", "boxes", "scores")


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What hybrid graphs run on.

    Attributes:
        backend: A backend's name.
        options: What it is asked for; the precision is that of the low file.
        rounded: Whether each 16-bit tensor is rounded in a float32 graph, for a CPU that does not compute in 16 bits.
    """

    backend: str
    options: BuildOptions
    rounded: bool

    def open(self, model: ModelProto, folder: Path, name: str = "hybrid") -> Runner:
        """Open a graph of both precisions.

        Raises:
            BackendUnavailableError: the backend cannot run here.
            EngineBuildError: the runtime refuses the graph.
        """
        path = folder / f"{name}.onnx"
        save_model(emulated(model) if self.rounded else model, path)
        if self.backend == "onnxruntime":
            return open_model(path, self.options)
        backend = load_backend(self.backend)
        return backend.open(backend.build(path, folder, self.options)[0], folder, self.options)


def both_of(run: RunRecord) -> tuple[PassesRecord, PrecisionRecord]:
    """Return the records of a run's float32 file and of the file in low precision.

    Raises:
        BundleError: the run stopped before the precision stage.
    """
    if run.passes is None or run.precision is None:
        raise BundleError(
            f"{run.name} has no file in low precision: its run stopped after {run.until.value}",
            hint="export without --until",
        )
    return run.passes, run.precision


def how_to_judge(precision: Precision, target: Target, options: BuildOptions) -> How:
    """Run on ONNX Runtime's CPU provider: integer kernels for its own style, everything else as it is written."""
    rtx = target is Target.TENSORRT
    return How(
        backend="onnxruntime",
        options=dataclasses.replace(options, device="cpu", integer_kernels=not rtx, threads=0),
        rounded=rtx or not precision.quantised,
    )


@dataclass(kw_only=True)
class Laboratory:
    """Both files of a network, images, and what was measured so far.

    Attributes:
        high: The float32 file.
        low: The same in low precision.
        images: What they run on.
        task: How outputs are compared (``deploy.parity.metrics.TASKS``).
        size: Height and width of an image.
        how: What runs the graphs.
        folder: For files that are written on the way.
        smoothed: Norms of the low file that hand outliers on to the products behind them (``deploy.precision.smooth``).
        runs: How many graphs were run.
    """

    high: Path
    low: Path
    images: CalibrationImages
    task: str
    size: tuple[int, int]
    how: How
    folder: Path
    smoothed: Collection[str] = ()
    store: Store = field(default_factory=Store)
    runs: int = 0

    @classmethod
    def of(
        cls, run: RunRecord, bundle: Path, scratch: Path, *, images: CalibrationImages, task: str,
        how: Callable[[Target], How],
    ) -> Laboratory:  # fmt: skip
        """Take the files of a run.

        Args:
            run: A run as far as the precision stage.
            bundle: Where its files lie.
            scratch: For files that are written on the way.
            images: What graphs run on.
            task: How outputs are compared.
            how: What runs the graphs of a target.

        Raises:
            BundleError: the run stopped before, or a file was changed.
        """
        passes, precision = both_of(run)
        smoothed = tuple(precision.quantization.smoothed) if precision.quantization else ()
        return cls(
            high=open_artifact(passes.artifact, bundle), low=open_artifact(precision.artifact, bundle), images=images,
            task=task, size=run.model.size, how=how(passes.target), folder=scratch, smoothed=smoothed,
        )  # fmt: skip

    @functools.cached_property
    def splice(self) -> Splice:
        """Both graphs, by node."""
        return Splice(load_model(self.high), load_model(self.low))

    @functools.cached_property
    def feeds(self) -> tuple[Feeds, ...]:
        """The images, in the batches that the graph takes.

        Raises:
            ImageError: more than one in a hundred cannot be read.
        """
        try:
            return tuple(self.images.batches())
        except ImageError as error:
            text = error.message.replace("calibration images", "images")
            raise ImageError(text, hint="remove these files from the folder, or save them again") from error

    def warn_of_skipped(self, console: Console) -> None:
        """Name the images that could not be read."""
        if skipped := self.images.skipped:
            console.warn(f"{len(skipped)} images were left out: {', '.join(skipped)}")

    @functools.cached_property
    def reference(self) -> list[Outputs]:
        """What the float32 graph gives."""
        return self._outputs(load_model(self.high))

    @functools.cached_property
    def whole(self) -> frozenset[str]:
        """Names of all nodes that are not the same in both files."""
        return self.splice.changed

    def together(self, nodes: Collection[str]) -> frozenset[str]:
        """Add what cannot be switched alone: a smoothed norm and the products that read it are one function."""
        found = set(nodes)
        for norm in self.smoothed:
            output = self.splice.nodes[norm].output[0]
            tied = {norm, *(node.name for node in self.splice.high.graph.node if output in node.input)}
            found |= tied if found & tied else set()
        return frozenset(found)

    def of_nodes(self, low: Collection[str]) -> Apart:
        """Measure the graph with these nodes from the low file, or remember what was measured."""
        consumed = {"low nodes": _digest(sorted(low))}
        return self._remembered(consumed, lambda: self.splice.hybrid(low))

    def of_file(self, path: Path) -> Apart:
        """Measure another file of the network against the float32 graph."""
        return self._remembered({"file": sha256_of(path)}, lambda: load_model(path))

    def open(self, model: ModelProto) -> Runner:
        """Open a graph of both precisions."""
        return self.how.open(model, self.folder)

    def _remembered(self, consumed: Mapping[str, str], make: Callable[[], ModelProto]) -> Apart:
        everything = {**self._identity, **consumed}
        key = key_of("sensitivity", everything)
        entry, _ = self.store.take("sensitivity", key)
        if entry is not None:
            return from_json(Apart, entry.record)
        found = self._measured(make())
        fresh = Entry(
            stage="sensitivity", key=key, made="", seconds=0.0, consumed=everything, files=(), record=to_json(found)
        )
        self.store.put(fresh, self.store.folder)
        return found

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        here = environment()
        return {
            "high": sha256_of(self.high), "low": sha256_of(self.low), "images": self.images.identity,
            "task": self.task, "how": repr(self.how), "cpu": f"{here.cpu} {here.cpu_features}",
            "packages": repr(sorted(here.packages.items())), "effdeploy's sources": code_version(),
        }  # fmt: skip

    def _measured(self, model: ModelProto) -> Apart:
        self.runs += 1
        return compared(self.task, self.size, self.reference, self._outputs(model))

    def _outputs(self, model: ModelProto) -> list[Outputs]:
        """Run all images; rows that only fill a batch up are cut."""
        found: list[Outputs] = []
        with self.open(model) as runner:
            for feeds in self.feeds:
                outputs = runner.infer(feeds)
                left = self.images.count - sum(len(next(iter(o.values()))) for o in found)
                found.append({name: value[:left] for name, value in outputs.items()})
        return found


def compared(task: str, size: tuple[int, int], reference: Sequence[Outputs], candidate: Sequence[Outputs]) -> Apart:
    """Compare the outputs of two graphs, batch by batch."""
    parts = [TASKS[task](a, b) for a, b in zip(reference, candidate, strict=True)]
    pooled = [pool(concatenate([part[name] for part in parts])) for name in parts[0]]
    agreed = [p.top1 for p in pooled if p.top1 is not None]
    finite = all(p.nonfinite == 0 for p in pooled)
    return Apart(
        images=pooled[0].images,
        error=max(p.relative_l2 for p in pooled) if finite else float("inf"),
        cosine=min(p.cosine for p in pooled) if finite else 0.0,
        top1=min(agreed, default=None),
        matched=_matched(size, reference, candidate) if finite else 0.0,
    )


def _matched(size: tuple[int, int], reference: Sequence[Outputs], candidate: Sequence[Outputs]) -> float | None:
    if not reference or not set(_DETECTIONS) <= set(reference[0]):
        return None
    pairs = zip(_images(reference), _images(candidate), strict=True)
    return Matches.over(match_detections(a, b, match_overlap(size)) for a, b in pairs).share


def _images(batches: Sequence[Outputs]) -> Iterator[Outputs]:
    for batch in batches:
        for row in range(len(batch["scores"])):
            yield {name: batch[name][row] for name in _DETECTIONS}


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
