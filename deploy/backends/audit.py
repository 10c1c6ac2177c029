"""Which precision an engine really computes in: its kernels held against the types of the graph.

A runtime that quietly falls back to FP32 shows in the kernels (build log, inspector, profile), a graph that was never
typed shows in its nodes. Both are counted, and ``audited`` raises when they do not say what was asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from deploy.errors import EngineBuildError, PrecisionAuditError
from deploy.records import Audit, Precision

# Where the arithmetic is: a precision that was asked must show in these.
MATRIX_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention"})
_NO_ARITHMETIC = frozenset({"Cast", "Constant", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
_FLOATS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One launch of an engine.

    Attributes:
        name: The runtime's own name.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"mixed"`` where it reads several floating types,
            ``"other"`` where it reads and writes none.
        reads: Floating and quantised types among its inputs and constants.
        fused: What kind of fused kernel it is (``"attention"``, ``"norm"``, ``"conv"``, ``"matmul"``), or empty.
        nodes: Names of the ONNX nodes that it came from, where the runtime tells.
    """

    name: str
    precision: str
    reads: frozenset[str]
    fused: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTypes:
    """The floating-point types of a graph's nodes, by the type of their first output.

    Attributes:
        counts: Precision -> nodes that do arithmetic (casts, constants and reshapes left out).
        matrix: Name of each matrix node -> its precision.
        producers: Tensor name -> name of the node that writes it.
    """

    counts: Mapping[str, int]
    matrix: Mapping[str, str]
    producers: Mapping[str, str]


def graph_types(path: Path) -> GraphTypes:
    """Read the types of an ONNX file's nodes.

    Raises:
        EngineBuildError: not an ONNX file, or its types contradict each other.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) > 4096:  # type inference reads shapes, never weights; copying them costs seconds
                tensor.ClearField("raw_data")
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    except Exception as error:
        raise EngineBuildError(
            f"{path.name} cannot be read as ONNX: {_first_line(error)}", hint="export again"
        ) from error
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}
    counts: Counter[str] = Counter()
    matrix: dict[str, str] = {}
    producers: dict[str, str] = {}
    for node in graph.node:
        producers |= dict.fromkeys(node.output, node.name)
        precision = _FLOATS.get(types.get(node.output[0], 0), "") if node.output else ""
        if precision and node.op_type not in _NO_ARITHMETIC:
            counts[precision] += 1
            if node.op_type in MATRIX_OPS:
                matrix[node.name] = precision
    return GraphTypes(counts=dict(counts), matrix=matrix, producers=producers)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kernel_counts(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Count kernels by precision; the sum is the number of kernel launches of one inference."""
    return dict(sorted(Counter(k.precision for k in kernels).items()))


def fused_counts(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Count fused kernels by kind."""
    return dict(sorted(Counter(k.fused for k in kernels if k.fused).items()))


def audit_engine(asked: Precision, graph: GraphTypes, kernels: Sequence[Kernel], evidence: str) -> Audit:
    """Hold an engine's kernels against the graph's matrix nodes, node by node.

    It is as asked when the graph has matrix nodes of that precision, at least one of them is found among the
    kernels, and none is found only in kernels that read other types. FP32 means that no kernel reads a shorter
    float. A graph without matrix nodes is judged by whether any kernel reads the precision.
    """
    typed = [name for name, precision in graph.matrix.items() if precision == asked.value]
    reads = {name: frozenset[str]().union(*(k.reads for k in kernels if name in k.nodes)) for name in typed}
    found = [name for name in typed if reads[name]]
    wrong = [name for name in found if asked.value not in reads[name]]
    shorter = sum(1 for k in kernels if k.reads & {"fp16", "bf16"}) if asked is Precision.FP32 else 0
    used = bool(found) if graph.matrix else any(asked.value in k.reads for k in kernels)
    label = asked.value.upper()
    parts = [f"{len(typed)} of {len(graph.matrix)} matrix nodes of the graph are {label}"]
    parts.append(f"{len(found) - len(wrong)} of them run in {label} kernels")
    if len(typed) > len(found):
        parts.append(f"{len(typed) - len(found)} were folded away or are not named in the {evidence}")
    if wrong:
        parts.append(f"not in {label}: {', '.join(wrong[:3])}")
    if shorter:
        parts.append(f"{shorter} kernels read a shorter float type")
    parts.append(f"{len(kernels)} kernels: " + ", ".join(f"{n} {p}" for p, n in kernel_counts(kernels).items()))
    return Audit(
        asked=asked, evidence=evidence, kernels=kernel_counts(kernels), fused=fused_counts(kernels),
        ok=used and not wrong and not shorter, statement="; ".join(parts),
    )  # fmt: skip


def audited(audit: Audit) -> Audit:
    """Return the audit when it holds.

    Raises:
        PrecisionAuditError: the engine does not have the precision that was asked.
    """
    if audit.ok:
        return audit
    raise PrecisionAuditError(
        f"asked for {audit.asked.value.upper()}, but the engine is not: {audit.statement} (evidence: {audit.evidence})",
        hint=f"export with --{audit.asked.value}, and give the backend the file of the precision stage",
    )
