"""Casts that do nothing, twice the same, or there and back.

```
Cast(x: T, to=T)                      -> x
Cast(Cast(x: A, to=B), to=C)          -> Cast(x, to=C), or x when C = A;   only if B holds every value of A
Cast(x, to=B), Cast(x, to=B)          -> one of them
```

``float32 -> float16 -> float32`` rounds and is left alone. So is a chain whose ends disagree about values that the
middle could hold (int8 -> float32 -> uint8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.matching import (
    bypass,
    detach,
    dtype_of,
    is_op,
    is_output,
    label,
    producer,
    redirect,
    require,
    rewrite,
)

_Type = np.dtype[Any]


def _visit(graph: gs.Graph, cast: gs.Node) -> bool:
    source, to = cast.inputs[0], _target(cast)
    if to is not None and dtype_of(source) == to:
        bypass(graph, cast, source)
        return True
    return _merged_with_twin(graph, cast) or _shortened(graph, cast)


def _merged_with_twin(graph: gs.Graph, cast: gs.Node) -> bool:
    # By place in the graph: a tensor's list of consumers is in no order once nodes were rewired.
    twins = (n for n in graph.nodes if is_op(n, "Cast") and n.inputs and n.inputs[0] is cast.inputs[0])
    first = next(n for n in twins if dict(n.attrs) == dict(cast.attrs))
    if first is cast:
        return False
    require(not is_output(graph, cast.outputs[0]), f"it equals {label(first)} and makes a graph output")
    redirect(cast.outputs[0], first.outputs[0])
    detach(cast)
    return True


def _shortened(graph: gs.Graph, cast: gs.Node) -> bool:
    first = producer(cast.inputs[0], "Cast")
    if first is None:
        return False
    source = first.inputs[0]
    begin, middle, end = dtype_of(source), _target(first), _target(cast)
    known = begin is not None and middle is not None and end is not None
    require(known, "a type of the chain is unknown to numpy")
    chain = f"{begin} -> {middle} -> {end}"
    require(_holds(middle, begin), f"the chain {chain} loses values in the middle")
    require(
        begin == end or _holds(end, begin) or _all_floats(begin, middle, end),
        f"the chain {chain} may differ from its ends",
    )
    if begin == end:
        bypass(graph, cast, source)
    else:
        cast.inputs = [source]
    return True


def _holds(wide: _Type | None, narrow: _Type | None) -> bool:
    """Whether every value of ``narrow`` exists in ``wide``."""
    return wide is not None and narrow is not None and bool(np.can_cast(narrow, wide, casting="safe"))


def _all_floats(*types: _Type | None) -> bool:
    return all(t is not None and t.kind == "f" for t in types)


def _target(cast: gs.Node) -> _Type | None:
    kind = cast.attrs["to"]
    if isinstance(kind, int):  # graphsurgeon leaves the enumeration of a type as it is in an attribute
        kind = onnx.helper.tensor_dtype_to_np_dtype(kind)
    dtype: _Type = np.dtype(kind)
    return dtype if dtype.kind in "biuf" else None


def _apply(graph: gs.Graph) -> PassResult:
    return rewrite(graph, {"Cast"}, _visit)


def _example() -> onnx.ModelProto:
    return parse_example("""
        example (float[2,3] x) => (float[2,3] y, double[2,3] z)
        {
            same = Cast<to = 1>(x)
            wide = Cast<to = 11>(same)
            again = Cast<to = 11>(same)
            total = Add(wide, again)
            back = Cast<to = 1>(wide)
            y = Neg(back)
            z = Neg(total)
        }
    """)


REMOVE_CASTS = GraphPass(
    name="remove_casts",
    apply=_apply,
    requires="The types of a Cast or of a chain of two are known, and the middle type holds every value of the first.",
    ensures="No Cast to the same type, no two equal Casts of one tensor, no lossless detour.",
    example=_example,
)
