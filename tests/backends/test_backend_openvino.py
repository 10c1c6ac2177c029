from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import effdeploy

pytest.importorskip("openvino", reason="needs the openvino package (extra openvino)")

from deploy.artifacts import environment, read_manifest
from deploy.backends import openvino as module
from deploy.backends import openvino_trial
from deploy.backends.audit import Kernel
from deploy.backends.base import BuildOptions
from deploy.backends.graph_types import graph_types
from deploy.backends.openvino_child import REFUSED
from deploy.backends.openvino_kernels import audit_kernels, products_by_name
from deploy.cpu import CPU_FEATURES, cpu_flags
from deploy.errors import BackendUnavailableError, BundleError, EngineBuildError, PrecisionAuditError, SizeError
from deploy.records import Batch, Precision

BACKEND = module.BACKEND
RANGE = BuildOptions(threads=1, batch=Batch.parse("1:2:4"))
BF16 = BuildOptions(threads=1, precision=Precision.BF16)
HAS_BF16 = not module.cannot_compute(Precision.BF16)


def images(batch: int = 2) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(0).standard_normal((batch, 3, 16, 16)).astype(np.float32)}


def pretend(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))


# ----------------------------------------------------------------------------------------------------------- engines


def test_the_engine_is_the_file_itself_and_every_product_is_seen(graph, tmp_path):
    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, RANGE)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (engine.device, engine.runnable) == ("cpu", True)
    assert (engine.options["threads"], engine.options["precision hint"]) == ("1", "f32")
    products = len(graph_types(path).matrix)
    assert f"{products} of them run in FP32 kernels" in engine.audit.statement
    assert engine.audit.evidence == "runtime model"
    assert not engine.audit.warnings
    assert sum(engine.audit.microseconds.values()) > 0


def test_it_computes_what_onnxruntime_computes(graph, tmp_path):
    from deploy.backends.onnxruntime import open_model

    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, RANGE)
    with BACKEND.open(engine, tmp_path, RANGE) as runner, open_model(path, RANGE) as reference:
        for batch in (1, 3, 4):
            mine, theirs = runner.infer(images(batch)), reference.infer(images(batch))
            assert mine.keys() == theirs.keys()
            np.testing.assert_allclose(mine["logits"], theirs["logits"], atol=1e-5)


def test_a_batch_outside_the_range_is_refused_before_openvino_sees_it(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network"), tmp_path, RANGE)
    with BACKEND.open(engine, tmp_path, RANGE) as runner, pytest.raises(SizeError, match="with 1 to 4 for names"):
        runner.infer(images(5))


def test_outputs_have_the_names_and_types_of_the_file(tmp_path):
    """OpenVINO merges a tensor with its Identity and then calls it by either name."""
    shape = ["n", 4]
    proto = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Identity", ["a"], ["y"]),
            helper.make_node("Cast", ["x"], ["labels"], to=TensorProto.INT64),
        ],
        "names",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("labels", TensorProto.INT64, shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
        ],
    )
    path = tmp_path / "names.onnx"
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    (engine,) = BACKEND.build(path, tmp_path, RANGE)
    with BACKEND.open(engine, tmp_path, RANGE) as runner:
        outputs = runner.infer({"x": np.full((2, 4), 3.5, np.float32)})
    assert {name: value.dtype.name for name, value in outputs.items()} == {"labels": "int64", "y": "float32"}
    assert (outputs["y"] == 3.5).all()


def test_profile_speaks_of_the_nodes_of_the_graph(graph, tmp_path):
    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, RANGE)
    with BACKEND.open(engine, tmp_path, RANGE) as runner:
        times = runner.profile(images(), runs=2)
    assert {"stem.act", "pool", "norm", "mlp.act", "out.cast"} <= times.keys()
    assert all(microseconds >= 0 for microseconds in times.values())


def test_a_crash_inside_openvino_is_an_error_of_ours(graph, tmp_path, monkeypatch):
    """OpenVINO 2026.4 does it with some small transformers; here a child that ends in the same way."""
    path, child = graph("network"), tmp_path / "child.py"
    child.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(openvino_trial, "TRIAL", child)
    with pytest.raises(EngineBuildError, match=f"ended by SIGSEGV while it compiled or ran {path.name}") as caught:
        BACKEND.build(path, tmp_path, RANGE)
    assert "--backend onnxruntime" in caught.value.hint
    child.write_text("raise AttributeError('Core')\n")  # no trial at all is not a pass
    with pytest.raises(EngineBuildError, match=r"its process ended with 1 \(AttributeError: Core\)"):
        BACKEND.build(path, tmp_path, RANGE)
    child.write_text(f"raise SystemExit({REFUSED})\n")  # no crash: the build meets it itself
    assert BACKEND.build(path, tmp_path, RANGE)


