"""The images that ranges are measured on: a folder's, or generated ones, in the batches that the graph takes.

Every pass over them reads each image anew, so memory is that of one batch however many there are. A file that cannot
be read is named and left out; more than one in a hundred stop the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.artifacts import sha256_of
from deploy.backends.base import Array, Feeds
from deploy.errors import ImageError
from deploy.preprocess import channels_first, find_images, preprocess, shown_size
from deploy.records import Preprocess, TensorSpec

Image = NDArray[Any]  # as deploy.preprocess.normalise gives it
Maker = Callable[[Image], Array]  # images [n, 3, height, width] -> another input of n rows

MOST_SKIPPED = 0.01
IMAGES = "images"
_PATH = re.compile(r"[^\s'\"]*/")
_GENERATED = (
    "calibrated on {count} generated images, not on photos: the accuracy on your data is unknown; "
    "give a few hundred of your own with --calib DIR"
)


@dataclass(kw_only=True)
class CalibrationImages:
    """Images, read one at a time.

    Attributes:
        names: One name for each image.
        read: Position -> image; raises ImageError where it cannot be read.
        batch: Rows of every batch; the last one is filled up with repeats.
        inputs: The graph's inputs.
        makers: What makes the inputs other than the images.
        source: What they are, in a few words, without a path.
        identity: Hash of everything that decides the pixels.
        warnings: What a reader must know of where they come from.
        skipped: Name -> why it could not be read; known after the first pass.
        flat: Names of images of one colour; known after the first pass.
    """

    names: Sequence[str]
    read: Callable[[int], Image]
    batch: int
    inputs: tuple[TensorSpec, ...]
    makers: Mapping[str, Maker]
    source: str
    identity: str
    warnings: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many images are used, as far as is known."""
        return len(self.names) - len(self.skipped)

    def batches(self) -> Iterator[Feeds]:
        """Yield feeds of ``batch`` rows.

        Raises:
            ImageError: more than one in a hundred images cannot be read.
        """
        rows: list[Image] = []
        for image in self._images():
            rows.append(image)
            if len(rows) == self.batch:
                yield self._feeds(rows)
                rows = []
        if rows:
            yield self._feeds([rows[i % len(rows)] for i in range(self.batch)])

    def _images(self) -> Iterator[Image]:
        for index, name in enumerate(self.names):
            if name in self.skipped:
                continue
            try:
                image = self.read(index)
            except ImageError as error:
                self.skipped[name] = _PATH.sub("", error.message)
                _refuse_many(self.skipped, len(self.names), error)
                continue
            if not np.ptp(channels_first(image[None]), axis=(2, 3)).any():
                self.flat.add(name)
            yield image

    def _feeds(self, rows: list[Image]) -> Feeds:
        images = np.stack(rows)
        first = channels_first(images)
        return {t.name: images if t.name == IMAGES else self.makers[t.name](first) for t in self.inputs}


def images_of_folder(
    folder: Path,
    size: tuple[int, int],
    spec: Preprocess,
    *,
    limit: int,
    batch: int,
    inputs: tuple[TensorSpec, ...],
    makers: Mapping[str, Maker],
) -> CalibrationImages:
    """Take at most ``limit`` images of a folder, evenly over its sorted names, through the system's preprocessing.

    Raises:
        ImageError: the folder is missing, unreadable, or holds no image.
    """
    paths = chosen_images(folder, limit)
    return CalibrationImages(
        names=[path.name for path in paths],
        read=lambda index: preprocess(paths[index], size, spec),
        batch=batch,
        inputs=inputs,
        makers=makers,
        source=f"{len(paths)} images of --calib",
        identity=_digest(repr((size, spec, batch)), *(f"{path.name} {sha256_of(path)}" for path in paths)),
    )


def check_images(folder: Path, limit: int) -> None:
    """Refuse a folder that no calibration could use before anything is exported, by the headers of its images.

    Raises:
        ImageError: the folder is missing, unreadable, holds no image, or more than one in a hundred are no images.
    """
    paths, skipped = chosen_images(folder, limit), dict[str, str]()
    for path in paths:
        try:
            shown_size(path)
        except ImageError as error:
            skipped[path.name] = error.message
            _refuse_many(skipped, len(paths), error)


def _refuse_many(skipped: Mapping[str, str], count: int, last: ImageError) -> None:
    if len(skipped) > MOST_SKIPPED * count:
        raise ImageError(
            f"{len(skipped)} of {count} calibration images cannot be read, at most 1 in 100 is left out: "
            f"{', '.join(skipped)}; the last: {last.message}",
            hint="remove these files from the folder of --calib, or save them again",
        ) from last


def chosen_images(folder: Path, limit: int) -> list[Path]:
    """List the images of a folder; of more than ``limit``, evenly over the names, which often begin with a class.

    Raises:
        ImageError: the folder is missing, unreadable, or holds no image.
    """
    try:
        found = find_images(folder, limit=1_000_000)
    except ImageError as error:
        raise ImageError(error.message, hint="--calib takes a folder of photos, some hundreds are enough") from error
    return found if len(found) <= limit else [found[i * len(found) // limit] for i in range(limit)]


def readable(paths: Sequence[Path], size: tuple[int, int], spec: Preprocess) -> list[Path]:
    """Leave out the images that cannot be read: the calibration has named and counted them."""
    found = []
    for path in paths:
        with contextlib.suppress(ImageError):
            preprocess(path, size, spec)
            found.append(path)
    return found


def generated_images(
    make: Callable[[int], Image],
    count: int,
    *,
    identity: str,
    batch: int,
    inputs: tuple[TensorSpec, ...],
    makers: Mapping[str, Maker],
) -> CalibrationImages:
    """Take generated images in place of a folder's, with a warning that says so."""
    return CalibrationImages(
        names=[f"generated {index}" for index in range(count)],
        read=make,
        batch=batch,
        inputs=inputs,
        makers=makers,
        source=f"{count} generated images",
        identity=_digest(identity, str(batch), str(count)),
        warnings=(_GENERATED.format(count=count),),
    )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
