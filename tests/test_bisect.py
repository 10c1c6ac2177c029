"""``effdeploy bisect``: injected faults are found by name, what is shown adds up, and where it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support import effdeploy

from deploy.answers import BisectRecord
from deploy.artifacts import artifact_of, read_manifest, write_manifest
from deploy.backends.base import BuildOptions
from deploy.bisecting import _how, _Search
from deploy.console import Console, Mode
from deploy.graph.io import save_model
from deploy.precision.boundaries import JUMP
from deploy.precision.convert import convert_precision
from deploy.precision.images import generated_images
from deploy.records import Precision, Target, TensorSpec, from_json
from deploy.resolve import resolve_recipe
from deploy.sensitivity import Laboratory, how_to_judge

SHAPE = (3, 4, 4)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Exported once: a small ViT in FP16 and in INT8, up to the precision stage."""
    folder = tmp_path_factory.mktemp("bisect")
    for precision in ("fp16", "int8"):
        result = effdeploy(
            "export", "tome", "--variant", "tiny", "--set", "options.r=0", "--set", "options.depth=2", "--size", 64,
            f"--{precision}", "--until", "precision", "--out", folder / precision,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
    return folder


def bisected(bundle: Path, folder: Path, *more: object) -> BisectRecord:
    result = effdeploy("bisect", bundle, "--out", folder / "b.svg", *more, "--json")
    assert result.exit_code == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["event"], last["type"]) == ("result", "BisectRecord")
    return from_json(BisectRecord, last["record"])


def broken(bundle: Path, folder: Path, change) -> Path:
    """A copy of a bundle whose low-precision file was changed, with a manifest that says so."""
    copy = shutil.copytree(bundle, folder / "broken")
    run = read_manifest(copy)
    path = copy / run.precision.artifact.name
    model = onnx.load(path)
    change(model)
    save_model(model, path)
    write_manifest(replace(run, precision=replace(run.precision, artifact=artifact_of(path, copy))), copy)
    return copy


def weight_of(model: onnx.ModelProto, module: str) -> onnx.TensorProto:
    """The initialiser that a layer's weight comes from; behind DequantizeLinear its scales."""
    makers = {output: n for n in model.graph.node for output in n.output}
    name = next(n for n in model.graph.node if n.name in (f"{module}/Gemm", f"{module}/MatMul")).input[1]
    name = makers[name].input[1] if name in makers else name
    return next(t for t in model.graph.initializer if t.name == name)


def one_weight(model: onnx.ModelProto) -> None:
    tensor = weight_of(model, "blocks.1.mlp.fc1")
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[3] += 100 * np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_one_changed_weight_is_found_by_name(bundles, tmp_path, precision):
    record = bisected(broken(bundles / precision, tmp_path, one_weight), tmp_path)
    assert record.jump == "blocks.1.mlp.fc1"
    assert record.worst == "blocks.1.mlp.fc1"
    assert "first module whose error jumps is blocks.1.mlp.fc1" in record.verdict
    found = {m.module: m for m in record.modules}
    others = [m.alone.error for name, m in found.items() if not "blocks.1.mlp.fc1".startswith(name)]
    assert found["blocks.1.mlp.fc1"].alone.error > 3 * max(others)
    assert found["blocks.1.mlp.fc1"].without.error < 0.5 * record.whole.error
    steps = {b.module: b for b in record.boundaries}
    assert steps["blocks.1.mlp.fc1"].after > JUMP * steps["blocks.1.mlp.fc1"].before
    assert not [b.module for b in record.boundaries if b.jump and b.module.startswith("blocks.0")]


