"""Castling-ViT against the official attention's outputs, what its deploy form drops, and how its cost grows."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from support import effdeploy, reference_case, rounding_of, types_of, without_islands
from torch.utils.flop_counter import FlopCounterMode

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.graph.pipeline import run_passes
from deploy.models import find_system
from deploy.models.base import example_inputs, load_model
from deploy.models.castling import DeployAttention, LinearAngularAttention, strong, unit
from deploy.models.checkpoint import read_checkpoint
from deploy.models.weights import random_state
from deploy.parity.compare import with_drift
from deploy.parity.inputs import natural_image
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Drift, ParityRecord, Precision, Preprocess, Target, TensorSpec
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, onnx_from_torch

SYSTEM = find_system("castling")
LIMIT, AUXILIARY_LIMIT = 1e-4, 5e-4  # of the largest logit; a probability at the threshold may fall on either side


def load(target=Target.ONNXRUNTIME, **asked):
    options = {key.replace("__", "."): ("", value) for key, value in {"variant": "tiny", **asked}.items()}
    return load_model(SYSTEM, resolve_recipe("castling", options), target)


@pytest.mark.parametrize(("suffix", "limit"), [("", LIMIT), ("_aux", AUXILIARY_LIMIT)])
def test_the_attention_is_the_official_one(suffix, limit):
    case = reference_case(f"castling_attn_d192_h3_L197{suffix}")
    attention = LinearAngularAttention(192, 3, qkv_bias=True, auxiliary=bool(suffix))
    attention.load_state_dict(case.state)
    with torch.inference_mode():
        got = attention(torch.from_numpy(case.images))[0].numpy()[:, ::8]
    assert abs(got - case.logits).max() <= limit * abs(case.logits).max()
    attention.auxiliary = not attention.auxiliary  # negative control
    with torch.inference_mode():
        got = attention(torch.from_numpy(case.images))[0].numpy()[:, ::8]
    assert abs(got - case.logits).max() > limit * abs(case.logits).max()


def on_onnxruntime(module, spec, images, folder):
    """Export a module, run the passes, and return what ONNX Runtime gives for the images."""
    request = TraceRequest(inputs=(spec,), outputs=("logits",), batch=Batch.parse(len(images)), opset=20)
    traced = onnx_from_torch(module, request, folder)
    graph = folder / run_passes(folder / traced.artifact.name, Target.ONNXRUNTIME, folder).artifact.name
    with open_model(graph, BuildOptions(threads=1)) as runner:
        return runner.infer({spec.name: images})["logits"]


class Attention(torch.nn.Module):
    """An attention alone, its output without what it returns beside."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, images):
        found = self.attention(images)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("suffix", "deployed", "limit"), [("", False, LIMIT), ("", True, LIMIT), ("_aux", False, AUXILIARY_LIMIT)]
)
def test_the_attentions_graph_is_the_official_one(suffix, deployed, limit, tmp_path):
    case = reference_case(f"castling_attn_d192_h3_L197{suffix}")
    attention = LinearAngularAttention(192, 3, qkv_bias=True, auxiliary=bool(suffix)).eval().requires_grad_(False)
    attention.load_state_dict(read_checkpoint(case.save(tmp_path / "official.pth")).tensors)
    spec = TensorSpec(name="images", dtype="float32", shape=("batch", *case.images.shape[1:]))
    module = Attention(DeployAttention(attention) if deployed else attention)
    got = on_onnxruntime(module, spec, case.images, tmp_path)[:, ::8]
    assert abs(got - case.logits).max() <= limit * abs(case.logits).max()
    other = reference_case(f"castling_attn_d192_h3_L197{'' if suffix else '_aux'}")  # negative control
    assert abs(got - other.logits).max() > AUXILIARY_LIMIT * abs(case.logits).max()