def test_the_child_compiles_and_runs_what_the_build_does(graph, tmp_path):
    path = graph("network")
    asked = {"model": str(path), "batch": [1, 4], "settings": {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": "1"}}
    linked = tmp_path / "linked"
    linked.symlink_to(openvino_trial.TRIAL.parent)  # where deploy.backends.openvino must not stand in for OpenVINO
    run = [sys.executable, str(linked / openvino_trial.TRIAL.name)]
    assert subprocess.run([*run, json.dumps(asked)], check=False).returncode == 0
    failed = subprocess.run([*run, json.dumps(asked | {"model": "none.onnx"})], check=False, capture_output=True)
    assert failed.returncode == REFUSED, failed.stderr


def test_a_changed_file_is_not_opened(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network"), tmp_path, RANGE)
    graph("network", batch=1)
    with pytest.raises(BundleError, match="was changed"):
        BACKEND.open(engine, tmp_path, RANGE)


def test_a_refused_graph_is_an_error_with_openvinos_words_alone(graph, tmp_path, capfd):
    with pytest.raises(EngineBuildError, match="do not have the same element type") as caught:
        BACKEND.build(graph("mixed_add"), tmp_path, RANGE)
    assert not re.search(r"\.cpp:\d+|Exception from", str(caught.value))
    assert str(tmp_path) not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("device", "words"), [("cuda", "on the CPU only"), ("tpu", "expected auto or cpu")])
def test_other_devices_are_refused(device, words):
    with pytest.raises(BackendUnavailableError, match=words):
        BACKEND.check(BuildOptions(device=device))


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.skipif(HAS_BF16, reason="this CPU computes in BF16")
def test_bf16_is_refused_where_it_would_not_really_run(graph, tmp_path):
    with pytest.raises(BackendUnavailableError, match="would not really run: this CPU has none of AMX BF16") as caught:
        BACKEND.build(graph("network", "bf16"), tmp_path, BF16)
    assert "AVX-512 BF16" in caught.value.hint


@pytest.mark.skipif(HAS_BF16, reason="this CPU computes in BF16")
def test_a_runtime_that_does_not_list_the_type_is_believed(monkeypatch):
    pretend(monkeypatch, "amx_bf16")
    with pytest.raises(BackendUnavailableError, match="OpenVINO does not list it"):
        BACKEND.check(BF16)


@pytest.mark.skipif(HAS_BF16, reason="this CPU computes in BF16")
@pytest.mark.parametrize("typed", ["bf16", "fp32"])
def test_silent_fp32_is_found_in_the_kernels(graph, tmp_path, monkeypatch, typed):
    """Negative control of the audit: with the CPU's own refusal out of the way, OpenVINO really falls back to FP32."""
    monkeypatch.setattr(module, "cannot_compute", lambda precision: "")
    with pytest.raises(PrecisionAuditError, match="asked for BF16, but the engine is not"):
        BACKEND.build(graph("network", typed), tmp_path, BF16)


@pytest.mark.skipif(not HAS_BF16, reason=f"BF16: {module.cannot_compute(Precision.BF16)}")
def test_bf16_runs_and_is_proven(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network", "bf16"), tmp_path, BF16)
    assert engine.audit.kernels["bf16"] > 0
    assert "run in BF16 kernels" in engine.audit.statement


def quantised_linear(path: Path, style: str) -> Path:
    """Write a product between Q and DQ: symmetric int8 for TensorRT, uint8 and a quantised output for ONNX Runtime."""
    kind, zero, dtype = (TensorProto.INT8, 0, np.int8) if style == "tensorrt" else (TensorProto.UINT8, 128, np.uint8)
    weights = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], name="wdq", axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["h"], name="fc"),
    ]
    if style == "onnxruntime":
        nodes += [
            helper.make_node("QuantizeLinear", ["h", "sh", "z"], ["hq"], name="q2"),
            helper.make_node("DequantizeLinear", ["hq", "sh", "z"], ["hd"], name="dq2"),
        ]
    nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["y"], name="act"))
    scale = np.float32
    constants = {
        "s": scale(0.03), "z": dtype(zero), "sh": scale(0.1), "w": weights, "sw": np.full(32, 0.004, np.float32),
        "zw": np.zeros(32, np.int8),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info("xq", kind, ["n", 64])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("style", ["onnxruntime", "tensorrt"])
def test_both_styles_of_q_and_dq_run_in_integer_kernels(tmp_path, style):
    from deploy.backends.onnxruntime import open_model

    path = quantised_linear(tmp_path / "linear.onnx", style)
    options = BuildOptions(threads=1, precision=Precision.INT8, batch=Batch.parse("1:2:4"))
    (engine,) = BACKEND.build(path, tmp_path, options)
    assert "1 of them run in INT8 kernels" in engine.audit.statement
    x = {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)}
    with BACKEND.open(engine, tmp_path, options) as runner, open_model(path, options) as reference:
        np.testing.assert_allclose(runner.infer(x)["y"], reference.infer(x)["y"], atol=0.11)  # one step of the output


