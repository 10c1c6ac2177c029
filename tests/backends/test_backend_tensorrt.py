"""The TensorRT backend without a GPU: what its inspector's JSON means, what is missing, and its build on a stand-in.

TensorRT itself builds only on a GPU. TensorRT-RTX has the same Python surface and builds on a CPU, so it stands in for
the path from file to serialised engine: evidence for our calls, not for TensorRT. Nothing here is a TensorRT result.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from deploy.backends import tensorrt as module
from deploy.backends.audit import GraphTypes, audit_engine, kernel_counts
from deploy.backends.base import BuildOptions
from deploy.backends.gpu import Gpu
from deploy.backends.trt_layers import io_from_inspector, kernels_from_inspector, kernels_from_log
from deploy.errors import BackendUnavailableError
from deploy.records import Artifact, Audit, EngineRecord, Precision

BACKEND = module.BACKEND

CHANNELS = "Channel major FP16 format where channel % 8 == 0"
# Hand-written after NVIDIA's description of both schemas: 10.x has one field for format and type, 11.x has two.
SCHEMA_10 = {
    "Layers": [
        {"Name": "shape", "LayerType": "shape_call", "Inputs": [], "Outputs": []},
        {
            "Name": "stem.conv + stem.act",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": CHANNELS}],
            "Outputs": [{"Name": "r", "Dimensions": [1, 8, 8, 8], "Format/Datatype": CHANNELS}],
            "Metadata": "[ONNX Layer: stem.conv]\x1f[ONNX Layer: stem.act]",
        },
        {
            "Name": "__myl_FcAdd_myl0_1",
            "LayerType": "gemm",
            "Inputs": [{"Name": "n", "Dimensions": [1, 8], "Format/Datatype": "Half"}],
            "Constants": [{"Name": "w", "Dimensions": [8, 64], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "h", "Dimensions": [1, 64], "Format/Datatype": "Float"}],
            "Metadata": "[ONNX Layer: mlp.fc1][ONNX Layer: mlp.fc1.bias]",
        },
        {
            "Name": "head",
            "LayerType": "gemm",
            "Inputs": [{"Name": "h", "Dimensions": [1, 64], "Format/Datatype": "Row major linear FP32"}],
            "Constants": [{"Name": "w2", "Dimensions": [64, 10], "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "logits", "Dimensions": [1, 10], "Format/Datatype": "Row major linear FP32"}],
            "Metadata": "[ONNX Layer: blocks[0].head]__gemm_from_conv1x1",
        },
    ],
    "Bindings": ["images", "logits"],
}  # fmt: skip


def _split(tensor: dict) -> dict:
    words = tensor["Format/Datatype"]
    kind = "Half" if "FP16" in words or words == "Half" else "Float"
    return {
        "Name": tensor["Name"],
        "Dimensions": tensor["Dimensions"],
        "Format": "Row major linear format",
        "Datatype": kind,
    }


SCHEMA_11 = {
    "Layers": [
        {k: [_split(t) for t in v] if k in ("Inputs", "Outputs", "Constants") else v for k, v in layer.items()}
        for layer in SCHEMA_10["Layers"]
    ],
    "I/O Tensors": [
        {"Name": "images", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 8, 8], "Location": "Device"},
        {"Name": "logits", "IOMode": "Output", "DataType": "Float", "Dimensions": [1, 10], "Location": "Device"},
    ],
}


@pytest.mark.parametrize("data", [SCHEMA_10, SCHEMA_11], ids=["10.x", "11.x"])
def test_both_schemas_of_the_inspector_give_the_same_kernels(data):
    kernels = kernels_from_inspector(data)
    assert kernel_counts(kernels) == {"fp16": 2, "fp32": 1}
    assert [k.nodes for k in kernels] == [("stem.conv", "stem.act"), ("mlp.fc1", "mlp.fc1.bias"), ("blocks[0].head",)]
    assert [k.fused for k in kernels] == ["", "matmul", "matmul"]
    assert io_from_inspector(data) == ("images", "logits")


@pytest.mark.parametrize("data", [SCHEMA_10, SCHEMA_11], ids=["10.x", "11.x"])
def test_the_audit_of_inspector_data_catches_a_layer_that_fell_back(data):
    graph = GraphTypes(counts={}, matrix={"stem.conv": "fp16", "blocks[0].head": "fp16"}, producers={})
    audit = audit_engine(Precision.FP16, graph, kernels_from_inspector(data), "engine inspector")
    assert not audit.ok
    assert "not in FP16: blocks[0].head" in audit.statement


@pytest.mark.parametrize("data", [{}, {"Layers": ["unnamed"]}, {"Layers": []}])
def test_an_inspector_without_details_proves_nothing(data):
    kernels = kernels_from_inspector(data)
    graph = GraphTypes(counts={"fp16": 1}, matrix={"fc": "fp16"}, producers={})
    assert not audit_engine(Precision.FP16, graph, kernels, "engine inspector").ok


@pytest.mark.parametrize(
    ("written", "precision"),
    [("Half", "fp16"), ("Float", "fp32"), ("BFloat16", "bf16"), ("Int8", "int8"), ("FP8", "fp8"), ("Int64", "other"),
     ("Four wide channel vectorized row major Int8 format", "int8"), ("Row major linear BF16 format", "bf16")],
)  # fmt: skip
def test_type_names(written, precision):
    layer = {"Name": "k", "LayerType": "kgen", "Inputs": [{"Name": "x", "Dimensions": [1], "Format/Datatype": written}]}
    assert kernels_from_inspector({"Layers": [layer]})[0].precision == precision


def test_a_log_without_a_listing_has_no_kernels():
    assert kernels_from_log("Total Activation Memory: 0 bytes") == []


def pretend(monkeypatch, version: str | None, gpu: Gpu | None) -> None:
    def runtime():
        if version is None:
            raise ImportError("No module named 'tensorrt'")
        return types.SimpleNamespace(__version__=version)

    monkeypatch.setattr(module, "_runtime", runtime)
    monkeypatch.setattr(module, "first_gpu", lambda: gpu)


ADA = Gpu(name="pretended", sm=89)


@pytest.mark.parametrize(
    ("version", "gpu", "words"),
    [
        (None, ADA, ["No module named 'tensorrt'", "pip install 'effdeploy[tensorrt]'"]),
        ("11.4.0.106", None, ["no NVIDIA GPU", "--backend tensorrt_rtx"]),
        ("10.11.0.33", ADA, ["10.11.0.33 is older than 10.12", "--upgrade"]),
        (None, None, ["pip install 'effdeploy[tensorrt]'", "no NVIDIA GPU"]),
    ],
)
def test_available_names_everything_that_is_missing(monkeypatch, tmp_path, version, gpu, words):
    pretend(monkeypatch, version, gpu)
    reason = BACKEND.available()
    assert all(word in reason for word in words)
    with pytest.raises(BackendUnavailableError):
        BACKEND.build(tmp_path / "a.onnx", tmp_path, BuildOptions())


@pytest.mark.parametrize("version", ["10.12.0.36", "10.16.1.11", "11.4.0.106"])
def test_available_where_nothing_is_missing(monkeypatch, version):
    pretend(monkeypatch, version, ADA)
    assert BACKEND.available() is None


def test_another_compute_capability_is_refused(monkeypatch, tmp_path):
    pretend(monkeypatch, "11.4.0.106", ADA)
    with pytest.raises(BackendUnavailableError, match=r"SM 89\), not for SM \[90\]"):
        BACKEND.build(tmp_path / "a.onnx", tmp_path, BuildOptions(sm=(89, 90)))


def test_an_engine_of_another_version_is_refused(monkeypatch, tmp_path):
    pretend(monkeypatch, "11.4.0.106", ADA)
    audit = Audit(asked=Precision.FP32, evidence="", kernels={}, fused={}, ok=True, statement="")
    artifact = Artifact(name="engine-sm89.plan", sha256="", size=0)
    engine = EngineRecord(
        backend="tensorrt", backend_version="10.16.1.11", artifact=artifact, device="cuda:0", runnable=True, reason="",
        audit=audit, options={}, seconds=0.0,
    )  # fmt: skip
    with pytest.raises(BackendUnavailableError, match=r"built by TensorRT 10\.16\.1\.11"):
        BACKEND.open(engine, tmp_path, BuildOptions())


STAND_IN = """
import sys
from pathlib import Path
import tensorrt_rtx
sys.modules["tensorrt"] = tensorrt_rtx
from deploy.backends.base import BuildOptions
from deploy.backends.tensorrt import build_plan
from deploy.errors import EngineBuildError
from deploy.records import Batch

for path in sys.argv[1:]:
    batch = Batch.parse("1:2:4" if "network" in path else "1")
    options = BuildOptions(batch=batch, workspace=1 << 28)
    try:
        print("plan", len(build_plan(Path(path), options)) > 10_000)
    except EngineBuildError as error:
        print(error.message)
"""


@pytest.mark.rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'effdeploy[tensorrt-rtx]'")
def test_the_build_path_on_the_stand_in(graph):
    paths = [str(graph("network", "fp16")), str(graph("mixed_add")), str(graph("wide_topk", 3841))]
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, *paths],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    plan, mixed, topk = done.stdout.splitlines()
    assert plan == "plan True"
    assert "block.add" in mixed
    assert "must have same input types" in mixed
    assert "head.topk: K exceeds the maximum value allowed (3840)" in topk
