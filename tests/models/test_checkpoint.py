"""Checkpoint files: every wrapping that trainers write, nothing loose, nothing that runs code."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import effdeploy

from deploy.errors import CheckpointError, NonFiniteWeightsError, UnsafeCheckpointError
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.models.checkpoint import Checkpoint, WeightMap, fit_checkpoint, read_checkpoint
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM = find_system("riformer")


def official(state):
    """Name our keys as the official release does."""
    names = {}
    for key, value in state.items():
        if key.startswith("stages."):
            _, stage, _, block, rest = key.split(".", 4)
            key = f"network.{2 * int(stage)}.{block}.{rest}"
        elif key.startswith("downsamples."):
            _, index, leaf = key.split(".")
            key = f"network.{2 * int(index) + 1}.proj.{leaf}"
        key = key.replace("stem.", "patch_embed.proj.")
        names[
            "head.fc." + key[5:]
            if key.startswith("head.")
            else "backbone." + key.replace("norm.", "norm6.", key.startswith("norm."))
        ] = value
    return names


@pytest.fixture(scope="module")
def loaded():
    return load_model(
        SYSTEM, resolve_recipe("riformer", {"variant": ("", "tiny")}, ["weights=random:7"]), Target.ONNXRUNTIME
    )


@pytest.fixture(scope="module")
def state(loaded):
    return official(loaded.reference.state_dict())


def load(path, *assignments):
    recipe = resolve_recipe("riformer", {"variant": ("", "tiny"), "weights": ("", str(path))}, assignments)
    return load_model(SYSTEM, recipe, Target.ONNXRUNTIME)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "meta": {"epoch": 3}},
    "model": lambda s: {"model": s, "optimizer": {"param_groups": []}},
    "ema.module": lambda s: {"ema": {"module": s, "updates": 5}, "model": prefixed(s, "wrong.")},
    "state_dict_ema": lambda s: {"state_dict": prefixed(s, "wrong."), "state_dict_ema": s},
    "mmengine ema": lambda s: {"ema_state_dict": {**prefixed(s, "module."), "steps": torch.tensor(3)}},
    "module prefix": lambda s: prefixed(s, "module."),
    "compiled module prefix": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "no backbone prefix": lambda s: {k.removeprefix("backbone."): v for k, v in s.items()},
    "half": lambda s: {k: v.half() for k, v in s.items()},
    "data preprocessor": lambda s: {**s, "data_preprocessor.mean": torch.zeros(3, 1, 1)},
}


@pytest.mark.parametrize("name", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_wrappings(name, suffix, state, loaded, tmp_path):
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPPINGS[name](state), path)
    got = load(path)
    for key, value in loaded.reference.state_dict().items():
        tolerance = 2e-3 if name == "half" else 0
        assert torch.allclose(got.reference.state_dict()[key], value, rtol=tolerance, atol=tolerance)
    assert got.record.weights.kind == "file"
    assert "weights.p" in got.record.weights.statement


def test_safetensors(state, loaded, tmp_path):
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")
    got = load(tmp_path / "weights.safetensors").reference.state_dict()
    assert all(torch.equal(value, got[key]) for key, value in loaded.reference.state_dict().items())


def test_the_ema_is_preferred_and_said(state, tmp_path):
    torch.save(WRAPPINGS["ema.module"](state), tmp_path / "w.pth")
    assert "from ema.module" in load(tmp_path / "w.pth").record.weights.statement


def test_deploy_layout_loads(tmp_path):
    from deploy.models.base import build_uninitialised
    from deploy.models.weights import random_state

    options = {**SYSTEM.variants["tiny"].options, "classes": 1000}
    model = build_uninitialised(SYSTEM, options, (224, 224), "reparameterised")
    torch.save({"state_dict": official(random_state(model.state_dict(), 1))}, tmp_path / "deploy.pth")
    assert load(tmp_path / "deploy.pth").record.weights.layout == "OpenMMLab deploy form"


def test_missing_unexpected_and_misshapen_keys_are_listed_with_neighbours(state, tmp_path):
    broken = dict(state)
    broken["backbone.network.0.0.mlp.fc1.weights"] = broken.pop("backbone.network.0.0.mlp.fc1.weight")
    broken["backbone.patch_embed.proj.bias"] = torch.zeros(9)
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth")
    text = caught.value.message
    assert "missing: stages.0.blocks.0.mlp.fc1.weight (nearest: backbone.network.0.0.mlp.fc1.weights)" in text
    assert "unexpected: backbone.network.0.0.mlp.fc1.weights" in text
    assert "shape: backbone.patch_embed.proj.bias is (9,), stem.bias needs (8,)" in text
    assert caught.value.exit_code == 6


def test_two_keys_for_one_weight(state, tmp_path):
    torch.save({**state, "patch_embed.proj.bias": torch.zeros(8)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="twice"):
        load(tmp_path / "w.pth")


def test_another_variant_is_named(tmp_path):
    from deploy.models.base import empty_state
    from deploy.models.weights import random_state

    template = empty_state(SYSTEM, {**SYSTEM.variants["s12"].options, "classes": 1000}, (224, 224), "training")
    torch.save(official(random_state(template, 0)), tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth")
    assert caught.value.hint == "it fits --variant s12"


def test_another_number_of_classes(state, tmp_path):
    other = {**state, "head.fc.weight": torch.randn(10, 32), "head.fc.bias": torch.zeros(10)}
    torch.save(other, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth")
    assert "classes" in caught.value.hint
    assert load(tmp_path / "w.pth", "classes=10").reference.head.out_features == 10


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(keep, suffix, state, tmp_path):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert caught.value.exit_code == 6
    assert caught.value.hint


class Hostile:
    """Runs a command when it is unpickled by the ordinary unpickler."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(zipped, state, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    torch.save({"state_dict": state, "evil": Hostile(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_checkpoint(path)
    assert not marker.exists()
    assert caught.value.exit_code == 7
    assert "system" in caught.value.message
    assert "convert" in caught.value.hint
    torch.load(path, weights_only=False)  # noqa: TID251 - negative control: the attack is real
    assert marker.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, state, tmp_path):
    bad = {**state, "backbone.patch_embed.proj.bias": torch.full((8,), value)}
    torch.save(bad, tmp_path / "w.pth")
    with pytest.raises(NonFiniteWeightsError, match=r"backbone\.patch_embed\.proj\.bias") as caught:
        load(tmp_path / "w.pth")
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {}, {"state_dict": {}}])
def test_files_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        read_checkpoint(tmp_path / "w.pth")


