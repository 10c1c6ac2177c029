"""The exporter is distrusted: what it writes is held against the request."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.errors import RecipeError, TraceError
from deploy.records import Batch, Target, TensorSpec
from deploy.trace import TraceRequest, choose_opset, onnx_from_torch, quiet_torch


def request(batch="1", opset=20, shape=("batch", 3, 8, 8)):
    spec = TensorSpec(name="images", dtype="float32", shape=shape)
    return TraceRequest(inputs=(spec,), outputs=("logits",), batch=Batch.parse(batch), opset=opset)


class Net(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), nn.Sequential(nn.Conv2d(4, 5, 3))])
        self.inner = Faulty(fault) if fault else nn.Identity()

    def forward(self, images):
        x = images
        for stage in self.stages:
            x = stage(x)
        return self.inner(x).mean((2, 3))


class Faulty(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        return self.fault(x)


def export(tmp_path, net, **kwargs):
    return onnx_from_torch(net.eval(), request(**kwargs), tmp_path)


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22])
def test_the_opset_is_the_asked_one(tmp_path, opset):
    record = export(tmp_path, Net(), opset=opset)
    model = onnx.load(tmp_path / record.artifact.name)
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset] == [record.opset]


@pytest.mark.parametrize(("batch", "axis"), [("4", 4), ("1:2:8", "batch"), ("3:3:5", "batch")])
def test_dimensions_are_the_asked_ones(tmp_path, batch, axis):
    record = export(tmp_path, Net(), batch=batch)
    assert record.inputs[0].shape == (axis, 3, 8, 8)
    assert record.outputs[0].shape == (axis, 5)


def test_names_follow_the_module_path_and_metadata_is_gone(tmp_path):
    record = export(tmp_path, Net())
    model = onnx.load(tmp_path / record.artifact.name)
    names = [node.name for node in model.graph.node]
    assert names[:3] == ["stages.0.0/Conv", "stages.0.1/Gelu", "stages.1.0/Conv"]
    assert len(set(names)) == len(names)
    assert {"stages.0.0.weight", "stages.1.0.bias"} <= {i.name for i in model.graph.initializer}
    data = (tmp_path / record.artifact.name).read_bytes()
    assert b".py" not in data
    assert b"pkg.torch" not in data
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_a_batch_frozen_by_the_code_is_an_error(tmp_path):
    def freeze(x):
        return x[torch.arange(len(x.unbind(0)))]

    with pytest.raises(TraceError) as caught:
        export(tmp_path, Net(freeze), batch="1:2:4")
    assert caught.value.exit_code == 9


def test_an_axis_that_the_exporter_froze_is_an_error(tmp_path, monkeypatch):
    """The checker itself: a file with a fixed batch where a range was asked."""
    from deploy import trace

    real = trace._convert
    fixed = request(batch="2")
    monkeypatch.setattr(trace, "_capture", lambda m, a, r: torch.export.export(m, a, strict=False))
    monkeypatch.setattr(trace, "_convert", lambda program, r: real(program, fixed))
    with pytest.raises(TraceError, match="froze or freed") as caught:
        export(tmp_path, Net(), batch="1:2:4")
    assert "images" in caught.value.message


def test_another_opset_in_the_file_is_an_error(tmp_path, monkeypatch):
    from deploy import trace

    real = trace._convert
    monkeypatch.setattr(trace, "_convert", lambda program, r: real(program, request(opset=18)))
    with pytest.raises(TraceError, match="wrote opset 18, asked was 21"):
        export(tmp_path, Net(), opset=21)


def test_a_graph_that_is_wrong_at_another_batch_is_an_error(tmp_path):
    """The comparison itself, on a module that PyTorch and the graph disagree about after tracing."""
    net = Net()
    drifting = Drifting(net)
    with pytest.raises(TraceError, match="is wrong at batch"):
        onnx_from_torch(drifting.eval(), request(batch="1:2:4"), tmp_path)


class Drifting(nn.Module):
    """Gives something else each time it runs outside of the tracer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        out = self.net(images)
        return out if torch.compiler.is_compiling() else out + 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda x: x @ torch.ones(3, 3), "inner"),
        (lambda x: x if x.sum() > 0 else -x, "inner"),
    ],
)
def test_a_failure_names_the_module(tmp_path, fault, words):
    with pytest.raises(TraceError) as caught:
        export(tmp_path, Net(fault))
    assert f"in module {words}" in caught.value.message
    assert caught.value.hint


def test_an_operator_that_onnx_lacks_is_named_with_its_module(tmp_path):
    with pytest.raises(TraceError) as caught:
        export(tmp_path, Net(lambda x: torch.special.bessel_j0(x)))
    assert "bessel_j0" in caught.value.message
    assert "inner" in caught.value.message


