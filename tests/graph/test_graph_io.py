"""Files in and out: deterministic bytes, nothing that names a machine, and clear errors for what is no ONNX model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
from graph_cases import assert_same, build, draw

from deploy.errors import GraphPassError, StorageError
from deploy.graph.io import (
    PRODUCER,
    control_flow,
    graph_of,
    load_model,
    model_bytes,
    model_of,
    module_of,
    op_counts,
    save_model,
    tensor_specs,
)
from deploy.records import TensorSpec

SECRET = "/home/somebody/project/model.py"


def model_with_paths() -> onnx.ModelProto:
    model = build("g (float[N,2] x) => (float[N,2] y) { a = Mul(x, w)  y = Relu(a) }", w=draw(2))
    model.producer_name, model.producer_version, model.doc_string = "pytorch", "2.15", SECRET
    graph = model.graph
    graph.doc_string = SECRET
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info[0]
    graph.value_info.append(inferred)
    for owner in (
        model,
        graph,
        graph.node[0],
        graph.input[0],
        graph.output[0],
        graph.value_info[0],
        graph.initializer[0],
    ):
        owner.metadata_props.add(key="namespace", value=SECRET)
    graph.node[1].doc_string = graph.input[0].doc_string = SECRET
    return model


def test_the_same_model_gives_the_same_bytes_without_anybodys_paths(tmp_path: Path) -> None:
    save_model(model_with_paths(), tmp_path / "a.onnx")
    save_model(model_with_paths(), tmp_path / "b.onnx")
    data = (tmp_path / "a.onnx").read_bytes()
    assert data == (tmp_path / "b.onnx").read_bytes()
    assert SECRET.encode() in model_with_paths().SerializeToString()  # the control: it was there
    assert SECRET.encode() not in data
    loaded = load_model(tmp_path / "a.onnx")
    assert (loaded.producer_name, loaded.producer_version, loaded.ir_version) == (PRODUCER, "", 10)
    assert_same(model_with_paths(), loaded, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_round_trip_through_the_graph_keeps_the_model() -> None:
    model = model_with_paths()
    after = model_of(graph_of(model_with_paths()))
    assert tensor_specs(after.graph.input) == (TensorSpec(name="x", dtype="float32", shape=("N", 2)),)
    assert tensor_specs(after.graph.output) == tensor_specs(model.graph.output)
    assert SECRET.encode() not in after.SerializeToString()
    assert model_bytes(after) == model_bytes(model_of(graph_of(onnx.load_from_string(model_bytes(after)))))
    assert_same(model, after, atol=0)


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(model_with_paths().SerializeToString()[:keep])
    with pytest.raises(GraphPassError, match=r"cut\.onnx is not a whole ONNX model") as caught:
        load_model(path)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"\x89PNG\r\n\x1a\n", b"name: riformer\n", bytes(500)])
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphPassError, match=r"foreign\.onnx is not a whole ONNX model"):
        load_model(path)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        load_model(tmp_path / "none.onnx")


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        save_model(model_with_paths(), tmp_path / "none" / "a.onnx")


def external(tmp_path: Path, location: str) -> Path:
    model = model_with_paths()
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    path = tmp_path / "run" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_beside_the_file_is_read(tmp_path: Path) -> None:
    path = external(tmp_path, "weights.bin")
    (path.parent / "weights.bin").write_bytes(draw(2).tobytes())
    loaded = load_model(path)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), draw(2))
    assert loaded.graph.initializer[0].data_location == onnx.TensorProto.DEFAULT


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin", "link.bin", "ABSOLUTE", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    outside = tmp_path / "weights.bin"
    outside.write_bytes(draw(2).tobytes())
    path = external(tmp_path, str(outside) if location == "ABSOLUTE" else location)
    (path.parent / "link.bin").symlink_to(outside)
    with pytest.raises(GraphPassError, match="the data of 'w' points outside its folder"):
        load_model(path)


@pytest.mark.parametrize("content", [None, b"short"])
def test_external_data_that_is_missing_or_short_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = external(tmp_path, "weights.bin")
    if content is not None:
        (path.parent / "weights.bin").write_bytes(content)
    with pytest.raises(GraphPassError, match=r"model\.onnx: its external data cannot be read"):
        load_model(path)


def test_weights_that_are_inputs_are_refused_because_the_import_would_drop_the_input() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", w=draw(2))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2]))
    with pytest.raises(GraphPassError, match=r"the inputs \['w'\] have default values"):
        graph_of(model)


def test_an_attribute_that_the_import_would_drop_is_refused() -> None:
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [2])
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.graph.node.append(
        onnx.helper.make_node("Optional", [], ["o"], name="o", type=onnx.helper.make_optional_type_proto(kind))
    )
    with pytest.raises(GraphPassError, match="node 'o': attribute 'type' of type TYPE_PROTO cannot be carried"):
        graph_of(model)


def test_shapes_that_contradict_each_other_are_an_error() -> None:
    model = build("g (float[2,3] x) => (float[2,4] y) { y = MatMul(x, w) }", w=draw(3, 4))
    model.graph.node[0].input[0] = "w"
    with pytest.raises(GraphPassError, match="the types and shapes of the graph contradict each other"):
        graph_of(model)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("stages.2.blocks.5.mlp.fc1/Conv", "stages.2.blocks.5.mlp.fc1"),
        ("head/Gemm_1", "head"),
        ("/stages/0/fc/MatMul", "/stages/0/fc"),
        ("node_Conv_94", ""),
        ("", ""),
    ],
)
def test_module_of(name: str, module: str) -> None:
    assert module_of(name) == module


def test_op_counts_are_sorted_and_name_foreign_domains() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Relu(x)  b = Abs(a)  y = Relu(b) }")
    model.graph.node.append(onnx.helper.make_node("FastGelu", ["y"], ["z"], domain="com.microsoft"))
    assert list(op_counts(model).items()) == [("Abs", 1), ("Relu", 2), ("com.microsoft::FastGelu", 1)]
    assert control_flow(model) == ""


def nameable() -> onnx.ModelProto:
    """Return a model with a marked name of each kind."""
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["inner#6"])], "g",
        [], [onnx.helper.make_tensor_value_info("inner#6", onnx.TensorProto.FLOAT, None)],
    )  # fmt: skip
    node = onnx.helper.make_node("If", ["c"], ["z"], name="node#0", then_branch=inner, else_branch=inner)
    model = build("g (float[N,2] x, bool c) => (float[N,2] y) { y = Relu(x) }")
    model.graph.node.append(node)
    model.graph.node[0].op_type = "Kind#1"
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch#2"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "weight#3"))
    model.metadata_props.add(key="key#4", value="")
    model.opset_import.add(domain="domain#5", version=1)
    return model


@pytest.mark.parametrize("mark", [f"#{place}".encode() for place in range(7)])
def test_a_name_that_is_no_text_is_refused(mark, tmp_path):
    """Protobuf reads such a file and gives the name as bytes, which nothing after it expects."""
    data = nameable().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    load_model(path)
    assert mark in data
    path.write_bytes(data.replace(mark, b"\xff\xfe"))
    with pytest.raises(GraphPassError, match=r"m.onnx is broken: a name in it is no text, .* is not UTF-8"):
        load_model(path)
