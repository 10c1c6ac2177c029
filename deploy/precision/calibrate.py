"""What activations take on real images: exact extremes in a first pass, histograms between them in a second.

Both passes hold one batch in memory. The first takes its extremes inside the graph; the second copies tensors out, in
groups that fit ``GROUP_BYTES``. Results are kept in the user's cache by the content of graph and images, so another
method, or other nodes left out, measure nothing again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper

from deploy.artifacts import cache_folder
from deploy.backends.base import Array, Feeds
from deploy.cpu import usable_threads
from deploy.errors import PrecisionError
from deploy.precision.histogram import BINS, Measured
from deploy.precision.images import CalibrationImages
from deploy.precision.view import FLOAT

FOLDER = "calibration"  # in the cache folder
GROUP_BYTES = 256 << 20
_SAMPLE = 1 << 18  # values of one tensor and image that a histogram takes
_FORMAT = 1  # of the cached file

Advance = Callable[[int], None]


def measure(
    model: ModelProto, tensors: Sequence[str], images: CalibrationImages, *, digest: str, advance: Advance
) -> tuple[dict[str, Measured], bool]:
    """Measure float tensors of a graph over all images; the images' ``skipped`` and ``flat`` are then known.

    Args:
        model: A float32 graph.
        tensors: Which of its tensors.
        images: What to run it on.
        digest: Content hash of the graph, for the cache.
        advance: Told the images that were done; each counts twice.

    Returns:
        Tensor -> what was measured, and whether it was taken from the cache.

    Raises:
        ImageError: too many images cannot be read.
        PrecisionError: ONNX Runtime cannot run the graph, or a tensor is not finite.
    """
    wanted = sorted(set(tensors))
    place = cache_folder() / FOLDER / f"{_key(digest, images.identity, wanted)}.npz"
    if (kept := _read(place, images)) is not None:
        return kept, True
    extremes, sizes = _extremes(model, wanted, images, advance)
    measured = _histograms(model, extremes, sizes, images, advance)
    _write(place, measured, images)
    return measured, False


def _extremes(
    model: ModelProto, tensors: Sequence[str], images: CalibrationImages, advance: Advance
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """First pass: the extremes of each tensor, and its number of values in one batch."""
    session = open_session(_probed(model, tensors))
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    sizes = np.zeros(len(tensors), np.int64)
    for feeds in images.batches():
        values = np.array([float(v) for v in run_session(session, None, feeds)]).reshape(len(tensors), 3)
        low, high = np.minimum(low, values[:, 0]), np.maximum(high, values[:, 1])
        sizes = values[:, 2].astype(np.int64)
        advance(_rows(feeds))
    for name, *ends in zip(tensors, low, high, strict=True):
        if not all(math.isfinite(end) for end in ends):
            raise PrecisionError(
                f"calibration: {name} is not finite on these images (from {ends[0]} to {ends[1]}): it has no range",
                hint="--fp32 with --images on the same folder shows where the network breaks",
            )
    pairs = zip(tensors, low.tolist(), high.tolist(), strict=True)
    return {name: (a, b) for name, a, b in pairs}, dict(zip(tensors, sizes.tolist(), strict=True))


def _probed(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Copy the model with the least and the largest value and the size of each tensor as its only outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for place, name in enumerate(tensors):
        for op, kind in (("ReduceMin", FLOAT), ("ReduceMax", FLOAT), ("Size", 7)):
            output = f"calibration/{place}/{op}"
            probe = helper.make_node(op, [name], [output])
            if op != "Size":
                probe.attribute.append(helper.make_attribute("keepdims", 0))
            copy.graph.node.append(probe)
            copy.graph.output.append(helper.make_tensor_value_info(output, kind, []))
    return copy


def _histograms(
    model: ModelProto,
    extremes: Mapping[str, tuple[float, float]],
    sizes: Mapping[str, int],
    images: CalibrationImages,
    advance: Advance,
) -> dict[str, Measured]:
    """Second pass: count the values of each tensor between its extremes."""
    counts = {name: np.zeros(BINS, np.int64) for name in extremes}
    groups = list(_groups(sizes))
    for place, group in enumerate(groups):
        session = open_session(_with_outputs(model, group))
        for feeds in images.batches():
            for name, values in zip(group, run_session(session, group, feeds), strict=True):
                counts[name] += _counted(values, *extremes[name])
            advance(_rows(feeds) if place == len(groups) - 1 else 0)
    return {name: Measured(low=ends[0], high=ends[1], counts=counts[name]) for name, ends in extremes.items()}


def _counted(values: Array, low: float, high: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    flat = values.reshape(-1)
    step = math.ceil(flat.size / (_SAMPLE * max(1, values.shape[0] if values.ndim else 1)))
    step += step > 1 and step % 2 == 0  # an even step would meet the same channels again and again
    return np.histogram(flat[::step], bins=BINS, range=(low, high) if high > low else (low, low + 1))[0]


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + 4 * size > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += 4 * size
    if group:
        yield group


def _with_outputs(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in tensors)
    return copy


def _rows(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def open_session(model: ModelProto) -> object:
    """Open a float32 graph on ONNX Runtime's CPU provider.

    Raises:
        PrecisionError: ONNX Runtime refuses it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = usable_threads(0)  # ONNX Runtime would pin to cores that a container may not have
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        raise PrecisionError(f"calibration cannot load the graph in ONNX Runtime: {error}") from error


def run_session(session: object, names: list[str] | None, feeds: Feeds) -> list[Array]:
    """Run once and return the named outputs, all of them for ``None``.

    Raises:
        PrecisionError: a kernel failed.
    """
    try:
        return session.run(names, dict(feeds))  # type: ignore[attr-defined, no-any-return]
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        raise PrecisionError(f"calibration cannot run the graph in ONNX Runtime: {error}") from error


def _key(digest: str, images: str, tensors: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, digest, images, list(tensors)]).encode()).hexdigest()[:40]


def _read(place: Path, images: CalibrationImages) -> dict[str, Measured] | None:
    """Read what was kept; whatever is wrong with the file, measuring again puts it right."""
    with contextlib.suppress(Exception), place.open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        about = json.loads(str(stored["about"]))
        images.skipped.update(about["skipped"])
        images.flat.update(about["flat"])
        rows = zip(about["tensors"], stored["extremes"].tolist(), stored["counts"], strict=True)
        return {name: Measured(low=low, high=high, counts=counts) for name, (low, high), counts in rows}
    return None


def _write(place: Path, measured: Mapping[str, Measured], images: CalibrationImages) -> None:
    """Keep what was measured; where the cache cannot be written, the run goes on without."""
    about = {"tensors": list(measured), "skipped": images.skipped, "flat": sorted(images.flat)}
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=place.parent, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file,
                    about=np.array(json.dumps(about)),
                    extremes=np.array([(m.low, m.high) for m in measured.values()], np.float64).reshape(-1, 2),
                    counts=np.array([m.counts for m in measured.values()], np.int64).reshape(-1, BINS),
                )
            Path(scratch).replace(place)
        finally:
            Path(scratch).unlink(missing_ok=True)
