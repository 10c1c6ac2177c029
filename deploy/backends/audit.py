"""Which precision an engine really computes in: its kernels held against the types of the graph.

A runtime that quietly falls back to FP32 shows in the kernels (build log, inspector, profile), a graph that was never
typed shows in its nodes. Both are counted, and ``audited`` raises when they do not say what was asked.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.backends.graph_types import GraphTypes, graph_types
from deploy.errors import PrecisionAuditError
from deploy.records import Audit, Precision

__all__ = ["GraphTypes", "Kernel", "audit_engine", "audited", "fused_counts", "graph_types", "kernel_counts"]

UNKNOWN = "unknown"
_SHORT = frozenset({"fp16", "bf16"})
_NAMED = 3  # nodes that a sentence names; the rest is counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One launch of an engine.

    Attributes:
        name: The runtime's own name.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"mixed"`` where it reads several floating types,
            ``"other"`` where it reads and writes none, ``"unknown"`` where the runtime does not say.
        reads: Floating and quantised types among its inputs and constants.
        writes: The same among its outputs.
        fused: What kind of fused kernel it is (``"attention"``, ``"norm"``, ``"conv"``, ``"matmul"``), or empty.
        nodes: Names of the ONNX nodes that it came from, where the runtime tells.
        weights: Precision -> parameters among its constants.
        microseconds: Time of one run, 0 where it was not measured.
    """

    name: str
    precision: str
    reads: frozenset[str]
    writes: frozenset[str] = frozenset()
    fused: str = ""
    nodes: tuple[str, ...] = ()
    weights: Mapping[str, int] = field(default_factory=dict)
    microseconds: float = 0.0


