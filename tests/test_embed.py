"""Preprocessing that travels with the model: uint8 images in, PyTorch's answers out, whatever reads the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage
import torch
from support import effdeploy

from deploy.artifacts import read_manifest
from deploy.graph.io import metadata_of
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.preprocess import normalise, pixels_of, preprocess
from deploy.records import Preprocess, Target
from deploy.resolve import resolve_recipe

PHOTO = Path(skimage.__file__).parent / "data" / "chelsea.png"


def infer(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP16 bundle with a range of batches, class names, and preprocessing inside."""
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "names.txt").write_text("".join(f"thing {n}\n" for n in range(1000)), encoding="utf-8")
    done = effdeploy(
        "export", "convmixer", "--variant", "tiny", "--size", 64, "--batch", "1:2:3", "--fp16", "--seconds", 0.05,
        "--set", "bench.rounds=3", "--embed-preprocess", "--labels", folder / "names.txt", "--out", folder / "b",
    )  # fmt: skip
    assert done.exit_code == 0, done.stdout + done.stderr
    (folder / "names.txt").unlink()  # from here on the bundle is enough
    return folder / "b"


def test_the_graph_gives_what_pytorch_gives_on_a_photo_and_shifted_pixels_are_seen(bundle):
    run = read_manifest(bundle)
    assert run.ok
    assert [(s.dtype, s.shape) for s in run.trace.inputs] == [("uint8", ("batch", 64, 64, 3))]
    assert run.precision.artifact.name == "30-fp16.onnx"
    pixels = preprocess(PHOTO, (64, 64), run.model.preprocess)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (64, 64, 3))
    recipe = resolve_recipe("convmixer", {"variant": ("", "tiny"), "size": ("", 64)})
    reference = load_model(find_system("convmixer"), recipe, Target.ONNXRUNTIME).reference
    image = preprocess(PHOTO, (64, 64), recipe.preprocess.record())
    with torch.inference_mode():
        expected = reference(torch.from_numpy(image[None])).numpy()
    limit = 0.01 * np.abs(expected).max()
    assert np.abs(infer(bundle / "30-fp16.onnx", {"images": pixels[None]})[0] - expected).max() < limit
    wrong = np.roll(pixels, 1, axis=-1)  # BGR
    assert np.abs(infer(bundle / "30-fp16.onnx", {"images": wrong[None]})[0] - expected).max() > limit


def test_names_and_recipe_are_in_every_file(bundle):
    for name in ("10-traced.onnx", "20-patched.onnx", "30-fp16.onnx"):
        found = metadata_of(onnx.load(bundle / name))
        assert json.loads(found["names"])[7] == "thing 7"
        about = json.loads(found["preprocess"])
        assert (about["embed"], about["size"], about["crop"]) == (True, [64, 64], 0.96)
        assert about["images"].startswith("uint8 [N, height, width, 3]")
    shown = effdeploy("inspect", bundle / "30-fp16.onnx").stdout
    assert "effdeploy.preprocess" in shown
    assert "effdeploy.names" in shown


@pytest.mark.parametrize("arguments", [("verify",), ("bench", "--seconds", "0.05")])
def test_commands_understand_such_a_bundle(arguments, bundle):
    done = effdeploy(arguments[0], bundle, *arguments[1:])
    assert done.exit_code == 0, done.stdout + done.stderr


def test_run_names_the_classes_from_the_bundle_alone(bundle):
    done = effdeploy("run", bundle, PHOTO, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["record"]["found"]
    pixels = preprocess(PHOTO, (64, 64), Preprocess(crop=0.96, embed=True))
    best = np.argsort(-infer(bundle / "30-fp16.onnx", {"images": pixels[None]})[0][0])[:5]
    assert [one["name"] for one in found] == [f"thing {index}" for index in best]


def test_eval_and_triton_take_the_same_pixels(bundle, tmp_path):
    for index in range(1000):
        (tmp_path / "images" / f"{index}").mkdir(parents=True)
        if index < 3:
            shutil.copy(PHOTO, tmp_path / "images" / f"{index}" / "photo.png")
        else:
            (tmp_path / "images" / f"{index}" / "photo.png").symlink_to(tmp_path / "images" / "0" / "photo.png")
    done = effdeploy("eval", bundle, "--imagefolder", tmp_path / "images", "--max-images", 4, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["record"]["agreement"] == 1.0
    assert effdeploy("package", bundle, "--triton", tmp_path / "models", "--name", "m").exit_code == 0
    config = (tmp_path / "models" / "m" / "config.pbtxt").read_text()
    assert "data_type: TYPE_UINT8" in config
    assert "dims: [64, 64, 3]" in config
    assert (tmp_path / "models" / "m" / "labels.txt").read_text().startswith("thing 0\n")
    assert "uint8 [height, width, 3]" in (tmp_path / "models" / "m" / "README.md").read_text()


def test_ranges_of_int8_are_measured_on_pixels(tmp_path):
    asked = ("convmixer", "--variant", "tiny", "--size", 64, "--int8", "--embed-preprocess", "--until", "parity")
    done = effdeploy("export", *asked, "--out", tmp_path / "b")
    assert done.exit_code == 0, done.stdout + done.stderr
    run = read_manifest(tmp_path / "b")
    assert run.trace.inputs[0].dtype == "uint8"
    assert run.precision.quantization.nodes > 0
    assert not [tensor.tensor for tensor in run.precision.quantization.calibration.tensors if tensor.dead]
    assert effdeploy("run", tmp_path / "b", PHOTO).exit_code == 0


def test_the_report_says_where_the_subtraction_stays(tmp_path):
    done = effdeploy("export", "riformer", "--variant", "tiny", "--size", 64, "--embed-preprocess",
                     "--seconds", 0.05, "--set", "bench.rounds=3", "--out", tmp_path / "b")  # fmt: skip
    assert done.exit_code == 0, done.stdout + done.stderr
    page = (tmp_path / "b" / "report.html").read_text()
    assert "uint8 [N, height, width, 3], scaled and normalised by the graph, inside the first convolution; " in page
    assert "one subtraction stays before it" in page
    assert "--val-range &#39;images:[0,255]&#39;" in page
    assert "--embed-preprocess" in page


def test_labels_that_are_not_there_are_an_error_before_the_work(tmp_path):
    for more in ((), ("--dry-run",)):
        labels = ("--labels", tmp_path / "none.txt")
        done = effdeploy("export", "riformer", "--variant", "tiny", *labels, *more, "--out", tmp_path / "b")
        assert done.exit_code == 18
        assert "none.txt cannot be read" in done.stderr


def test_labels_are_counted_before_the_work(tmp_path):
    (tmp_path / "two.txt").write_text("cat\ndog\n", encoding="utf-8")
    done = effdeploy(
        "export", "riformer", "--variant", "tiny", "--labels", tmp_path / "two.txt", "--out", tmp_path / "b"
    )
    assert done.exit_code == 18
    assert "got 2 names, the network has 1000 classes" in done.stderr


def test_a_part_that_takes_no_images_is_refused(tmp_path):
    done = effdeploy("export", "rtdetr", "--variant", "tiny", "--part", "encoder", "--embed-preprocess", "--out",
                     tmp_path / "b")  # fmt: skip
    assert done.exit_code == 3
    assert "expected images first" in done.stderr


def test_pixels_come_back_from_what_the_network_takes():
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    for spec in (Preprocess(), Preprocess(embed=True)):
        assert (pixels_of(normalise(pixels, spec), spec) == pixels).all()
