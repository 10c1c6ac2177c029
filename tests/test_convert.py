"""``effdeploy convert``: every layout of every system there and back, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import os
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support import effdeploy, reference_case

from deploy.errors import CheckpointError, StorageError, UnknownNameError
from deploy.models import SYSTEMS, conversion, find_system
from deploy.models.base import empty_state, resolve_options
from deploy.models.conversion import convert_checkpoint, layout_names
from deploy.models.weights import random_state
from deploy.resolve import resolve_recipe

TINY = {"variant": ("test", "tiny")}
TRAINING, DEPLOY = "openmmlab-training-form", "openmmlab-deploy-form"


@pytest.fixture(params=SYSTEMS)
def system(request):
    return find_system(request.param)


def tiny(system):
    recipe = resolve_recipe(system.name, TINY)
    return recipe, partial(empty_state, system, resolve_options(system, recipe), recipe.size)


@pytest.fixture
def wrapped(tmp_path):
    """A tiny RIFormer in the official keys, in a trainer's wrapping."""
    system = find_system("riformer")
    _, template = tiny(system)
    state = random_state(template("training"), 0)
    named = {f"module.{system.weight_maps[0].inverse(k)}": v for k, v in state.items()}
    path = tmp_path / "wrapped.pth"
    torch.save({"epoch": 3, "state_dict": named}, path)
    return path


def convert(source, out, **options):
    system = find_system("riformer")
    return convert_checkpoint(system, resolve_recipe("riformer", TINY), source, out, **options)


def test_names_survive_the_way_there_and_back(system):
    _, template = tiny(system)
    for weight_map in system.weight_maps:
        if weight_map.inverse is not None:
            keys = list(template(weight_map.layout))
            written = [weight_map.inverse(key) for key in keys]
            assert [weight_map.rename(key) for key in written] == keys
            assert len(set(written)) == len(keys)


def test_a_map_that_loses_keys_is_noticed():
    system = find_system("riformer")
    wrong = dataclasses.replace(system.weight_maps[0], inverse=lambda key: key.replace("norm2", "norm1"))
    broken = dataclasses.replace(system, weight_maps=(wrong,))
    with pytest.raises(AssertionError):
        test_names_survive_the_way_there_and_back(broken)


@pytest.mark.parametrize("name", ["riformer_s12_train", "riformer_s12_deploy"])
def test_the_written_keys_are_the_official_ones(name):
    case, system = reference_case(name), find_system("riformer")
    for key in case.state:
        assert system.weight_maps[0].inverse(system.weight_maps[0].rename(key)) == key


def test_the_official_switch_gives_the_same_weights(tmp_path):
    """The release's own switch_to_deploy, run on the weights of the training case, against ours."""
    case = reference_case("riformer_s12_train")
    ours = tmp_path / "deploy.pth"
    convert_checkpoint(
        find_system("riformer"), resolve_recipe("riformer"), case.save(tmp_path / "train.pth"), ours, to=DEPLOY
    )
    written = torch.load(ours, weights_only=True)  # noqa: TID251 - plain tensors that this test wrote
    assert set(written) == set(reference_case("riformer_s12_deploy").state)
    for block in ("0.0", "2.1", "6.1"):
        head = f"backbone.network.{block}"
        scale = case.state[f"{head}.token_mixer.affine.weight"].double().flatten() - 1
        expected = case.state[f"{head}.norm1.weight"].double() * scale
        torch.testing.assert_close(written[f"{head}.norm_reparam.weight"].double(), expected, rtol=1e-7, atol=0)


