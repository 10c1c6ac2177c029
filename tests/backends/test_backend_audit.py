from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.backends import load_backend
from deploy.backends.audit import GraphTypes, Kernel, audit_engine, audited, graph_types, kernel_counts, weight_counts
from deploy.backends.base import BuildOptions
from deploy.backends.trt_layers import (
    inspector_data,
    io_from_inspector,
    io_from_log,
    kernels_from_inspector,
    kernels_from_log,
)
from deploy.errors import EngineBuildError, PrecisionAuditError
from deploy.records import Audit, Precision, from_json, to_json

LOGS = Path(__file__).parents[1] / "data" / "trt-logs"  # as TensorRT-RTX 1.7.1 wrote them for the graphs of conftest.py

HALF = GraphTypes(counts={"fp16": 2, "fp32": 1}, matrix={"fc1": "fp16", "fc2": "fp16", "head": "fp32"}, producers={})


def kernel(precision: str, *nodes: str) -> Kernel:
    return Kernel(name="k", precision=precision, reads=frozenset({precision}), nodes=nodes)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graph_types_follow_the_file(graph, precision):
    types = graph_types(graph("network", precision))
    assert types.matrix == dict.fromkeys(["stem.conv", "mlp.fc1", "mlp.fc2"], precision)
    assert types.counts == {precision: 9}
    assert types.producers["a"] == "mlp.fc1.bias"


def test_graph_types_of_something_else_is_an_error(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"not a graph" * 9)
    with pytest.raises(EngineBuildError, match=r"a\.onnx cannot be read as ONNX"):
        graph_types(tmp_path / "a.onnx")


def test_an_engine_that_does_what_the_graph_says_passes():
    audit = audit_engine(Precision.FP16, HALF, [kernel("fp16", "fc1", "fc2"), kernel("fp32", "head")], "log")
    assert audited(audit).kernels == {"fp16": 1, "fp32": 1}
    assert audit.statement.startswith("2 of 3 matrix nodes of the graph are FP16; 2 of them run in FP16 kernels")


def test_folded_nodes_are_told_and_do_not_fail_the_audit():
    audit = audit_engine(Precision.FP16, HALF, [kernel("fp16", "fc1")], "log")
    assert audit.ok
    assert "1 were folded away or are not named in the log" in audit.statement


@pytest.mark.parametrize(
    ("asked", "graph_side", "kernels"),
    [
        pytest.param(Precision.FP16, HALF, [kernel("fp16", "fc1"), kernel("fp32", "fc2")], id="one-layer-fell-back"),
        pytest.param(Precision.FP16, HALF, [kernel("fp32", "fc1", "fc2")], id="all-fell-back"),
        pytest.param(Precision.FP16, HALF, [], id="no-evidence"),
        pytest.param(Precision.BF16, HALF, [kernel("fp16", "fc1", "fc2")], id="another-short-float"),
        pytest.param(
            Precision.FP16,
            GraphTypes(counts={"fp32": 1}, matrix={"fc1": "fp32"}, producers={}),
            [kernel("fp32", "fc1")],
            id="graph-never-typed",
        ),
        pytest.param(Precision.FP32, HALF, [kernel("fp16", "fc1"), kernel("fp32", "head")], id="fp32-asked-fp16-built"),
        pytest.param(
            Precision.FP16,
            GraphTypes(counts={"fp32": 1}, matrix={}, producers={}),
            [kernel("fp32")],
            id="no-matrix-nodes",
        ),
    ],
)
def test_an_engine_that_does_something_else_is_caught(asked, graph_side, kernels):
    audit = audit_engine(asked, graph_side, kernels, "log")
    assert not audit.ok
    with pytest.raises(PrecisionAuditError, match=f"asked for {asked.value.upper()}"):
        audited(audit)


def test_kernel_counts_add_up_to_the_launches():
    kernels = [kernel("fp16"), kernel("fp16"), kernel("other")]
    assert kernel_counts(kernels) == {"fp16": 2, "other": 1}


