"""Deformable sampling: every form gives the same numbers, and TensorRT-RTX builds them."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
import torch
from support import effdeploy
from torch.nn import functional

from deploy.artifacts import read_manifest
from deploy.models.rtdetr.sampling import BILINEAR, DiscreteSampling, GatherSampling, GridSampling

SIZES, POINTS = [(12, 20), (6, 10), (3, 5)], [4, 2, 3]
HEADS, DIM, QUERIES = 4, 8, 30


def case(dtype=torch.float32, batch=2, reach=1.6):
    """Draw maps, points of which some lie outside, on pixels and on edges, and weights."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch * HEADS, DIM, h, w, generator=generator, dtype=dtype) for h, w in SIZES]
    grid = (torch.rand(batch * HEADS, QUERIES, sum(POINTS), 2, generator=generator, dtype=dtype) * 2 - 1) * reach
    grid[:, 0], grid[:, 1], grid[:, 2] = -1.0, 1.0, 0.0
    grid[:, 3], grid[:, 4] = 1e4, -1e4
    weights = torch.rand(batch * HEADS, 1, QUERIES, sum(POINTS), generator=generator, dtype=dtype).softmax(3)
    return maps, grid, weights


def by_hand(maps, grid, weights):
    """Sample in numpy, point by point, from the definition."""
    levels = np.repeat(np.arange(len(SIZES)), POINTS)
    out = np.zeros((len(grid), DIM, QUERIES))
    for n, q, p in np.ndindex(len(grid), QUERIES, len(levels)):
        values, (height, width) = maps[levels[p]][n].numpy(), SIZES[levels[p]]
        x, y = (grid[n, q, p].numpy() + 1) * (width, height) / 2 - 0.5
        for row, column in ((r, c) for r in (np.floor(y), np.floor(y) + 1) for c in (np.floor(x), np.floor(x) + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[n, 0, q, p].item()
                out[n, :, q] += share * values[:, int(row), int(column)]
    return out


@pytest.mark.parametrize("form", ["grid_sample", "gather"])  # the plugin's: tests/graph/test_graph_plugins.py
def test_each_form_is_the_definition(form):
    maps, grid, weights = case(torch.float64)
    got = BILINEAR[form](SIZES, POINTS).double()(maps, grid, weights).numpy()
    assert abs(got - by_hand(maps, grid, weights)).max() <= 1e-11


def test_forms_agree_in_float32_and_other_samplings_do_not():
    maps, grid, weights = case()
    got = {name: form(SIZES, POINTS)(maps, grid, weights) for name, form in BILINEAR.items()}
    assert abs(got["grid_sample"] - got["gather"]).max() <= 2e-6
    for wrong in ({"align_corners": True}, {"padding_mode": "border"}, {"mode": "nearest"}):  # negative controls
        how = {"align_corners": False, "padding_mode": "zeros", "mode": "bilinear", **wrong}
        parts = [functional.grid_sample(x, g, **how) for x, g in zip(maps, grid.split(POINTS, 2), strict=True)]
        assert abs((torch.cat(parts, 3) * weights).sum(3) - got["gather"]).max() > 0.1


@pytest.mark.parametrize("form", [GatherSampling, DiscreteSampling])
def test_rows_that_are_not_numbers_stay_alone(form):
    maps, grid, weights = case()
    sampling = form(SIZES, POINTS)
    clean = sampling(maps, grid, weights)
    grid[HEADS:], weights[HEADS:] = torch.nan, torch.inf
    assert torch.equal(sampling(maps, grid, weights)[:HEADS], clean[:HEADS])


def test_discrete_sampling_takes_the_pixel_below_and_clamps():
    maps, grid, weights = case()
    got = DiscreteSampling(SIZES, POINTS)(maps, grid, weights)
    want, start = torch.zeros_like(got), 0
    for x, (height, width), points in zip(maps, SIZES, POINTS, strict=True):
        side = torch.tensor([width, height])
        pixel = ((grid[:, :, start : start + points] + 1) / 2 * side + 0.5).to(torch.int64).clamp(0, height - 1)
        for n in range(len(x)):
            taken = x[n][:, pixel[n, ..., 1], pixel[n, ..., 0]]
            want[n] += (taken * weights[n, 0, :, start : start + points]).sum(2)
        start += points
    assert abs(got - want).max() <= 1e-6
    assert abs(got - GridSampling(SIZES, POINTS)(maps, grid, weights)).max() > 0.1


@pytest.mark.parametrize(("form", "precision"), [("grid_sample", "fp16"), ("gather", "fp32")])
def test_tensorrt_rtx_builds_the_detector(form, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    engine = build(
        tmp_path, "tiny", precision, "--size", "64x96", "--batch", "1:2:3", "--set", f"options.sampling={form}"
    )
    assert engine.artifact.name.endswith(".rtx")
    assert engine.artifact.size > 0


@pytest.mark.slow
def test_tensorrt_rtx_fuses_the_real_detector(tmp_path):
    """Attention in one kernel each and few kernels in all, with the score path and the boxes in float32."""
    pytest.importorskip("tensorrt_rtx")
    engine = build(tmp_path, "r18", "fp16")
    assert engine.audit.fused["attention"] == engine.audit.expected["attention"] == 4
    assert sum(engine.audit.kernels.values()) <= 166


def build(folder, variant, precision, *options):
    result = effdeploy(
        "export", "rtdetr", "--variant", variant, "--backend", "tensorrt_rtx", "--sm", "89", f"--{precision}",
        "--until", "engine", *options, "--out", folder / "bundle",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    (engine,) = read_manifest(folder / "bundle").engines
    return engine


@pytest.mark.parametrize(("opset", "mode"), [(16, "bilinear"), (20, "linear"), (21, "linear")])
def test_tensorrt_rtx_reads_the_mode_that_opset_20_renamed(opset, mode):
    """Older parsers take "linear" for an unknown word and sample the nearest pixel (deploy/data/known_bad.yaml)."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert interpolation(trt, opset, mode) == trt.InterpolationMode.LINEAR
    assert interpolation(trt, opset, "nearest") == trt.InterpolationMode.NEAREST  # negative control


def interpolation(trt, opset, mode):
    """Parse one GridSample and return what the network holds."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": {opset}]>
        sample (float[1,2,4,4] x, float[1,3,3,2] grid) => (float[1,2,3,3] y)
        {{ y = GridSample<mode = "{mode}">(x, grid) }}
    """)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    (layer,) = [found for found in layers if found.type == trt.LayerType.GRID_SAMPLE]
    layer.__class__ = trt.IGridSampleLayer  # the bindings give the base class, and the type is told apart
    return layer.interpolation_mode
