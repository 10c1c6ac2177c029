"""SparseFormer against both official releases' outputs, its folds, its two samplings and its constants."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from reference import rtdetr_fill
from support import REFERENCE, Case, effdeploy, rounding_of, types_of, without_islands

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.errors import RecipeError
from deploy.graph.io import load_model as load_onnx
from deploy.graph.io import op_counts
from deploy.graph.pipeline import run_passes
from deploy.models import find_system, vit
from deploy.models.base import empty_state, example_inputs, load_model, specialised
from deploy.models.rtdetr.sampling import FIXED
from deploy.models.sparseformer import looking
from deploy.models.sparseformer.system import from_imagenet, from_library, to_imagenet
from deploy.parity.inputs import natural_image
from deploy.parity.rounding import OWN
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Precision, Preprocess, Target
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, onnx_from_torch

SYSTEM = find_system("sparseformer")
CASES = {
    "sparseformer_tiny_imagenet_224x224": ("t", "imagenet release"),
    "sparseformer_tiny_imagenet_192x320": ("t", "imagenet release"),
    "sparseformer_tiny_v1lib_224x224": ("t", "library release"),
    "sparseformer_small_imagenet_224x224": ("s", "imagenet release"),
}
LIMIT = 2e-4  # of the largest logit; float32 itself is off by up to 9e-5 here


def about(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


def case_of(name):
    described, numbers = about(name), np.load(REFERENCE / f"{name}.npz")
    state = {key: torch.from_numpy(rtdetr_fill.fill(key, tuple(shape))) for key, shape in described["keys"].items()}
    shape = (1, *described["input_shape"][1:])
    images = np.concatenate([rtdetr_fill.image(shape, seed=seed) for seed in described["input"]["seeds"]])
    return Case(name=name, state=state, images=images, logits=numbers["logits"])


def load(target=Target.ONNXRUNTIME, **asked):
    options = {key.replace("__", "."): ("", value) for key, value in {"variant": "tiny", **asked}.items()}
    return load_model(SYSTEM, resolve_recipe("sparseformer", options), target)


def off(module, case):
    with torch.inference_mode():
        got = module(torch.from_numpy(case.images)).numpy()
    return abs(got - case.logits).max() / abs(case.logits).max()


def exported(loaded, folder, target=Target.ONNXRUNTIME, batch=2):
    request = TraceRequest(inputs=loaded.inputs, outputs=loaded.outputs, batch=Batch.parse(batch), opset=20)
    traced = onnx_from_torch(loaded.deploy, request, folder)
    return folder / run_passes(folder / traced.artifact.name, target, folder).artifact.name


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_pytorch_forms_and_the_graph_meet_the_official_logits(name, tmp_path):
    case, (variant, layout) = case_of(name), CASES[name]
    size = "x".join(str(side) for side in case.images.shape[2:])
    loaded = load(variant=variant, size=size, weights=str(case.save(tmp_path / "official.pth")))
    assert loaded.record.weights.layout == layout
    for module in (loaded.reference, loaded.deploy, SYSTEM.to_deploy(loaded.reference, Target.TENSORRT)):
        assert off(module, case) <= LIMIT
    with torch.inference_mode():
        looks = loaded.reference.features(torch.from_numpy(case.images))[1]
    official = np.load(REFERENCE / f"{name}.npz")["roi_final"]
    official = official if layout == "library release" else official.transpose(1, 0, 2)
    assert len(looks) == 5
    assert abs(looks[-1][:, :, :2].flatten(2).numpy() - official).max() <= 1e-3
    with open_model(exported(loaded, tmp_path), BuildOptions(threads=1)) as runner:
        got = runner.infer({"images": case.images})["logits"]
    assert abs(got - case.logits).max() <= LIMIT * abs(case.logits).max()
    assert (got.argmax(1) == case.logits.argmax(1)).all()


def test_the_releases_constants_are_not_interchangeable(tmp_path):
    case = case_of("sparseformer_tiny_imagenet_224x224")
    path = case.save(tmp_path / "official.pth")
    assert off(load(variant="t", weights=str(path), options__constants="library").reference, case) > 20 * LIMIT


@pytest.mark.slow
def test_the_command_line_meets_the_official_logits(tmp_path):
    """A float16 export judges its float32 file as well; noise by PyTorch's own rounding, which breaks both limits."""
    name = "sparseformer_tiny_v1lib_224x224"
    case, out = case_of(name), tmp_path / "bundle"
    result = effdeploy(
        "export", "sparseformer", "--variant", "t", "--weights", case.save(tmp_path / "official.pth"), "--batch", 2,
        "--fp16", "--until", "parity", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    assert f"{CASES[name][1]} layout" in result.stdout
    run, allowed = read_manifest(out), resolve_recipe("sparseformer").parity.tolerances
    limits = {run.passes.artifact: LIMIT, run.precision.artifact: allowed["fp16"].max_relative}
    for artifact, limit in limits.items():
        with open_model(out / artifact.name, BuildOptions(threads=1)) as runner:
            got = runner.infer({"images": case.images})["logits"]
        assert abs(got - case.logits).max() <= limit * abs(case.logits).max()
        assert (got.argmax(1) == case.logits.argmax(1)).all()
    assert {found.stage for found in run.parity.comparisons} == {
        "deploy form",
        "traced",
        "patched",
        "engine",
        "fp16, rounded",
    }
    for found in run.parity.comparisons:
        precision, judged = found.precision.split(", ")
        assert judged == OWN
        limit = allowed[precision].max_relative
        assert max(found.per_input["natural"], found.per_input["extremes"]) <= limit < found.per_input["noise"]
        assert round(found.top1 * found.images) + found.top1_ties == found.images
        assert len(found.top1_gaps) == found.top1_ties


def test_coordinates_stay_float32(tmp_path, monkeypatch):
    target = Target.TENSORRT  # the form with Gather, whose grid no operator gives away
    loaded = load(target)
    request = TraceRequest(inputs=loaded.inputs, outputs=("logits",), batch=Batch.parse(1), opset=20)
    traced = onnx_from_torch(loaded.deploy, request, tmp_path)
    graph = tmp_path / run_passes(tmp_path / traced.artifact.name, target, tmp_path).artifact.name
    image, off = natural_image((224, 224), Preprocess(), 0)[None], []
    for keep, expected in ((SYSTEM.keep_fp32({}), "FLOAT"), ((), "FLOAT16")):
        typed = convert_precision(graph, Precision.FP16, tmp_path, keep=keep, target=target).artifact.name
        types = types_of(tmp_path / typed)
        places = {name: kind for name, kind in types.items() if re.search(r"\.rois/(?!Cast|Constant)", name)}
        assert len(places) > 30
        assert set(places.values()) == {expected}
        assert {kind for name, kind in types.items() if ".asked/MatMul" in name} == {"FLOAT16"}
        off.append(rounding_of(tmp_path / typed, graph, image))
        without_islands(monkeypatch)  # negative control
    assert off[1] > 1.05 * off[0]


def test_the_grid_is_not_rounded_where_it_is_sampled(tmp_path):
    """GridSample would take its grid in the type of the map."""
    graph = exported(load(), tmp_path, batch=1)
    for keep, expected in ((SYSTEM.keep_fp32({}), "FLOAT"), ((r"\brois/",), "FLOAT16")):  # negative control
        typed = convert_precision(graph, Precision.FP16, tmp_path, keep=keep, target=Target.ONNXRUNTIME).artifact.name
        types = types_of(tmp_path / typed)
        assert {kind for name, kind in types.items() if name.split("_")[0].endswith("/GridSample")} == {expected}
        assert types["stem.conv1/Conv"] == "FLOAT16"


@pytest.mark.parametrize("target", list(Target), ids=lambda t: t.value)
def test_both_forms_look_at_the_same_places(target):
    loaded = load(target, options__looks=True)
    images = example_inputs(loaded.inputs, 2)[0]
    with torch.inference_mode():
        (_, expected), (_, got) = loaded.reference(images), loaded.deploy(images)
    assert expected.shape == (2, 3, 9, 2 + 4, 2)
    assert abs(got - expected).max() <= 1e-5
    assert abs(expected[0] - expected[1])[0].max() == 0  # the first look does not know the image
    assert abs(expected[0] - expected[1])[1].max() > 1e-3


def test_show_draws_regions_and_points(tmp_path):
    out, photo = tmp_path / "bundle", tmp_path / "photo.png"
    Image.fromarray(np.tile(np.arange(96, dtype=np.uint8)[None, :, None], (80, 1, 3))).save(photo)
    done = effdeploy(
        "export", "sparseformer", "--variant", "tiny", "--set", "options.looks=true", "--until", "engine", "--out", out
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    shown = effdeploy("show", out, photo, "--out", tmp_path / "shown.png", "--json")
    assert shown.exit_code == 0, shown.stdout + shown.stderr
    panels = json.loads(shown.stdout.splitlines()[-1])["record"]["panels"]
    assert [panel["title"] for panel in panels[:3]] == [f"look {n} of 3: 100% of points within 1 px" for n in (1, 2, 3)]
    assert len(panels) == 6
    with Image.open(tmp_path / "shown.png") as picture:
        assert picture.width > 1000


def test_a_look_is_drawn_where_it_is():
    dark = np.zeros((64, 64, 3), np.uint8)
    look = np.array([[[0.25, 0.25], [0.5, 0.75], [0.375, 0.5]]])
    drawn = looking.draw_look(dark, look)
    assert drawn.shape == (448, 448, 3)
    assert drawn[224, 168].any()  # the point
    assert drawn[111:113, 140].any()  # the frame
    assert not drawn[224, 140].any()  # between both
    assert not drawn[:, 240:].any()
    moved = look.copy()
    moved[0, 2] += 2 / 64
    (panel,) = looking.panels({}, dark, {"looks": look[None, None]}, {"looks": moved[None, None]})
    assert panel.agreement == 0


PARAMETERS = {"t": 32, "s": 48, "b": 81}  # millions, as the release prints them


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_are_the_published_ones(variant):
    state = empty_state(SYSTEM, {**SYSTEM.variants[variant].options, "classes": 1000}, (224, 224), "imagenet")
    assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(PARAMETERS[variant], abs=0.6)


@pytest.mark.parametrize("name", [n for n in CASES if "small" not in n and "320" not in n])
def test_keys_go_both_ways(name):
    forward, back = (from_imagenet, to_imagenet) if "imagenet" in name else (from_library, vit.as_it_is)
    keys = list(about(name)["keys"])
    assert [back(forward(key)) for key in keys] == keys
    assert len({forward(key) for key in keys}) == len(keys)


def test_the_librarys_converted_head_is_taken():
    assert [from_library(f"head.{key}") for key in ("norm.weight", "classifier.bias")] == ["norm.weight", "proj.bias"]


@pytest.mark.parametrize("option", ["constants", "sampling"])
def test_an_unknown_choice_is_refused(option):
    with pytest.raises(RecipeError, match=rf"options.{option}: got 'none'"):
        load(**{f"options__{option}": "none"})


@pytest.mark.parametrize(
    ("asked", "target", "named", "missing"),
    [
        ({}, Target.ONNXRUNTIME, "GridSample", "padded"),
        ({}, Target.TENSORRT, "Gather, heads padded to 16", "GridSample"),
        ({"options.sampling": "gather"}, Target.ONNXRUNTIME, "Gather", "GridSample"),
        ({"options.sampling": "grid_sample"}, Target.TENSORRT, "GridSample, heads padded to 16", "Gather"),
        ({"options.pad_heads": False}, Target.TENSORRT, "Gather", "padded"),
    ],
)
def test_the_report_names_the_form_that_is_exported(asked, target, named, missing):
    options = {key: ("", value) for key, value in {"variant": "tiny", **asked}.items()}
    form = specialised(SYSTEM, resolve_recipe("sparseformer", options)).forms[target]
    assert form.name.endswith(named)
    assert missing not in form.name
    assert all(f"{key}={str(value).lower()} asks for" in form.reason for key, value in asked.items())


@pytest.mark.parametrize("size", [(28, 36), (27, 33)])
def test_both_samplings_are_the_definition(size):
    draw = torch.Generator().manual_seed(0)
    image_map = torch.randn(2, 3, *size, generator=draw, dtype=torch.float64)
    grid = torch.rand(1, 50, 1, 2, generator=draw, dtype=torch.float64) * 3 - 1.5  # a third lies outside
    expected = torch.nn.functional.grid_sample(image_map, grid.expand(2, -1, -1, -1), align_corners=False).squeeze(3)
    for form in FIXED.values():
        assert abs(form(grid, size)(image_map) - expected).max() < 1e-12
        assert abs(form(grid + 0.01, size)(image_map) - expected).max() > 1e-3  # negative control


@pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
def test_the_deploy_form_is_exact_with_either_sampling(sampling):
    reference = load(options__sampling=sampling).reference.double()
    deploy = SYSTEM.to_deploy(reference, Target.ONNXRUNTIME)
    images = example_inputs(load().inputs, 2)[0].double()
    with torch.inference_mode():
        expected = reference(images)
        assert abs(deploy(images) - expected).max() <= 1e-10 * abs(expected).max()


def test_padded_heads_keep_the_attention():
    deploy = load().deploy
    attention = deploy.blocks[0].attn
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = attention(x)[0]
        vit.pad_heads(attention)
        assert attention.q.out_features == attention.proj.in_features == 8 * 16
        assert abs(attention(x)[0] - before).max() <= 1e-5 * abs(before).max()
    assert load(Target.TENSORRT).deploy.cortex.attn.q.out_features == 8 * 16
    assert load(Target.TENSORRT, options__pad_heads=False).deploy.cortex.attn.q.out_features == 64


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_the_tiny_variant(precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'effdeploy[tensorrt-rtx]'")
    result = effdeploy(
        "export", "sparseformer", "--variant", "tiny", f"--{precision}", "--backend", "tensorrt_rtx",
        "--set", "engine.sm=[80,89]", "--until", "engine", "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(tmp_path / "bundle")
    assert [engine.device for engine in run.engines] == ["sm80", "sm89"]
    assert all(engine.audit.ok for engine in run.engines)
    assert "GridSample" not in op_counts(load_onnx(tmp_path / "bundle" / run.passes.artifact.name))
