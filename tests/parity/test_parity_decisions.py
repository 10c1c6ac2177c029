"""Parity of a network that chooses: flips near a tie are noise, wide ones and wrong indices fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support import effdeploy

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.graph.io import load_model as load_onnx
from deploy.models import find_system, merge_forms, merging
from deploy.models.base import load_model
from deploy.models.decisions import DecidingModel
from deploy.parity.decisions import MARGIN, DecidingFile, check_decisions, leaving, with_decisions
from deploy.precision.emulate import emulated
from deploy.records import Precision, Target
from deploy.report.blocks import Details
from deploy.report.parity import parity as report_parity
from deploy.resolve import parity_inputs, resolve_recipe

SYSTEM = find_system("tome")


@pytest.fixture(scope="module", params=list(Target), ids=lambda t: t.value)
def exported(request, tmp_path_factory):
    """A tiny bundle in FP16 for each target, through the command line, with its parity."""
    out = tmp_path_factory.mktemp("bundle") / request.param.value
    result = effdeploy(
        "export", "tome", "--variant", "tiny", "--fp16", "--target", request.param.value, "--until", "parity",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    recipe = resolve_recipe("tome", {"variant": ("", "tiny"), "precision": ("", "fp16")})
    return out, load_model(SYSTEM, recipe, request.param), parity_inputs(SYSTEM, recipe)


def checked(exported, spoil, rounded=True):
    out, loaded, inputs = exported
    model = DecidingModel(loaded, SYSTEM.decisions)

    def load():
        graph = load_onnx(out / "30-fp16.onnx")
        spoil(graph)
        return emulated(graph) if rounded else graph

    file = DecidingFile(stage="fp16", precision=Precision.FP16, load=load)
    traced = load_onnx(out / "10-traced.onnx")
    return check_decisions(model, traced, [file], inputs, lambda path: open_model(path, BuildOptions(threads=1)))


def test_an_export_holds_arithmetic_and_decisions_apart(exported):
    out, loaded, _ = exported
    parity = read_manifest(out).parity
    stages = [c.stage for c in parity.comparisons]
    assert {"fp16, decisions imposed", "fp16, rounded, decisions imposed"} <= set(stages)
    assert "fp16, decisions imposed" in parity.tolerances
    modules = [name for name, module in loaded.deploy.named_modules() if name.endswith(".plan")]
    for stage in ("deploy form", "fp16, rounded"):
        assert [c.module for c in parity.decisions if c.stage == stage] == modules
    assert "deploy form, decisions imposed" in stages
    assert all(c.ok and c.margin <= c.limit and 0 < c.same <= 1 for c in parity.decisions)
    assert parity.comparisons[-1].stage in ("engine", "fp16, rounded")  # what ships stays the last one
    folded = [b.summary for b in report_parity(read_manifest(out)).blocks if isinstance(b, Details)]
    assert f"{len(parity.decisions)} checks of decisions" in folded


def test_the_unspoilt_graph_passes(exported):
    record = checked(exported, lambda graph: None)
    assert record.ok
    assert all(c.limit < 0.01 for c in record.decisions)


def test_the_size_of_a_dynamic_batch_is_no_decision(tmp_path):
    """Layers share what is made of it, and one deciding module seems to hand it to the next."""
    result = effdeploy(
        "export", "tome", "--variant", "tiny", "--batch", "1:2:4", "--until", "parity", "--out", tmp_path / "b"
    )
    assert result.exit_code == 0, result.stdout + result.stderr
    modules = {check.module for check in read_manifest(tmp_path / "b").parity.decisions}
    assert len(modules) > 1
    graph = load_onnx(tmp_path / "b" / "10-traced.onnx")
    shared = {n.output[0] for n in graph.graph.node if n.op_type == "Concat" and ".plan/" in n.name}
    read = {name for n in graph.graph.node for name in n.input if n.name.startswith("merges.1.plan/")}
    assert shared & read, "nothing is shared in this graph: the test shows nothing"
    assert not shared & {value for values in leaving(graph, sorted(modules)).values() for value in values}


def test_one_wrong_index_of_a_decision_fails(exported):
    """Choices that are shifted by one are no near-tie; PyTorch's are imposed on all other modules."""
    _, loaded, _ = exported

    def spoil(graph):
        values = leaving(graph, ["merges.1.plan"])["merges.1.plan"]
        suffix = "GatherElements" if loaded.target is Target.ONNXRUNTIME else "Div_1"  # receivers, or weights
        shift(graph, next(value for value in values if value.endswith(suffix)), -1)

    record = checked(exported, spoil)
    assert not record.ok
    assert [c.module for c in record.decisions if not c.ok] == ["merges.1.plan"]
    assert "merges of 'merges.1.plan' differ at 'fp16' although PyTorch preferred its own by" in record.verdict


def shift(graph, value, axis):
    """Roll a value by one along an axis, inside of its module."""
    node = next(n for n in graph.graph.node if value in n.output)
    place = list(node.output).index(value)
    node.output[place] = f"{value}/right"
    size = next(
        v for v in onnx.shape_inference.infer_shapes(graph).graph.value_info if v.name == f"{value}/right"
    ).type.tensor_type.shape
    count = size.dim[axis].dim_value
    order = numpy_helper.from_array(np.roll(np.arange(count), 1), f"{value}/order")
    graph.graph.initializer.append(order)
    wrong = onnx.helper.make_node(
        "Gather", [f"{value}/right", order.name], [value], name=f"{node.name}_rolled", axis=axis
    )
    graph.graph.node.insert(list(graph.graph.node).index(node) + 1, wrong)


