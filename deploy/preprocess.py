"""From an image file to the network's input, with the arithmetic that the checkpoints were scored with.

Resizing libraries differ by several grey levels on the same image, which is more than FP16 costs. So this file
resamples with Pillow, and does what torchvision's ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` do.
"""

from __future__ import annotations

import contextlib
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from deploy.errors import ImageError, UnknownNameError, did_you_mean
from deploy.records import Preprocess

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# A strip of 1 x 60000 pixels passes Pillow's own limit, and would grow to gigabytes when its short edge is resized.
_MAX_RESIZED_PIXELS = 1 << 26

# What Pillow's decoders raise on damaged files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    struct.error,
)


def find_images(folder: Path, limit: int) -> list[Path]:
    """List the images that lie directly in ``folder``, sorted by name, at most ``limit``.

    Raises:
        ImageError: the folder is missing, unreadable, or holds no image.
    """
    try:
        found = sorted(path for path in folder.iterdir() if _is_image(path))
    except OSError as error:
        raise ImageError(
            f"cannot list the images in {folder}: {error.strerror or error}", hint="--images takes a folder of photos"
        ) from error
    if not found:
        raise ImageError(
            f"{folder} holds no image: expected files that end in {', '.join(SUFFIXES)}",
            hint="--images takes a folder of photos; images in sub-folders are not looked for",
        )
    return found[:limit]


def _is_image(path: Path) -> bool:
    # macOS leaves "._photo.jpg" files with its own notes beside the photos.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def preprocess(image: Path | Image.Image, size: tuple[int, int], spec: Preprocess) -> NDArray[Any]:
    """Turn an image into the graph's input.

    EXIF orientation is applied, the image is made RGB (an alpha channel is dropped, as torchvision's loader does), its
    short edge is resized to ``floor(size / crop)`` and the centre is cropped, or, with ``fit`` "stretch", both edges
    are resized to the size; the pixels are scaled to 0..1 and normalised.

    Args:
        image: A file, or an opened image.
        size: Height and width of the input, in pixels.
        spec: Mean, standard deviation, crop share and interpolation of the checkpoint.

    Returns:
        As ``normalise``.

    Raises:
        ImageError: the file is not an image, is damaged, or is too large.
        UnknownNameError: an interpolation that is not known.
    """
    if spec.interpolation not in INTERPOLATIONS:
        raise UnknownNameError(
            f"unknown interpolation {spec.interpolation!r}", hint=did_you_mean(spec.interpolation, INTERPOLATIONS)
        )
    with _image_errors(image):
        if isinstance(image, Image.Image):
            return normalise(_pixels(image, size, spec), spec)
        with Image.open(image) as opened:
            return normalise(_pixels(opened, size, spec), spec)


def shown_size(image: Path) -> tuple[int, int]:
    """Return width and height of an image file as it is shown, EXIF orientation applied.

    Raises:
        ImageError: the file is not an image, or is damaged.
    """
    with _image_errors(image), Image.open(image) as opened:
        width, height = opened.size
        return (height, width) if opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else (width, height)


def normalise(pixels: NDArray[np.generic], spec: Preprocess) -> NDArray[Any]:
    """Turn RGB pixels [height, width, 3] (uint8, or float in 0..1) into the input.

    Returns:
        float32 [3, height, width], contiguous; where the graph normalises itself, uint8 [height, width, 3].
    """
    if spec.embed:
        whole = pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels.astype(np.float64))
        return np.ascontiguousarray(whole, dtype=np.uint8)
    scaled = pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        scaled /= np.float32(255)
    normal = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def pixels_of(image: NDArray[np.generic], spec: Preprocess) -> NDArray[np.uint8]:
    """Take what ``normalise`` gave back to RGB pixels, uint8 [height, width, 3]."""
    if spec.embed:
        return np.asarray(image, np.uint8)
    shares = image.transpose(1, 2, 0) * np.asarray(spec.std) + np.asarray(spec.mean)
    return np.asarray(np.clip(np.rint(255 * shares), 0, 255), np.uint8)


def channels_first(images: NDArray[np.generic]) -> NDArray[Any]:
    """Return a batch of inputs as [N, 3, height, width], pixels included: what other inputs are made from."""
    return images.transpose(0, 3, 1, 2) if images.dtype == np.uint8 else images


def resized(image: tuple[int, int], size: tuple[int, int], crop: float) -> tuple[int, int]:
    """Return height and width after the resize: the smallest that covers ``floor(size / crop)``.

    The rounding is torchvision's ``Resize`` (the long edge is cut off to whole pixels); where height and width of
    ``size`` differ, it is timm's ``ResizeKeepRatio`` (rounded).
    """
    height, width = image
    goal_height, goal_width = (math.floor(edge / crop) for edge in size)
    if goal_height == goal_width:
        short, long = sorted(image)
        stretched = int(goal_height * long / short)
        return (goal_height, stretched) if height <= width else (stretched, goal_width)
    ratio = min(height / goal_height, width / goal_width)
    return round(height / ratio), round(width / ratio)


def _pixels(image: Image.Image, size: tuple[int, int], spec: Preprocess) -> NDArray[np.generic]:
    upright = _rgb(ImageOps.exif_transpose(image))
    if 0 in upright.size:
        raise ValueError("it has no pixels")
    whole = (upright.height, upright.width)
    height, width = size if spec.fit == "stretch" else resized(whole, size, spec.crop)
    if height * width > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{upright.width} x {upright.height} pixels would become {width} x {height} "
            f"with the short edge resized: too long and thin"
        )
    if (width, height) != upright.size:
        upright = upright.resize((width, height), INTERPOLATIONS[spec.interpolation])
    top, left = round((height - size[0]) / 2.0), round((width - size[1]) / 2.0)
    return np.asarray(upright.crop((left, top, left + size[1], top + size[0])))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip everything above 255 to white; 16-bit grey is scaled instead.
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextlib.contextmanager
def _image_errors(image: Path | Image.Image) -> Iterator[None]:
    """Translate what Pillow raises into ``ImageError``; the one border for it."""
    name = "the image" if isinstance(image, Image.Image) else str(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} is too large: {error}", hint=f"resize it; at most {Image.MAX_IMAGE_PIXELS} pixels are read"
        ) from error
    except _DECODER_ERRORS as error:
        raise ImageError(
            f"{name} cannot be read as an image: {error}; expected a whole file of type {', '.join(SUFFIXES)}",
            hint="remove the file from the folder, or save it again",
        ) from error
