"""RT-DETR against the official implementations' outputs: forms, checkpoint layouts, interface and bad input."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import rtdetr_fill
from reference.rtdetr_cases import about, arrays, case_of, state_of
from safetensors.torch import save_file

from deploy.errors import CheckpointError, RecipeError, SizeError
from deploy.models.base import count_macs, empty_state, load_model
from deploy.models.checkpoint import read_checkpoint
from deploy.models.rtdetr import SYSTEM
from deploy.models.rtdetr.encoder import position_table
from deploy.models.rtdetr.system import detections
from deploy.records import Target
from deploy.resolve import resolve_recipe

MEDIAN, LARGEST, BOX, CUT = 5e-5, 1e-3, 2e-5, 1e-4  # of logits, of logits, of boxes in 0..1, of scores at the cut


def recipe_of(variant, size, weights="random", **options):
    layers = {"variant": ("", variant), "size": ("", size), "weights": ("", str(weights))}
    return resolve_recipe("rtdetr", {**layers, **{f"options.{k}": ("", v) for k, v in options.items()}})


def load(variant, size, weights="random", target=Target.ONNXRUNTIME, **options):
    return load_model(SYSTEM, recipe_of(variant, size, weights, **options), target)


def raw(module, images):
    """Return the positions selected [Q], logits [Q,C] and boxes [Q,4] of one image."""
    with torch.inference_mode():
        maps = module.encoder(module.backbone(torch.from_numpy(images)))
        logits, boxes = module.decoder(maps)
        if hasattr(module.decoder, "selection"):
            index = module.decoder.selection(maps)[2]
        else:
            index = module.decoder.select(module.decoder.memory(maps))[2]
    return index[0].numpy(), logits[0].numpy(), boxes[0].numpy()


def gate(case, index, logits, boxes):
    """Compare rows of the same position; return whether all are within the limits, and the errors."""
    place = {int(position): row for row, position in enumerate(index)}
    kept = np.array([int(position) in place for position in case.index])
    row = np.array([place.get(int(position), 0) for position in case.index])
    judged = kept[case.rows]
    apart = abs(logits[row[case.rows]] - case.logits)[judged]
    found = np.median(apart), apart.max(), abs(boxes[row] - case.boxes)[kept].max(), int((~kept).sum())
    return found[0] <= MEDIAN and found[1] <= LARGEST and found[2] <= BOX and found[3] == 0, found


def hub(state):
    """Rename a transformers 5 state dict to what its files and transformers 4 hold, with the heads' second names."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in (
            (r"\.o_proj\.", ".out_proj."),
            (r"\.mlp\.(fc[12])\.", r".\1."),
            (r"encoder\.aifi\.", "encoder.encoder."),
        ):
            key = re.sub(pattern, replacement, key)
        out[key] = value
        if match := re.match(r"model\.decoder\.((?:class|bbox)_embed\..*)", key):
            out[match[1]] = value.clone()
    return out


def words(options):
    """Return architecture options as the command line takes them."""
    return [word for key, value in options.items() for word in ("--set", f"options.{key}={value}")]


def save(name, path):
    """Write a case's weights as their origin does: the release in an EMA or model wrapper, the Hub as safetensors."""
    state = state_of(name)
    if name.startswith("hf"):
        path = path.with_suffix(".safetensors")
        save_file(hub(state) if "480" in name else state, path)
    elif "deploy" in name:
        torch.save({"model": state, "epoch": 3}, path)
    else:
        torch.save({"ema": {"module": state, "updates": 7}, "last_epoch": 71}, path)
    return path


CASES = {
    "rtdetr_r18vd_640x640": ("r18vd", "official v1"),
    "rtdetr_r18vd_480x640": ("r18vd", "official v1"),
    "rtdetr_r50vd_640x640": ("r50vd", "official v1"),
    "rtdetrv2_r18vd_640x640": ("r18", "official v2"),
    "hf_rtdetr_r18_640x640": ("r18vd", "Hugging Face"),
    "hf_rtdetr_r18_480x640": ("r18vd", "Hugging Face"),
    "rtdetr_r18vd_deploy_640x640": ("r18vd", "official v1, converted"),
}
# Widths for tests: depths, blocks, layers and what is read of them stay the variant's.
NARROW = {
    "hidden": 64, "ffn": 64, "decoder_hidden": 64, "decoder_ffn": 64, "heads": 4, "queries": 20, "top_k": 20,
}  # fmt: skip


@pytest.mark.parametrize("name", ["rtdetr_r18vd_480x640", "rtdetrv2_r18vd_640x640"])
def test_the_form_for_tensorrt_meets_the_official_outputs(name, tmp_path):
    """Which runs in PyTorch here; the other form's graphs run in ONNX Runtime (``test_rtdetr_graphs.py``)."""
    case = case_of(name)
    loaded = load(CASES[name][0], case.size, save(name, tmp_path / "official.pth"), Target.TENSORRT)
    within, errors = gate(case, *raw(loaded.deploy, case.images))
    assert within, errors


