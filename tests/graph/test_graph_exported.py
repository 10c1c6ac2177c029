"""The passes on what torch.onnx really writes, at the opsets that effdeploy traces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deploy.artifacts import PATCHED
from deploy.graph.io import save_model
from deploy.graph.pipeline import run_passes
from deploy.records import PassesRecord, Target

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Network(nn.Module):
    """One of each: what the passes are for, in a few milliseconds; LayerNorm also written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.groups, self.activation, self.layer = nn.GroupNorm(2, 8), nn.GELU(), nn.LayerNorm(8)
        self.after, self.tanh, self.drop = nn.BatchNorm2d(8), nn.GELU(approximate="tanh"), nn.Dropout(0.5)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.groups(self.activation(self.norm(self.conv(images))))
        x = self.tanh(self.up_norm(self.up(self.after(x))))
        x = self.layer(self.drop(x.flatten(2).transpose(1, 2)))
        mean = x.mean(-1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return self.fc(x.mean(1))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model(torch.randn(4, 3, 8, 8))  # running statistics of its own
    return model.eval()


def export(network: Network, folder: Path, exporter: str, opset: int, dynamic: bool) -> Path:
    path = folder / f"{exporter}-{opset}-{dynamic}.onnx"
    images = torch.randn(2, 3, 8, 8)
    if exporter == "dynamo":
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        program = torch.onnx.export(
            network, (images,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, input_names=["images"],
            output_names=["logits"], verbose=False,
        )  # fmt: skip
        save_model(program.model_proto, path)
    else:
        axes = {"images": {0: "batch"}, "logits": {0: "batch"}} if dynamic else None
        torch.onnx.export(
            network, (images,), str(path), dynamo=False, opset_version=opset, dynamic_axes=axes,
            input_names=["images"], output_names=["logits"], do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    return path


EXPORTS = [("dynamo", 18, False), ("dynamo", 20, True), ("dynamo", 21, True), ("torchscript", 18, True)]


@pytest.fixture(scope="module")
def exporter(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, bool], Path]:
    return functools.cache(functools.partial(export, network, tmp_path_factory.mktemp("export")))


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


def passed(record: PassesRecord, name: str) -> tuple[int, str]:
    found = next(p for p in record.passes if p.name == name)
    return found.sites, " | ".join(found.declined)


@pytest.mark.parametrize("kind", EXPORTS, ids=str)
@pytest.mark.parametrize("target", Target, ids=lambda t: t.value)
def test_the_patched_graph_equals_torch_and_holds_what_its_opset_allows(
    exporter: Callable[[str, int, bool], Path],
    network: Network,
    tmp_path: Path,
    target: Target,
    kind: tuple[str, int, bool],
) -> None:
    exported = exporter(*kind)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    record = run_passes(exported, target, tmp_path, verify={"images": images})
    counts, opset = dict(record.op_counts), onnx.load(exported).opset_import[0].version
    expected = network(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(logits(tmp_path / PATCHED, images), expected, rtol=0, atol=2e-6)
    assert counts["LayerNormalization"] == 2  # its own and the one written out
    assert not {"Constant", "Identity", "Dropout", "Cast"} & counts.keys()
    assert counts.get("Gelu", 0) == (2 if opset >= 20 else 0)
    assert ("trace with opset 20" in passed(record, "fuse_gelu")[1]) == (opset < 20)
    assert counts.get("BatchNormalization", 0) == 1  # behind the group norm there is no convolution to fold it into
    assert "expected Conv, ConvTranspose, Gemm" in passed(record, "fuse_batch_norm")[1]
    if target is Target.TENSORRT and opset < 21:
        assert f"from opset 21 on, the graph has {opset}" in passed(record, "fuse_group_norm")[1]
    assert ("GroupNormalization" in counts) == (opset >= 21)


def test_the_instance_norm_form_of_opset_20_becomes_the_operator_at_21_for_tensorrt(
    exporter: Callable[[str, int, bool], Path], network: Network, tmp_path: Path
) -> None:
    """A model whose author writes ONNX Runtime's form keeps it there and gets TensorRT's where TensorRT runs."""
    model = onnx.load(exporter("dynamo", 20, True))
    lifted = onnx.version_converter.convert_version(model, 21)
    save_model(lifted, tmp_path / "10-traced.onnx")
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    for target, wanted in ((Target.ONNXRUNTIME, "InstanceNormalization"), (Target.TENSORRT, "GroupNormalization")):
        record = run_passes(tmp_path / "10-traced.onnx", target, tmp_path, verify={"images": images})
        assert wanted in record.op_counts
        expected = network(torch.from_numpy(images)).detach().numpy()
        np.testing.assert_allclose(logits(tmp_path / PATCHED, images), expected, rtol=0, atol=2e-6)
