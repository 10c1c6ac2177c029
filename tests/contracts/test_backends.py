"""What every backend promises. Those that cannot run here are skipped with the reason that they give themselves."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

from deploy.backends import BACKENDS, load_backend
from deploy.backends.base import BuildOptions, DeviceTimed
from deploy.errors import BackendUnavailableError, EngineBuildError, SizeError, UnknownNameError
from deploy.records import Batch, EngineRecord, Target, from_json, to_json

PACKAGES = {name: name for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")}
OPTIONS = BuildOptions(batch=Batch.parse("1:2:4"))
RUNNING = [
    "onnxruntime",
    "openvino",
    pytest.param("tensorrt", marks=pytest.mark.gpu),
]
BUILDING = [*RUNNING, pytest.param("tensorrt_rtx", marks=pytest.mark.rtx)]


@pytest.fixture
def model(tmp_path):
    """``y = relu(x @ w)`` with a dynamic batch."""
    weights = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
            helper.make_node("Relu", ["h"], ["y"], name="act"),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.ravel())],
    )
    path = tmp_path / "small.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path, weights


def usable(name: str):
    backend = load_backend(name)
    if reason := backend.available():
        pytest.skip(f"{name}: {reason}")
    return backend


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_is_what_the_registry_says(name):
    backend = load_backend(name)
    assert backend.name == name
    assert isinstance(backend.target, Target)
    assert (backend.target is Target.ONNXRUNTIME) == (name in ("onnxruntime", "openvino"))
    assert all(callable(getattr(backend, method)) for method in ("available", "build", "open"))


@pytest.mark.parametrize("name", BACKENDS)
def test_available_is_none_or_says_what_to_do(name):
    reason = load_backend(name).available()
    assert reason is None or "pip install" in reason or "--backend" in reason


@pytest.mark.parametrize("name", BACKENDS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, model, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(module, *arguments, **options):
        if module.split(".")[0] == PACKAGES[name]:
            raise ImportError(f"No module named {module!r}")
        return real(module, *arguments, **options)

    backend = load_backend(name)
    monkeypatch.delitem(sys.modules, PACKAGES[name], raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    reason = backend.available()
    assert reason is not None
    assert f"No module named {PACKAGES[name]!r}" in reason
    assert "pip install" in reason
    with pytest.raises(BackendUnavailableError, match="No module named"):
        backend.build(model[0], tmp_path, OPTIONS)


@pytest.mark.parametrize("name", BUILDING)
def test_each_backend_builds_and_describes_its_engine(name, model, tmp_path):
    for engine in usable(name).build(model[0], tmp_path, OPTIONS):
        assert (tmp_path / engine.artifact.name).stat().st_size == engine.artifact.size
        assert engine.runnable or engine.reason
        assert engine.audit.ok
        assert sum(engine.audit.kernels.values()) >= 1
        assert from_json(EngineRecord, to_json(engine)) == engine


@pytest.mark.parametrize("name", BUILDING)
def test_each_backend_refuses_what_is_no_graph(name, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"not a graph" * 9)
    with pytest.raises(EngineBuildError, match=r"a\.onnx"):
        usable(name).build(tmp_path / "a.onnx", tmp_path, OPTIONS)


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_each_backend_computes_the_same(name, model, tmp_path, batch):
    path, weights = model
    backend = usable(name)
    (engine,) = backend.build(path, tmp_path, OPTIONS)
    x = np.random.default_rng(batch).standard_normal((batch, 16)).astype(np.float32)
    with backend.open(engine, tmp_path, OPTIONS) as runner:
        first = runner.infer({"x": x})["y"]
        runner.infer({"x": -x})  # outputs must not be overwritten by the next call
    np.testing.assert_allclose(first, np.maximum(x @ weights, 0), atol=1e-5)
    assert runner.name == name


@pytest.mark.parametrize("name", RUNNING)
def test_each_runner_checks_its_feeds(name, model, tmp_path):
    backend = usable(name)
    (engine,) = backend.build(model[0], tmp_path, OPTIONS)
    with backend.open(engine, tmp_path, OPTIONS) as runner, pytest.raises(SizeError, match="expected"):
        runner.infer({"x": np.zeros((1, 15), np.float32)})


@pytest.mark.parametrize("name", RUNNING)
def test_each_engine_is_timed_on_its_device(name, model, tmp_path):
    backend = usable(name)
    (engine,) = backend.build(model[0], tmp_path, OPTIONS)
    feeds = {"x": np.ones((3, 16), np.float32)}
    with backend.open(engine, tmp_path, OPTIONS) as runner:
        assert isinstance(runner, DeviceTimed)
        with runner.device_timers(feeds) as timers:
            assert timers[0].name == ""  # the engine's own latency comes first
            assert len({timer.name for timer in timers}) == len(timers)
            for timer in timers:
                assert all(0 < timer.call() < 10**9 for _ in range(5))
                assert timer.note
                assert isinstance(timer.findings(), str)
        with pytest.raises(SizeError, match="expected"), runner.device_timers({"x": np.zeros((1, 15), np.float32)}):
            pass
        runner.infer(feeds)  # the runner still works


@pytest.mark.parametrize("name", BUILDING)
def test_what_a_backend_checks_it_refuses_to_build(name, model, tmp_path):
    backend = usable(name)
    backend.check(OPTIONS)
    with pytest.raises(BackendUnavailableError, match=r"SM|compute capabilities"):
        backend.check(dataclasses.replace(OPTIONS, sm=(1,)))


def test_an_unknown_backend_is_answered_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="did you mean 'tensorrt'"):
        load_backend("tensort")


def test_every_module_of_the_registry_has_a_backend():
    assert all(hasattr(importlib.import_module(module), "BACKEND") for module in BACKENDS.values())


def test_importing_the_backends_imports_no_runtime():
    code = (
        "import sys, deploy.backends as b; [__import__(m) for m in b.BACKENDS.values()];"
        f"print([m for m in {[*PACKAGES, 'polygraphy', 'torch']} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
