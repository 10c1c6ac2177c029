from __future__ import annotations

import pytest

from deploy.backends.audit import GraphTypes, Kernel, audit_engine, audited, graph_types, kernel_counts
from deploy.errors import EngineBuildError, PrecisionAuditError
from deploy.records import Precision

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
