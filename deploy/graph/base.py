"""What a graph pass is: a rewrite in place that says what it needs, what it guarantees, and what it left alone."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import onnx
import onnx.parser
import onnx_graphsurgeon as gs


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResult:
    """What one run of a pass did.

    Attributes:
        sites: How many places it rewrote; 0 means that the graph is untouched.
        declined: One sentence for each place that looked right and was left alone: the node's name and the reason.
    """

    sites: int
    declined: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPass:
    """A rewrite of an ONNX graph; ``tests/contracts/test_passes.py`` holds each one to this contract.

    Outputs stay equal, inputs and outputs keep name, type and shape, nodes stay in topological order, a second run
    finds nothing, and a graph without a site is not touched.

    Attributes:
        name: Identifier in records and reports, e.g. ``fuse_gelu``.
        apply: Rewrites the graph in place.
        requires: What must hold for a site to be rewritten, in one sentence.
        ensures: What holds afterwards, in one sentence.
        example: Builds the smallest model that the pass rewrites: its documentation and its first test.
    """

    name: str
    apply: Callable[[gs.Graph], PassResult]
    requires: str
    ensures: str
    example: Callable[[], onnx.ModelProto]


def parse_example(text: str, *, opset: int = 20, module: str = "block") -> onnx.ModelProto:
    """Build a small model from ONNX's textual syntax, its nodes named as the tracer names them (``block/Add_1``).

    Args:
        text: Graph in the syntax of ``onnx.parser``, without the model header.
        opset: Version of the default operator set.
        module: Module path that every node's name starts with.
    """
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    model: onnx.ModelProto = onnx.parser.parse_model(header + textwrap.dedent(text))
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        count = seen[node.op_type]
        node.name = f"{module}/{node.op_type}" + (f"_{count}" if count else "")
        seen[node.op_type] += 1
    return model