def test_out_of_a_wrapping_into_safetensors(wrapped, tmp_path):
    record = convert(wrapped, tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    assert record.max_relative == 0
    assert len(plain) == record.tensors
    assert all(key.startswith(("backbone.", "head.fc.")) for key in plain)
    again = convert(tmp_path / "plain.safetensors", tmp_path / "again.pth")
    assert again.artifact.name == "again.pth"
    assert again.source_sha256 == record.artifact.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pth", "plain.safetensors", "wrapped.pth"]


def test_training_to_deploy_form_and_never_back(wrapped, tmp_path):
    record = convert(wrapped, tmp_path / "d.safetensors", to=DEPLOY)
    assert 0 <= record.max_relative <= 1e-5
    assert any("norm_reparam" in key for key in load_file(tmp_path / "d.safetensors"))
    with pytest.raises(CheckpointError, match="cannot be taken apart") as caught:
        convert(tmp_path / "d.safetensors", tmp_path / "t.pth", to=TRAINING)
    assert f"--to {DEPLOY}" in caught.value.hint
    assert not (tmp_path / "t.pth").exists()


def test_a_wrong_fold_is_caught_by_the_outputs(wrapped, tmp_path, monkeypatch):
    system = find_system("riformer")
    fold = system.relayouts["training", "reparameterised"]

    def careless(state):
        return {k: v * 1.01 if k.endswith("norm_reparam.weight") else v for k, v in fold(state).items()}

    wrong = dataclasses.replace(system, relayouts={("training", "reparameterised"): careless})
    with pytest.raises(CheckpointError, match="outputs differ"):
        convert_checkpoint(wrong, resolve_recipe("riformer", TINY), wrapped, tmp_path / "d.pth", to=DEPLOY)
    assert [p.name for p in tmp_path.iterdir()] == ["wrapped.pth"]


def test_nothing_is_overwritten_unless_asked(wrapped, tmp_path):
    out = tmp_path / "mine.pth"
    out.write_bytes(b"mine")
    with pytest.raises(StorageError, match="left alone"):
        convert(wrapped, out)
    assert out.read_bytes() == b"mine"
    convert(wrapped, out, force=True)
    assert out.stat().st_size > 1000
    with pytest.raises(StorageError):
        convert(wrapped, tmp_path / "none" / "x.pth")


def test_a_file_system_without_hard_links(wrapped, tmp_path, monkeypatch):
    """FAT and many network shares refuse ``link``; none can be mounted here."""

    def refuse(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "x.pth"
    convert(wrapped, out)
    before = out.read_bytes()
    late = tmp_path / "late.pth"
    late.write_bytes(b"late")
    with pytest.raises(StorageError, match="File exists"):  # another process took the name after the first look
        conversion._publish(late, out, force=False)
    assert out.read_bytes() == before


def test_unknown_layouts_and_types(wrapped, tmp_path):
    with pytest.raises(UnknownNameError) as caught:
        convert(wrapped, tmp_path / "x.pth", to="openmmlab-deploy")
    assert TRAINING in caught.value.hint
    assert f"did you mean '{DEPLOY}'" in caught.value.hint
    with pytest.raises(CheckpointError, match=r"expected \.safetensors"):
        convert(wrapped, tmp_path / "x.onnx")
    assert set(layout_names(find_system("riformer"))) == {TRAINING, DEPLOY}


def test_a_layout_that_is_only_read(wrapped, tmp_path):
    system = find_system("riformer")
    read_only = tuple(dataclasses.replace(m, inverse=None) for m in system.weight_maps)
    system = dataclasses.replace(system, weight_maps=read_only)
    with pytest.raises(CheckpointError, match="can be read, not written"):
        convert_checkpoint(system, resolve_recipe("riformer", TINY), wrapped, tmp_path / "x.pth")


def test_the_command(wrapped, tmp_path):
    out = tmp_path / "o.safetensors"
    arguments = ("convert", wrapped, out, "--system", "riformer", "--variant", "tiny", "--to", DEPLOY)
    result = effdeploy(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "OpenMMLab deploy form" in result.stdout
    assert effdeploy(*arguments).exit_code == 19
    wrong = effdeploy("convert", wrapped, tmp_path / "p.pth", "--system", "riformer", "--variant", "s12")
    assert wrong.exit_code == 6
    assert "tiny" in wrong.stderr
