"""Every system keeps the contract that the road relies on."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.backends import load_backend
from deploy.candidates import build_options
from deploy.graph.pipeline import run_passes
from deploy.models import SYSTEMS, find_system
from deploy.models.base import build_uninitialised, empty_state, example_inputs, graph_inputs, load_model
from deploy.models.checkpoint import Checkpoint, fit_checkpoint
from deploy.models.weights import random_state
from deploy.parity.metrics import furthest
from deploy.preprocess import normalise
from deploy.records import Target
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, choose_opset, onnx_from_torch

TINY = {"variant": ("test", "tiny")}


@pytest.fixture(params=SYSTEMS)
def system(request):
    return find_system(request.param)


@pytest.fixture(params=list(Target), ids=lambda t: t.value)
def target(request):
    return request.param


def named(system, outputs):
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: tensor.numpy() for name, tensor in zip(system.outputs, tensors, strict=False)}


def load_tiny(system, target, batch=1, *, pixels=False):
    recipe = resolve_recipe(system.name, {**TINY, "batch": ("test", batch), "preprocess.embed": ("test", pixels)})
    return recipe, load_model(system, recipe, target)


def test_every_variant_of_the_yaml_is_a_variant_and_the_other_way_round(system):
    from deploy.recipe import configs_folder, read_yaml

    shipped = set(read_yaml(configs_folder() / f"{system.name}.yaml").variants)
    assert shipped == set(system.variants) - {"tiny"}


def test_weight_maps_fit_their_own_layout_and_no_key_is_lost(system):
    recipe = resolve_recipe(system.name, TINY)
    options = {**system.variants["tiny"].options, "classes": recipe.classes}
    for weight_map in system.weight_maps:
        model = build_uninitialised(system, options, recipe.size, weight_map.layout)
        names = [weight_map.rename(key) for key in model.state_dict()]
        assert names == list(model.state_dict()), "our own keys must pass through a map unchanged"


def test_a_layout_is_recognised_and_a_missing_key_is_refused(system):
    from deploy.errors import CheckpointError

    recipe = resolve_recipe(system.name, TINY)
    template = partial(empty_state, system, {**system.variants["tiny"].options, "classes": recipe.classes}, recipe.size)
    for weight_map in system.weight_maps:
        state = random_state(template(weight_map.layout), 0)
        checkpoint = Checkpoint(tensors=state, sha256="", wrapping="")
        assert fit_checkpoint(checkpoint, system.weight_maps, template, str).layout == weight_map.layout
        short = Checkpoint(tensors=dict(list(state.items())[1:]), sha256="", wrapping="")
        with pytest.raises(CheckpointError, match="missing"):
            fit_checkpoint(short, system.weight_maps, template, str)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_to_deploy_keeps_the_function_and_its_input(system, target, dtype, limit):
    recipe, loaded = load_tiny(system, target)
    if loaded.approximate:  # then the recipe says how far, and every run measures it
        limit = recipe.parity.max_drift
    model = copy.deepcopy(loaded.reference).to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    deploy = system.to_deploy(model, target).eval()
    images = tuple(t.to(dtype) if t.is_floating_point() else t for t in example_inputs(loaded.inputs, 3))
    with torch.inference_mode():
        expected, got = named(system, model(*images)), named(system, deploy(*images))
    assert furthest(system.task, expected, got)[1] <= limit
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_random_weights_are_alive_and_deterministic(system):
    _, first = load_tiny(system, Target.ONNXRUNTIME)
    _, second = load_tiny(system, Target.ONNXRUNTIME)
    feeds = {s.name: t.numpy() for s, t in zip(first.inputs, example_inputs(first.inputs, 2), strict=True)}
    a, b = (next(iter(loaded.run(feeds).values())) for loaded in (first, second))
    assert (a == b).all()
    assert abs(a[0] - a[1]).max() > 0.05 * abs(a).max(), "two images must not give the same outputs"


# The systems whose first convolution pads with zeros and whose mean is not 0: one subtraction stays before it.
PADDED = ("alternet", "riformer", "sparseformer")


@pytest.mark.parametrize(("batch", "pixels"), [("1", False), ("3", True), ("1:2:4", False)])
def test_graph_agrees_with_pytorch_on_onnx_runtime(system, target, batch, pixels, tmp_path):
    recipe, loaded = load_tiny(system, target, batch, pixels=pixels)
    opset = choose_opset(None, target, attention_op=False)
    request = TraceRequest(inputs=loaded.inputs, outputs=system.outputs, batch=recipe.batch, opset=opset)
    traced = onnx_from_torch(loaded.deploy, request, tmp_path)
    patched = run_passes(tmp_path / traced.artifact.name, target, tmp_path)
    backend, options = load_backend("onnxruntime"), build_options(recipe)
    (engine,) = backend.build(tmp_path / patched.artifact.name, tmp_path, options)
    arguments = example_inputs(loaded.inputs, recipe.batch.max)
    feeds = {spec.name: t.numpy() for spec, t in zip(loaded.inputs, arguments, strict=True)}
    with backend.open(engine, tmp_path, options) as runner:
        got = runner.infer(feeds)
    assert furthest(system.task, loaded.run(feeds), got)[1] <= 2e-5
    fold = next(p for p in patched.passes if p.name == "fold_preprocess")
    assert (fold.sites, bool(fold.declined)) == (int(pixels), pixels and system.name in PADDED)
    if pixels:  # PyTorch itself gives what it gives on images that were normalised before
        _, plain = load_tiny(system, target, batch)
        spec = recipe.preprocess.record()
        before = np.stack([normalise(image, dataclasses.replace(spec, embed=False)) for image in feeds["images"]])
        assert feeds["images"].dtype == np.uint8
        assert furthest(system.task, plain.run({**feeds, "images": before}), loaded.run(feeds))[1] <= 2e-6


def test_two_exports_give_the_same_bytes(system, target, tmp_path):
    recipe, loaded = load_tiny(system, target)
    opset = choose_opset(None, target, attention_op=False)
    request = TraceRequest(inputs=loaded.inputs, outputs=system.outputs, batch=recipe.batch, opset=opset)
    hashes = []
    for name in ("a", "b"):
        folder = Path(tmp_path / name)
        folder.mkdir()
        _, loaded = load_tiny(system, target)
        traced = onnx_from_torch(loaded.deploy, request, folder)
        hashes.append(run_passes(folder / traced.artifact.name, target, folder).artifact.sha256)
    assert hashes[0] == hashes[1]


def test_inputs_are_bound_to_the_size(system):
    shapes = [spec.shape for spec in graph_inputs(system, (64, 96))]
    assert shapes[0] == ("batch", 3, 64, 96)
