"""ONNX Runtime's profile, read: which kernels ran, in which precision, how long, and for which node of the graph."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.backends.audit import GraphTypes, Kernel, fused_counts, graph_warnings, kernel_counts, times
from deploy.records import Audit, Precision

_PRECISIONS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "int8": "int8",
    "uint8": "int8",
}
INTEGER_KERNELS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
)
_FUSED = {"LayerNormalization": "norm", "SkipLayerNormalization": "norm", "MultiHeadAttention": "attention",
          "Attention": "attention", "FusedConv": "conv", "FusedMatMul": "matmul", "FusedGemm": "matmul"}  # fmt: skip
_FUSED_QDQ = re.compile(r"_token_\d+$")  # of a node that took the Q/DQ around it into itself
_NAMED = 3  # nodes that a sentence names
INTEGER = "integer"  # kind of a product that runs in integers
Event = Mapping[str, Any]


def read_events(path: Path) -> list[Event]:
    """Return the kernel events of a profile file, in order of execution."""
    events = json.loads(path.read_text(encoding="utf-8"))
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def node_times(events: Sequence[Event], graph: GraphTypes) -> dict[str, float]:
    """Return node name -> median microseconds over the profiled runs; the first run warms up and is left out."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        times[_node_name(event["name"], graph), event["args"]["node_index"]].append(event["dur"])
    totals: dict[str, float] = defaultdict(float)
    for (name, _), values in times.items():
        totals[name] += statistics.median(values[1:] or values)
    return dict(totals)


def kernels_of(events: Sequence[Event], graph: GraphTypes) -> list[Kernel]:
    """Turn kernel events into kernels. A cast's precision is ``"cast"``: it moves data and computes nothing."""
    kernels = []
    for event in events:
        arguments = event["args"]
        reads = _types(arguments.get("input_type_shape", ()))
        writes = _types(arguments.get("output_type_shape", ()))
        found = reads or writes
        precision = "other" if not found else next(iter(found)) if len(found) == 1 else "mixed"
        name = _node_name(event["name"], graph)
        kernels.append(
            Kernel(
                name=name, precision="cast" if arguments["op_name"] == "Cast" else precision, reads=reads,
                writes=writes, fused=_kind(arguments["op_name"]), nodes=(name,), microseconds=event["dur"],
            )
        )  # fmt: skip
    return kernels


def _kind(op: str) -> str:
    return INTEGER if op in INTEGER_KERNELS else _FUSED.get(op, "")


def _node_name(event: str, graph: GraphTypes) -> str:
    """Undo the optimizer's names: prefixes, fusion suffixes, and tensor names for nodes of a blocked layout."""
    name = event.removesuffix("_kernel_time").removeprefix("InsertedPrecisionFreeCast_").removesuffix("_nchwc")
    name = _FUSED_QDQ.sub("", name)
    return graph.producers.get(name) or name.split("/MatMulAddFusion")[0]


def _types(tensors: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(_PRECISIONS[kind] for tensor in tensors for kind in tensor if kind in _PRECISIONS)


def audit_profile(asked: Precision, graph: GraphTypes, kernels: Sequence[Kernel], device: str) -> Audit:
    """Hold a profiled run against what was asked: it must be in the graph; the kernels are told as they are.

    In the graph means: in its matrix nodes where it has any. ONNX Runtime fuses no attention and expands some norms
    whatever the precision, so no fused kernels are expected of it.
    """
    if asked is Precision.INT8:
        return _audit_integers(graph, kernels)
    nodes, total = graph.counts.get(asked.value, 0), sum(graph.counts.values())
    counts = kernel_counts(kernels)
    computing = sum(n for kind, n in counts.items() if kind not in ("cast", "other"))
    provider = "CUDA" if device.startswith("cuda") else "CPU"
    label = asked.value.upper()
    statement = f"{nodes} of {total} nodes of the graph are {label}"
    if asked is Precision.FP32:
        statement += f"; {counts.get('fp32', 0)} of {computing} kernels compute in FP32"
    else:
        statement += (
            f", with their weights; ONNX Runtime's {provider} provider computed {counts.get('fp32', 0)} of its "
        )
        statement += f"{computing} kernels in FP32 (casts that ran: {counts.get('cast', 0)})"
        if counts.get(asked.value, 0) * 2 < computing:
            statement += f": {label} is a size option here, not a speed-up"
    shorter = graph.counts.get("fp16", 0) + graph.counts.get("bf16", 0)
    held = asked.value in graph.matrix.values() if graph.matrix else bool(nodes)
    return Audit(
        asked=asked, evidence="graph types and profile of one run", kernels=counts,
        fused=fused_counts(kernels), ok=not shorter if asked is Precision.FP32 else held,
        statement=statement, weights=graph.weights, microseconds=times(kernels),
        warnings=tuple(graph_warnings(asked, graph)),
    )  # fmt: skip


def _audit_integers(graph: GraphTypes, kernels: Sequence[Kernel]) -> Audit:
    """Hold the quantised products against the kernels that ran, by name: each must be one of the integer kernels.

    A Q/DQ pair around a float kernel is how ONNX Runtime falls back: it gives the same numbers, slower than FP32.
    """
    asked = [name for name, precision in graph.matrix.items() if precision == Precision.INT8.value]
    integer = {name for k in kernels if k.fused == INTEGER for name in k.nodes}
    ran = [name for name in asked if name in integer]
    lost = [name for name in asked if name not in integer]
    counts = kernel_counts(kernels)
    statement = f"{len(asked)} of {len(graph.matrix)} matrix nodes of the graph are INT8; {len(ran)} of them ran in "
    statement += f"ONNX Runtime's integer kernels, {counts.get('fp32', 0)} other kernels in FP32"
    if lost:
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        statement += f"; quantised and yet in float: {', '.join(lost[:_NAMED])}{more}"
    return Audit(
        asked=Precision.INT8, evidence="graph types and profile of one run", kernels=counts,
        fused=fused_counts(kernels), ok=bool(asked) and not lost, statement=statement, weights=graph.weights,
        microseconds=times(kernels), warnings=tuple(graph_warnings(Precision.INT8, graph)),
    )  # fmt: skip
