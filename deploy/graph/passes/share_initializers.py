"""Initialisers with the same content stored once, and the constant expressions that become equal by that computed once.

```
a = [1, 1], b = [1, 1]:  Mul(x, a), Mul(y, b)        -> Mul(x, a), Mul(y, a)
Expand(c, s), Expand(c, s); Shape(x), Shape(x)       -> one of each
```

Equal means type, shape and every bit, so 0.0 and -0.0 or two NaN patterns stay apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    Array,
    constant,
    detach,
    dtype_of,
    is_op,
    is_output,
    redirect,
    refuse_control_flow,
    sweep,
)

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_PROBE = 16  # elements; enough to tell almost all weights apart without reading them whole


def _apply(graph: gs.Graph) -> PassResult:
    if (refused := refuse_control_flow(graph)) is not None:
        return refused
    constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and not is_output(graph, t)]
    return PassResult(sites=_share(constants) + _merge_expressions(graph))


def _share(constants: Iterable[gs.Constant]) -> int:
    """Point the consumers of each repeated constant at its first copy."""
    groups: defaultdict[Hashable, list[gs.Constant]] = defaultdict(list)
    for tensor in constants:
        groups[(str(dtype_of(tensor)), tuple(tensor.shape))].append(tensor)
    shared = 0
    for group in groups.values():
        firsts: defaultdict[bytes, list[tuple[gs.Constant, Array]]] = defaultdict(list)
        for tensor in group if len(group) > 1 else ():
            values = constant(tensor)
            if values is None:
                continue
            candidates = firsts[_probe(values)]
            twin = next((t for t, v in candidates if v.tobytes() == values.tobytes()), None)
            if twin is None:
                candidates.append((tensor, values))
            else:
                redirect(tensor, twin)
                shared += 1
    return shared


def _probe(values: Array) -> bytes:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // _PROBE)].tobytes()


def _merge_expressions(graph: gs.Graph) -> int:
    seen: dict[Hashable, gs.Node] = {}
    merged = 0
    for node in graph.nodes:
        if not _is_constant_expression(node):
            continue
        # Serialised: the text of a tensor attribute does not hold its values.
        attributes = (a.SerializeToString(deterministic=True) for a in OnnxExporter.export_attributes(node.attrs))
        key = (node.op, tuple(sorted(attributes)), tuple(id(t) for t in node.inputs))
        first = seen.setdefault(key, node)
        if first is not node and not any(is_output(graph, t) for t in node.outputs):
            for old, new in zip(node.outputs, first.outputs, strict=True):
                redirect(old, new)
            detach(node)
            merged += 1
    if merged:
        sweep(graph)
    return merged


def _is_constant_expression(node: gs.Node) -> bool:
    if is_op(node, "Shape"):
        return True
    plain = is_op(node, node.op) and node.op not in _RANDOM
    return plain and len(node.inputs) > 0 and all(isinstance(t, gs.Constant) for t in node.inputs)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,3] x) => (float[2,3] y)
        <float[3] a = {1, 2, 3}, float[3] b = {1, 2, 3}, float[3] c = {1, 2, 4}>
        {
            first = Mul(x, a)
            second = Add(first, b)
            y = Sub(second, c)
        }
    """)


SHARE_INITIALIZERS = GraphPass(
    name="share_initializers",
    apply=_apply,
    requires="Two initialisers agree in type, shape and bits; two nodes in operator, attributes and constant inputs.",
    ensures="Each constant is stored once and each expression of constants computed once.",
    example=_example,
)