def test_the_exporters_noise_goes_to_the_log(tmp_path, capfd, caplog):
    with caplog.at_level(logging.DEBUG, logger="deploy.trace"):
        export(tmp_path, Net())
    assert capfd.readouterr() == ("", "")


def test_same_bytes_twice(tmp_path):
    hashes = []
    for name in ("a", "b"):
        torch.manual_seed(3)
        (tmp_path / name).mkdir()
        hashes.append(export(tmp_path / name, Net()).artifact.sha256)
    assert hashes[0] == hashes[1]


def test_choice_of_opset():
    assert choose_opset(None, Target.ONNXRUNTIME, False) == 20
    assert choose_opset(None, Target.TENSORRT, False) == 21
    assert choose_opset(22, Target.TENSORRT, False) == 22
    assert choose_opset(23, Target.TENSORRT, True) == 23
    for opset in (17, 23):
        with pytest.raises(RecipeError, match="expected 18 to 22"):
            choose_opset(opset, Target.TENSORRT, False)


def test_outputs_equal_pytorch(tmp_path):
    from deploy.backends.base import BuildOptions
    from deploy.backends.onnxruntime import open_model

    net = Net().eval()
    record = export(tmp_path, net, batch="2")
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    with open_model(tmp_path / record.artifact.name, BuildOptions(threads=1)) as runner, torch.inference_mode():
        assert abs(runner.infer({"images": images})["logits"] - net(torch.from_numpy(images)).numpy()).max() < 1e-5


class Returning(nn.Module):
    """Gives whatever ``make`` makes of the logits."""

    def __init__(self, make):
        super().__init__()
        self.net, self.make = Net(), make

    def forward(self, images):
        return self.make(self.net(images))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: (x, x + 1), "returns 2 outputs, asked 1: logits"),
        (lambda x: x.sum(), "output logits: a scalar"),
        (lambda x: {"logits": x}, "returns dict"),
    ],
)
def test_outputs_that_were_not_asked_are_an_error(tmp_path, make, words):
    with pytest.raises(TraceError) as caught:
        export(tmp_path, Returning(make))
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("make", [lambda x: x.argmax(1), lambda x: x.reshape(len(x), 5, 1), lambda x: x > 0])
def test_outputs_of_any_type_and_rank_are_held_against_pytorch(tmp_path, make):
    record = export(tmp_path, Returning(make), batch="2")
    assert record.outputs[0].shape[0] == 2


def test_a_shape_without_batch_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="output logits: exported logits float32"):
        export(tmp_path, Returning(lambda x: x.t()), batch="2")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.double(), "float64[1, 5], expected float32[1, 5]"),
        (lambda x: x.argmax(1, keepdim=True).expand(-1, 5), "int64[1, 5], expected float32[1, 5]"),
        (lambda x: x[:, :4], "float32[1, 4], expected float32[1, 5]"),
        (lambda x: x.sum(), "float32[], expected float32[1, 5]"),
        (lambda x: (x, x + 1), "2 outputs exported"),
    ],
)
def test_a_file_whose_outputs_differ_from_pytorchs_is_an_error(tmp_path, monkeypatch, make, words):
    """The checker itself: the file comes from another module than the one that runs."""
    from deploy import trace

    other, capture, convert = Returning(make).eval(), trace._capture, trace._convert
    names = ("logits", "extra") if "2 outputs" in words else ("logits",)
    monkeypatch.setattr(trace, "_capture", lambda m, a, r: capture(other, a, r))
    monkeypatch.setattr(trace, "_convert", lambda p, r: convert(p, replace(r, outputs=names)))
    with pytest.raises(TraceError) as caught:
        export(tmp_path, Net())
    assert words in caught.value.message


def test_another_number_of_inputs_is_an_error(tmp_path, monkeypatch):
    from deploy import trace

    real = trace._check_interface
    doubled = request()
    doubled = replace(doubled, inputs=doubled.inputs * 2)
    monkeypatch.setattr(trace, "_check_interface", lambda m, r, o: real(m, doubled, o))
    with pytest.raises(TraceError, match=r"1 inputs exported \(images\), asked 2"):
        export(tmp_path, Net())


def test_what_the_exporter_logs_stays_off_the_terminal():
    """Where no handler is found, Python's last resort prints warnings to stderr."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript")]
    before = [logger.handlers[:] for logger in loggers]
    with quiet_torch():
        assert all(isinstance(h, logging.NullHandler) for logger in loggers for h in logger.handlers)
        assert all(logger.handlers for logger in loggers)
    assert [logger.handlers for logger in loggers] == before
    assert not logging.getLogger("onnxscript").handlers, "it has a handler by itself now: this help is not needed"