def kernel_counts(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Count kernels by precision; the sum is the number of kernel launches of one inference."""
    return dict(sorted(Counter(k.precision for k in kernels).items()))


def fused_counts(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Count fused kernels by kind."""
    return dict(sorted(Counter(k.fused for k in kernels if k.fused).items()))


def weight_counts(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Count parameters by precision, as far as the kernels' constants are listed."""
    total: Counter[str] = Counter()
    for kernel in kernels:
        total.update(kernel.weights)
    return dict(sorted(total.items()))


def times(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Sum microseconds by precision; empty where no time was measured."""
    total: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        total[kernel.precision] += kernel.microseconds
    return dict(sorted(total.items())) if any(total.values()) else {}


def audit_engine(
    asked: Precision, graph: GraphTypes, kernels: Sequence[Kernel], evidence: str, io: Sequence[str] | None = None
) -> Audit:
    """Hold an engine's kernels against the graph's matrix nodes, node by node.

    It is as asked when the graph has matrix nodes of that precision, at least half of them are found among the
    kernels, none is found only in kernels that read other types, and the engine's inputs and outputs are the graph's.
    FP32 means that no kernel reads a shorter float. A graph without matrix nodes is judged by whether any kernel reads
    the precision. What is worth knowing and no contradiction is a warning.

    Args:
        asked: The precision.
        graph: Types of the ONNX file that was built.
        kernels: What the evidence lists.
        evidence: Where they come from: ``"build log"``, ``"engine inspector"``.
        io: Names of the engine's inputs and outputs by the same evidence; ``None`` where it does not list them.
    """
    label = asked.value.upper()
    typed = [name for name, precision in graph.matrix.items() if precision == asked.value]
    reads: dict[str, set[str]] = {name: set() for name in typed}
    for kernel in kernels:
        for name in kernel.nodes:
            if name in reads:
                reads[name] |= kernel.reads
    found = [name for name in typed if reads[name]]
    wrong = [name for name in found if asked.value not in reads[name]]
    unseen = [name for name in typed if not reads[name]]
    shorter = sum(1 for k in kernels if k.reads & _SHORT) if asked is Precision.FP32 else 0
    lost = [name for name in graph.io if name not in io] if io is not None else []
    used = bool(found) and len(unseen) <= len(found) if graph.matrix else any(asked.value in k.reads for k in kernels)
    expected, unfused = _fusions(graph, kernels)
    parts = [
        f"{len(typed)} of {len(graph.matrix)} matrix nodes of the graph are {label}",
        f"{len(found) - len(wrong)} of them run in {label} kernels",
        f"{len(unseen)} were folded away or are not named in the {evidence}" if unseen else "",
        f"not in {label}: {_some(wrong)}" if wrong else "",
        f"{shorter} kernels read a shorter float type" if shorter else "",
        f"the {evidence} lacks inputs or outputs of the graph: {_some(lost)}" if lost else "",
        f"{len(kernels)} kernels: " + (", ".join(f"{n} {p}" for p, n in kernel_counts(kernels).items()) or "none"),
        *(f"{n - len(unfused[kind])} of {n} {kind} blocks in fused kernels" for kind, n in expected.items()),
    ]
    return Audit(
        asked=asked, evidence=evidence, kernels=kernel_counts(kernels), fused=fused_counts(kernels),
        ok=used and not wrong and not shorter and not lost, statement="; ".join(part for part in parts if part),
        weights=weight_counts(kernels), microseconds=times(kernels), expected=expected,
        warnings=(
            *_unfused_warnings(graph, unfused),
            *graph_warnings(asked, graph),
            *_kernel_warnings(asked, graph, kernels),
            *_unseen_warnings(unseen, evidence),
        ),
    )  # fmt: skip


def _fusions(graph: GraphTypes, kernels: Sequence[Kernel]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return how many blocks of each kind a good engine fuses, and the names of those that this one does not.

    Attention in FP32 never fuses in TensorRT, so it is not expected; norms do in every precision.
    """
    blocks = {"attention": [name for name, p in graph.attention.items() if p in _SHORT], "norm": list(graph.norms)}
    expected = {kind: len(names) for kind, names in blocks.items() if names}
    named = {kind: {name for k in kernels if k.fused == kind for name in k.nodes} for kind in expected}
    return expected, {kind: [name for name in blocks[kind] if name not in named[kind]] for kind in expected}


def _unfused_warnings(graph: GraphTypes, unfused: Mapping[str, Sequence[str]]) -> list[str]:
    found = [
        f"{len(names)} {kind} blocks are not in a fused kernel: {_some(names)}"
        for kind, names in unfused.items()
        if names
    ]
    slow = [name for name, precision in graph.attention.items() if precision == "fp32"]
    if slow and len(slow) < len(graph.attention):
        found.append(f"{len(slow)} attention blocks are FP32 in the graph and never fuse: {_some(slow)}")
    return found


def graph_warnings(asked: Precision, graph: GraphTypes) -> list[str]:
    """Warn of a graph in which most matrix nodes have another type than asked: allowed, but seldom meant."""
    typed = sum(1 for precision in graph.matrix.values() if precision == asked.value)
    if not graph.matrix or 2 * typed >= len(graph.matrix):
        return []
    return [f"only {typed} of {len(graph.matrix)} matrix nodes of the graph are {asked.value.upper()}"]


def _kernel_warnings(asked: Precision, graph: GraphTypes, kernels: Sequence[Kernel]) -> list[str]:
    """Warn of FP32 that nobody asked for, and of kernels that do not say what they compute in."""
    found = []
    if asked is not Precision.FP32:
        islands = [k for k in kernels if k.reads == k.writes == {"fp32"} and _all_short(graph, k)]
        if islands:
            names = _some([name for k in islands for name in k.nodes if name in graph.nodes])
            found.append(f"{len(islands)} kernels compute in FP32 what the graph has in {asked.value.upper()}: {names}")
    if unknown := [k.name for k in kernels if k.precision == UNKNOWN]:
        found.append(f"{len(unknown)} kernels do not say what they compute in: {_some(unknown)}")
    return found


def _all_short(graph: GraphTypes, kernel: Kernel) -> bool:
    types = [graph.nodes[name] for name in kernel.nodes if name in graph.nodes]
    return bool(types) and all(precision in _SHORT for precision in types)


def _unseen_warnings(unseen: Sequence[str], evidence: str) -> list[str]:
    return [f"{len(unseen)} matrix nodes are not named in the {evidence}: {_some(unseen)}"] if unseen else []


def _some(names: Sequence[str]) -> str:
    """Name the first few and count the rest."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def audited(audit: Audit, *, mixed: bool = False) -> Audit:
    """Return the audit when it holds; nothing is held against a graph that mixes precisions on purpose.

    Raises:
        PrecisionAuditError: the engine does not have the precision that was asked.
    """
    if mixed:
        return dataclasses.replace(audit, ok=True)
    if audit.ok:
        return audit
    raise PrecisionAuditError(
        f"asked for {audit.asked.value.upper()}, but the engine is not: {audit.statement} (evidence: {audit.evidence})",
        hint=f"export with --{audit.asked.value}, and give the backend the file of the precision stage",
    )