@pytest.mark.slow
def test_the_graph_with_the_branch_meets_the_official_logits(tmp_path):
    """The training form's: the deploy form has no branch, and its drift is measured."""
    case = reference_case("castling_deit_tiny_224_aux")
    loaded = load(variant="deit_tiny", weights=str(case.save(tmp_path / "official.pth")))
    got = on_onnxruntime(loaded.reference, loaded.inputs[0], case.images, tmp_path)
    assert abs(got - case.logits).max() <= AUXILIARY_LIMIT * abs(case.logits).max()


@pytest.mark.parametrize("auxiliary", [False, True])
def test_pytorch_forms_meet_the_official_logits(auxiliary, tmp_path):
    plain = reference_case("castling_deit_tiny_224")
    case = reference_case("castling_deit_tiny_224_aux") if auxiliary else plain
    path = case.save(tmp_path / "official.pth")
    loaded = load(variant="deit_tiny", weights=str(path), options__auxiliary=auxiliary)
    assert loaded.approximate is auxiliary
    limit = (AUXILIARY_LIMIT if auxiliary else LIMIT) * abs(case.logits).max()
    with torch.inference_mode():
        reference, deploy = (m(torch.from_numpy(case.images)).numpy() for m in (loaded.reference, loaded.deploy))
    assert abs(reference - case.logits).max() <= limit
    assert abs(deploy - plain.logits).max() <= LIMIT * abs(plain.logits).max()  # same weights: the branch has none
    assert (abs(deploy - case.logits).max() > limit) == auxiliary


