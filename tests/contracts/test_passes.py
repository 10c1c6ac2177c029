"""Every graph pass keeps the contract that ``deploy.graph.base.GraphPass`` states, on the example that it brings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import deploy.graph.passes
from deploy.graph.base import GraphPass, parse_example
from deploy.graph.io import control_flow, graph_of, model_bytes, model_of, tensor_specs
from deploy.graph.passes import PASSES
from deploy.graph.pipeline import AFTER_QUANTIZATION, PIPELINE

every_pass = pytest.mark.parametrize("graph_pass", PASSES, ids=lambda p: p.name)


def unrelated() -> onnx.ModelProto:
    """A graph in which no pass has a site, though it holds an operator that each of them looks at."""
    return parse_example(
        """
        unrelated (float[N,4,4,4] x) => (float[N,4,16] y, float16[N,4,16] half)
        <
            float[4,4,1,1] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
            float[4] scale = {1, 1, 1, 1}, float[4] offset = {0, 0, 0, 0},
            int64[3] flat = {0, 4, 16}, int64[1] last = {-1}, float two = {2}
        >
        {
            a = Conv(x, weight, scale)
            b = Relu(a)
            c = InstanceNormalization(b, scale, offset)
            d = Reshape(c, flat)
            e = ReduceMean<keepdims = 1>(d, last)
            f = Sub(d, e)
            g = Erf(f)
            h = Mul(g, two)
            i = Transpose<perm = [0, 2, 1]>(h)
            j = Exp(i)
            y = Transpose<perm = [0, 2, 1]>(j)
            half = Cast<to = 10>(y)
        }
        """,
        opset=21,
    )


def with_branch() -> onnx.ModelProto:
    """A graph whose If reads a tensor of the graph around it by name; everything outside it could be rewritten."""
    branch = [
        onnx.helper.make_graph(
            [onnx.helper.make_node(op, ["copied"], [f"out_{op}"], name=f"branch/{op}")],
            op,
            [],
            [onnx.helper.make_tensor_value_info(f"out_{op}", onnx.TensorProto.FLOAT, [2])],
        )
        for op in ("Neg", "Abs")
    ]
    nodes = [
        onnx.helper.make_node("Identity", ["x"], ["copied"], name="block/Identity"),
        onnx.helper.make_node("ReduceSum", ["copied"], ["sum"], name="block/ReduceSum", keepdims=0),
        onnx.helper.make_node("Cast", ["sum"], ["flag"], name="block/Cast", to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", ["flag"], ["y"], name="block/If", then_branch=branch[0], else_branch=branch[1]),
    ]
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "branching", values[:1], values[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def outputs_of(model: onnx.ModelProto, seed: int, batch: int) -> dict[str, np.ndarray]:
    """Run a model as it stands, on standard normal inputs; pixels are of any value."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    feeds = {}
    for i in session.get_inputs():
        shape = [d if isinstance(d, int) else batch for d in i.shape]
        pixels = i.type == "tensor(uint8)"
        drawn = generator.integers(256, size=shape) if pixels else generator.standard_normal(shape)
        feeds[i.name] = drawn.astype(np.uint8 if pixels else np.float32)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def rewritten(graph_pass: GraphPass) -> onnx.ModelProto:
    graph = graph_of(graph_pass.example())
    graph_pass.apply(graph)
    return model_of(graph)


@every_pass
def test_the_example_has_a_site_and_none_is_left_by_a_second_run(graph_pass: GraphPass) -> None:
    graph = graph_of(graph_pass.example())
    first = graph_pass.apply(graph)
    once = model_bytes(model_of(graph))
    second = graph_pass.apply(graph)
    assert first.sites >= 1
    assert first.declined == ()
    assert second.sites == 0
    assert model_bytes(model_of(graph)) == once
    assert graph_pass.apply(graph_of(onnx.load_from_string(once))).sites == 0


@every_pass
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_stay_equal(graph_pass: GraphPass, seed: int, batch: int) -> None:
    before = outputs_of(graph_pass.example(), seed, batch)
    after = outputs_of(rewritten(graph_pass), seed, batch)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-6)


@every_pass
def test_inputs_and_outputs_stay_as_they_were(graph_pass: GraphPass) -> None:
    before, after = graph_pass.example().graph, rewritten(graph_pass).graph
    assert tensor_specs(after.input) == tensor_specs(before.input)
    assert tensor_specs(after.output) == tensor_specs(before.output)


@every_pass
def test_the_checker_passes_and_names_are_unique_and_keep_the_module(graph_pass: GraphPass) -> None:
    model = rewritten(graph_pass)
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(rf"block/{node.op_type}(_\d+)?", node.name) for node in model.graph.node)


@every_pass
def test_an_unrelated_graph_is_not_touched(graph_pass: GraphPass) -> None:
    graph = graph_of(unrelated())
    before = model_bytes(model_of(graph_of(unrelated())))
    assert graph_pass.apply(graph).sites == 0
    assert model_bytes(model_of(graph)) == before


@every_pass
def test_a_graph_with_control_flow_is_left_alone_and_the_reason_says_so(graph_pass: GraphPass) -> None:
    model = with_branch()
    assert control_flow(model) == "If 'block/If'"
    before = model_bytes(model_of(graph_of(with_branch())))
    graph = graph_of(model)
    result = graph_pass.apply(graph)
    assert result.sites == 0
    assert result.declined == ("block/If: If holds a subgraph; the whole graph is left alone",)
    assert model_bytes(model_of(graph)) == before


def test_the_unrelated_graph_would_be_noticed_if_it_were_touched() -> None:
    """The control of the test above: one more node and its bytes differ."""
    graph = graph_of(unrelated())
    graph.nodes[1].op = "Sigmoid"
    assert model_bytes(model_of(graph)) != model_bytes(model_of(graph_of(unrelated())))


def test_every_file_of_passes_is_in_the_registry_and_every_pass_on_a_list() -> None:
    folder = Path(deploy.graph.passes.__file__).parent
    assert {p.name for p in PASSES} == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    lists = (*PIPELINE.values(), *AFTER_QUANTIZATION.values())
    assert {step.pass_.name for steps in lists for step in steps} == {p.name for p in PASSES}


@every_pass
def test_a_pass_says_what_it_needs_and_what_it_ensures(graph_pass: GraphPass) -> None:
    assert graph_pass.requires.endswith(".")
    assert graph_pass.ensures.endswith(".")


@pytest.mark.parametrize("target", PIPELINE, ids=lambda t: t.value)
def test_every_step_has_a_reason_and_no_pass_runs_twice(target: object) -> None:
    names = [step.pass_.name for step in PIPELINE[target]]  # type: ignore[index]
    assert len(set(names)) == len(names)
    assert all(len(step.reason) > 20 for step in PIPELINE[target])  # type: ignore[index]
