"""AlterNet against the official implementation's outputs, its folds and its windows."""

from __future__ import annotations

import pytest
import torch
from support import effdeploy, reference_case, rounding_of, types_of

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.errors import CheckpointError, RecipeError, SizeError
from deploy.graph.pipeline import run_passes
from deploy.models import find_system
from deploy.models.alternet import (
    ATTENTIONS,
    AttentionBlock,
    DeployAttentionBlock,
    LocalAttention,
    Projections,
    folded,
    from_windows,
    keep_fp32,
    to_windows,
)
from deploy.models.base import example_inputs, load_model
from deploy.models.weights import random_state
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Precision, Target, TensorSpec
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, onnx_from_torch

SYSTEM = find_system("alternet")
CASES = {"alternet_18_cifar_w4": "18_cifar", "alternet_18_imagenet": "18", "alternet_50_imagenet": "50"}
SLOW = [  # the command line meets the CIFAR case in ONNX Runtime's form
    pytest.param(name, target, marks=[pytest.mark.slow] * ("imagenet" in name), id=f"{name}-{target.value}")
    for name in CASES
    for target in Target
    if "imagenet" in name or target is not Target.ONNXRUNTIME
]
LIMIT = 1e-4  # of the largest logit


def load(asked, target=Target.ONNXRUNTIME):
    return load_model(SYSTEM, resolve_recipe("alternet", {key: ("", value) for key, value in asked.items()}), target)


@pytest.mark.parametrize(("name", "target"), SLOW)
def test_pytorch_forms_and_the_graph_meet_the_official_logits(name, target, tmp_path):
    case = reference_case(name)
    loaded = load({"variant": CASES[name], "weights": str(case.save(tmp_path / "official.pth"))}, target)
    scale = abs(case.logits).max()
    with torch.inference_mode():
        for module in (loaded.reference, loaded.deploy):
            assert abs(module(torch.from_numpy(case.images)).numpy() - case.logits).max() <= LIMIT * scale
    request = TraceRequest(inputs=loaded.inputs, outputs=("logits",), batch=Batch.parse(2), opset=20)
    traced = onnx_from_torch(loaded.deploy, request, tmp_path)
    graph = tmp_path / run_passes(tmp_path / traced.artifact.name, target, tmp_path).artifact.name
    with open_model(graph, BuildOptions(threads=1)) as runner:
        got = runner.infer({"images": case.images})["logits"]
    assert abs(got - case.logits).max() <= LIMIT * scale


def test_a_table_read_from_key_to_query_is_another_function(tmp_path):
    case = reference_case("alternet_18_cifar_w4")
    loaded = load({"variant": "18_cifar", "weights": str(case.save(tmp_path / "official.pth"))})
    for module in loaded.reference.modules():
        if isinstance(module, LocalAttention):
            module.pos_embedding = torch.nn.Parameter(module.pos_embedding.flip(0, 1), requires_grad=False)
    got = loaded.run({"images": case.images})["logits"]
    assert abs(got - case.logits).max() > LIMIT * abs(case.logits).max()