@pytest.mark.slow
def test_the_command_line_meets_the_official_logits(tmp_path):
    case = reference_case("castling_deit_tiny_224")
    path, out = case.save(tmp_path / "official.pth"), tmp_path / "bundle"
    result = effdeploy(
        "export", "castling", "--variant", "deit_tiny", "--weights", path, "--auxiliary", "false", "--batch", 2,
        "--fp16", "--until", "parity", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(out)
    assert run.model.drift.fp64_relative <= 1e-10
    limits = {run.passes.artifact: LIMIT, run.precision.artifact: run.parity.tolerances["fp16"].max_relative}
    for artifact, limit in limits.items():
        with open_model(out / artifact.name, BuildOptions(threads=1)) as runner:
            got = runner.infer({"images": case.images})["logits"]
        assert abs(got - case.logits).max() <= limit * abs(case.logits).max()
    assert all(c.top1 == 1.0 for c in run.parity.comparisons)


@pytest.fixture
def leaning(tmp_path):
    """Weights that still lean on the branch: drawn without ``castling.random``."""
    path = tmp_path / "leaning.pth"
    torch.save(random_state(load(size=64).reference.state_dict(), 0), path)
    return path


def test_a_large_drift_is_refused_unless_told(leaning, tmp_path):
    few = (
        "export", "castling", "--variant", "tiny", "--size", 64, "--weights", leaning, "--until", "parity",
        "--out", tmp_path / "bundle",
    )  # fmt: skip
    refused = effdeploy(*few)  # 65 tokens: many probabilities are above the threshold
    assert refused.exit_code == 15
    said = " ".join((refused.stdout + refused.stderr).split())
    pattern = r"form by (0\.0\d+) of the largest output; parity.max_drift allows 0.001; (--set) (\S+) takes it"
    off, *enough = re.search(pattern, said).groups()
    assert 0.03 < float(off) < 0.06
    told = effdeploy(*few, *enough)
    assert told.exit_code == 0, told.stdout + told.stderr
    run = read_manifest(tmp_path / "bundle")
    assert run.parity.notes[-1].startswith("the deploy form is off from the training form by " + off)
    assert run.model.drift.fp64_relative == pytest.approx(run.model.drift.fp32_relative, rel=1e-3)


def test_random_weights_have_a_branch_that_faded_out(leaning):
    faded, leans = load(size=64), load(size=64, weights=str(leaning))
    images = torch.from_numpy(natural_image((64, 64), Preprocess(), 0)[None])
    with torch.inference_mode():
        for loaded, drifts in ((faded, False), (leans, True)):
            expected = loaded.reference(images)
            assert (abs(loaded.deploy(images) - expected).max() > 1e-5 * abs(expected).max()) == drifts
        off = abs(faded.deploy(images) - leans.deploy(images)).max()
        assert off <= 1e-5 * abs(expected).max()  # the linear branch is the same


def test_drift_is_judged_whoever_has_it_and_nan_is_too_much():
    parity = ParityRecord(ok=True, verdict="holds", tolerances={}, comparisons=(), inputs={}, notes=(), seconds=0.0)
    drift = Drift(fp32_max_abs=1.0, fp32_relative=0.1, fp64_max_abs=1.0, fp64_relative=0.1)
    assert with_drift(parity, drift, None, approximate=False) == parity
    assert with_drift(parity, drift, 0.1, approximate=False) == parity
    assert not with_drift(parity, drift, 0.09, approximate=False).ok
    assert not with_drift(parity, dataclasses.replace(drift, fp32_relative=np.nan), 0.5, approximate=True).ok
    failed = with_drift(dataclasses.replace(parity, ok=False, verdict="fails"), drift, 0.09, approximate=True)
    assert failed.verdict.startswith("fails; and the deploy form is off")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_without_the_branch_the_deploy_form_is_exact(dtype, limit):
    loaded = load(options__auxiliary=False, size=64)
    reference = loaded.reference.to(dtype)
    deploy = SYSTEM.to_deploy(reference, Target.ONNXRUNTIME)
    images = example_inputs(loaded.inputs, 2)[0].to(dtype)
    with torch.inference_mode():
        expected, got = reference(images), deploy(images)
    assert abs(expected - got).max() <= limit * abs(expected).max()


def test_a_zero_row_stays_zero_and_the_threshold_does_not_normalise():
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(strong(torch.tensor([0.02, 0.03, 0.95])), torch.tensor([0.0, 0.03, 0.95]))


def macs(module, size):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def test_cost_grows_linearly_with_the_tokens():
    per_token = {}
    for size in (64, 256):
        loaded, tokens = load(size=size), (size // 8) ** 2 + 1
        per_token[size] = [macs(module, size) / tokens for module in (loaded.deploy, loaded.reference)]
    assert per_token[256][0] == pytest.approx(per_token[64][0], rel=0.05)
    assert per_token[256][1] > 2 * per_token[64][1]  # with the branch it is quadratic


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_the_tiny_variant(precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'effdeploy[tensorrt-rtx]'")
    result = effdeploy(
        "export", "castling", "--variant", "tiny", f"--{precision}", "--backend", "tensorrt_rtx",
        "--set", "engine.sm=[80,89]", "--until", "engine", "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    engines = read_manifest(tmp_path / "bundle").engines
    assert [engine.device for engine in engines] == ["sm80", "sm89"]
    assert all(engine.audit.ok for engine in engines)


def test_norms_and_denominators_stay_float32(tmp_path, monkeypatch):
    target = Target.TENSORRT  # the form is ONNX Runtime's
    loaded = load(target, size=64)
    request = TraceRequest(inputs=loaded.inputs, outputs=("logits",), batch=Batch.parse(1), opset=20)
    traced = onnx_from_torch(loaded.deploy, request, tmp_path)
    graph = tmp_path / run_passes(tmp_path / traced.artifact.name, target, tmp_path).artifact.name
    image, off = natural_image((64, 64), Preprocess(), 0)[None], []
    for expected in ("FLOAT", "FLOAT16"):
        typed = tmp_path / convert_precision(graph, Precision.FP16, tmp_path, target=target).artifact.name
        places = {
            name: kind for name, kind in types_of(typed).items() if re.search(r"\.attn/(ReduceL2|Div)(_\d+)?$", name)
        }
        assert len(places) == 3 * 3 * 2
        assert set(places.values()) == {expected}
        assert "FLOAT16" in {kind for name, kind in types_of(typed).items() if ".attn/MatMul" in name}
        off.append(rounding_of(typed, graph, image))
        without_islands(monkeypatch)  # negative control
    assert off[1] > 1.05 * off[0]
