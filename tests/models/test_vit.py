"""Vision transformers against timm with the same weights, and their checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import effdeploy, reference_case

from deploy.errors import CheckpointError, RecipeError
from deploy.models import find_system, vit
from deploy.models.base import build_uninitialised, empty_state, example_inputs, load_model
from deploy.models.weights import random_state
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM = find_system("tome")
SMALL = {"width": 48, "patch": 16, "depth": 2, "heads": 3}
LAYOUTS = {  # ours -> timm's keyword arguments
    "class token": ({}, {}),
    "distilled": ({"distilled": True}, {}),
    "registers": ({"registers": 4, "embed_prefix": False}, {"reg_tokens": 4, "no_embed_class": True}),
    "average, fc_norm": ({"pool": "avg"}, {"global_pool": "avg"}),
    "no class token, norm before": (
        {"class_token": False, "pool": "avg", "fc_norm": False, "qkv_bias": False, "layer_scale": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False, "init_values": 1e-5},
    ),
    "registers, no class token": (
        {"class_token": False, "pool": "avg", "registers": 4, "embed_prefix": False},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 4, "no_embed_class": True},
    ),
}


def options_of(**changes):
    merging = {"r": 0, "schedule": "constant", "prop_attn": True, "groups": False, "pieces": True}
    return {**vit.options_of(SMALL["width"]), **SMALL, **merging, "classes": 10, **changes}


def theirs(size=64, distilled=False, **kwargs):
    pytest.importorskip("timm", reason="timm is in the extra bench")
    from timm.models import deit, vision_transformer

    kind = deit.VisionTransformerDistilled if distilled else vision_transformer.VisionTransformer
    arguments = {"img_size": size, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    return kind(**arguments, **kwargs).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_timms_function_of_timms_keys(layout):
    changes, kwargs = LAYOUTS[layout]
    model = theirs(distilled=changes.get("distilled", False), **kwargs)
    model.load_state_dict(random_state(model.state_dict(), 1))
    ours = SYSTEM.build(options_of(**changes), (64, 64), "training")
    ours.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = model(images)
        forms = [ours, *(SYSTEM.to_deploy(ours, target) for target in Target)]
        for form in forms:
            assert (form(images) - want).abs().max() <= 1e-5 * want.abs().max()
        ours.pos_embed.data += 0.01 * torch.randn(ours.pos_embed.shape)  # negative control
        assert (ours(images) - want).abs().max() > 1e-5 * want.abs().max()


@pytest.mark.parametrize(("grid", "prefix"), [((6, 6), 1), ((3, 5), 1), ((4, 4), 0), ((2, 2), 2), ((5, 3), 0)])
def test_positions_are_resampled_as_timm_does(grid, prefix):
    pytest.importorskip("timm", reason="timm is in the extra bench")
    from timm.layers import resample_abs_pos_embed

    embedding = torch.randn(1, prefix + 16, 8, generator=torch.Generator().manual_seed(3))
    want = resample_abs_pos_embed(embedding, new_size=list(grid), num_prefix_tokens=prefix)
    got = vit.resample(embedding, prefix, grid)
    assert torch.allclose(got, want, atol=1e-6)
    assert got.shape == (1, prefix + grid[0] * grid[1], 8)


def test_a_checkpoint_of_another_size_is_resampled_and_the_report_says_so(tmp_path):
    state = random_state(empty_state(SYSTEM, {**SYSTEM.variants["tiny"].options, "classes": 1000}, (224, 224), ""), 0)
    save_file(state, tmp_path / "small.safetensors")
    options = {"variant": ("", "tiny"), "weights": ("", str(tmp_path / "small.safetensors")), "size": ("", "96x64")}
    options["options.r"] = ("", 2)  # of 7 tokens
    loaded = load_model(SYSTEM, resolve_recipe("tome", options), Target.ONNXRUNTIME)
    assert "pos_embed adapted from (1, 50, 32) to (1, 7, 32)" in loaded.record.weights.statement
    assert torch.equal(loaded.reference.pos_embed, vit.resample(state["pos_embed"], 1, (3, 2)))


def test_a_grid_that_is_not_square_is_refused_not_guessed(tmp_path):
    state = random_state(empty_state(SYSTEM, {**SYSTEM.variants["tiny"].options, "classes": 1000}, (224, 224), ""), 0)
    state["pos_embed"] = state["pos_embed"][:, :-3].contiguous()
    save_file(state, tmp_path / "odd.safetensors")
    options = {"variant": ("", "tiny"), "weights": ("", str(tmp_path / "odd.safetensors"))}
    with pytest.raises(CheckpointError, match=r"shape.*pos_embed"):
        load_model(SYSTEM, resolve_recipe("tome", options), Target.ONNXRUNTIME)


def swag_keys(state, depth):
    """Rename our state to SWAG's release, positions turned."""
    names = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj.weight": "conv_proj.weight",
        "patch_embed.proj.bias": "conv_proj.bias", "norm.weight": "encoder.ln.weight", "norm.bias": "encoder.ln.bias",
        "head.weight": "head.layers.head.weight", "head.bias": "head.layers.head.bias",
    }  # fmt: skip
    inner = {
        "norm1.weight": "ln_1.weight", "norm1.bias": "ln_1.bias", "attn.qkv.weight": "self_attention.in_proj_weight",
        "attn.qkv.bias": "self_attention.in_proj_bias", "attn.proj.weight": "self_attention.out_proj.weight",
        "attn.proj.bias": "self_attention.out_proj.bias", "norm2.weight": "ln_2.weight", "norm2.bias": "ln_2.bias",
        "mlp.fc1.weight": "mlp.linear_1.weight", "mlp.fc1.bias": "mlp.linear_1.bias",
        "mlp.fc2.weight": "mlp.linear_2.weight", "mlp.fc2.bias": "mlp.linear_2.bias",
    }  # fmt: skip
    names |= {f"blocks.{i}.{a}": f"encoder.layers.layer_{i}.{b}" for i in range(depth) for a, b in inner.items()}
    renamed = {names[key]: value for key, value in state.items()}
    renamed["encoder.pos_embedding"] = renamed["encoder.pos_embedding"].transpose(0, 1).contiguous()
    return renamed


