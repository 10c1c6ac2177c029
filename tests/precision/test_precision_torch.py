"""Networks as torch's exporter writes them, with its shared weights, folded constants and dynamic shapes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from precision_cases import close, convert, noise, run
from torch import nn

from deploy.precision.emulate import emulated
from deploy.records import Precision, Target


class ConvNet(nn.Module):
    """Conv, GroupNorm, GELU, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.GroupNorm(1, 16)
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.3))
        self.fc = nn.Conv2d(16, 32, 1)
        self.up = nn.Upsample(scale_factor=2.0, mode="bilinear")
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.scale * self.mix(self.norm(x))
        return self.head(self.up(self.up(nn.functional.gelu(self.fc(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Patches, class token, attention and MLP with LayerNorm before each, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 32) * 0.1)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """Each network at the opsets of the targets, with a dynamic batch."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("exported")
    models = {}
    for name, build, opset in (("conv20", ConvNet, 20), ("conv21", ConvNet, 21), ("attention20", Attention, 20)):
        torch.manual_seed(0)
        torch.onnx.export(
            build().eval(), (torch.zeros(2, 3, 32, 32),), folder / f"{name}.onnx", dynamo=True, opset_version=opset,
            input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        models[name] = onnx.load(folder / f"{name}.onnx")
    return models


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize(("precision", "limit"), [(Precision.FP16, 2e-3), (Precision.BF16, 2e-2)])
@pytest.mark.parametrize("name", ["conv20", "conv21", "attention20"])
def test_an_exported_network_keeps_its_outputs(
    name: str, precision: Precision, limit: float, target: Target, exported: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    model = exported[name]
    feeds = {"images": noise(3, 3, 32, 32)}
    typed = convert(model, tmp_path, precision, feeds=feeds, target=target)
    close(model, typed, feeds, limit)
    products = {"Conv", "MatMul", "Gemm"}
    types = {typed.types[n.output[0]] for n in typed.model.graph.node if n.op_type in products}
    assert types == {typed.types[typed.node(f"{_stem(typed.model)}").output[0]]}
    norms = {"LayerNormalization", "InstanceNormalization", "Softmax"}
    assert {typed.types[n.output[0]] for n in typed.model.graph.node if n.op_type in norms} <= {1}
    assert typed.record.largest_activation is not None


def _stem(model: onnx.ModelProto) -> str:
    return next(n.name for n in model.graph.node if n.op_type == "Conv")


def test_the_emulation_is_stricter_than_onnx_runtime(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider computes float16 graphs in float32 and rounds less; that is why the twin exists."""
    model = exported["attention20"]
    errors = []
    for seed in range(4):
        feeds = {"images": noise(8, 3, 32, 32, seed=seed)}
        typed = convert(model, tmp_path)
        wanted = run(model, feeds)[0]
        errors.append([np.square(run(m, feeds)[0] - wanted).mean() for m in (typed.model, emulated(typed.model))])
    runtime, twin = np.sqrt(np.mean(errors, axis=0))
    assert twin > 1.1 * runtime > 0


def test_the_exporters_shapes_survive(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    typed = convert(exported["attention20"], tmp_path)
    shapes = {v.name: v.type.tensor_type.shape for v in typed.model.graph.value_info}
    made = [n for node in typed.model.graph.node for n in node.output if n not in {"logits"}]
    assert all(name in shapes for name in made)
    assert not any(d.dim_param.startswith("unk__") for s in shapes.values() for d in s.dim)


def test_the_file_is_half_as_large(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    typed = convert(exported["attention20"], tmp_path)
    sizes = [sum(len(t.raw_data) for t in m.graph.initializer) for m in (exported["attention20"], typed.model)]
    assert sizes[1] < 0.55 * sizes[0]