def log_of(kind: str) -> str:
    return (LOGS / f"rtx-1.7.1-{kind}-fp16.log").read_text()


def audit_of(path: Path, log: str, asked: Precision = Precision.FP16) -> Audit:
    return audit_engine(asked, graph_types(path), kernels_from_log(log), "build log", io_from_log(log))


def test_a_real_build_log_holds_against_its_graph(graph):
    audit = audit_of(graph("network", "fp16"), log_of("network"))
    assert audited(audit).warnings == ()
    assert audit.kernels == {"fp16": 5, "fp32": 1}
    assert audit.fused == {"conv": 1, "matmul": 2, "norm": 1}
    assert audit.expected == {"norm": 1}
    assert audit.weights["fp16"] > 8 * 27 + 8 * 64 + 64 * 10  # the products' weights, biases and the norm's affine
    assert from_json(Audit, to_json(audit)) == audit


def edited(log: str, kernel: str, old: str, new: str) -> str:
    """Change one entry of the listing."""
    lines = [line.replace(old, new) if line.startswith(f"Name: {kernel}") else line for line in log.splitlines()]
    changed = "\n".join(lines)
    assert changed != "\n".join(log.splitlines())
    return changed


def test_a_product_that_silently_fell_back_in_the_log_is_an_error(graph):
    log = edited(log_of("network"), "__myl_FcAddCast", "Datatype: Half", "Datatype: Float")
    audit = audit_of(graph("network", "fp16"), log)
    with pytest.raises(PrecisionAuditError, match=r"not in FP16: mlp\.fc2"):
        audited(audit)


def test_fp16_asked_of_an_fp32_graph_is_an_error_whatever_the_log_says(graph):
    with pytest.raises(PrecisionAuditError, match="0 of 3 matrix nodes of the graph are FP16"):
        audited(audit_of(graph("network", "fp32"), log_of("network")))


@pytest.mark.parametrize("keep", range(9))
def test_a_log_that_is_cut_is_no_evidence(graph, keep):
    """The list of inputs and outputs comes last, so every cut loses it."""
    lines = log_of("network").splitlines()
    whole = [i for i, line in enumerate(lines) if line.startswith(("Name:", "I/O"))]
    audit = audit_of(graph("network", "fp16"), "\n".join(lines[: whole[min(keep, len(whole) - 1)]]))
    assert not audit.ok
    assert "the build log lacks inputs or outputs of the graph: images, logits" in audit.statement


def test_a_norm_in_float32_that_the_graph_has_in_fp16_is_an_island_and_told(graph):
    name = "__myl_ReshCastMeanSubMulMeanAddSqrtDivMulCastMulAdd"
    audit = audit_of(graph("network", "fp16"), edited(log_of("network"), name, "Half", "Float"))
    assert audit.ok
    assert audit.warnings == ("1 kernels compute in FP32 what the graph has in FP16: pool, norm",)


def test_a_norm_in_float32_that_was_asked_for_is_no_island(tmp_path, graph):
    path = graph("network", "fp16")
    model = onnx.load(path)
    kept = [n for n in model.graph.node if n.name in ("pool", "norm")]
    for node in kept:
        up = helper.make_node("Cast", [node.input[0]], [f"{node.name}_up"], to=TensorProto.FLOAT)
        model.graph.node.insert(list(model.graph.node).index(node), up)
        node.input[0] = f"{node.name}_up"
    by_name = {t.name: t for t in model.graph.initializer}
    for name in ("g", "b"):
        by_name[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(by_name[name]).astype("f4"), name))
    down = helper.make_node("Cast", ["n"], ["n_down"], to=TensorProto.FLOAT16)
    model.graph.node.insert([n.name for n in model.graph.node].index("mlp.fc1"), down)
    next(n for n in model.graph.node if n.name == "mlp.fc1").input[0] = "n_down"
    path.write_bytes(model.SerializeToString())
    name = "__myl_ReshCastMeanSubMulMeanAddSqrtDivMulCastMulAdd"
    audit = audit_of(path, edited(log_of("network"), name, "Half", "Float"))
    assert graph_types(path).norms == {"norm": "fp32"}
    assert audit.warnings == ()