def test_int8_that_is_not_in_the_graph_is_found(graph, tmp_path):
    with pytest.raises(PrecisionAuditError, match="asked for INT8, but the engine is not: 0 of 3"):
        BACKEND.build(graph("network"), tmp_path, BuildOptions(threads=1, precision=Precision.INT8))


def test_fp8_is_refused():
    with pytest.raises(BackendUnavailableError, match="OpenVINO has no such kernels"):
        BACKEND.check(BuildOptions(precision=Precision.FP8))


def test_an_fp32_engine_with_shorter_kernels_is_found(graph):
    types = graph_types(graph("network"))
    kernels = [Kernel(name=name, precision="bf16", reads=frozenset({"bf16"}), nodes=(name,)) for name in types.matrix]
    audit = audit_kernels(Precision.FP32, types, kernels)
    assert not audit.ok
    assert "read a shorter float type" in audit.statement


def test_what_the_graph_keeps_in_fp32_and_ran_lower_is_a_warning(graph):
    types = graph_types(graph("network", "bf16"))
    matrix = dict(types.matrix)
    first = next(iter(matrix))
    matrix[first] = "fp32"
    kernels = [Kernel(name=name, precision="bf16", reads=frozenset({"bf16"}), nodes=(name,)) for name in matrix]
    audit = audit_kernels(Precision.BF16, type(types)(counts=types.counts, matrix=matrix, producers={}), kernels)
    assert audit.ok
    assert f"the first {first}" in audit.warnings[0]


def test_a_product_is_found_under_the_name_of_its_bias(tmp_path, graph):
    weights = [helper.make_tensor(n, 1, s, np.ones(s).ravel()) for n, s in (("w", (4, 4)), ("b", (4,)))]
    proto = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="fc/MatMul"),
            helper.make_node("Add", ["h", "b"], ["y"], name="fc/Add"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", 1, ["n", 3, 4])],
        [helper.make_tensor_value_info("y", 1, ["n", 3, 4])],
        weights,
    )
    path = tmp_path / "linear.onnx"
    path.write_bytes(
        helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    assert products_by_name(path) == {"fc/Add": "fc/MatMul", "y": "fc/MatMul"}
    (engine,) = BACKEND.build(path, tmp_path, RANGE)
    assert "1 of them run in FP32 kernels" in engine.audit.statement


# -------------------------------------------------------------------------------------------------------- the machine


def test_importing_openvino_starts_no_telemetry_and_prints_nothing(tmp_path):
    code = (
        "import sys; from deploy.backends import load_backend;"
        "assert load_backend('openvino').available() is None;"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry')]"
    )
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_names_openvino_and_the_cpu():
    here = environment()
    assert here.packages["openvino"]
    assert set(here.cpu_features) <= set(CPU_FEATURES.values())
    assert bool(here.cpu_features) == bool(cpu_flags() & set(CPU_FEATURES))


def test_doctor_says_what_the_cpu_and_openvino_can_do():
    shown = " ".join(effdeploy("doctor").stdout.split())
    assert "backend openvino: builds and runs on the CPU; computes in FP32" in shown
    assert ("BF16 would not really run" in shown) != HAS_BF16
    lacking = {
        "no AVX-512": {"avx512f"},
        "no VNNI": {"avx512_vnni", "avx_vnni"},
        "no AMX": {"amx_int8", "amx_bf16"},
    }
    for words, flags in lacking.items():
        assert (words in shown) == ("sse4_1" in cpu_flags() and not cpu_flags() & flags)


# -------------------------------------------------------------------------------------------------------------- road


def test_a_bundle_on_openvino_is_exported_verified_benched_and_inspected(tmp_path):
    bundle = tmp_path / "bundle"
    made = effdeploy(
        "export", "riformer", "--variant", "tiny", "--size", 64, "--batch", "1:2:3", "--backend", "openvino",
        "--out", bundle, "--seconds", 0.05, "--set", "bench.rounds=3", "--set", "bench.warmup_seconds=0",
    )  # fmt: skip
    assert made.exit_code == 0, made.stdout + made.stderr
    run = read_manifest(bundle)
    assert [(e.backend, e.artifact.name) for e in run.engines] == [("openvino", "20-patched.onnx")]
    assert run.ok
    assert run.bench is not None
    assert any("." in name for name in run.bench.modules)
    for command in (("verify", bundle), ("inspect", bundle), ("bench", bundle, "--seconds", 0.05)):
        done = effdeploy(*command)
        assert done.exit_code == 0, done.stdout + done.stderr


def test_build_takes_a_file_and_leaves_it_as_the_engine(graph, tmp_path):
    path = graph("network")
    done = effdeploy("build", path, "--backend", "openvino", "--batch", "1:2:4")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["network.onnx", "network.onnx.openvino.json"]