def converted(folder):
    """Write a checkpoint as the release's conversion leaves it: branches in place, which nothing may read any more."""
    plain = load("r18vd", "640", save("rtdetr_r18vd_640x640", folder / "plain.pth"))
    state = dict(state_of("rtdetr_r18vd_deploy_640x640"))
    blocks = {n: m for n, m in plain.reference.named_modules() if type(m).__name__ == "RepVGG"}
    for name, block in blocks.items():
        weight, bias = block.fused()
        state[f"{name}.conv.weight"], state[f"{name}.conv.bias"] = weight.detach(), bias.detach()
        state[f"{name}.conv1.conv.weight"] = torch.full_like(state[f"{name}.conv1.conv.weight"], 9.0)
    torch.save({"model": state, "epoch": 3}, folder / "converted.pth")
    return folder / "converted.pth"


def test_a_converted_checkpoint_computes_with_its_fused_convolutions(tmp_path):
    """The release's fused weights are ours, and they are what is used: the branches are spoilt."""
    numbers = arrays("rtdetr_r18vd_deploy_640x640")
    state = read_checkpoint(converted(tmp_path)).tensors
    probes = [key.removesuffix("__idx") for key in numbers if key.endswith("__idx")]
    for probe in probes:
        got = state[probe.removeprefix("w:")].flatten()[numbers[f"{probe}__idx"]].numpy()
        assert abs(got - numbers[f"{probe}__val"]).max() <= 1e-6 * abs(got).max()
    assert len(probes) == 4


def test_the_gate_catches_the_other_position_embedding_and_a_wrong_class_head(tmp_path):
    """Negative controls: on an image that is not square the order of positions decides; the head always does."""
    case = case_of("rtdetr_r18vd_480x640")
    path = save(case.name, tmp_path / "official.pth")
    swapped = load("r18vd", case.size, path, position="huggingface")
    assert not gate(case, *raw(swapped.reference, case.images))[0]
    right = load("r18vd", case.size, path)
    index, logits, boxes = raw(right.deploy, case.images)
    assert gate(case, index, logits, boxes)[0]
    assert not gate(case, index, np.roll(logits, 1, axis=1), boxes)[0]
    assert not gate(case, index, logits, boxes + 4 * BOX)[0]


def test_the_hybrid_encoder_alone(tmp_path):
    described, numbers = about("rtdetr_r18vd_hybrid_encoder"), arrays("rtdetr_r18vd_hybrid_encoder")
    loaded = load("r18vd", "640", save("rtdetr_r18vd_640x640", tmp_path / "official.pth"), part="encoder")
    shapes = zip(described["input_shape"], described["input_keys"], strict=True)
    maps = [torch.from_numpy(rtdetr_fill.features(shape, key)) for shape, key in shapes]
    for module in (loaded.reference, loaded.deploy):
        with torch.inference_mode():
            outputs = module(*maps)
        for level, got in enumerate(outputs):
            want = numbers[f"val{level}"]
            assert abs(got.flatten()[numbers[f"idx{level}"]].numpy() - want).max() <= 1e-4 * abs(want).max()
    assert [spec.shape[1:] for spec in loaded.inputs] == [(128, 80, 80), (256, 40, 40), (512, 20, 20)]
    assert loaded.record.deploy_parameters < loaded.record.parameters / 2


def test_the_post_processor_gives_the_official_detections():
    numbers = arrays("rtdetr_r18vd_post")
    logits, boxes = (torch.from_numpy(numbers[name]) for name in ("pred_logits", "pred_boxes"))
    labels, corners, scores = detections(logits, boxes, torch.tensor([[500, 375]]), 300, 0.0)
    assert (labels.numpy() == numbers["labels"]).all()
    assert abs(corners.numpy() - numbers["boxes"]).max() <= 1e-3
    assert abs(scores.numpy() - numbers["scores"]).max() <= 1e-6
    swapped = detections(logits, boxes, torch.tensor([[375, 500]]), 300, 0.0)[1]
    assert abs(swapped.numpy() - numbers["boxes"]).max() > 10  # negative control: (width, height), not (height, width)
    few = detections(logits, boxes, torch.tensor([[500, 375]]), 7, float(scores[0, 4]))
    assert few[0].tolist() == [[*labels[0, :5].tolist(), -1, -1]]
    assert all(not part[0, 5:].any() for part in few[1:])