def test_swags_release_loads_to_the_same_model(tmp_path):
    state = random_state(empty_state(SYSTEM, {**SYSTEM.variants["tiny"].options, "classes": 1000}, (224, 224), ""), 0)
    torch.save({"model": swag_keys(state, 4)}, tmp_path / "swag.pth")
    options = {"variant": ("", "tiny"), "weights": ("", str(tmp_path / "swag.pth"))}
    loaded = load_model(SYSTEM, resolve_recipe("tome", options), Target.ONNXRUNTIME)
    assert "SWAG" in loaded.record.weights.statement
    assert all(torch.equal(value, state[key]) for key, value in loaded.reference.state_dict().items())


def test_torchvisions_names_are_swags_with_other_prefixes():
    torchvision = (
        "encoder.layers.encoder_layer_3.mlp.0.weight",
        "encoder.layers.encoder_layer_3.mlp.3.bias",
        "heads.head.bias",
    )
    ours = ("blocks.3.mlp.fc1.weight", "blocks.3.mlp.fc2.bias", "head.bias")
    assert tuple(map(vit.from_swag, torchvision)) == ours


def test_a_checkpoint_of_another_vit_is_refused_with_the_one_that_fits(tmp_path):
    case = reference_case("tome_deit_tiny_r8_prop")
    path = case.save(tmp_path / "deit_tiny.pth")
    result = effdeploy("export", "tome", "--weights", path, "--until", "model", "--out", tmp_path / "b")
    assert result.exit_code == 6
    assert "deit_tiny_patch16_224" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": "max"}, "options.pool"),
        ({"class_token": False}, "options.class_token"),
        ({"heads": 5}, "options.heads"),
    ],
)
def test_architectures_that_cannot_be_are_refused(changes, words):
    with pytest.raises(RecipeError, match=words):
        SYSTEM.build(options_of(**changes), (64, 64), "training")


# Parameters (M) of timm's models of the same names, and of the MAE and SWAG papers.
PARAMETERS = {
    "deit_tiny_patch16_224": 5.72, "deit_small_distilled_patch16_224": 22.44, "deit_base_patch16_384": 86.86,
    "vit_small_patch32_224": 22.88, "vit_base_patch8_224": 86.58, "vit_large_patch16_224": 304.33,
    "vit_huge_patch14_224": 632.05, "vit_medium_patch16_reg4_gap_256": 38.88, "mae_huge_patch14_224": 632.05,
    "swag_huge_patch14_518": 633.47,
}  # fmt: skip


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_are_the_published_ones(variant):
    recipe = resolve_recipe("tome", {"variant": ("", variant)})
    state = empty_state(SYSTEM, {**SYSTEM.variants[variant].options, "classes": 1000}, recipe.size, "training")
    assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(PARAMETERS[variant], abs=0.006)


def test_every_architecture_has_timms_names_and_shapes():
    timm = pytest.importorskip("timm", reason="timm is in the extra bench")
    for name in ("deit_tiny_distilled_patch16_224", "vit_small_patch32_224", "vit_medium_patch16_reg4_gap_256"):
        with torch.device("meta"):
            want = {k: tuple(v.shape) for k, v in timm.create_model(name).state_dict().items()}
        size = resolve_recipe("tome", {"variant": ("", name)}).size
        got = empty_state(SYSTEM, {**SYSTEM.variants[name].options, "classes": 1000}, size, "training")
        assert {k: tuple(v.shape) for k, v in got.items()} == want


def test_the_last_row_can_be_computed_alone():
    model = build_uninitialised(SYSTEM, options_of(), (64, 64), "training")
    model.load_state_dict(random_state(model.state_dict(), 0))
    x = example_inputs(SYSTEM.inputs[:0], 1) or torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, first = (vit.DeployBlock(model.blocks[0], queries)(x) for queries in (0, 1))
    assert np.allclose(whole[:, :1], first, atol=1e-5)
