"""Operators of TensorRT's plugin library, for engines of full TensorRT: no other runtime has them.

A rewrite here is no ``GraphPass``, because ONNX Runtime cannot run what it makes; it belongs between the finished
graph, which parity has seen, and the builder. A model asks for it by the names of its nodes: samplings made by a module
called ``plugin`` are replaced by ``for_builder`` and by nothing else.

```
ReduceSum(Mul(Concat(GridSample(V_l, G_l) for each level l), W), axis 3)
    ->  MultiscaleDeformableAttnPlugin_TRT(values, sizes, starts, locations, weights)
```

V_l [N*heads,d,h_l,w_l] are the maps, G_l [N*heads,Q,P,2] the points in -1..1, W [N*heads,1,Q,levels*P] their weights.
The plugin wants tokens before channels, points in 0..1 and as many of them at every level; it has no parameters, and
samples as GridSample does, bilinear with zeros outside and pixel centres at half steps (NVIDIA/TensorRT,
``plugin/multiscaleDeformableAttnPlugin/README.md``; version 2 from TensorRT 10.11 on).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deploy.artifacts import WITH_PLUGINS
from deploy.errors import EngineBuildError, RecipeError
from deploy.graph.base import PassResult
from deploy.graph.io import graph_of, load_model, model_bytes, model_of, write_model
from deploy.graph.matching import (
    Array,
    DeclinedError,
    constant,
    inside,
    is_op,
    producer,
    reduction_axes,
    require,
    require_private,
    reshape_target,
    rewrite,
    shape_of,
    unused_name,
)

DEFORMABLE_ATTENTION = "MultiscaleDeformableAttnPlugin_TRT"
MARK = ".plugin/GridSample"
VERSION = "2"  # of the plugin; from TensorRT 10.11 on, and the backend wants 10.12


def for_builder(model: Path, folder: Path, backend: str) -> Path:
    """Return the file that a backend builds: the finished graph, or beside it a copy with the plugins it asks for.

    Args:
        model: The typed ONNX file.
        folder: Where ``40-plugins.onnx`` is written if the graph asks for plugins.
        backend: Name of the backend that will build.

    Raises:
        RecipeError: the graph asks for plugins that the backend does not have.
        EngineBuildError: a sampling that the plugin cannot replace; the message says why.
    """
    marked = sum(MARK in node.name for node in onnx.load(model, load_external_data=False).graph.node)
    if not marked:
        return model
    if backend != "tensorrt":
        raise RecipeError(
            f"options.sampling: plugin is an operator of TensorRT's plugin library, which {backend} does not have",
            hint="--set options.sampling=gather, or build with --backend tensorrt",
        )
    graph = graph_of(load_model(model))
    result = use_deformable_attention(graph, version=VERSION)
    if left := sum(MARK in node.name for node in graph.nodes):
        raise EngineBuildError(
            f"{left} of {marked} samplings cannot be the plugin: {'; '.join(result.declined) or 'unknown pattern'}",
            hint="--set options.sampling=gather",
        )
    path = folder / WITH_PLUGINS
    write_model(model_bytes(model_of(graph)), path)
    return path


def use_deformable_attention(graph: gs.Graph, *, version: str = "1") -> PassResult:
    """Replace multi-scale sampling by TensorRT's plugin, in place.

    Args:
        graph: Typed or not; the plugin takes float32 and float16.
        version: "1" (deprecated since TensorRT 10.11) or "2".

    Returns:
        How many samplings were replaced, and why others were not.
    """

    def visit(graph: gs.Graph, total: gs.Node) -> bool:
        return _visit(graph, total, version)

    return rewrite(graph, {"ReduceSum"}, visit)


def _visit(graph: gs.Graph, total: gs.Node, version: str) -> bool:
    widened = producer(total.inputs[0], "Cast")  # 16-bit graphs sum in float32
    product = producer((widened or total).inputs[0], "Mul")
    concat = None if product is None else producer(product.inputs[0], "Concat")
    samples = [] if concat is None else [producer(t, "GridSample") for t in concat.inputs]
    if product is None or concat is None or not samples or not all(is_op(sample, "GridSample") for sample in samples):
        return False
    found = [sample for sample in samples if sample is not None]
    for node in (product, concat, *found, *([] if widened is None else [widened])):
        require_private(graph, node)
    require(reduction_axes(total) == (3,) and not total.attrs.get("keepdims", 1), "it does not sum over the points")
    require(concat.attrs.get("axis") == 3, "the levels are not joined along the points")
    _require_sampling(found)
    grids = _split_of(found)
    heads, sizes = _heads(found), [_map_size(sample) for sample in found]
    grid = shape_of(found[0].inputs[1]) or ()
    queries, points = (axis if isinstance(axis, int) else 0 for axis in grid[1:3])
    require(bool(queries and points), "the number of queries or points is not known")
    levels = [(shape_of(sample.inputs[1]) or (0, 0, 0))[2] for sample in found]
    require(set(levels) == {points}, f"the levels have {levels} points, the plugin wants as many at each")
    _replace(graph, total, _Site(found, grids, product.inputs[1], heads, sizes, queries, points), version)
    return True


def _split_of(samples: Sequence[gs.Node]) -> gs.Tensor:
    """Return the points of all levels, which one Split hands to the levels in order."""
    grids = [_before_cast(sample.inputs[1]) for sample in samples]  # 16-bit graphs compute them in float32
    split = producer(grids[0], "Split")
    parts = [] if split is None else list(split.outputs)
    same = len(parts) == len(grids) and all(grid is part for grid, part in zip(grids, parts, strict=True))
    if split is None or not same:
        raise DeclinedError("its grids are not the parts of one Split")
    return split.inputs[0]


def _before_cast(tensor: gs.Tensor) -> gs.Tensor:
    cast = producer(tensor, "Cast")
    return tensor if cast is None else cast.inputs[0]


def _require_sampling(samples: Sequence[gs.Node]) -> None:
    for sample in samples:
        mode = sample.attrs.get("mode", "linear")
        require(mode in ("linear", "bilinear"), f"its mode is {mode}, the plugin is bilinear")
        padding = sample.attrs.get("padding_mode", "zeros")
        require(padding == "zeros", f"its padding is {padding}, the plugin's is zeros")
        require(not sample.attrs.get("align_corners", 0), "it aligns corners, the plugin does not")


def _heads(samples: Sequence[gs.Node]) -> int:
    """Read the number of heads from the Reshape that makes [N*heads,d,h,w] of [N,heads*d,h,w]."""
    reshape = producer(samples[0].inputs[0], "Reshape")
    target = None if reshape is None else reshape_target(reshape)
    source = None if reshape is None else shape_of(reshape.inputs[0])
    require(
        source is not None and target is not None and len(source) == len(target) == 4, "its heads are not a Reshape"
    )
    channels, width = (source or ())[1], (target or ())[1]
    known = isinstance(channels, int) and isinstance(width, int) and channels % width == 0
    require(known, f"{channels} channels do not divide into heads of {width}")
    return int(channels or 0) // int(width or 1)


def _map_size(sample: gs.Node) -> tuple[int, int]:
    reshape = producer(sample.inputs[0], "Reshape")
    target = None if reshape is None else constant(reshape.inputs[1])
    require(target is not None and target.size == 4 and bool((target[2:] > 0).all()), "a map's size is not known")
    return (int(target[2]), int(target[3])) if target is not None else (0, 0)


class _Site:
    """A sampling: its nodes and sizes."""

    def __init__(
        self, samples: Sequence[gs.Node], grid: gs.Tensor, weights: gs.Tensor, heads: int,
        sizes: Sequence[tuple[int, int]], queries: int, points: int,
    ) -> None:  # fmt: skip
        self.maps, self.grid, self.weights = [sample.inputs[0] for sample in samples], grid, weights
        self.heads, self.sizes, self.queries, self.points = heads, sizes, queries, points


def _replace(graph: gs.Graph, total: gs.Node, site: _Site, version: str) -> None:
    build = _Builder(graph, total)
    heads, queries, levels, points = site.heads, site.queries, len(site.sizes), site.points
    lengths = [h * w for h, w in site.sizes]
    parts = [
        build.reshape(x, [-1, heads, int((shape_of(x) or (0, 0))[1] or 0), length])
        for x, length in zip(site.maps, lengths, strict=True)
    ]
    values = build.transpose(build.node("Concat", parts, axis=3), [0, 3, 1, 2])
    dtype = np.dtype(site.maps[0].dtype)
    half = build.constant("half", np.asarray(0.5, site.grid.dtype))
    place = build.node("Add", [build.node("Mul", [site.grid, half]), half])
    place = place if np.dtype(site.grid.dtype) == dtype else build.cast(place, dtype)
    place = build.transpose(build.reshape(place, [-1, heads, queries, levels, points, 2]), [0, 2, 1, 3, 4, 5])
    weights = build.reshape(site.weights, [-1, heads, queries, levels, points])
    weights = build.transpose(weights, [0, 2, 1, 3, 4])
    sizes = build.constant("sizes", np.array(site.sizes, np.int32))
    starts = build.constant("starts", np.array([0, *itertools.accumulate(lengths[:-1])], np.int32))
    inputs = [values, sizes, starts, place, weights]
    mixed = build.node(DEFORMABLE_ATTENTION, inputs, plugin_version=version, plugin_namespace="")
    channels = int((shape_of(site.maps[0]) or (0, 0))[1] or 0)
    last = build.transpose(mixed, [0, 2, 3, 1])
    if np.dtype(total.outputs[0].dtype) != dtype:
        last = build.cast(last, np.dtype(total.outputs[0].dtype))
    total.op, total.attrs = "Reshape", {}
    total.inputs = [last, build.constant("rows", np.array([-1, channels, queries], np.int64))]
    position = next(i for i, node in enumerate(graph.nodes) if node is total)
    graph.nodes[position:position] = build.nodes


class _Builder:
    """Makes nodes in the module of another one; they go into the graph in the order in which they are made."""

    def __init__(self, graph: gs.Graph, near: gs.Node) -> None:
        self.near = near
        self.nodes: list[gs.Node] = []
        self.names = {node.name for node in graph.nodes} | set(graph.tensors())

    def node(self, op: str, inputs: Sequence[gs.Tensor], **attrs: object) -> gs.Variable:
        """Add a node and return what it makes."""
        name = self.unused(op)
        output = gs.Variable(name, dtype=next(t.dtype for t in inputs if t.dtype is not None))
        self.nodes.append(gs.Node(op, name, attrs=dict(attrs), inputs=list(inputs), outputs=[output]))
        return output

    def unused(self, name: str) -> str:
        """Reserve a name in the module; what was made is no part of the graph yet."""
        name = unused_name(self.names, inside(self.near, name))
        self.names.add(name)
        return name

    def constant(self, name: str, values: Array) -> gs.Constant:
        """Add an initialiser."""
        return gs.Constant(self.unused(name), values)

    def reshape(self, x: gs.Tensor, shape: Sequence[int]) -> gs.Variable:
        """Add a Reshape."""
        return self.node("Reshape", [x, self.constant("shape", np.array(shape, np.int64))])

    def cast(self, x: gs.Tensor, dtype: np.dtype[np.generic]) -> gs.Variable:
        """Add a Cast."""
        output = self.node("Cast", [x], to=onnx.helper.np_dtype_to_tensor_dtype(dtype))
        output.dtype = dtype
        return output

    def transpose(self, x: gs.Tensor, order: Sequence[int]) -> gs.Variable:
        """Add a Transpose."""
        return self.node("Transpose", [x], perm=list(order))
