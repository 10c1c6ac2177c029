"""The passes of each target, in order, and the one function that runs them under guard."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from deploy.artifacts import PATCHED, artifact_of
from deploy.errors import GraphPassError
from deploy.graph.base import GraphPass, PassResult
from deploy.graph.io import (
    control_flow,
    graph_of,
    load_model,
    metadata_of,
    model_bytes,
    model_of,
    op_counts,
    set_metadata,
    tensor_specs,
    write_model,
)
from deploy.graph.passes import (
    CONSTANT_AXES,
    FOLD_CONSTANTS,
    FOLD_PREPROCESS,
    FUSE_BATCH_NORM,
    FUSE_GELU,
    FUSE_GROUP_NORM,
    FUSE_LAYER_NORM,
    LIFT_BIAS,
    REMOVE_CASTS,
    REMOVE_RESHAPES,
    SHARE_INITIALIZERS,
)
from deploy.graph.verify import Feeds, Interface, OutputWatch, check_model, check_structure, interface_of
from deploy.records import PassesRecord, PassRecord, Target

# One pass can open a site for an earlier one: the list is repeated until nothing changes, mostly in the second round.
MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Step:
    """A pass on a target's list, and why it is there."""

    pass_: GraphPass
    reason: str


_SHARED: tuple[Step, ...] = (
    Step(FOLD_CONSTANTS, "what is constant is computed once, and the passes below match on initialisers"),
    Step(CONSTANT_AXES, "TensorRT requires constant axes; shape inference knows more with them everywhere"),
    Step(FOLD_PREPROCESS, "scaling and normalising pixels is part of the first convolution, not passes over the image"),
    Step(FUSE_BATCH_NORM, "no gain in time (runtimes do it too), but Q/DQ must see the weights that really run"),
    Step(FUSE_LAYER_NORM, "one kernel with float32 statistics, also in a float16 graph"),
)
_LAST: tuple[Step, ...] = (
    Step(FUSE_GELU, "ONNX Runtime does not fuse the chain that torch.export writes below opset 20"),
    Step(REMOVE_CASTS, "each cast is a kernel, and precision typing places its own"),
    Step(REMOVE_RESHAPES, "each transpose copies a tensor; pairs appear where modules meet"),
    Step(SHARE_INITIALIZERS, "smaller files; last, since every rewrite above makes constants"),
)

PIPELINE: dict[Target, tuple[Step, ...]] = {
    # No FUSE_GROUP_NORM here: ONNX Runtime's CPU provider has no kernel for the operator and expands it into ten nodes.
    Target.ONNXRUNTIME: (*_SHARED, *_LAST),
    Target.TENSORRT: (
        *_SHARED,
        Step(FUSE_GROUP_NORM, "one kernel instead of three (TensorRT-RTX build log); RIFormer-S12 has 93 with it"),
        *_LAST,
    ),
}

# What runs once on a graph with Q/DQ, in the precision stage.
AFTER_QUANTIZATION: dict[Target, tuple[Step, ...]] = {
    Target.ONNXRUNTIME: (Step(LIFT_BIAS, "without it every linear layer with a bias runs in float32"),),
    Target.TENSORRT: (),
}


def run_passes(
    model: Path, target: Target, folder: Path, *, verify: Feeds | None = None, steps: tuple[Step, ...] | None = None
) -> PassesRecord:
    """Lower a traced graph for its target and write ``20-patched.onnx``.

    Args:
        model: The traced ONNX file.
        target: Whose list of passes runs.
        folder: The run folder, where the file is written.
        verify: Inputs by name. With them the graph runs before and after every pass, and a pass that moves an output by
            more than 1e-5 of its largest value is an error that names it.
        steps: Another list than the target's.

    Raises:
        GraphPassError: a pass broke its contract, or the traced file is no ONNX model.
        StorageError: a file cannot be read or written.
    """
    start = time.perf_counter()
    traced = load_model(model)
    counts, interface = op_counts(traced), (tensor_specs(traced.graph.input), tensor_specs(traced.graph.output))
    metadata = metadata_of(traced)
    chosen = PIPELINE[target] if steps is None else steps
    patched, records = _patched(traced, chosen, verify)
    if (got := (tensor_specs(patched.graph.input), tensor_specs(patched.graph.output))) != interface:
        raise GraphPassError(f"the passes changed the inputs or outputs: got {got}, expected {interface}")
    set_metadata(patched, metadata)
    data = model_bytes(patched)
    check_model(data)
    path = folder / PATCHED
    write_model(data, path)
    return PassesRecord(
        artifact=artifact_of(path, folder),
        target=target,
        passes=records,
        op_counts_before=counts,
        op_counts=op_counts(patched),
        seconds=time.perf_counter() - start,
    )


def _patched(
    traced: onnx.ModelProto, steps: tuple[Step, ...], verify: Feeds | None
) -> tuple[onnx.ModelProto, tuple[PassRecord, ...]]:
    """Run the list to its fixed point; a graph with control flow is returned as it came."""
    if name := control_flow(traced):
        reason = f"{name} holds a subgraph; the whole graph is left alone"
        size = len(traced.graph.node)
        return traced, tuple(_Tally(step=step, before=size, after=size, declined=(reason,)).record() for step in steps)
    graph = graph_of(traced)
    interface = interface_of(graph)
    watch = None if verify is None else OutputWatch(graph, verify)
    tallies = [_Tally(step=step, change=None if watch is None else 0.0) for step in steps]
    for _ in range(MAX_ROUNDS):
        changed = [tally for tally in tallies if _run_once(graph, tally, interface, watch)]
        if not changed:
            return model_of(graph), tuple(tally.record() for tally in tallies)
    raise GraphPassError(
        f"after {MAX_ROUNDS} rounds these passes still find sites: {', '.join(t.step.pass_.name for t in changed)}"
    )


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What one pass did over all rounds."""

    step: Step
    sites: int = 0
    declined: tuple[str, ...] = ()
    before: int | None = None
    after: int = 0
    seconds: float = 0.0
    change: float | None = None

    def record(self) -> PassRecord:
        return PassRecord(
            name=self.step.pass_.name,
            reason=self.step.reason,
            sites=self.sites,
            declined=self.declined,
            nodes_before=self.before or 0,
            nodes_after=self.after,
            seconds=self.seconds,
            max_abs_change=self.change,
        )


def _run_once(graph: gs.Graph, tally: _Tally, interface: Interface, watch: OutputWatch | None) -> bool:
    """Run one pass under guard, add to its tally, and say whether it rewrote anything."""
    start, name = time.perf_counter(), tally.step.pass_.name
    size = len(graph.nodes)
    result = _apply(tally.step.pass_, graph)
    tally.seconds += time.perf_counter() - start
    check_structure(graph, interface, name)
    if watch is not None:
        tally.change = max(tally.change or 0.0, watch.compare(graph, name))
    if tally.before is None:
        tally.before, tally.after = size, size
    tally.after -= size - len(graph.nodes)
    tally.sites += result.sites
    tally.declined = result.declined
    return result.sites > 0


def _apply(pass_: GraphPass, graph: gs.Graph) -> PassResult:
    try:
        return pass_.apply(graph)
    except Exception as error:  # whatever a pass trips over in a foreign graph, the user needs its name
        raise GraphPassError(
            f"pass {pass_.name} failed on this graph: {type(error).__name__}: {error}", hint="report the graph"
        ) from error
