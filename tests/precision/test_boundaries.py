"""Error by module: rounding grows along the network, and a changed weight is in the row of its own module."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.console import Console, Mode
from deploy.graph.io import load_model, save_model
from deploy.precision.boundaries import JUMP, boundary_errors
from deploy.precision.convert import convert_precision
from deploy.precision.splice import Splice
from deploy.records import Precision, Stage, Target
from deploy.resolve import resolve_recipe
from deploy.sensitivity import how_to_judge
from deploy.stages import Work

WIDTH = 16
PATHS = ("stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Write a chain of products, two of them in each block, in float32 and in float16."""
    rng = np.random.default_rng(0)
    given = ("images", *PATHS[:-1])
    weights = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4, f"{path}.w")
        for path in PATHS
    ]
    nodes = [
        helper.make_node("MatMul", [name, f"{path}.w"], [path if path != "head" else "logits"], f"{path}/MatMul")
        for name, path in zip(given, PATHS, strict=True)
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, WIDTH]) for name in ("images", "logits")]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], weights)
    high = tmp_path / "20-patched.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), high)
    record = convert_precision(high, Precision.FP16, tmp_path, target=Target.ONNXRUNTIME)
    return high, tmp_path / record.artifact.name


def measured(high: Path, low: Path, most: int | None = None):
    how = how_to_judge(Precision.FP16, Target.ONNXRUNTIME, BuildOptions())
    splice = Splice(load_model(high), load_model(low))
    feeds = [{"images": np.random.default_rng(seed).standard_normal((2, WIDTH)).astype(np.float32)} for seed in (1, 2)]
    return boundary_errors(splice, Precision.FP16, partial(how.open, folder=low.parent), feeds, most=most)


def spoil(low: Path, path: str) -> None:
    model = onnx.load(low)
    tensor = next(t for t in model.graph.initializer if t.name.startswith(f"{path}.w"))
    values = numpy_helper.to_array(tensor).copy()
    values[3, 3] += 10
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    save_model(model, low)


def test_rounding_grows_and_a_changed_weight_is_in_its_modules_row(files):
    high, low = files
    sound = measured(high, low)
    assert [row.module for row in sound] == list(PATHS)
    assert [row.jump for row in sound] == [False] * len(PATHS)
    assert all(0 < row.after < 5e-3 for row in sound)
    assert [row.before for row in sound[1:]] == [row.after for row in sound[:-1]]
    spoil(low, "blocks.1.fc1")
    broken = measured(high, low)
    assert broken[:3] == sound[:3]
    assert [row.module for row in broken if row.jump] == ["blocks.1.fc1"]
    assert broken[3].after > 100 * JUMP * sound[3].after
    assert broken[4].after > 0.1  # what comes behind is off as well, and does not jump


def test_with_too_many_borders_coarser_modules_are_compared(files):
    fine, coarse = measured(*files), measured(*files, most=4)
    assert [row.module for row in coarse] == ["stem", "blocks.0", "blocks.1", "head"]
    assert {row.tensor: row.after for row in coarse}.items() <= {row.tensor: row.after for row in fine}.items()


def test_what_cannot_be_measured_is_a_note_of_the_export(files):
    high, low = files
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny"), "precision": ("", "fp16"), "size": ("", 32)})
    work = Work(
        recipe=recipe, backend=load_backend("onnxruntime"), target=Target.ONNXRUNTIME, folder=high.parent,
        until=Stage.PARITY, console=Console(Mode.SILENT),
    )  # fmt: skip
    model = onnx.load(low)
    model.graph.node[0].name = ""
    save_model(model, low)
    records = [SimpleNamespace(artifact=SimpleNamespace(name=path.name)) for path in (high, low)]
    found, (note,) = work._modules(*records)
    assert found == ()
    assert note.startswith("error by module was not measured: the low-precision file has nodes without a name")