def test_a_sound_bundle_has_no_jump_and_its_parts_make_the_whole(bundles, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (70, 80, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{seed}.png")
    record = bisected(bundles / "int8", tmp_path, "--images", photos)
    assert (record.images, record.whole.images) == ("3 images of --images", 3)
    assert record.jump == ""
    assert "no module's error jumps" in record.verdict
    assert record.precision == "int8"
    assert 0 < record.whole.error < 0.2
    coarse = [m for m in record.modules if m.depth == 1]
    assert {"blocks.0", "blocks.1"} <= {m.module for m in coarse}
    parts = np.sqrt(sum(m.alone.error**2 for m in coarse))
    assert 0.3 * record.whole.error < parts < 3 * record.whole.error
    inside = [m for m in record.modules if m.depth > 1]
    assert inside
    assert record.worst in {m.module for m in inside}
    assert all(m.nodes > 0 for m in record.modules)
    assert [s.stage for s in record.stages] == ["patched", "int8"]
    assert record.stages[0].apart.error < 1e-4 < record.stages[1].apart.error
    text = Path(record.plot).read_text()
    assert record.worst in text
    again = bisected(bundles / "int8", tmp_path, "--images", photos)
    assert again.runs == 0  # everything was remembered
    assert again.modules == record.modules


def overflowing(folder: Path, *, islands: bool) -> Laboratory:
    """A network whose middle squares what the float16 range cannot hold; without its float32 island it overflows."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((4, 4)).astype(np.float32) for n in ("a.w", "b.w", "c.w")}
    weights["large"] = np.full(1, 40.0, np.float32)
    nodes = [
        helper.make_node("MatMul", ["images", "a.w"], ["a"], "blocks.0.fc/MatMul"),
        helper.make_node("Mul", ["a", "large"], ["l"], "blocks.1.scale/Mul"),
        helper.make_node("Mul", ["l", "l"], ["s"], "blocks.1.square/Mul"),
        helper.make_node("Mul", ["s", "s"], ["q"], "blocks.1.square/Mul_1"),
        helper.make_node("Sqrt", ["q"], ["r"], "blocks.1.root/Sqrt"),
        helper.make_node("MatMul", ["r", "b.w"], ["b"], "blocks.2.fc/MatMul"),
        helper.make_node("MatMul", ["b", "c.w"], ["logits"], "head/MatMul"),
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in weights.items()]
    shape = ["N", *SHAPE]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)], tensors,
    )  # fmt: skip
    high = folder / "20-patched.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), high)
    images = generated_images(
        lambda i: np.random.default_rng(i).standard_normal(SHAPE).astype(np.float32), 8, identity="noise", batch=4,
        inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", *SHAPE)),), makers={},
    )  # fmt: skip
    feeds = {"images": np.stack([images.read(i) for i in range(4)])}
    record = convert_precision(high, Precision.FP16, folder, feeds=feeds if islands else None, target=Target.TENSORRT)
    return Laboratory(
        high=high, low=folder / record.artifact.name, images=images, task="classification", size=SHAPE[1:],
        how=how_to_judge(Precision.FP16, Target.TENSORRT, BuildOptions(inputs=images.inputs)), folder=folder,
    )  # fmt: skip


def test_an_overflow_where_a_float32_island_was_taken_away_is_found_by_name(tmp_path):
    found = {}
    for islands in (True, False):
        folder = tmp_path / str(islands)
        folder.mkdir()
        search = _Search(
            laboratory=overflowing(folder, islands=islands), precision=Precision.FP16, console=Console(Mode.SILENT)
        )
        boundaries = search.boundaries()
        jump = next((b.module for b in boundaries if b.jump), "")
        found[islands] = (search.whole, jump, {m.module: m for m in search.modules(jump)})
    whole, jump, _ = found[True]
    assert (jump, whole.error < 0.01) == ("", True)
    whole, jump, modules = found[False]
    assert np.isinf(whole.error)
    assert jump == "blocks.1.square"
    assert np.isinf(modules["blocks.1.square"].alone.error)
    assert modules["blocks.0"].alone.error < 0.01


def test_bad_input(bundles, tmp_path, tiny_bundle):
    assert "is in FP32" in refused(tiny_bundle, tmp_path, code=17)
    assert "cannot list the images" in refused(bundles / "int8", tmp_path, "--images", tmp_path / "none", code=18)
    changed = shutil.copytree(bundles / "int8", tmp_path / "changed")
    (changed / "30-int8.onnx").write_bytes(b"")
    assert "was changed" in refused(changed, tmp_path, code=17)
    assert "a whole network in one precision" in refused(bundles / "fp16", tmp_path, "--backend", "openvino", code=3)
    assert "was lowered for onnxruntime" in refused(bundles / "int8", tmp_path, "--backend", "tensorrt", code=3)


def refused(bundle: Path, folder: Path, *more: object, code: int) -> str:
    result = effdeploy("bisect", bundle, "--out", folder / "b.svg", *more)
    assert result.exit_code == code, result.stdout + result.stderr
    assert not (folder / "b.svg").exists()
    return result.stderr


def test_graphs_are_run_on_the_images_that_they_take():
    settings = ("preprocess.embed=true", "size=32")
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny"), "precision": ("", "fp16")}, settings)
    (images,) = _how(recipe, Target.ONNXRUNTIME, None).options.inputs
    assert (images.dtype, images.shape[1:]) == ("uint8", (32, 32, 3))
