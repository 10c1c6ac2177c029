from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from deploy.backends import onnxruntime as module
from deploy.backends.base import BuildOptions
from deploy.backends.gpu import Gpu
from deploy.errors import BackendUnavailableError, BundleError, EngineBuildError, PrecisionAuditError, SizeError
from deploy.records import Batch, Precision

BACKEND = module.BACKEND
CPU = BuildOptions(device="cpu", threads=1, batch=Batch.parse("1:2:4"))
FP16 = BuildOptions(device="cpu", threads=1, precision=Precision.FP16)
FOREIGN = [
    value
    for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
]


def images(batch: int = 2) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(0).standard_normal((batch, 3, 16, 16)).astype(np.float32)}


def test_the_engine_is_the_file_itself(graph, tmp_path):
    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, CPU)
    assert engine.artifact.name == path.name
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (engine.device, engine.runnable, engine.options["threads"]) == ("cpu", True, "1")
    assert engine.seconds > 0


def test_fp32_and_fp16_agree_and_the_audit_tells_them_apart(graph, tmp_path):
    outputs = {}
    for precision in ("fp32", "fp16"):
        options = BuildOptions(device="cpu", precision=Precision(precision))
        (engine,) = BACKEND.build(graph("network", precision), tmp_path, options)
        with BACKEND.open(engine, tmp_path, options) as runner:
            outputs[precision] = runner.infer(images())["logits"]
        assert engine.audit.ok
        assert f"9 of 9 nodes of the graph are {precision.upper()}" in engine.audit.statement
    assert outputs["fp16"].dtype == np.float32
    assert 0 < np.abs(outputs["fp32"] - outputs["fp16"]).max() < 1e-2


def test_fp16_on_the_cpu_is_called_what_it_is(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network", "fp16"), tmp_path, FP16)
    computing = sum(n for kind, n in engine.audit.kernels.items() if kind not in ("cast", "other"))
    assert engine.audit.kernels["fp32"] * 2 > computing
    assert "FP16 is a size option here, not a speed-up" in engine.audit.statement


@pytest.mark.parametrize(("asked", "got"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_another_precision_than_asked_is_an_error(graph, tmp_path, asked, got):
    with pytest.raises(PrecisionAuditError, match=f"0 of 9 nodes of the graph are {asked.upper()}"):
        BACKEND.build(graph("network", got), tmp_path, BuildOptions(device="cpu", precision=Precision(asked)))


def test_bf16_on_the_cpu_names_the_backends_that_can(graph, tmp_path):
    with pytest.raises(BackendUnavailableError) as caught:
        BACKEND.build(graph("network"), tmp_path, BuildOptions(device="cpu", precision=Precision.BF16))
    assert "--backend tensorrt_rtx" in caught.value.hint


def test_bf16_on_the_cpu_is_refused_before_the_runtime_fails_on_a_kernel(graph, tmp_path):
    path = graph("network", "bf16")
    with pytest.raises(EngineBuildError, match="Could not find an implementation"):
        module.open_model(path, CPU)
    with pytest.raises(BackendUnavailableError, match="no BF16 kernels"):
        BACKEND.build(path, tmp_path, BuildOptions(device="cpu", precision=Precision.BF16))


def test_profile_speaks_of_the_nodes_of_the_graph(graph, tmp_path):
    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, CPU)
    with BACKEND.open(engine, tmp_path, CPU) as runner:
        times = runner.profile(images(), runs=2)
    assert {"stem.act", "pool", "norm", "mlp.fc1", "mlp.act", "mlp.fc2"} <= times.keys()
    assert all(microseconds >= 0 for microseconds in times.values())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_feeds_are_checked_before_the_run(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network"), tmp_path, CPU)
    with BACKEND.open(engine, tmp_path, CPU) as runner:
        assert runner.infer(images(3))["logits"].shape == (3, 10)
        with pytest.raises(SizeError, match="got dtype float64, expected float32"):
            runner.infer({"images": np.zeros((1, 3, 16, 16))})


def test_a_refused_graph_is_an_error_with_the_runtimes_words_and_no_noise(graph, tmp_path, capfd):
    with pytest.raises(EngineBuildError, match=r"block\.add") as caught:
        BACKEND.build(graph("mixed_add"), tmp_path, CPU)
    assert str(tmp_path) not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_fails_in_its_first_run_is_an_error_without_noise(graph, tmp_path, capfd):
    with pytest.raises(EngineBuildError, match=r"head\.reshape"):
        BACKEND.build(graph("failing_reshape"), tmp_path, CPU)
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_not_opened(graph, tmp_path):
    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, CPU)
    graph("network", batch=1)
    with pytest.raises(BundleError, match="was changed"):
        BACKEND.open(engine, tmp_path, CPU)


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda kind: kind.__name__)
def test_every_exception_of_the_runtime_is_translated(foreign):
    with pytest.raises(EngineBuildError, match="could not run the graph: words"), module._translated("run the graph"):
        raise foreign("words")


def test_the_map_of_exceptions_is_not_empty():
    assert len(FOREIGN) >= 10


@pytest.mark.skipif(module.first_gpu() is not None, reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_with_a_reason(graph, tmp_path):
    with pytest.raises(BackendUnavailableError, match="the driver shows no NVIDIA GPU"):
        BACKEND.build(graph("network"), tmp_path, BuildOptions(device="cuda"))


@pytest.mark.skipif(module.first_gpu() is not None, reason="this machine has a GPU")
def test_a_session_that_fell_back_is_not_called_cuda(graph, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "first_gpu", lambda: Gpu(name="pretended", sm=90))
    if module.CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    path = graph("network")
    (engine,) = BACKEND.build(path, tmp_path, BuildOptions())
    assert (engine.device, engine.reason) == ("cpu", "the CUDA provider could not be loaded; runs on the CPU")
    with pytest.raises(BackendUnavailableError, match="fell back to the CPU"):
        BACKEND.build(path, tmp_path, BuildOptions(device="cuda"))
    assert capfd.readouterr() == ("", "")


def test_an_unknown_device_is_refused(graph, tmp_path):
    with pytest.raises(BackendUnavailableError, match="expected auto, cpu or cuda"):
        BACKEND.build(graph("network"), tmp_path, BuildOptions(device="tpu"))


def test_importing_the_runtime_prints_nothing():
    code = "from deploy.backends import load_backend; assert load_backend('onnxruntime').available() is None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_importing_the_runtime_does_not_start_its_telemetry():
    code = (
        "import os; from deploy.backends import load_backend; load_backend('onnxruntime').available();"
        "print(sum('onnxruntime.db' in os.path.realpath(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd')))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in module._TELEMETRY_OFF}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_noise_of_the_import_would_be_swallowed(capfd):
    with module._native_stderr_closed():
        os.write(2, b"device_discovery warning")
    os.write(2, b"afterwards")
    assert capfd.readouterr().err == "afterwards"


def test_threads_follow_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert module._threads(BuildOptions()) == 2
    assert module._threads(BuildOptions(threads=5)) == 5
