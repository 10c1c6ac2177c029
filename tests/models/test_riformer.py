"""RIFormer against the official implementation's outputs, and its own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import effdeploy, reference_case

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.models import find_system
from deploy.models.base import count_macs, load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM = find_system("riformer")
CASES = ("riformer_s12_train", "riformer_s12_switched", "riformer_s12_deploy", "riformer_s24_train")
LIMIT = 1e-4  # of the largest logit


def variant_of(case):
    return case.split("_")[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", list(Target), ids=lambda t: t.value)
def test_pytorch_forms_meet_the_official_logits(name, target, tmp_path):
    case = reference_case(name)
    path = case.save(tmp_path / "official.pth")
    options = {"variant": ("", variant_of(name)), "weights": ("", str(path))}
    loaded = load_model(SYSTEM, resolve_recipe("riformer", options), target)
    scale = abs(case.logits).max()
    with torch.inference_mode():
        for module in (loaded.reference, loaded.deploy):
            got = module(torch.from_numpy(case.images)).numpy()
            assert abs(got - case.logits).max() <= LIMIT * scale
    wrong = loaded.deploy
    wrong.head.bias.data += 2 * LIMIT * scale  # negative control
    assert abs(wrong(torch.from_numpy(case.images)).detach().numpy() - case.logits).max() > LIMIT * scale


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_the_command_line_meets_the_official_logits(name, precision, tmp_path):
    case = reference_case(name)
    path = case.save(tmp_path / "official.pth", meta={"epoch": 1})
    out = tmp_path / "bundle"
    result = effdeploy(
        "export", "riformer", "--variant", variant_of(name), "--weights", path, "--batch", 2, f"--{precision}",
        "--until", "parity", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(out)
    assert "official.pth" in result.stdout
    with open_model(out / run.engines[0].artifact.name, BuildOptions(threads=1)) as runner:
        got = runner.infer({"images": case.images})["logits"]
    assert (got.argmax(1) == case.logits.argmax(1)).all()
    tolerance = LIMIT if precision == "fp32" else run.parity.tolerances["fp16"].max_relative
    assert abs(got - case.logits).max() <= tolerance * abs(case.logits).max()
    assert all(c.top1 == 1.0 for c in run.parity.comparisons)


# Parameters and multiply-adds of the official metafile (configs/riformer/metafile.yml of OpenMMLab mmpretrain).
OFFICIAL = {
    ("s12", 224): (11.915, 1.822),
    ("s24", 224): (21.389, 3.412),
    ("s36", 224): (30.863, 5.003),
    ("m36", 224): (56.173, 8.801),
    ("m48", 224): (73.473, 11.590),
    ("s12", 384): (11.915, 5.355),
    ("m48", 384): (73.473, 34.060),
}


@pytest.mark.parametrize(("variant", "size"), OFFICIAL)
def test_parameters_and_macs_are_the_published_ones(variant, size):
    from deploy.models.base import empty_state

    options = {**SYSTEM.variants[variant].options, "classes": 1000}
    parameters, macs = OFFICIAL[variant, size]
    state = empty_state(SYSTEM, options, (size, size), "reparameterised")  # what the official table counts
    assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(parameters, abs=0.001)
    # The official counter adds normalisation and layer scales; ours counts convolutions and matrix products.
    assert count_macs(SYSTEM, options, (size, size)) / 1e9 == pytest.approx(macs, rel=0.01)


def test_the_folds_leave_fewer_parameters_and_no_layer_scale():
    loaded = load_model(SYSTEM, resolve_recipe("riformer", {"variant": ("", "tiny")}), Target.ONNXRUNTIME)
    assert loaded.record.deploy_parameters < loaded.record.parameters
    assert not [name for name, _ in loaded.deploy.named_parameters() if "scale" in name or "mixer" in name]


def test_the_identity_is_subtracted_in_the_mixer():
    from deploy.models.riformer import Affine

    mixer = Affine(2)
    mixer.affine.weight.data.fill_(1.0)
    mixer.affine.bias.data.fill_(0.25)
    x = torch.randn(1, 2, 3, 3)
    assert np.allclose(mixer(x).detach(), 0.25, atol=1e-6)