def test_the_command_line_meets_the_official_logits(tmp_path):
    """A float16 export judges its float32 file, which is the engine of a float32 one, as well."""
    case = reference_case("alternet_18_cifar_w4")
    path, out = case.save(tmp_path / "official.pth", meta={"epoch": 1}), tmp_path / "bundle"
    result = effdeploy(
        "export", "alternet", "--variant", "18_cifar", "--weights", path, "--batch", 2, "--fp16",
        "--until", "parity", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(out)
    limits = {run.passes.artifact: LIMIT, run.precision.artifact: run.parity.tolerances["fp16"].max_relative}
    for artifact, limit in limits.items():
        with open_model(out / artifact.name, BuildOptions(threads=1)) as runner:
            got = runner.infer({"images": case.images})["logits"]
        assert (got.argmax(1) == case.logits.argmax(1)).all()
        assert abs(got - case.logits).max() <= limit * abs(case.logits).max()
    assert all(c.top1 == 1.0 for c in run.parity.comparisons)


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_for_ampere_and_ada(precision, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "bundle"
    result = effdeploy(
        "export", "alternet", "--variant", "tiny", f"--{precision}", "--backend", "tensorrt_rtx", "--sm", "80,89",
        "--until", "engine", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    engines = read_manifest(out).engines
    assert [engine.device for engine in engines] == ["sm80", "sm89"]
    assert all(engine.audit.ok for engine in engines)


@pytest.mark.parametrize("size", [(4, 4), (8, 12)])
def test_windows_go_row_by_row_and_come_back(size):
    x = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float32).reshape(2, 3, *size)
    windows = to_windows(x, 4)
    expected = [
        image[:, r : r + 4, c : c + 4] for image in x for r in range(0, size[0], 4) for c in range(0, size[1], 4)
    ]
    assert torch.equal(windows, torch.stack(expected))
    assert torch.equal(from_windows(windows, size, 4), x)


@pytest.mark.parametrize(("dim", "width", "merged"), [(16, 16, True), (64, 16, False)])
@pytest.mark.parametrize("target", list(Target), ids=lambda t: t.value)
def test_an_attention_block_keeps_its_function(dim, width, merged, target):
    block = AttentionBlock(dim, width, 2, {"head_dim": 8, "window": 4}).double().eval()
    block.load_state_dict({key: value.double() for key, value in random_state(block.state_dict(), 0).items()})
    x = torch.randn(2, dim, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        folds = Projections(block)
        assert (folds.narrow is None) == merged
        active = torch.nn.functional.gelu(block.norm1(x))
        got = x + ATTENTIONS[target](folds)(folds.narrow(active) if folds.narrow else active)
        assert torch.allclose(got, block(x), atol=1e-12)
        folds.bias = folds.bias.t()  # negative control: key by query
        got = x + ATTENTIONS[target](folds)(folds.narrow(active) if folds.narrow else active)
        assert not torch.allclose(got, block(x), atol=1e-6)


def test_a_norm_folds_into_the_convolution_before_it():
    convolution, norm = torch.nn.Conv2d(3, 4, 3, 2, 1, bias=False).double(), torch.nn.BatchNorm2d(4).double().eval()
    norm.load_state_dict({key: value.double() for key, value in random_state(norm.state_dict(), 0).items()})
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(folded(convolution, norm)(x), norm(convolution(x)), atol=1e-12)


class OneBlock(torch.nn.Module):
    """The deploy form of one attention block, under the name that it has in the network."""

    def __init__(self, block, target):
        super().__init__()
        self.layer1 = torch.nn.Sequential(DeployAttentionBlock(block, target))

    def forward(self, images):
        return self.layer1(images)


@pytest.mark.parametrize("target", list(Target), ids=lambda t: t.value)
def test_the_logits_of_windows_stay_float32(target, tmp_path):
    block = AttentionBlock(64, 16, 2, {"head_dim": 16, "window": 4}).eval().requires_grad_(False)
    block.load_state_dict(random_state(block.state_dict(), 0))
    block.attn.pos_embedding += 300  # for all keys alike, so nothing to a softmax; float16 has steps of 0.25 there
    spec = TensorSpec(name="images", dtype="float32", shape=("batch", 64, 8, 8))
    request = TraceRequest(inputs=(spec,), outputs=("logits",), batch=Batch.parse(1), opset=20)
    traced = onnx_from_torch(OneBlock(block, target), request, tmp_path)
    graph = tmp_path / run_passes(tmp_path / traced.artifact.name, target, tmp_path).artifact.name
    images, off = example_inputs((spec,), 1)[0].numpy(), {}
    for keep, expected in ((keep_fp32(SYSTEM.variants["tiny"].options), "FLOAT"), ((), "FLOAT16")):  # negative control
        typed = tmp_path / convert_precision(graph, Precision.FP16, tmp_path, keep=keep, target=target).artifact.name
        types = types_of(typed)
        assert types["layer1.0.attention/Add"] == expected
        products = {name: kind for name, kind in types.items() if "attention/MatMul" in name}
        assert len(products) == 2
        assert set(products.values()) == {"FLOAT16"}
        off[expected] = rounding_of(typed, graph, images)
    assert off["FLOAT16"] > 5 * off["FLOAT"]


def test_a_missing_key_is_refused(tmp_path):
    case = reference_case("alternet_18_cifar_w4")
    del case.state["layer3.1.attn.pos_embedding"]
    with pytest.raises(CheckpointError, match=r"missing.*\n.*layer3\.1\.attn\.pos_embedding"):
        load({"variant": "18_cifar", "weights": str(case.save(tmp_path / "short.pth"))})


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ({"variant": "18", "size": 256}, SizeError, "256x256.*multiples of 224"),
        ({"variant": "18_cifar", "size": 48}, SizeError, "multiples of 32"),
        ({"variant": "18_cifar", "size": 32, "options.window": 7}, SizeError, "multiples of 56"),
        ({"variant": "tiny", "options.stem": "patch"}, RecipeError, "imagenet or cifar"),
        ({"variant": "tiny", "options.blocks": [1, 2]}, RecipeError, "one a stage"),
    ],
)
def test_what_cannot_be_is_refused(asked, error, text):
    with pytest.raises(error, match=text):
        load(asked)
