"""The parity inputs: a small, deterministic pack that a wrong graph has trouble to survive.

Noise excites every channel, images with natural statistics excite the depth as photos do, extremes meet saturation
and overflow. Every image has its own seed, so one image stays the same when the number of the others changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.backends.base import Array, Feeds
from deploy.errors import ParityError
from deploy.preprocess import channels_first, normalise, preprocess
from deploy.records import Batch, Preprocess, TensorSpec

IMAGES = "images"

Picture = NDArray[np.float64]  # RGB in 0..1, [height, width, 3]
ExtraFeed = Callable[[NDArray[np.float32]], Array]  # images [n, 3, height, width] -> another input, axis 0 of length n

NOISE, NATURAL = 2, 3  # images of these groups; the extremes are listed below

# Rows: what R, G and B take from three independent fields: luminance, yellow against blue, magenta against green.
# Natural images vary most in luminance, less in the second, least in the third (Ruderman, Cronin and Chiao 1998).
_COLOUR = np.array([[1.0, 0.12, 0.06], [1.0, 0.04, -0.08], [1.0, -0.22, 0.04]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One call of the network.

    Attributes:
        feeds: Input arrays by name.
        groups: Group of each image that counts, in order; images behind them pad a fixed batch and are not compared.
    """

    feeds: Feeds
    groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputPack:
    """All parity inputs, cut to batches that the engine takes."""

    chunks: tuple[Chunk, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Group -> number of images, padding not counted."""
        return dict(Counter(group for chunk in self.chunks for group in chunk.groups))


def pack(
    inputs: tuple[TensorSpec, ...],
    size: tuple[int, int],
    spec: Preprocess,
    *,
    batch: Batch,
    seed: int = 0,
    photos: Sequence[Path] = (),
    extra: Mapping[str, ExtraFeed] | None = None,
) -> InputPack:
    """Make the parity inputs of a network.

    Args:
        inputs: The graph's inputs; ``images`` is made here.
        size: Height and width in pixels.
        spec: How the system normalises images.
        batch: What the engine takes. Fixed: every chunk has exactly that size, filled up with repeats. Dynamic: a first
            chunk of ``min``, then chunks of up to ``opt``, so that more than one batch size runs.
        seed: Changes all images.
        photos: Image files to add, through the system's preprocessing.
        extra: Makes the inputs other than ``images``, by name, from the images of the same call.

    Raises:
        ParityError: an input that nothing makes.
        ImageError: a photo that cannot be read.
    """
    makers = dict(extra or {})
    if unknown := [t.name for t in inputs if t.name != IMAGES and t.name not in makers]:
        raise ParityError(
            f"no parity inputs for {', '.join(unknown)}: expected {', '.join([IMAGES, *makers])}",
            hint="a system whose graph has more inputs than images says in its file how they are made",
        )
    rows = _rows(size, spec, seed, photos)
    chunks: list[Chunk] = []
    while part := list(islice(rows, batch.opt if chunks else batch.min)):
        images = np.stack([part[i % len(part)][1] for i in range(max(len(part), batch.min))])
        first = channels_first(images)
        feeds = {t.name: makers[t.name](first) if t.name in makers else images for t in inputs}
        chunks.append(Chunk(feeds=feeds, groups=tuple(group for group, _ in part)))
    return InputPack(chunks=tuple(chunks))


def _rows(size: tuple[int, int], spec: Preprocess, seed: int, photos: Sequence[Path]) -> Iterator[tuple[str, Array]]:
    """Yield (group, what ``deploy.preprocess.normalise`` gives) in a fixed order."""
    for index in range(NOISE):
        yield "noise", _noise(size, spec, _generator(seed, 0, index))
    for index in range(NATURAL):
        yield "natural", normalise(natural(size, _generator(seed, 1, index)), spec)
    for index, make in enumerate(EXTREMES.values()):
        yield "extremes", normalise(make(size, _generator(seed, 2, index)), spec)
    for path in photos:
        yield "photos", preprocess(path, size, spec)


def _noise(size: tuple[int, int], spec: Preprocess, rng: np.random.Generator) -> Array:
    if spec.embed:
        return rng.integers(256, size=(*size, 3), dtype=np.uint8)
    return rng.standard_normal((3, *size), dtype=np.float32)


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seeds)))


def natural_image(size: tuple[int, int], spec: Preprocess, seed: int) -> Array:
    """Draw one image with natural statistics, as ``deploy.preprocess.normalise`` gives it; never one of a pack's."""
    return normalise(natural(size, _generator(seed, 3, 0)), spec)


def natural(size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """Draw an image with a 1/f amplitude spectrum, correlated colours, light from one side and a few objects."""
    fields = np.stack([_pink(size, rng, rng.uniform(0.9, 1.3)) for _ in range(3)], axis=-1)
    picture = rng.uniform(0.35, 0.6) + rng.uniform(0.1, 0.2) * fields @ _COLOUR.T
    rows, columns = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    picture += 0.1 * (np.cos(angle) * rows + np.sin(angle) * columns)[..., None]
    for _ in range(4):
        centre, radius = rng.uniform(-0.8, 0.8, 2), rng.uniform(0.15, 0.6, 2)
        distance = np.hypot((rows - centre[0]) / radius[0], (columns - centre[1]) / radius[1])
        cover = 1 / (1 + np.exp(np.clip((distance - 1) * 30, -50, 50)))
        picture += (cover * rng.uniform(0.4, 0.9))[..., None] * (rng.uniform(0, 1, 3) - picture)
    clipped: Picture = np.clip(picture, 0, 1)
    return clipped


def _pink(size: tuple[int, int], rng: np.random.Generator, alpha: float) -> Picture:
    """Return a field [height, width] of mean 0 and deviation 1 whose amplitude falls with frequency ** -alpha."""
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(size)) * frequency**-alpha, s=size)
    scaled: Picture = field / max(float(field.std()), 1e-12)
    return scaled


def _white(size: tuple[int, int], rng: np.random.Generator) -> Picture:
    return np.ones((*size, 3))


def _checkerboard(size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """Alternate two saturated, opposite colours at the pixel grid: the largest input differences that exist."""
    parity = (np.arange(size[0])[:, None] + np.arange(size[1])[None, :]) % 2
    colour = np.roll([1.0, 0.0, 0.0], rng.integers(3))
    return np.where(parity[..., None] == 1, colour, 1 - colour)


def _bright_pixel(size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """Return black with one white pixel: nearly no variance, which is hard on norms."""
    picture = np.zeros((*size, 3))
    picture[rng.integers(size[0]), rng.integers(size[1])] = 1
    return picture


EXTREMES: Mapping[str, Callable[[tuple[int, int], np.random.Generator], Picture]] = {
    "white": _white,
    "checkerboard": _checkerboard,
    "bright pixel on black": _bright_pixel,
}
