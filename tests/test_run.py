"""``effdeploy run``: classes and boxes of a photo, held against the runtime called by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support import effdeploy

from deploy.artifacts import artifact_of, read_manifest, write_manifest
from deploy.graph.io import save_model
from deploy.preprocess import preprocess
from deploy.records import Preprocess, TensorSpec

PHOTO = Path(skimage.__file__).parent / "data" / "chelsea.png"  # 451 x 300


def result_of(*arguments):
    done = effdeploy("run", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["record"]


def detector(bundle, folder, boxes, scores):
    """A copy of a bundle whose engine answers with boxes, as shares of the size that it is told."""
    run = read_manifest(bundle)
    rows = len(scores)
    constants = {"shares": np.array(boxes, np.float32), "score": np.array([scores], np.float32),
                 "label": np.arange(rows)[None]}  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["orig_target_sizes"], ["wh"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["wh", "wh"], ["whwh"], axis=1),
        helper.make_node("Mul", ["whwh", "shares"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "zero"], ["boxes"]),
        helper.make_node("ReduceMean", ["images"], ["used"], keepdims=0),
        helper.make_node("Mul", ["used", "nothing"], ["none"]),
        helper.make_node("Add", ["score", "none"], ["scores"]),
        helper.make_node("Identity", ["label"], ["labels"]),
    ]
    constants |= {"zero": np.array([0]), "nothing": np.array(0, np.float32)}
    inputs = {"images": (TensorProto.FLOAT, [1, 3, 224, 224]), "orig_target_sizes": (TensorProto.INT64, [1, 2])}
    outputs = {"labels": (TensorProto.INT64, [1, rows]), "boxes": (TensorProto.FLOAT, [1, rows, 4]),
               "scores": (TensorProto.FLOAT, [1, rows])}  # fmt: skip
    graph = helper.make_graph(
        nodes, "detector",
        [helper.make_tensor_value_info(n, *s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, *s) for n, s in outputs.items()],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )  # fmt: skip
    folder.mkdir()
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "d.onnx")

    def specs(values):
        return tuple(
            TensorSpec(name=n, dtype="int64" if kind == TensorProto.INT64 else "float32", shape=tuple(shape))
            for n, (kind, shape) in values.items()
        )

    changed = dataclasses.replace(
        run,
        trace=dataclasses.replace(run.trace, inputs=specs(inputs), outputs=specs(outputs)),
        engines=(dataclasses.replace(run.engines[0], artifact=artifact_of(folder / "d.onnx", folder)),),
        recipe={**run.recipe, "preprocess": {**run.recipe["preprocess"], "fit": "stretch"}},
    )
    write_manifest(changed, folder)
    return folder


def test_the_best_classes_are_those_of_the_runtime(tiny_bundle):
    run = read_manifest(tiny_bundle)
    spec = Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in run.recipe["preprocess"].items()})
    image = preprocess(PHOTO, (224, 224), spec)
    session = onnxruntime.InferenceSession(tiny_bundle / run.engines[0].artifact.name)
    logits = session.run(None, {"images": image[None]})[0][0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    found = result_of(tiny_bundle, PHOTO, "--top", "3")["found"]
    assert [one["label"] for one in found] == np.argsort(-logits)[:3].tolist()
    assert [one["score"] for one in found] == pytest.approx(np.sort(shares)[::-1][:3], rel=1e-5)
    assert found[0]["name"] == f"class {found[0]['label']}"


def test_class_names_and_a_picture(tiny_bundle, tmp_path):
    labels, picture = tmp_path / "labels.txt", tmp_path / "seen.png"
    labels.write_text("\n".join(f"animal {n}" for n in range(1000)))
    record = result_of(tiny_bundle, PHOTO, "--labels", labels, "--out", picture)
    assert record["found"][0]["name"] == f"animal {record['found'][0]['label']}"
    with Image.open(picture) as drawn:
        assert drawn.width > 600
    labels.write_text("cat\n")
    done = effdeploy("run", tiny_bundle, PHOTO, "--labels", labels)
    assert done.exit_code == 18
    assert "got 1 names, the network has 1000 classes" in done.stderr


def test_boxes_are_in_the_photos_pixels(tiny_bundle, tmp_path):
    folder = detector(tiny_bundle, tmp_path / "d", [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]], [0.9, 0.3])
    record = result_of(folder, PHOTO, "--out", tmp_path / "boxes.png")
    (one,) = record["found"]  # the other is below the threshold
    assert one["box"] == pytest.approx([45.1, 60, 225.5, 270], abs=1e-3)
    with Image.open(tmp_path / "boxes.png") as drawn:
        colours = {pixel for _, pixel in drawn.convert("RGB").getcolors(1 << 24)}
    assert (10, 102, 194) in colours  # the frame
    low = result_of(folder, PHOTO, "--threshold", "0.2")["found"]
    assert [round(found["score"], 3) for found in low] == [0.9, 0.3]
    assert result_of(folder, PHOTO, "--threshold", "0.95")["found"] == []


def test_an_engine_of_maps_is_refused(tiny_bundle, tmp_path):
    run = read_manifest(tiny_bundle)
    shutil.copytree(tiny_bundle, tmp_path / "b")
    maps = (TensorSpec(name="map", dtype="float32", shape=(1, 8, 7, 7)),)
    write_manifest(dataclasses.replace(run, trace=dataclasses.replace(run.trace, outputs=maps)), tmp_path / "b")
    done = effdeploy("run", tmp_path / "b", PHOTO)
    assert done.exit_code == 17
    assert "map [1, 8, 7, 7]" in done.stderr


def test_a_changed_engine_is_refused(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    engine = tmp_path / "b" / read_manifest(tiny_bundle).engines[0].artifact.name
    engine.write_bytes(engine.read_bytes() + b"\0")
    done = effdeploy("run", tmp_path / "b", PHOTO)
    assert done.exit_code == 17
    assert "was changed" in done.stderr


def test_what_is_no_photo_is_refused(tiny_bundle, tmp_path):
    (tmp_path / "p.jpg").write_text("no photo")
    done = effdeploy("run", tiny_bundle, tmp_path / "p.jpg")
    assert done.exit_code == 18
    assert "p.jpg" in done.stderr