def test_one_wrong_index_behind_a_decision_fails(exported):
    """What is merged where is right; the tokens that are taken are not. Only the imposed arithmetic shows it."""
    kind, axis = ("ScatterND", 0) if exported[1].target is Target.ONNXRUNTIME else ("MatMul", 1)

    def spoil(graph):
        merge = next(n for n in graph.graph.node if n.name.startswith("merges.0/") and n.op_type == kind)
        shift(graph, merge.output[0], axis)

    record = checked(exported, spoil)
    assert not record.ok
    assert not all(c.passed for c in record.comparisons)
    assert "decisions imposed" in record.verdict


def test_either_verdict_is_that_of_the_run(exported):
    out, _, _ = exported
    good = read_manifest(out).parity
    bad = checked(exported, lambda graph: shift(graph, leaving(graph, ["merges.0.plan"])["merges.0.plan"][0], -1))
    assert with_decisions(good, bad).ok is False
    assert with_decisions(good, bad).verdict == bad.verdict


@pytest.mark.parametrize("sort", [True, False])
def test_margins_are_those_of_the_scores(sort):
    plan = merge_forms.RowPlan(merge_forms.Sides(tokens=9, protected=int(sort), sort=sort), 2)
    keys = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    metric = plan.given(keys)
    chosen = plan(metric, torch.zeros(1, 1, dtype=torch.int64))
    count, margin = merging.flips(plan, (metric,), chosen, chosen)
    assert (int(count), float(margin)) == (0, 0.0)

    unit = keys.mean(1) / keys.mean(1).norm(dim=-1, keepdim=True)
    scores = (unit[:, plan.sides.a :: 2] @ unit[:, plan.sides.b :: 2].transpose(1, 2))[0]
    stay, merged, receiver = chosen
    other = (receiver + 1) % scores.shape[1]
    count, margin = merging.flips(plan, (metric,), chosen, (stay, merged, other))
    first = (merged[0] - plan.sides.a) // 2
    expected = (scores[first, receiver[0]] - scores[first, other[0]]).max()
    assert int(count) == 2
    assert float(margin) == pytest.approx(float(expected))


@pytest.mark.parametrize("lost", [-1, 0, 8, 9])
def test_what_is_no_merge_is_infinitely_wrong(lost):
    plan = merge_forms.RowPlan(merge_forms.Sides(tokens=9, protected=1, sort=True), 2)
    keys = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    metric = plan.given(keys)
    stay, merged, receiver = plan(metric, torch.zeros(1, 1, dtype=torch.int64))
    wrong = merged.clone()
    wrong[0, 0] = lost
    assert float(merging.flips(plan, (metric,), (stay, merged, receiver), (stay, wrong, receiver))[1]) == float("inf")


def test_shares_compare_partitions_and_not_names():
    assert merging.first_members(torch.tensor([[3, 1, 3, 0, 1]])).tolist() == [[0, 1, 0, 3, 1]]


def test_a_deploy_form_that_chooses_wrongly_is_found_by_the_training_form(exported):
    _, loaded, inputs = exported
    model = DecidingModel(loaded, SYSTEM.decisions)
    feeds = inputs.chunks[0].feeds
    decided = model.decide(feeds)
    outputs, judged = model.follow(feeds, decided)
    assert set(judged.flips) == set(model.modules)
    assert not any(count.any() for count in judged.flips.values())
    assert np.allclose(outputs["logits"], decided.outputs["logits"], atol=1e-5)

    name = list(model.modules)[1]
    *first, last = decided.chosen[name]  # receivers, or places
    if loaded.target is Target.ONNXRUNTIME:
        wrong = (*first, (last + 1) % model.modules[name].sides.receivers)
    else:
        wrong = (first[0].roll(1, 1), *first[1:], last)
    spoilt = dataclasses.replace(decided, chosen={**decided.chosen, name: wrong})
    judged = model.follow(feeds, spoilt)[1]
    assert judged.margins[name].max() > MARGIN[Precision.FP32]


def test_only_a_flip_near_a_tie_excuses_a_free_run(exported):
    out, _, _ = exported
    good = read_manifest(out).parity
    (form, *_), checks = good.comparisons, good.decisions
    moved = dataclasses.replace(form, passed=False, failures=("max_relative",), max_relative=3e-2, cosine=0.999)
    assert form.stage == "deploy form"
    failing = dataclasses.replace(good, ok=False, comparisons=(moved, *good.comparisons[1:]), decisions=())
    judged = dataclasses.replace(good, comparisons=(), decisions=checks)

    def flipped(stage):
        return tuple(dataclasses.replace(c, flips=int(c.stage == stage)) for c in checks)

    turned = with_decisions(failing, dataclasses.replace(judged, decisions=flipped("deploy form")))
    assert turned.ok
    assert turned.comparisons[0].precision == "fp32, flipped near ties"
    assert "merges that flipped near ties" in turned.verdict
    far = dataclasses.replace(failing, comparisons=(dataclasses.replace(moved, cosine=0.9), *good.comparisons[1:]))
    for parity, decisions in (
        (failing, dataclasses.replace(judged, decisions=flipped("nothing"))),  # nothing flipped
        (failing, dataclasses.replace(judged, decisions=flipped("fp16, rounded"))),  # not in this stage
        (failing, dataclasses.replace(judged, decisions=flipped("deploy form"), ok=False)),  # a wide flip
        (far, dataclasses.replace(judged, decisions=flipped("deploy form"))),  # too far for a flip near a tie
    ):
        assert not with_decisions(parity, decisions).ok