def test_unknown_type_and_missing_file(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown type '\.h5'"):
        read_checkpoint(tmp_path / "w.h5")
    with pytest.raises(CheckpointError, match="not a file"):
        read_checkpoint(tmp_path / "none.pth")


BESIDE = {
    "scalar tensors": lambda s: {"state_dict": s, "epoch": torch.tensor(3), "best": torch.tensor(0.7)},
    "an ema without weights": lambda s: {"ema": {"decay": 0.9, "updates": 5}, "state_dict": s},
    "an ema of scalars": lambda s: {"ema": {"decay": torch.tensor(0.9), "more": {"n": torch.tensor(5)}}, "model": s},
}


@pytest.mark.parametrize("name", BESIDE)
def test_bookkeeping_beside_a_wrapper_does_not_hide_it(name, state, tmp_path):
    torch.save(BESIDE[name](state), tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").tensors.keys() == {k.removeprefix("module.") for k in state}
    assert load(tmp_path / "w.pth").record.weights.kind == "file"


def test_a_weight_beside_a_wrapper_is_not_dropped_in_silence(state, tmp_path):
    """Negative control: two real tensors at the top are weights, whatever else lies there."""
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2), "state_dict": state}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").tensors.keys() == {"a", "b"}


def test_only_scalars_are_no_weights(tmp_path):
    torch.save({"epoch": torch.tensor(3)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_file_that_holds_itself_ends(tmp_path):
    endless = {"w": torch.zeros(2)}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").tensors.keys() == {"w"}


@pytest.mark.parametrize(("value", "finite"), [(1e300, False), (-1e39, False), (1e38, True)])
def test_float64_beyond_float32_is_not_finite(value, finite, state, tmp_path):
    key = "backbone.patch_embed.proj.bias"
    torch.save({**state, key: torch.full((8,), value, dtype=torch.float64)}, tmp_path / "w.pth")
    if finite:
        assert read_checkpoint(tmp_path / "w.pth").tensors[key].dtype == torch.float32
        return
    with pytest.raises(NonFiniteWeightsError, match=r"backbone\.patch_embed\.proj\.bias"):
        read_checkpoint(tmp_path / "w.pth")


STRANGE = {
    "complex64": lambda: torch.zeros(8, dtype=torch.complex64),
    "sparse_coo": lambda: torch.eye(8).to_sparse(),
    "meta device": lambda: torch.zeros(8, device="meta"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_are_not_dense_and_real_are_refused(kind, state, tmp_path):
    torch.save({**state, "backbone.patch_embed.proj.bias": STRANGE[kind]()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"backbone\.patch_embed\.proj\.bias \({kind}") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert caught.value.exit_code == 6


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantised_tensors_are_refused(state, tmp_path):
    torch.save({**state, "q": torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"q \(qint8\)"):
        read_checkpoint(tmp_path / "w.pth")


def test_integers_for_a_float_weight_do_not_fit(state, tmp_path):
    torch.save({**state, "backbone.patch_embed.proj.bias": torch.ones(8, dtype=torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth")
    assert "dtype: backbone.patch_embed.proj.bias is int8, stem.bias needs float32" in caught.value.message


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("options.depths=3", "options.depths: got 3, expected e.g. ["),
        ("options.widths=[8,16]", "options.widths: got [8, 16], expected e.g. ["),
        ("options.mlp_ratio=abc", "options.mlp_ratio: got 'abc', expected e.g. "),
    ],
)
def test_options_that_no_model_can_be_built_with(assignment, words, tmp_path):
    got = effdeploy(
        "export", "riformer", "--variant", "tiny", "--until", "model", "--set", assignment, "--out", tmp_path / "out"
    )
    assert got.exit_code == 3
    assert words in " ".join(got.stderr.split())


def test_a_defect_of_a_system_is_not_blamed_on_the_recipe():
    def build(options, size, layout):
        raise TypeError("a defect")

    system = replace(SYSTEM, build=build)
    with pytest.raises(TypeError, match="a defect"):
        load_model(system, resolve_recipe("riformer", {"variant": ("", "tiny")}), Target.ONNXRUNTIME)


def resnet(state):
    """A checkpoint of quite another model."""
    return {f"layer{i}.{j}.conv1.weight": torch.zeros(4, 4, 3, 3) for i in range(4) for j in range(60)}


def half_missing(state):
    return {k: v for k, v in state.items() if "network.0" not in k} | {f"extra.{i}": torch.zeros(2) for i in range(40)}


@pytest.mark.parametrize("other", [resnet, half_missing])
def test_a_foreign_checkpoint_is_told_in_a_few_lines_with_counts(other, state, tmp_path):
    torch.save(other(state), tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth")
    lines = caught.value.message.splitlines()
    assert len(lines) <= 8
    options = {**SYSTEM.variants["tiny"].options, "classes": 1000}
    model = len(SYSTEM.build(options, (224, 224), "reparameterised").state_dict())  # the layout with fewest keys
    count, extra = (model, 240) if other is resnet else (sum("network.0" in k for k in state), 40)
    assert lines[0].endswith(f": {count} missing, {extra} unexpected")
    assert sum(line.startswith("  missing: ") for line in lines) == 3
    assert sum(line.startswith("  unexpected: ") for line in lines) == 3
    assert lines[-1] == f"  ... and {count + extra - 6} more"
    assert ("another model" in caught.value.hint) == (other is resnet)


def test_every_kind_of_misfit_is_shown(state, tmp_path):
    """Many of one kind do not crowd the others out."""
    broken = {**half_missing(state), "backbone.patch_embed.proj.bias": torch.zeros(9)}
    broken["backbone.patch_embed.proj.weight"] = torch.zeros(state["backbone.patch_embed.proj.weight"].shape).int()
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth")
    assert {line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:-1]} == {
        "missing", "shape", "dtype", "unexpected",
    }  # fmt: skip


INTEGERS = {
    "bn.num_batches_tracked": torch.tensor(70000),
    "index": torch.arange(12).view(3, 4),
    "mask": torch.eye(3) > 0,
}


def fit(**changed):
    tensors = {**INTEGERS, "w": torch.ones(2), **changed}
    expected = {**INTEGERS, "w": torch.ones(2)}
    maps = (WeightMap(name="own", layout="own", rename=str),)
    return fit_checkpoint(Checkpoint(tensors=tensors, sha256="", wrapping=""), maps, lambda layout: expected, str).state


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8, torch.float64])
def test_integer_buffers_may_have_any_type_that_holds_them(dtype):
    got = fit(**{k: v.to(dtype) for k, v in INTEGERS.items() if k != "bn.num_batches_tracked"})
    for key, value in INTEGERS.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32])
def test_the_counter_of_a_batch_norm_may_have_any_type_and_value(dtype):
    got = fit(**{"bn.num_batches_tracked": torch.tensor(1234.5).to(dtype)})
    assert got["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", torch.full((3, 4), 0.5)),
        ("index", torch.full((3, 4), 257.0)),  # as bfloat16 it may have been 256 or 258 as well
        ("index", torch.full((3, 4), float("nan"))),
        ("mask", torch.full((3, 3), 2)),
        ("w", torch.ones(2, dtype=torch.int64)),
    ],
)
def test_values_that_a_type_cannot_hold_do_not_fit(name, value):
    with pytest.raises(CheckpointError, match=f"dtype: {name} is"):
        fit(**{name: value})