def test_an_attention_that_does_not_fuse_is_named(graph):
    path = graph("attention", "fp16")
    good = audit_of(path, log_of("attention"))
    assert good.expected == good.fused == {"attention": 1}
    assert "1 of 1 attention blocks in fused kernels" in good.statement
    assert good.warnings == ()
    log = log_of("attention").replace("_gemm_mha_v2", "__myl_FcMulMaxSubExpSumDivFc")
    bad = audit_of(path, log)
    assert bad.ok
    assert "0 of 1 attention blocks in fused kernels" in bad.statement
    assert bad.warnings == ("1 attention blocks are not in a fused kernel: attn.softmax",)


def test_attention_in_float32_is_not_expected_to_fuse(graph):
    types = graph_types(graph("attention", "fp32"))
    assert types.attention == {"attn.softmax": "fp32"}
    assert audit_engine(Precision.FP32, types, [kernel("fp32", "attn.scores", "attn.values")], "log").expected == {}


def test_attention_that_stayed_float32_in_an_fp16_graph_is_told():
    types = GraphTypes(
        counts={}, matrix={"a": "fp16", "b": "fp16"}, producers={}, attention={"one": "fp16", "two": "fp32"}
    )
    fused = Kernel(name="m", precision="fp16", reads=frozenset({"fp16"}), fused="attention", nodes=("a", "b", "one"))
    audit = audit_engine(Precision.FP16, types, [fused], "log")
    assert audit.warnings == ("1 attention blocks are FP32 in the graph and never fuse: two",)


def small(path: Path, nodes: list[onnx.NodeProto], shape: list[int], weights: dict | None = None) -> Path:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y"))
    held = [numpy_helper.from_array(v, n) for n, v in (weights or {}).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], held), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path.write_bytes(model.SerializeToString())
    return path


def test_a_classifiers_softmax_is_no_attention(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="fc1"),
        helper.make_node("Softmax", ["h"], ["p"], name="softmax"),
        helper.make_node("MatMul", ["p", "w"], ["y"], name="fc2"),
    ]
    types = graph_types(small(tmp_path / "a.onnx", nodes, [4, 4], {"w": np.eye(4, dtype=np.float32)}))
    assert types.attention == {}
    assert types.weights == {"fp32": 16}
    assert types.io == ("x", "y")


def test_products_of_constants_are_folded_and_not_looked_for(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["w", "w"], ["ww"], name="table"),
        helper.make_node("MatMul", ["x", "ww"], ["y"], name="fc"),
    ]
    types = graph_types(small(tmp_path / "a.onnx", nodes, [4, 4], {"w": np.eye(4, dtype=np.float32)}))
    assert types.matrix == {"fc": "fp32"}


def test_evidence_for_less_than_half_of_the_products_is_no_evidence():
    many = GraphTypes(counts={}, matrix={f"fc{i}": "fp16" for i in range(5)}, producers={})
    half = audit_engine(Precision.FP16, many, [kernel("fp16", "fc0", "fc1", "fc2")], "log")
    assert half.ok
    assert half.warnings == ("2 matrix nodes are not named in the log: fc3, fc4",)
    assert not audit_engine(Precision.FP16, many, [kernel("fp16", "fc0", "fc1")], "log").ok


def test_a_graph_that_is_mostly_something_else_is_told():
    few = GraphTypes(counts={}, matrix={"a": "fp16", "b": "fp32", "c": "fp32"}, producers={})
    audit = audit_engine(Precision.FP16, few, [kernel("fp16", "a"), kernel("fp32", "b", "c")], "log")
    assert audit.ok
    assert audit.warnings == ("only 1 of 3 matrix nodes of the graph are FP16",)


