from __future__ import annotations

import contextlib
import gc
import importlib.util

import pytest

from deploy.backends import tensorrt_rtx as module
from deploy.backends.base import BuildOptions
from deploy.errors import BackendUnavailableError, EngineBuildError, PrecisionAuditError
from deploy.records import Batch, Precision

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt_rtx is not installed: pip install 'effdeploy[tensorrt-rtx]'",
    ),
]
BACKEND = module.BACKEND


def options(precision: str = "fp32", *sm: int, batch: str = "1") -> BuildOptions:
    return BuildOptions(precision=Precision(precision), sm=sm or (89,), batch=Batch.parse(batch))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_for_the_default_targets(graph, tmp_path, capfd, precision):
    engines = BACKEND.build(
        graph("network", precision, batch=4), tmp_path, BuildOptions(precision=Precision(precision))
    )
    assert [e.artifact.name for e in engines] == ["engine-sm80.rtx", "engine-sm89.rtx", "engine-sm120.rtx"]
    assert [e.device for e in engines] == ["sm80", "sm89", "sm120"]
    assert len({e.artifact.sha256 for e in engines}) == 3
    for engine in engines:
        assert engine.audit.ok
        assert engine.audit.statement.startswith(
            f"3 of 3 matrix nodes of the graph are {precision.upper()}; 3 of them run"
        )
        assert engine.audit.fused == {"conv": 1, "matmul": 2, "norm": 1}
        assert sum(engine.audit.kernels.values()) <= 7
    assert capfd.readouterr() == ("", "")


def test_the_audit_tells_fp32_from_fp16(graph, tmp_path):
    (full,) = BACKEND.build(graph("network", "fp32"), tmp_path, options("fp32"))
    (half,) = BACKEND.build(graph("network", "fp16"), tmp_path, options("fp16"))
    assert set(full.audit.kernels) == {"fp32"}
    assert half.audit.kernels["fp16"] >= 4
    assert half.artifact.sha256 != full.artifact.sha256


@pytest.mark.parametrize(("asked", "got"), [("fp16", "fp32"), ("fp32", "fp16"), ("bf16", "fp16")])
def test_another_precision_than_asked_is_an_error_and_leaves_no_engine(graph, tmp_path, asked, got):
    with pytest.raises(PrecisionAuditError, match=f"asked for {asked.upper()}"):
        BACKEND.build(graph("network", got), tmp_path, options(asked))
    assert not list(tmp_path.glob("*.rtx"))


def test_bf16_builds_as_bf16(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network", "bf16"), tmp_path, options("bf16"))
    assert engine.audit.kernels["bf16"] >= 4


@pytest.mark.parametrize(("precision", "fused"), [("fp16", 1), ("fp32", 0)])
def test_attention_fuses_in_fp16_only(graph, tmp_path, precision, fused):
    (engine,) = BACKEND.build(graph("attention", precision), tmp_path, options(precision))
    assert engine.audit.fused.get("attention", 0) == fused


def test_a_dynamic_batch_gets_its_profile(graph, tmp_path, monkeypatch):
    logs = []
    keep = module.kernels_from_log
    monkeypatch.setattr(module, "kernels_from_log", lambda log: logs.append(log) or keep(log))
    (engine,) = BACKEND.build(graph("network", "fp32"), tmp_path, options(batch="1:4:16"))
    assert engine.options["batch"] == "1:4:16"
    for line in ("MinShape: [1,3,16,16]", "OptShape: [4,3,16,16]", "MaxShape: [16,3,16,16]"):
        assert line in logs[0]


def test_a_mixed_type_add_is_refused_with_the_node_and_the_parsers_words(graph, tmp_path, capfd):
    with pytest.raises(EngineBuildError) as caught:
        BACKEND.build(graph("mixed_add"), tmp_path, options())
    assert "node 'block.add' (Add)" in caught.value.message
    assert "must have same input types" in caught.value.message
    assert "cudaError" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_a_topk_beyond_the_limit_is_refused(graph, tmp_path):
    BACKEND.build(graph("wide_topk", 3840), tmp_path, options())
    with pytest.raises(EngineBuildError, match=r"head\.topk: K exceeds the maximum value allowed \(3840\)"):
        BACKEND.build(graph("wide_topk", 3841), tmp_path, options())


@pytest.mark.parametrize("name", ["network", "mixed_add"])
def test_the_garbage_collector_stays_out_of_the_build(graph, tmp_path, monkeypatch, name):
    """A collection inside TensorRT's log callback can free another builder and deadlock."""
    enabled = []

    def watching(trt):
        class Watcher(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)
                self.lines = []

            def log(self, severity, message):
                enabled.append(gc.isenabled())
                self.lines.append((severity.name, message))

        return Watcher()

    monkeypatch.setattr(module, "_collector", watching)
    with contextlib.suppress(EngineBuildError):
        BACKEND.build(graph(name), tmp_path, options())
    assert enabled
    assert not any(enabled)
    assert gc.isenabled()


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"not a graph" * 9)
    with pytest.raises(EngineBuildError, match="Failed to parse the ONNX model"):
        BACKEND.build(tmp_path / "a.onnx", tmp_path, options())


@pytest.mark.parametrize("sm", [(90,), (89, 100), (121,)])
def test_targets_that_it_cannot_build_for_are_refused(graph, tmp_path, sm):
    with pytest.raises(BackendUnavailableError, match=rf"SM \[{sm[-1]}\]") as caught:
        BACKEND.build(graph("network"), tmp_path, options("fp32", *sm))
    assert "--sm 80,89,120" in caught.value.hint
    assert not list(tmp_path.glob("*.rtx"))


def test_every_supported_target_builds(graph, tmp_path):
    engines = BACKEND.build(graph("network", "fp16", batch=1), tmp_path, options("fp16", *module.SUPPORTED_SM))
    assert len(engines) == len(module.SUPPORTED_SM)
    assert all(e.audit.ok for e in engines)


def test_an_engine_is_never_said_to_have_run(graph, tmp_path):
    (engine,) = BACKEND.build(graph("network"), tmp_path, options())
    assert not engine.runnable
    assert "not run" in engine.reason
    with pytest.raises(BackendUnavailableError, match="is not run by effdeploy"):
        BACKEND.open(engine, tmp_path, options())
