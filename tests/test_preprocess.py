from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from deploy.errors import ImageError, UnknownNameError
from deploy.preprocess import INTERPOLATIONS, find_images, preprocess, resized
from deploy.records import Preprocess

PLAIN = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=1.0)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "size", "crop", "expected"),
    [
        ((480, 640), (224, 224), 0.875, (256, 341)),  # 256 * 640 / 480 = 341.3
        ((640, 480), (224, 224), 0.875, (341, 256)),
        ((500, 500), (224, 224), 0.9, (248, 248)),  # 224 / 0.9 = 248.9, cut off: the official RIFormer recipe says 248
        ((500, 500), (384, 384), 0.95, (404, 404)),  # as above, 404
        ((1, 1), (224, 224), 1.0, (224, 224)),
        ((300, 600), (384, 512), 1.0, (384, 768)),
        ((600, 300), (384, 512), 1.0, (1024, 512)),
    ],
)
def test_resize_keeps_the_ratio_and_covers_the_crop(image, size, crop, expected):
    assert resized(image, size, crop) == expected


def test_hand_computed_pixels():
    image = Image.fromarray(np.array([[[255, 0, 51], [0, 255, 102]]] * 2, dtype=np.uint8))
    got = preprocess(image, (2, 2), Preprocess(mean=(0.5, 0.0, 0.2), std=(0.5, 2.0, 0.1), crop=1.0))
    assert got.dtype == np.float32
    assert got.shape == (3, 2, 2)
    assert got.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(got[0], [[1, -1]] * 2, atol=1e-6)
    np.testing.assert_allclose(got[1], [[0, 0.5]] * 2, atol=1e-6)
    np.testing.assert_allclose(got[2], [[0, 2]] * 2, atol=1e-5)


def test_the_centre_is_cropped():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    assert preprocess(Image.fromarray(pixels), (4, 4), PLAIN).min() == 1.0


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(97, 61), (40, 133), (224, 224), (5, 3), (301, 300)])
def test_same_as_torchvision(shape, interpolation):
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed (extra: bench)")
    spec = Preprocess(interpolation=interpolation, crop=0.9)
    road = transforms.Compose(
        [
            transforms.Resize(int(64 / 0.9), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    image = picture(*shape)
    np.testing.assert_allclose(preprocess(image, (64, 64), spec), road(image).numpy(), atol=1e-6)


def test_the_interpolation_is_the_one_that_was_named():
    image = picture(97, 61)
    results = [preprocess(image, (32, 32), Preprocess(interpolation=name)) for name in INTERPOLATIONS]
    gaps = [np.abs(a - b).max() for i, a in enumerate(results) for b in results[:i]]
    assert min(gaps) > 0.01


def test_exif_orientation_is_applied(tmp_path):
    image = picture(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    image.save(tmp_path / "turned.png", exif=exif)
    upright = preprocess(image.transpose(Image.Transpose.ROTATE_270), (32, 32), PLAIN)
    np.testing.assert_array_equal(preprocess(tmp_path / "turned.png", (32, 32), PLAIN), upright)
    assert np.abs(preprocess(image, (32, 32), PLAIN) - upright).max() > 0.1


def test_grey_is_three_equal_channels(tmp_path):
    grey = ImageOps.grayscale(picture(20, 20))
    grey.save(tmp_path / "grey.png")
    got = preprocess(tmp_path / "grey.png", (20, 20), PLAIN)
    np.testing.assert_array_equal(got[0], got[2])
    np.testing.assert_allclose(got[0], np.asarray(grey) / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode):
    assert preprocess(picture(20, 24).convert(mode), (16, 16), PLAIN).shape == (3, 16, 16)


def test_alpha_is_dropped_and_a_palette_is_looked_up(tmp_path):
    image = picture(16, 16).quantize(8)
    expected = preprocess(image.convert("RGB"), (16, 16), PLAIN)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128] * 4))
    np.testing.assert_array_equal(preprocess(tmp_path / "palette.png", (16, 16), PLAIN), expected)
    veiled = image.convert("RGBA")
    veiled.putalpha(7)
    np.testing.assert_array_equal(preprocess(veiled, (16, 16), PLAIN), expected)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    got = preprocess(tmp_path / "deep.png", (16, 16), PLAIN)
    np.testing.assert_allclose(got[0], ramp / 65535, atol=0.5 / 255 + 1e-6)


def test_unknown_interpolation():
    with pytest.raises(UnknownNameError, match="did you mean 'bicubic'"):
        preprocess(picture(4, 4), (4, 4), Preprocess(interpolation="bicubik"))


def test_images_are_found_sorted_and_limited(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "d.bmp", "notes.txt", "._a.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    assert [p.name for p in find_images(tmp_path, 10)] == ["a.jpg", "b.PNG", "c.webp", "d.bmp"]
    assert [p.name for p in find_images(tmp_path, 2)] == ["a.jpg", "b.PNG"]


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match=r"holds no image: expected files that end in \.bmp"):
        find_images(tmp_path, 8)
    with pytest.raises(ImageError, match="cannot list"):
        find_images(tmp_path / "missing", 8)


def truncated(path: Path) -> None:
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:5000])


def bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)))


BAD = {
    "truncated": (truncated, "cannot be read as an image"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as an image"),
    "text": (lambda path: path.write_text("hello"), "cannot be read as an image"),
    "broken header": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64), "cannot be read as an image"),
    "bomb": (bomb, "is too large"),
    "strip": (lambda path: Image.new("RGB", (60_000, 1)).save(path), "too long and thin"),
    "missing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(tmp_path, kind):
    make, message = BAD[kind]
    path = tmp_path / "photo.png"
    make(path)
    with pytest.raises(ImageError, match=message) as caught:
        preprocess(path, (224, 224), Preprocess())
    assert "photo.png" in str(caught.value)
    assert caught.value.hint


def test_just_above_the_pixel_limit_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow only warns up to twice the limit
    picture(40, 40).save(tmp_path / "big.png")
    with pytest.raises(ImageError, match="is too large"):
        preprocess(tmp_path / "big.png", (32, 32), Preprocess())


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 0)), Image.new("F", (8, 8))], ids=["no pixels", "float"])
def test_images_without_meaning(image):
    with pytest.raises(ImageError, match="the image cannot be read"):
        preprocess(image, (8, 8), Preprocess())