def test_a_hugging_face_file_becomes_an_official_one_and_back(tmp_path):
    names = {"variant": ("", "tiny"), "size": ("", "64")}
    from deploy.models.conversion import convert_checkpoint
    from deploy.models.weights import random_state

    recipe = resolve_recipe("rtdetr", names)
    options = {**SYSTEM.variants["tiny"].options, "classes": recipe.classes}
    official = random_state(empty_state(SYSTEM, options, (64, 64), "official"), 0)
    torch.save(official, tmp_path / "ours.pth")
    for source, target, to in (
        ("ours.pth", "hub.safetensors", "hugging-face"),
        ("hub.safetensors", "v2.pth", "official-v2"),
        ("v2.pth", "v1.pth", "official-v1"),
    ):
        record = convert_checkpoint(SYSTEM, recipe, tmp_path / source, tmp_path / target, to=to)
        assert record.max_relative <= 1e-5
    last = read_checkpoint(tmp_path / "v1.pth").tensors
    assert {"decoder.enc_output.0.weight", "encoder.input_proj.0.1.running_var"} <= set(last)
    assert all(torch.equal(last[SYSTEM.weight_maps[0].inverse(key)], value) for key, value in official.items())


def shapes_of(state):
    """Give names and shapes, without what counts training steps or is computed."""
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_names_and_shapes_of_r18_are_the_releases_and_transformers_own():
    """Both ways for the real layout: what we would write is what each side has, and what each has is what we read."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra test)")
    maps = {m.name: m for m in SYSTEM.weight_maps}
    options = {**SYSTEM.variants["r18vd"].options, "classes": 80}
    backbone = transformers.RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3,
        num_labels=80,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.RTDetrForObjectDetection(config).state_dict()
    versions = {
        "official v1": about("rtdetr_r18vd_640x640")["keys"],
        "official v2": about("rtdetrv2_r18vd_640x640")["keys"],
        "official v1, converted": about("rtdetr_r18vd_deploy_640x640")["keys"],
        "Hugging Face": hub(theirs),  # as files hold them, heads under both of their names
    }
    for name, known in versions.items():
        known = {key: torch.empty(getattr(value, "shape", value), device="meta") for key, value in known.items()}
        ours = empty_state(SYSTEM, options, (640, 640), maps[name].layout)
        written = {maps[name].inverse(key): value for key, value in ours.items()}
        written |= {twin: value for key, value in written.items() if (twin := maps[name].twin(key))}
        computed = {key for key in known if re.search(r"decoder\.(anchors|valid_mask)|num_points_scale", key)}
        assert shapes_of(written) == {k: v for k, v in shapes_of(known).items() if k not in computed}, name
        read = SYSTEM.adapt({maps[name].rename(key): value for key, value in known.items()}, options, (640, 640))
        assert shapes_of(read) == shapes_of(ours), name
    assert sum(key.startswith("class_embed") for key in written) == 6


# Millions of parameters and GFLOPs (two per multiply-add) at 640 of the release's README.
PUBLISHED = {"r18vd": (20, 60), "r50vd_m": (36, 100), "r101vd": (76, 259), "hgnetv2_l": (32, 110)}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(variant):
    options = {**SYSTEM.variants[variant].options, "classes": 80, "head": "raw"}
    system = replace(SYSTEM, **SYSTEM.interface(options))
    parameters, flops = PUBLISHED[variant]
    with torch.device("meta"):
        model = SYSTEM.build(options, (640, 640), "official")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=1.0)
    assert 2 * count_macs(system, options, (640, 640)) / 1e9 == pytest.approx(flops, rel=0.03)


def test_positions_agree_on_squares_and_differ_elsewhere():
    assert torch.equal(position_table(20, 20, 256, "official"), position_table(20, 20, 256, "huggingface"))
    assert not torch.allclose(position_table(15, 20, 256, "official"), position_table(15, 20, 256, "huggingface"))


def test_bad_input_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(SizeError, match="multiples of 32"):
        recipe_of("tiny", "600x640")
    with pytest.raises(SizeError, match="84 positions, expected at least one for each of 300 queries"):
        load("r18vd", "64")
    with pytest.raises(RecipeError, match="expected one of auto, grid_sample, gather"):
        load("tiny", "64", sampling="bilinear")
    with pytest.raises(RecipeError, match="expected 1 to 960"):
        load("tiny", "64", top_k=961)
    with pytest.raises(RecipeError, match=r"got 1\.5"):
        load("tiny", "64", score_threshold=1.5)
    torch.save(load("tiny", "64").reference.state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(CheckpointError, match="does not fit") as error:
        load("r18vd", "640", tmp_path / "tiny.pth")
    assert "--variant tiny" in str(error.value.hint)
    fewer = resolve_recipe("rtdetr", {"variant": ("", "tiny"), "size": ("", "64"), "classes": ("", 20),
                                      "weights": ("", str(tmp_path / "tiny.pth"))})  # fmt: skip
    with pytest.raises(CheckpointError, match="does not fit") as error:
        load_model(SYSTEM, fewer, Target.ONNXRUNTIME)
    assert "--set classes=80" in str(error.value.hint)
    with pytest.raises(RecipeError, match="the target is onnxruntime") as error:
        load("tiny", "64", sampling="plugin")
    assert "--backend tensorrt" in str(error.value.hint)
