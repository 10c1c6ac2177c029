"""TensorRT's deformable attention plugin in place of GridSample: the same numbers by the plugin's definition."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from deploy.errors import EngineBuildError, RecipeError
from deploy.graph.base import parse_example
from deploy.graph.io import graph_of, model_of
from deploy.graph.pipeline import run_passes
from deploy.graph.plugins import for_builder, use_deformable_attention
from deploy.models.base import load_model
from deploy.models.rtdetr import SYSTEM
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Precision, Target, TensorSpec
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, onnx_from_torch

SIZES, HEADS, WIDTH, QUERIES, POINTS = [(4, 6), (2, 3)], 2, 3, 5, 2


class MultiscaleDeformableAttnPlugin_TRT(OpRun):  # noqa: N801  the plugin's name
    """The plugin's definition, point by point."""

    op_domain = ""

    def _run(self, value, sizes, starts, locations, weights, plugin_version=None, plugin_namespace=None):
        out = np.zeros((len(value), locations.shape[1], *value.shape[2:]), np.float32)
        for n, q, m, level, p in np.ndindex(*weights.shape):
            height, width = sizes[level]
            x, y = locations[n, q, m, level, p] * (width, height) - 0.5
            for row in (np.floor(y), np.floor(y) + 1):
                for column in (np.floor(x), np.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        token = starts[level] + int(row) * width + int(column)
                        share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[n, q, m, level, p]
                        out[n, q, m] += share * value[n, token, m]
        return (out,)


class HalfPlugin(MultiscaleDeformableAttnPlugin_TRT):
    """The same with values and result in float16."""

    def _run(self, value, *others, **attributes):
        (out,) = super()._run(value, *others, **attributes)
        return (out.astype(value.dtype),)


HalfPlugin.__name__ = MultiscaleDeformableAttnPlugin_TRT.__name__


def sampling(second=POINTS, align_corners=0, padding="zeros"):
    return parse_example(f"""
        example (float[N,6,4,6] a, float[N,6,2,3] b, float[M,5,{POINTS + second},2] grid,
                 float[M,1,5,{POINTS + second}] weights) => (float[M,3,5] y)
        <int64[4] first = {{-1, 3, 4, 6}}, int64[4] second = {{-1, 3, 2, 3}}, int64[2] parts = {{{POINTS}, {second}}},
         int64[1] last = {{3}}>
        {{
            low = Reshape(a, first)
            high = Reshape(b, second)
            left, right = Split <axis = 2> (grid, parts)
            p = GridSample <align_corners = {align_corners}, padding_mode = "{padding}"> (low, left)
            q = GridSample <align_corners = {align_corners}, padding_mode = "{padding}"> (high, right)
            all = Concat <axis = 3> (p, q)
            weighted = Mul(all, weights)
            y = ReduceSum <keepdims = 0> (weighted, last)
        }}
    """)


def feeds(batch):
    draw = np.random.default_rng(0)
    maps = {name: draw.standard_normal((batch, 6, *size)) for name, size in zip("ab", SIZES, strict=True)}
    grid = draw.uniform(-1.4, 1.4, (batch * HEADS, QUERIES, 2 * POINTS, 2))
    weights = draw.uniform(0, 1, (batch * HEADS, 1, QUERIES, 2 * POINTS))
    return {name: value.astype(np.float32) for name, value in {**maps, "grid": grid, "weights": weights}.items()}


@pytest.mark.parametrize("batch", [1, 3])
def test_the_plugin_gives_what_gridsample_gave(batch):
    model = onnx.shape_inference.infer_shapes(sampling())
    graph = graph_of(model)
    result = use_deformable_attention(graph, version="2")
    assert (result.sites, result.declined) == (1, ())
    rewritten = model_of(graph)
    (plugin,) = [node for node in rewritten.graph.node if node.op_type == MultiscaleDeformableAttnPlugin_TRT.__name__]
    assert [a.s for a in plugin.attribute if a.name == "plugin_version"] == [b"2"]
    assert not [node for node in rewritten.graph.node if node.op_type in ("GridSample", "ReduceSum")]
    (want,) = ReferenceEvaluator(model).run(None, feeds(batch))
    (got,) = ReferenceEvaluator(rewritten, new_ops=[MultiscaleDeformableAttnPlugin_TRT]).run(None, feeds(batch))
    assert abs(got - want).max() <= 2e-6
    other = dict(feeds(batch), grid=feeds(batch)["grid"] + np.float32(0.05))  # negative control
    assert abs(ReferenceEvaluator(model).run(None, other)[0] - got).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"align_corners": 1}, "aligns corners"),
        ({"padding": "border"}, "padding is border"),
        ({"second": 3}, "as many at each"),
    ],
)
def test_what_the_plugin_cannot_do_is_left_alone_with_the_reason(change, reason):
    model = onnx.shape_inference.infer_shapes(sampling(**change))
    graph = graph_of(model)
    result = use_deformable_attention(graph)
    assert result.sites == 0
    assert reason in result.declined[0]
    assert model_of(graph).SerializeToString() == model_of(graph_of(model)).SerializeToString()


class Sampler(torch.nn.Module):
    """The cross-attention of a deploy form with its maps as inputs of their own."""

    def __init__(self, cross):
        super().__init__()
        self.cross = cross

    def forward(self, query, boxes, low, middle, high):
        return self.cross(query, boxes, [low, middle, high])


