"""A convolutional MLP, done a piece of its hidden channels at a time.

```
Conv 1x1 (w1, b1) -> Gelu -> Conv 1x1 (w2, b2)
  ->  y0 = Conv(Gelu(Conv(x, w1[0], b1[0])), w2[:, 0], b2)
      y1 = y0 + Conv(Gelu(Conv(x, w1[1], b1[1])), w2[:, 1])      and so on, exact up to rounding
```

The hidden map is four times as wide as the block: written by one node, read and written by the next, read by the third,
it goes through the slow end of the cache three times. A piece as wide as the block stays nearer, and ONNX Runtime fuses
the running sum into the convolution. It pays on a CPU only: on a GPU it is the same work in more kernels.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from deploy.graph.base import GraphPass, PassResult
from deploy.graph.matching import (
    Array,
    constant,
    inside,
    only_consumer,
    optional_input,
    producer,
    require,
    require_float32,
    require_private,
    rewrite,
    unused_name,
)

# Below, a piece is a few blocks of the layout that ONNX Runtime's convolutions work in, and overhead wins.
NARROWEST = 32


def _visit(graph: gs.Graph, gelu: gs.Node) -> bool:
    expand, project = producer(gelu.inputs[0], "Conv"), only_consumer(graph, gelu.outputs[0], "Conv")
    if expand is None or project is None or project.inputs[0] is not gelu.outputs[0]:
        return False
    kernel = constant(expand.inputs[1])
    pieces = 1 if kernel is None else pieces_of(*kernel.shape[:2])
    if pieces == 1:
        return False
    require(_pointwise(expand) and _pointwise(project), "one of its convolutions is not 1x1 without stride and groups")
    require_private(graph, expand)
    require_float32(gelu.inputs[0])
    weights = [constant(node.inputs[1]) for node in (expand, project)]
    biases = [_bias(node) for node in (expand, project)]
    require(all(w is not None for w in weights) and all(b is not None for b in biases), "its weights are not constant")
    _split(graph, (expand, gelu, project), [a for a in (*weights, *biases) if a is not None], pieces)
    return True


def pieces_of(hidden: int, width: int) -> int:
    """Choose into how many pieces to cut the hidden channels: each as wide as the block, 1 if that does not divide."""
    return hidden // width if width >= NARROWEST and hidden % width == 0 else 1


def _pointwise(conv: gs.Node) -> bool:
    kernel = constant(conv.inputs[1])
    plain = kernel is not None and kernel.shape[2:] == (1, 1) and conv.attrs.get("group", 1) == 1
    strides, pads = conv.attrs.get("strides") or [1], conv.attrs.get("pads") or [0]
    return plain and set(strides) == {1} and set(pads) == {0} and conv.attrs.get("auto_pad", "NOTSET") == "NOTSET"


def _bias(conv: gs.Node) -> Array | None:
    tensor = optional_input(conv, 2)
    kernel = constant(conv.inputs[1])
    if tensor is None and kernel is not None:
        return np.zeros(kernel.shape[0], kernel.dtype)
    return None if tensor is None else constant(tensor)


def _split(graph: gs.Graph, site: tuple[gs.Node, gs.Node, gs.Node], arrays: list[Array], pieces: int) -> None:
    """Write the pieces before the place of ``project``; the last sum makes its output."""
    expand, gelu, project = site
    w1, w2, b1, b2 = arrays
    writer = _Writer(graph)
    step, source, total = w1.shape[0] // pieces, expand.inputs[0], None
    for k in range(pieces):
        part = slice(k * step, (k + 1) * step)
        hidden = writer.conv(expand, source, w1[part], b1[part])
        active = writer.node("Gelu", gelu, [hidden])
        term = writer.conv(project, active, w2[:, part], *([b2] if k == 0 else []))
        total = term if total is None else writer.node("Add", project, [total, term])
    place = next(i for i, node in enumerate(graph.nodes) if node is project)
    writer.made[-1].outputs = list(project.outputs)
    project.outputs.clear()
    graph.nodes[place:place] = writer.made


class _Writer:
    """Makes the nodes of one site, named after the nodes that they replace."""

    def __init__(self, graph: gs.Graph) -> None:
        self.made: list[gs.Node] = []
        self._names = {node.name for node in graph.nodes}
        self._tensors = set(graph.tensors())

    def conv(self, like: gs.Node, x: gs.Tensor, *arrays: Array) -> gs.Tensor:
        """Append a convolution with other weights; returns its output."""
        constants = [gs.Constant(self._tensor(like.inputs[1].name), np.ascontiguousarray(array)) for array in arrays]
        return self.node("Conv", like, [x, *constants])

    def node(self, op: str, like: gs.Node, inputs: list[gs.Tensor]) -> gs.Tensor:
        """Append a node; returns its output."""
        name = unused_name(self._names, inside(like, op))
        self._names.add(name)
        output = gs.Variable(self._tensor(name), dtype=np.float32)
        attributes = dict(like.attrs) if op == like.op else {}
        self.made.append(gs.Node(op=op, name=name, attrs=attributes, inputs=inputs, outputs=[output]))
        return output

    def _tensor(self, stem: str) -> str:
        name = unused_name(self._tensors, stem)
        self._tensors.add(name)
        return name


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"Gelu"}, _visit)


def _example() -> onnx.ModelProto:
    """An MLP from 32 to 64 channels and back."""
    stream = np.random.default_rng(0)
    shapes = {"w1": (64, 32, 1, 1), "b1": (64,), "w2": (32, 64, 1, 1), "b2": (32,)}
    weights = [
        numpy_helper.from_array((0.03 * stream.standard_normal(shape)).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    image = [1, 32, 2, 3]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["wide"], name="block/Conv"),
        helper.make_node("Gelu", ["wide"], ["active"], name="block/Gelu"),
        helper.make_node("Conv", ["active", "w2", "b2"], ["y"], name="block/Conv_1"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, image) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "example", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)


SPLIT_MLP = GraphPass(
    name="split_mlp",
    apply=_apply,
    requires="Two 1x1 convolutions with constant float32 weights around a Gelu that nobody else reads; the hidden "
    "width is a multiple of the block's.",
    ensures="The same sum, piece by piece, each piece as wide as the block.",
    example=_example,
)
