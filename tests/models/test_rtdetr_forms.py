"""The forms of RT-DETR's convolutions: filtering and sums in place of concatenations are the same function."""

from __future__ import annotations

from functools import partial

import onnx
import onnxruntime
import pytest
import torch
from test_rtdetr import NARROW
from torch.nn import functional

from deploy.backends.gpu import Gpu
from deploy.console import Console, Mode
from deploy.graph.pipeline import run_passes
from deploy.linting.build import check_before_build
from deploy.models.base import load_model, measure_drift, specialised
from deploy.models.rtdetr import SYSTEM, winograd
from deploy.models.rtdetr.layers import ConvNorm, folded
from deploy.models.rtdetr.pyramid import SumCsp, without_concatenation
from deploy.parity.metrics import furthest
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Precision, Target, TensorSpec
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, onnx_from_torch


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def convolution(channels, out, act, kernel=3, stride=1, dtype=torch.float64):
    block = ConvNorm(channels, out, kernel, stride, act=act).to(dtype)
    for seed, tensor in enumerate((block.conv.weight, block.norm.weight, block.norm.bias)):
        tensor.data = draw(*tensor.shape, dtype=dtype, seed=seed) / 3
    return folded(block)


def test_the_transforms_filter_exactly():
    a, g, b = winograd.transforms()
    pixels, taps = draw(6), draw(3, seed=1)
    want = functional.conv1d(pixels[None, None], taps[None, None])[0, 0]
    assert abs(a @ ((g @ taps) * (b @ pixels)) - want).max() <= 1e-14
    assert (
        abs(a @ ((g @ taps.flip(0)) * (b @ pixels)) - want).max() > 0.1
    )  # negative control: convolution, not correlation


@pytest.mark.parametrize("act", ["", "relu", "silu"])
def test_filtering_is_the_convolution(act):
    direct = convolution(5, 7, act)
    either = winograd.with_winograd(direct, always=True)
    x = draw(3, 5, 8, 12)
    assert either.filters(x)
    assert abs(either(x) - direct(x)).max() <= 1e-13
    single = winograd.with_winograd(convolution(5, 7, act, dtype=torch.float32), always=True)
    assert abs(single(x.float()) - direct(x)).max() <= 2e-5
    odd = draw(1, 5, 10, 12)
    assert not either.filters(odd)
    assert torch.equal(either(odd), direct(odd))


def test_only_what_gains_is_filtered():
    with torch.device("meta"):
        wide, narrow = (winograd.with_winograd(convolution(c, c, "")) for c in (128, 64))
        others = [convolution(128, 128, "", kernel=1), convolution(128, 128, "", stride=2)]
        maps = {side: torch.empty(1, 128, side, side) for side in (20, 40, 80)}
    assert [wide.filters(maps[side]) for side in maps] == [False, True, True]
    assert not narrow.filters(torch.empty(1, 64, 160, 160, device="meta"))
    assert all(winograd.with_winograd(other) is other for other in others)


def test_only_float32_on_onnx_runtimes_cpu_filters_unless_it_is_told():
    """Filtering needs float32's digits, and other runtimes have filtering kernels of their own."""
    elsewhere = ({"engine.device": ("", "cuda")}, {"engine.backend": ("", "openvino")})
    assert [dict(resolve_recipe("rtdetr", place).options) for place in elsewhere] == [{"convolutions": "direct"}] * 2
    chosen = {p: dict(resolve_recipe("rtdetr", {"precision": ("", p)}).options) for p in ("fp32", "fp16", "bf16")}
    assert chosen == {"fp32": {}, "fp16": {"convolutions": "direct"}, "bf16": {"convolutions": "direct"}}
    told = resolve_recipe("rtdetr", {"precision": ("", "fp16")}, ["convolutions=winograd"])
    assert told.options["convolutions"] == "winograd"


def test_a_machine_whose_gpu_onnx_runtime_takes_does_not_filter(monkeypatch):
    for place in ("deploy.resolve", "deploy.backends.onnxruntime"):
        monkeypatch.setattr(f"{place}.first_gpu", lambda: Gpu(name="made up", sm=89))
    takes = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert dict(resolve_recipe("rtdetr").options) == ({"convolutions": "direct"} if takes else {})
    assert dict(resolve_recipe("rtdetr", {"engine.device": ("", "cpu")}).options) == {}