def sampler(folder, points, sampling="plugin"):
    asked = {"variant": ("", "tiny"), "size": ("", "64x96"), "options.points": ("", points)}
    recipe = resolve_recipe("rtdetr", {**asked, "options.sampling": ("", sampling)})
    deploy = load_model(SYSTEM, recipe, Target.TENSORRT).deploy
    shapes = {"query": (12, 32), "boxes": (12, 4), "low": (32, 8, 12), "middle": (32, 4, 6), "high": (32, 2, 3)}
    specs = tuple(TensorSpec(name=k, dtype="float32", shape=("batch", *v)) for k, v in shapes.items())
    module = Sampler(deploy.decoder.decoder.layers[0].cross_attn).eval()
    request = TraceRequest(inputs=specs, outputs=("y",), batch=Batch.parse("1:2:3"), opset=20)
    traced = onnx_from_torch(module, request, folder)
    return module, specs, folder / run_passes(folder / traced.artifact.name, Target.TENSORRT, folder).artifact.name


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    return sampler(tmp_path_factory.mktemp("asking"), [2, 2, 2])


def test_a_model_that_asks_for_the_plugin_gets_it_in_front_of_the_builder(asking, tmp_path):
    module, specs, path = asking
    built = for_builder(path, tmp_path, "tensorrt")
    model = onnx.load(built)
    operators = [node.op_type for node in model.graph.node]
    assert (built.name, operators.count(MultiscaleDeformableAttnPlugin_TRT.__name__)) == ("40-plugins.onnx", 1)
    assert "GridSample" not in operators
    for batch in (1, 3):
        draw = np.random.default_rng(batch)
        feeds = {s.name: draw.standard_normal((batch, *s.shape[1:])).astype(np.float32) for s in specs}
        feeds["boxes"] = abs(feeds["boxes"]) / 2
        with torch.inference_mode():
            want = module(*(torch.from_numpy(value) for value in feeds.values())).numpy()
        (got,) = ReferenceEvaluator(model, new_ops=[MultiscaleDeformableAttnPlugin_TRT]).run(None, feeds)
        assert abs(got - want).max() <= 1e-5
        feeds["boxes"] += np.float32(0.05)  # negative control
        (moved,) = ReferenceEvaluator(model, new_ops=[MultiscaleDeformableAttnPlugin_TRT]).run(None, feeds)
        assert abs(moved - want).max() > 1e-3
    (plugin,) = [node for node in model.graph.node if node.op_type == MultiscaleDeformableAttnPlugin_TRT.__name__]
    assert [a.s for a in plugin.attribute if a.name == "plugin_version"] == [b"2"]


def test_a_16_bit_graph_gets_it_too(asking, tmp_path):
    """Casts stand between sampling, product and sum, which adds in float32; the plugin takes one type."""
    module, specs, path = asking
    typed = convert_precision(path, Precision.FP16, tmp_path, target=Target.TENSORRT)
    built = for_builder(tmp_path / typed.artifact.name, tmp_path, "tensorrt")
    model = onnx.shape_inference.infer_shapes(onnx.load(built))
    (plugin,) = [node for node in model.graph.node if node.op_type == MultiscaleDeformableAttnPlugin_TRT.__name__]
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
    given = [types[plugin.input[0]], types[plugin.input[3]], types[plugin.input[4]]]
    assert given == [onnx.TensorProto.FLOAT16] * 3
    draw = np.random.default_rng(0)
    feeds = {s.name: draw.standard_normal((2, *s.shape[1:])).astype(np.float32) for s in specs}
    feeds["boxes"] = abs(feeds["boxes"]) / 2
    with torch.inference_mode():
        want = module(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    (got,) = ReferenceEvaluator(model, new_ops=[HalfPlugin]).run(None, feeds)
    assert abs(got - want).max() <= 1e-2 * abs(want).max()
    feeds["boxes"] += np.float32(0.05)  # negative control
    (moved,) = ReferenceEvaluator(model, new_ops=[HalfPlugin]).run(None, feeds)
    assert abs(moved - want).max() > 3e-2 * abs(want).max()


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx"])
def test_other_backends_refuse_a_graph_that_asks_for_the_plugin(backend, asking, tmp_path):
    _, _, path = asking
    with pytest.raises(RecipeError, match=f"plugin library, which {backend} does not have") as error:
        for_builder(path, tmp_path, backend)
    assert "--set options.sampling=gather" in str(error.value.hint)


def test_what_was_asked_for_and_cannot_be_is_an_error(tmp_path):
    _, _, path = sampler(tmp_path, [3, 2, 1])
    with pytest.raises(EngineBuildError, match=r"3 of 3 samplings cannot be the plugin: .*as many at each"):
        for_builder(path, tmp_path, "tensorrt")
    asked = {"variant": ("", "tiny"), "size": ("", "64x96"), "options.sampling": ("", "plugin")}
    with pytest.raises(RecipeError, match="the target is onnxruntime"):
        load_model(SYSTEM, resolve_recipe("rtdetr", asked), Target.ONNXRUNTIME)


def test_a_graph_that_does_not_ask_is_built_as_it_is(tmp_path):
    _, _, path = sampler(tmp_path, [2, 2, 2], "grid_sample")
    assert for_builder(path, tmp_path, "tensorrt_rtx") == path