INSPECTED = {
    "Layers": [
        {
            "Name": "fc",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Dimensions": [1, 8], "Format/Datatype": "Row major linear FP16 format"}],
            "Constants": [{"Name": "w", "Dimensions": [8, 4], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "y", "Dimensions": [1, 4], "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: fc]",
        },
        {"Name": "new", "LayerType": "kgen", "Inputs": [{"Name": "x", "Dimensions": [1], "Datatype": "Posit16"}]},
        {"Name": "silent", "LayerType": "kgen"},
        "fc2_myl0_3",
    ],
    "Bindings": ["x", "y", "x [profile 1]", "y [profile 1]"],
}  # fmt: skip


def test_what_the_inspector_does_not_say_is_counted_as_unknown_and_not_guessed():
    kernels = kernels_from_inspector(INSPECTED)
    assert kernel_counts(kernels) == {"fp16": 1, "unknown": 3}
    assert weight_counts(kernels) == {"fp16": 32}
    types = GraphTypes(counts={}, matrix={"fc": "fp16"}, producers={}, io=("x", "y"))
    audit = audit_engine(Precision.FP16, types, kernels, "engine inspector", io_from_inspector(INSPECTED))
    assert audit.ok
    assert audit.warnings == ("3 kernels do not say what they compute in: new, silent, fc2_myl0_3",)


def test_an_inspector_of_names_only_proves_nothing():
    kernels = kernels_from_inspector({"Layers": ["fc", "fc2"]})
    types = GraphTypes(counts={}, matrix={"fc": "fp16"}, producers={})
    assert kernel_counts(kernels) == {"unknown": 2}
    assert not audit_engine(Precision.FP16, types, kernels, "engine inspector").ok


def test_inspector_text_that_is_cut_is_an_error_at_every_character():
    text = json.dumps(INSPECTED)
    assert inspector_data(text) == INSPECTED
    for end in range(0, len(text), 7):
        with pytest.raises(PrecisionAuditError, match="cannot be read"):
            inspector_data(text[:end])
    for other in ("[]", "{}", '{"Layers": null}', "7"):
        with pytest.raises(PrecisionAuditError, match="expected an object with Layers"):
            inspector_data(other)


def test_an_engine_that_lost_an_output_is_caught():
    types = GraphTypes(counts={}, matrix={"fc": "fp16"}, producers={}, io=("x", "y", "boxes"))
    audit = audit_engine(Precision.FP16, types, kernels_from_inspector(INSPECTED), "engine inspector", ("x", "y"))
    with pytest.raises(PrecisionAuditError, match="lacks inputs or outputs of the graph: boxes"):
        audited(audit)


def test_onnx_runtime_tells_weights_and_time_by_precision(graph, tmp_path):
    options = BuildOptions(device="cpu", precision=Precision.FP16, threads=1)
    (engine,) = load_backend("onnxruntime").build(graph("network", "fp16"), tmp_path, options)
    assert set(engine.audit.weights) == {"fp16"}
    assert engine.audit.microseconds.keys() == engine.audit.kernels.keys()
    assert all(value >= 0 for value in engine.audit.microseconds.values())


def test_onnx_runtime_with_no_product_in_the_asked_precision_is_an_error(tmp_path):
    """One cheap FP16 node does not make an FP16 graph."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
        helper.make_node("Cast", ["h"], ["c"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["c"], ["r"], name="act"),
        helper.make_node("Cast", ["r"], ["y"], name="up", to=TensorProto.FLOAT),
    ]
    path = small(tmp_path / "a.onnx", nodes, [4, 4], {"w": np.eye(4, dtype=np.float32)})
    with pytest.raises(PrecisionAuditError, match="1 of 2 nodes of the graph are FP16"):
        load_backend("onnxruntime").build(path, tmp_path, BuildOptions(device="cpu", precision=Precision.FP16))
