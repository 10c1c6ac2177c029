"""Graphs made of two files: what they compute, whose nodes they hold, and the modules that nodes are named after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from quantised_cases import SIDE, images, network, quantised

from deploy.backends.base import BuildOptions
from deploy.errors import PrecisionAuditError, PrecisionError
from deploy.graph.io import save_model
from deploy.precision.modules import TOP, children, leaves, path_parts, splits
from deploy.precision.qdq import quantised_products
from deploy.precision.splice import LOW, Splice
from deploy.records import Batch, Precision, Target
from deploy.sensitivity import How, Laboratory, how_to_judge

PRODUCTS = {"blocks.0.a/Conv", "blocks.0.b/Conv", "blocks.1.mlp/MatMul", "head/Gemm"}


def pair(target=Target.ONNXRUNTIME):
    """The network, and the same in INT8."""
    high = network()
    return high, quantised(high, target).model


def outputs(model):
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    return session.run(None, {"images": rng.standard_normal((4, 3, SIDE, SIDE)).astype(np.float32)})[0]


def error(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("target", list(Target))
def test_all_of_one_file_computes_what_that_file_computes(target):
    high, low = pair(target)
    splice = Splice(high, low)
    assert np.array_equal(outputs(splice.hybrid([])), outputs(high))
    assert np.array_equal(outputs(splice.hybrid(list(splice.nodes))), outputs(low))
    assert np.array_equal(outputs(splice.hybrid(splice.changed)), outputs(low))
    assert not np.array_equal(outputs(low), outputs(high))


def test_one_node_alone_is_quantised_and_makes_a_part_of_the_error():
    high, low = pair()
    splice, exact = Splice(high, low), outputs(high)
    assert set(quantised_products(low)) == PRODUCTS
    parts = []
    for name in sorted(PRODUCTS):
        alone = splice.hybrid([name])
        assert set(quantised_products(alone)) == {LOW + name}
        parts.append(error(outputs(alone), exact))
        rest = splice.hybrid(splice.changed - {name})
        assert set(quantised_products(rest)) == {LOW + other for other in PRODUCTS - {name}}
    assert all(part > 0 for part in parts)
    whole = error(outputs(low), exact)
    assert (
        max(parts) < 2 * whole < 4 * float(np.linalg.norm(parts))
    )  # roundings add up in squares, as far as they are alike


def test_what_a_convolution_computes_inside_goes_with_it():
    high, low = pair()
    splice = Splice(high, low)
    assert splice.absorbed == {"blocks.0.act/Relu": "blocks.0.a/Conv"}
    alone = splice.hybrid(["blocks.0.a/Conv"])
    assert "Relu" not in {node.op_type for node in alone.graph.node}
    assert "Relu" in {node.op_type for node in splice.hybrid(["blocks.0.b/Conv"]).graph.node}


def test_activations_of_both_are_compared_tensor_by_tensor():
    high, low = pair()
    splice = Splice(high, low)
    low_weight = next(t for t in low.graph.initializer if t.name.startswith("mlp.w"))
    sums = {}
    for fault in (False, True):
        if fault:
            low_weight.raw_data = bytes(len(low_weight.raw_data))  # all zero
            splice = Splice(high, low)
        sums[fault] = dict(zip(("s", "a", "r", "n"), outputs(splice.probed(["s", "a", "r", "n"])), strict=True))
    assert sums[False]["s"][0] == 0  # the stem is in both the same
    assert 0 < sums[False]["a"][0] < 1e-2 * sums[False]["a"][1]  # before the Relu that the low file has not
    assert 0 < sums[False]["r"][0] < 1e-2 * sums[False]["r"][1]
    assert sums[True]["r"].tolist() == sums[False]["r"].tolist()
    assert sums[True]["n"][0] > 0.1 * sums[True]["n"][1]  # negative control: the fault is seen behind it


def test_another_runtime_finds_the_same(tmp_path):
    """Graphs of both precisions go through the backend's own build, whose audit would refuse them."""
    pytest.importorskip("openvino", reason="needs OpenVINO (extra openvino)")
    high, low = pair()
    for model, name in ((high, "high.onnx"), (low, "low.onnx")):
        save_model(model, tmp_path / name)
    source = images(8, seed=3)
    options = BuildOptions(precision=Precision.INT8, batch=Batch(min=1, opt=4, max=4), inputs=source.inputs)
    judged = how_to_judge(Precision.INT8, Target.ONNXRUNTIME, options)
    other = How(backend="openvino", options=replace(options, mixed=True), rounded=False)
    found = []
    for how in (judged, other):
        laboratory = Laboratory(
            high=tmp_path / "high.onnx", low=tmp_path / "low.onnx", images=source, task="classification",
            size=(SIDE, SIDE), how=how, folder=tmp_path,
        )  # fmt: skip
        found.append([laboratory.of_nodes([name]).error for name in sorted(PRODUCTS)])
    assert found[1] == pytest.approx(found[0], rel=0.1)
    with pytest.raises(PrecisionAuditError):
        replace(other, options=options).open(laboratory.splice.high, tmp_path)


def test_files_that_are_not_of_one_network_are_refused():
    high, low = pair()
    short = onnx.ModelProto()
    short.CopyFrom(low)
    del short.graph.node[:]
    short.graph.node.extend(n for n in low.graph.node if n.name != "pool/ReduceMean")
    with pytest.raises(PrecisionError, match=r"lacks the node 'pool/ReduceMean'"):
        Splice(high, short)
    unnamed = onnx.ModelProto()
    unnamed.CopyFrom(high)
    unnamed.graph.node[1].name = unnamed.graph.node[0].name
    with pytest.raises(PrecisionError, match="without a name of their own"):
        Splice(unnamed, low)


def test_modules_are_read_from_names():
    assert path_parts("stages.0.blocks.11.mlp.fc1") == ("stages.0", "blocks.11", "mlp", "fc1")
    nodes = [
        "stem/Conv", "net.blocks.0.norm/Add", "net.blocks.0.mlp.fc1/MatMul", "net.blocks.0/Add", "net.blocks.1.mlp/Mul",
        "Concat",
    ]  # fmt: skip
    top = children(nodes)
    assert [(m.path, sorted(m.nodes)) for m in top[:2]] == [("stem", ["stem/Conv"]), ("net", sorted(nodes[1:5]))]
    assert (top[2].path, top[2].whole, splits(top[2])) == (TOP, True, False)
    assert splits(top[1])
    assert [m.path for m in children(top[1].nodes, "net")] != []
    blocks = {m.path: m for m in children(sorted(top[1].nodes), "net")}
    assert set(blocks) == {"net.blocks.0", "net.blocks.1.mlp"} or set(blocks) == {"net.blocks.0", "net.blocks.1"}
    inside = {m.name: m.nodes for m in children(sorted(blocks["net.blocks.0"].nodes), "net.blocks.0")}
    assert inside["net.blocks.0 (itself)"] == {"net.blocks.0/Add"}
    assert set(inside) == {"net.blocks.0 (itself)", "net.blocks.0.norm", "net.blocks.0.mlp"}
    assert [m.path for m in leaves(nodes)] == [
        "stem",
        "net.blocks.0.norm",
        "net.blocks.0.mlp.fc1",
        "net.blocks.0",
        "net.blocks.1.mlp",
        TOP,
    ]
