"""scikit-learn's handwritten digits as photos: 1797 images of 8 x 8 pixels, half of them held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32  # pixels; the networks' smallest stage still has one


def digits(held_out: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images [N,32,32] in grey levels and their classes; every second image is held out."""
    found = load_digits()
    half = slice(1 if held_out else 0, None, 2)
    images = [
        np.asarray(Image.fromarray(np.uint8(image * (255 / 16))).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for image in found.images[half]
    ]
    return np.stack(images), found.target[half].astype(np.int64)


def write_images(folder: Path, *, held_out: bool, by_class: bool = True) -> Path:
    """Write images as PNG files: a sub-folder a class for ``eval --imagefolder``, or all in one for ``--calib``."""
    for number, (image, label) in enumerate(zip(*digits(held_out), strict=True)):
        path = folder / str(label) / f"{number:04}.png" if by_class else folder / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
