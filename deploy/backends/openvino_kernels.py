"""OpenVINO's runtime model, read: which kernels a compiled network has, in which precision, and for which nodes.

OpenVINO fuses and renames. Each kernel lists the ONNX nodes that went into it, but a MatMul that is joined with its
bias goes by the name of the Add, and the last node by the name of the graph's output.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from deploy.backends.audit import Kernel, audit_engine
from deploy.backends.graph_types import MATRIX_OPS, GraphTypes
from deploy.records import Audit, Precision

_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "i8": "int8", "u8": "int8"}
_NO_KERNELS = frozenset({"Input", "Output", "Const"})
_CASTS = frozenset({"Convert", "Reorder"})  # also changes of layout: they move data and compute nothing
_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
_AFTER = frozenset({"Add", "Cast", "Identity"})
_FUSED = {"MVN": "norm", "RMS": "norm", "MHA": "attention", "ScaledDotProductAttention": "attention"}


def kernels_of(runtime_model: Any, products: Mapping[str, str]) -> list[Kernel]:
    """Turn the nodes of a runtime model that ran into kernels.

    Args:
        runtime_model: Of a network that was compiled with performance counters and has run.
        products: As ``products_by_name`` gives it.
    """
    kernels = []
    for operation in runtime_model.get_ordered_ops():
        about = {key: str(_plain(value)) for key, value in operation.get_rt_info().items()}
        kind, time = about.get("layerType", ""), about.get("execTimeMcs", "")
        if kind in _NO_KERNELS or not time.isdigit():  # folded constants and views are "not_executed"
            continue
        nodes = tuple(name for name in about.get("originalLayersNames", "").split(",") if name)
        if kind in _PRODUCTS:
            nodes += tuple(products[name] for name in nodes if name in products and products[name] not in nodes)
        computes = _PRECISIONS.get(about.get("runtimePrecision", ""), "")
        types = frozenset({computes} if computes else ())
        kernels.append(
            Kernel(
                name=operation.get_friendly_name(), precision="cast" if kind in _CASTS else computes or "other",
                reads=types, writes=types, fused=_fused(kind, nodes), nodes=nodes, microseconds=float(time),
            )
        )  # fmt: skip
    return kernels


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _fused(kind: str, nodes: Sequence[str]) -> str:
    if kind in _PRODUCTS and len(nodes) > 1:
        return "conv" if "onv" in kind else "matmul"
    return _FUSED.get(kind, "")


def products_by_name(model: Path) -> dict[str, str]:
    """Return which product OpenVINO may mean by the name of what comes after it.

    That is its bias, a cast or an Identity, and for the last node the graph's output.

    Returns:
        Name of a node or of an output -> name of the matrix node.
    """
    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    reached: dict[str, str] = {}  # tensor -> product
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in MATRIX_OPS:
            reached[node.output[0]] = node.name
        elif node.op_type in _AFTER:
            first, *others = [name for name in node.input if name not in constants] or [""]
            if first in reached and not others:
                reached[node.output[0]] = found[node.name] = reached[first]
    return found | {output.name: reached[output.name] for output in graph.output if output.name in reached}


def audit_kernels(asked: Precision, graph: GraphTypes, kernels: Sequence[Kernel]) -> Audit:
    """Hold the kernels that ran against what was asked, product by product.

    Attention and norms are left out of what must be fused: OpenVINO takes norms apart and fuses attention for language
    models only. What the graph keeps in FP32 and ran in a shorter type is a warning: its hint is for the whole network.
    """
    audit = audit_engine(asked, dataclasses.replace(graph, attention={}, norms={}), kernels, "runtime model")
    ran: defaultdict[str, set[str]] = defaultdict(set)
    for kernel in kernels:
        for name in kernel.nodes:
            ran[name] |= kernel.reads
    kept = [name for name, precision in graph.matrix.items() if precision == "fp32"]
    lowered = [name for name in kept if asked is not Precision.FP32 and asked.value in ran[name]]
    if not lowered:
        return audit
    told = (
        f"{len(lowered)} products that the graph keeps in FP32 ran in {asked.value.upper()}, the first {lowered[0]}: "
        "OpenVINO's precision is one for the whole network"
    )
    return dataclasses.replace(audit, warnings=(*audit.warnings, told))


def time_by_node(kernels: Sequence[Kernel], times: Mapping[str, float], graph: GraphTypes) -> dict[str, float]:
    """Name each kernel's time after the last node of the graph in it, or after the kernel where it has none."""
    known = set(graph.producers.values())
    found: dict[str, float] = {}
    for kernel in kernels:
        nodes = (graph.producers.get(name, name) for name in kernel.nodes)  # the last goes by the output's name
        names = [name for name in nodes if name in known]
        name = names[-1] if names else kernel.name
        found[name] = found.get(name, 0.0) + times.get(kernel.name, 0.0)
    return found