@pytest.mark.parametrize("channels", [[24, 40, 56], [90, 40, 56]])
def test_sums_in_place_of_concatenations_are_the_same_encoder(channels):
    """With few channels below, the input projection goes into the blocks; with many it stays."""
    recipe = resolve_recipe("rtdetr", {"variant": ("", "tiny"), "size": ("", "64x96"), "options.expansion": ("", 1.0)})
    encoder = load_model(SYSTEM, recipe, Target.TENSORRT).reference.encoder.double()
    for level, count in enumerate(channels):
        encoder.input_proj[level] = ConvNorm(count, 32, 1).double()
        encoder.input_proj[level].norm.bias.data = draw(32)
    plain = folded(encoder)
    summed = without_concatenation(plain)
    assert isinstance(summed.input_proj[0], torch.nn.Identity) is (channels[0] == 24)
    maps = [draw(2, c, 64 // s, 96 // s, seed=s) for c, s in zip(channels, (8, 16, 32), strict=True)]
    for got, want, training in zip(summed(maps), plain(maps), encoder(maps), strict=True):
        assert abs(got - want).max() <= 1e-12
        assert abs(want - training).max() <= 1e-12
    block = SumCsp(plain.fpn_blocks[0])  # negative control: the halves swapped
    first, second = draw(1, 32, 4, 6), draw(1, 32, 4, 6, seed=1)
    assert abs(block(second, first) - plain.fpn_blocks[0](first, second)).max() > 0.01


BACKBONES = {"width": 16, "stem": [8, 16], "widths": [8, 16, 24, 32], "outs": [32, 64, 96, 128]}
DISTINCT = {str(variant.options): name for name, variant in SYSTEM.variants.items() if name != "tiny"}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_every_variant_has_an_exact_deploy_form(name):
    own = {key: value for key, value in BACKBONES.items() if key in SYSTEM.variants[name].options}
    options = {f"options.{key}": ("", value) for key, value in {**NARROW, **own}.items()}
    recipe = resolve_recipe("rtdetr", {"variant": ("", name), "size": ("", "64x96"), **options})
    loaded = load_model(SYSTEM, recipe, Target.ONNXRUNTIME)
    drift = measure_drift(loaded, partial(furthest, loaded.system.task))
    assert drift.fp64_relative <= 1e-10
    assert loaded.record.deploy_parameters < loaded.record.parameters


def test_a_filtered_convolution_keeps_its_nine_numbers_and_float32(tmp_path):
    """The trace itself compares the graph with PyTorch; the file grows by the transforms' constants only."""
    block = convolution(64, 64, "relu", dtype=torch.float32)
    module = torch.nn.Sequential(winograd.with_winograd(block, always=True), torch.nn.Conv2d(64, 4, 1).eval())
    spec = TensorSpec(name="images", dtype="float32", shape=("batch", 64, 8, 12))
    request = TraceRequest(inputs=(spec,), outputs=("y",), batch=Batch.parse("1:2:3"), opset=20)
    traced = onnx_from_torch(module, request, tmp_path)
    patched = run_passes(tmp_path / traced.artifact.name, Target.ONNXRUNTIME, tmp_path)
    assert patched.artifact.size < 1.3 * block.conv.weight.numel() * 4
    for backend, device, told in (("onnxruntime", "auto", 1), ("onnxruntime", "cpu", 0), ("tensorrt", "auto", 1)):
        record = check_before_build(tmp_path / patched.artifact.name, backend, device, Console(Mode.SILENT))
        assert [f.rule for f in record.findings].count("filtered-convolution") == told
    keep = SYSTEM.keep_fp32({**SYSTEM.variants["tiny"].options, "classes": 80})[-1:]  # the others name the decoder
    for kept, precision in ((keep, onnx.TensorProto.FLOAT), ((), onnx.TensorProto.FLOAT16)):  # the second: a control
        typed = convert_precision(
            tmp_path / patched.artifact.name, Precision.FP16, tmp_path, keep=kept, target=Target.ONNXRUNTIME
        )
        graph = onnx.load(tmp_path / typed.artifact.name).graph
        types = {t.name: t.data_type for t in graph.initializer}
        products = [n for n in graph.node if n.op_type == "MatMul"]
        assert {types[name] for n in products for name in n.input if name in types} == {precision}
    assert [n.op_type for n in graph.node].count("DepthToSpace") == 1


@pytest.mark.parametrize(
    ("asked", "target", "said", "unsaid"),
    [
        ({}, Target.ONNXRUNTIME, "GridSample, sums for concatenations, filtered convolutions", "plain"),
        ({"precision": "fp16"}, Target.ONNXRUNTIME, "sums for concatenations, plain convolutions", "filtered"),
        ({"options.sampling": "gather"}, Target.ONNXRUNTIME, "sampling by Gather", "GridSample"),
        ({"options.convolutions": "direct"}, Target.ONNXRUNTIME, "plain convolutions", "filtered"),
        ({"options.sampling": "grid_sample"}, Target.TENSORRT, "GridSample", "Gather"),
        ({"options.sampling": "plugin"}, Target.TENSORRT, "TensorRT's plugin", "Gather"),
        ({"variant": "r18_dsp"}, Target.TENSORRT, "sampling of pixels", "Gather"),
        ({"options.part": "encoder"}, Target.ONNXRUNTIME, "filtered convolutions", "GridSample"),
    ],
)  # fmt: skip
def test_the_report_names_the_form_that_is_exported(asked, target, said, unsaid):
    recipe = resolve_recipe("rtdetr", {"variant": ("", "tiny"), **{key: ("", value) for key, value in asked.items()}})
    form = specialised(SYSTEM, recipe).forms[target]
    assert said in form.name
    assert unsaid not in form.name
    if "options.sampling" in asked:
        assert f"options.sampling={asked['options.sampling']} asks for it" in form.reason
