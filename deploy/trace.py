"""PyTorch to ONNX: the only file that knows both.

The exporter is helped and then distrusted. It is helped by capturing the program ourselves, so that its silent retries
with other strategies never run; and what it writes is held against what was asked: opset, every dimension, dynamic
axes, other batch sizes run. Nodes and tensors are renamed after the module that made them
(``stages.2.blocks.5.mlp.fc1/Conv``), and the exporter's metadata, which holds paths of the machine, is dropped.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import ModelProto
from onnxscript import optimizer
from torch import nn

from deploy.artifacts import TRACED, artifact_of
from deploy.errors import RecipeError, TraceError
from deploy.graph.io import op_counts, save_model, set_metadata
from deploy.models.base import Apart, example_inputs, run_module
from deploy.models.operators import TRANSLATIONS
from deploy.records import Batch, Target, TensorSpec, TraceRecord
from deploy.torchlib import unread_sources

log = logging.getLogger(__name__)

# ONNX Runtime fuses GELU only as the opset-20 op and expands GroupNormalization (opset 21) slowly; TensorRT maps it to
# one kernel (benchmarks/results). Opset 23 brings the Attention op, whose FP32 build TensorRT refuses.
DEFAULT_OPSET = {Target.ONNXRUNTIME: 20, Target.TENSORRT: 21}
OLDEST_OPSET, NEWEST_OPSET = 18, 22
ROUNDS = 1  # of the exporter's optimiser, which by default looks through every graph twice; our passes come after it
_RUN_TOLERANCE = 1e-3  # a frozen axis or a wrong graph is off by far more; tight comparison is the parity stage's work


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """What the exported graph must look like.

    ``apart`` compares outputs by name, (reference, candidate), and returns their largest difference, absolute and
    relative; left out, they are compared element by element. ``metadata`` goes into the file
    (``deploy.graph.io.set_metadata``).
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    batch: Batch
    opset: int
    apart: Apart | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def choose_opset(asked: int | None, target: Target, attention_op: bool) -> int:
    """Return the opset to export at.

    Raises:
        RecipeError: outside 18 to 22, or 23+ without ``trace.attention_op``.
    """
    opset = asked or DEFAULT_OPSET[target]
    if opset < OLDEST_OPSET or (opset > NEWEST_OPSET and not attention_op):
        raise RecipeError(
            f"opset: got {opset}, expected {OLDEST_OPSET} to {NEWEST_OPSET}",
            hint="opset 23+ writes the Attention op, which TensorRT cannot build in FP32; "
            "--set trace.attention_op=true if you want it",
        )
    return opset


def onnx_from_torch(module: nn.Module, request: TraceRequest, folder: Path) -> TraceRecord:
    """Export a module to ``10-traced.onnx`` and hold the file against the request.

    Raises:
        TraceError: the module could not be captured or converted, or the file is not what was asked.
    """
    start = time.perf_counter()
    size = 2 if request.batch.dynamic else request.batch.opt
    arguments = example_inputs(request.inputs, size)
    with quiet_torch(), _without_collection(), unread_sources():
        program = _capture(module, arguments, request)
        converted = _convert(program, request)
        optimizer.optimize_ir(converted.model, num_iterations=ROUNDS)
    _rename(converted.model)
    _strip(converted.model)
    model = ir.to_proto(converted.model)
    checks = _check_interface(model, request, _expected_outputs(module, arguments, request))
    set_metadata(model, request.metadata)
    path = folder / TRACED
    save_model(model, path)
    checks += _check_batches(module, path, request, traced_at=size)
    return TraceRecord(
        artifact=artifact_of(path, folder),
        opset=request.opset,
        batch=request.batch,
        inputs=_specs(model.graph.input),
        outputs=_specs(model.graph.output),
        op_counts=op_counts(model),
        checks=tuple(checks),
        seconds=time.perf_counter() - start,
    )


def bare_export(module: nn.Module, arguments: tuple[torch.Tensor, ...], path: Path, names: tuple[str, ...]) -> Path:
    """Export with ``torch.onnx.export`` and its defaults: the baseline that users have today."""
    with quiet_torch():
        torch.onnx.export(module, arguments, path, dynamo=True, input_names=list(names), verbose=False)
    return path


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Send what the exporter warns and logs to our log instead of the terminal, where torch's own handlers write."""
    names = ("torch", "onnxscript", *logging.root.manager.loggerDict)
    noisy = [logging.getLogger(name) for name in names if name.startswith(("torch", "onnxscript"))]
    kept = [(logger, logger.handlers[:], logger.propagate) for logger in noisy]
    for logger in noisy:
        logger.handlers, logger.propagate = [logging.NullHandler()], True
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            log.debug("%s: %s", warning.category.__name__, warning.message)
    finally:
        for logger, handlers, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Let the garbage collector rest.

    The exporter makes millions of small objects that all stay alive, and looking through them again and again is a
    sixth of its time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _capture(module: nn.Module, arguments: tuple[torch.Tensor, ...], request: TraceRequest) -> Any:
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments) if request.batch.dynamic else None
    try:
        with torch.no_grad():
            return torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code raises
        place = _failing_module(module, arguments)
        raise TraceError(
            f"torch.export failed in module {place or '(root)'}: {_brief(error)}",
            hint="a dynamic batch that the code turns into a constant? try --batch 1; details: --log FILE",
        ) from error


def _failing_module(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> str:
    """Run again with hooks that remember which module was entered last and not left."""
    entered: list[str] = []
    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda _m, _i, n=name: entered.append(n)))
        handles.append(child.register_forward_hook(lambda _m, _i, _o: entered.pop() and None))
    with contextlib.suppress(Exception), torch.no_grad():
        torch.export.export(module, arguments, strict=False)
    for handle in handles:
        handle.remove()
    return entered[-1] if entered else ""


def _convert(program: Any, request: TraceRequest) -> Any:
    names = [spec.name for spec in request.inputs]
    dynamic = tuple({0: "batch"} for _ in names) if request.batch.dynamic else None
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=names,
            output_names=list(request.outputs),
            opset_version=request.opset,
            dynamic_shapes=dynamic,
            custom_translation_table=dict(TRANSLATIONS),
            verbose=False,
            optimize=False,
        )
    except Exception as error:  # the exporter wraps whatever its translations raise
        raise TraceError(
            f"torch.onnx could not translate {_failing_node(program, error)}: {_brief(error)}",
            hint="another opset may have the operator: --set trace.opset=22; details: --log FILE",
        ) from error
    if converted is None:
        raise TraceError("torch.onnx.export returned nothing", hint="details: --log FILE")
    return converted


def _failing_node(program: Any, error: BaseException) -> str:
    """Name the operator and module that the exporter's message speaks of."""
    text = " ".join(str(e) for e in (error, error.__cause__) if e)
    named = set(re.findall(r"%(\w+) ", text))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    # A decomposed node drops its namespace: special_bessel_j0 becomes bessel_j0.
    near = [node for node in calls if any(node.name.endswith(f"_{name}") for name in named)]
    found = [node for node in calls if node.name in named] or (near if len(near) == 1 else [])
    if not found:
        return "the program"
    scopes = [path for path, _ in (found[0].meta.get("nn_module_stack") or {}).values()]
    return f"{found[0].target} in module {scopes[-1] if scopes else '(root)'}"


def _brief(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:300] if lines else ''}"


def _rename(model: ir.Model) -> None:
    """Name nodes ``<module path>/<OpType>`` and tensors after the node that makes them."""
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    used: Counter[str] = Counter()
    path = ""
    for node in model.graph:
        path = _module_path(node, path)
        stem = f"{path}/{node.op_type}" if path else node.op_type
        used[stem] += 1
        node.name = stem if used[stem] == 1 else f"{stem}_{used[stem] - 1}"
        for index, output in enumerate(node.outputs):
            if output.name not in fixed:
                output.name = node.name if index == 0 else f"{node.name}:{index}"
    _rename_constants(model)


def _module_path(node: ir.Node, previous: str) -> str:
    """Read the path from the exporter's metadata; nodes that its optimiser made belong to where they stand."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if not text:
        return previous
    scopes = ast.literal_eval(text)
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _rename_constants(model: ir.Model) -> None:
    """Name anonymous initialisers after their first reader; parameters keep their names."""
    anonymous = [v for v in model.graph.initializers.values() if v.name and "." not in v.name]
    for value in anonymous:
        uses = [use for use in value.uses() if use.node.name]
        if uses:
            name = f"{uses[0].node.name}.input{uses[0].idx}"
            if name not in model.graph.initializers:
                model.graph.initializers.pop(str(value.name))
                value.name = name
                if value.const_value is not None:
                    value.const_value.name = name
                model.graph.initializers[name] = value


def _strip(model: ir.Model) -> None:
    """Drop what is not the function: paths, stack traces and versions. Same model, same bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.graph.name = "effdeploy"
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim)
        dtype = ir.DataType(tensor.elem_type).numpy().name
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)


def _expected_outputs(
    module: nn.Module, arguments: tuple[torch.Tensor, ...], request: TraceRequest
) -> tuple[TensorSpec, ...]:
    """Run the module once: what PyTorch gives is what the graph must give, with the asked batch axis."""
    try:
        with torch.inference_mode():
            result = module(*arguments)
    except Exception as error:  # a capture with fake tensors can pass where real values fail
        raise TraceError(f"the module fails in PyTorch: {_brief(error)}", hint="details: --log FILE") from error
    tensors = result if isinstance(result, tuple) else (result,)
    if got := [type(t).__name__ for t in tensors if not isinstance(t, torch.Tensor)]:
        raise TraceError(f"the module returns {got[0]}, expected a tensor or a tuple of tensors", hint=_OUTPUTS)
    if len(tensors) != len(request.outputs):
        raise TraceError(
            f"the module returns {len(tensors)} outputs, asked {len(request.outputs)}: {', '.join(request.outputs)}",
            hint=_OUTPUTS,
        )
    if scalars := [name for name, t in zip(request.outputs, tensors, strict=True) if t.ndim == 0]:
        raise TraceError(f"output {scalars[0]}: a scalar, expected a batch axis", hint=_OUTPUTS)
    return tuple(
        TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=(_axis(request), *t.shape[1:]))
        for name, t in zip(request.outputs, tensors, strict=True)
    )


def _axis(request: TraceRequest) -> int | str:
    return "batch" if request.batch.dynamic else request.batch.opt


def _check_interface(model: ModelProto, request: TraceRequest, outputs: tuple[TensorSpec, ...]) -> list[str]:
    """Compare opset, counts, names, types and every dimension with the request and with PyTorch's ``outputs``."""
    versions = {o.domain: o.version for o in model.opset_import}
    if versions.get("") != request.opset:
        raise TraceError(
            f"the exporter wrote opset {versions.get('')}, asked was {request.opset}",
            hint=f"--set trace.opset={versions.get('')}",
        )
    inputs = tuple(
        TensorSpec(name=s.name, dtype=s.dtype, shape=tuple(_axis(request) if d == "batch" else d for d in s.shape))
        for s in request.inputs
    )
    _check_specs("input", inputs, _specs(model.graph.input))
    _check_specs("output", outputs, _specs(model.graph.output))
    return [
        f"opset {request.opset} as asked",
        "names, types and every dimension of " + ", ".join(s.name for s in (*inputs, *outputs)) + " as asked",
    ]


def _check_specs(kind: str, asked: tuple[TensorSpec, ...], exported: tuple[TensorSpec, ...]) -> None:
    if len(asked) != len(exported):
        names = ", ".join(spec.name for spec in exported) or "none"
        raise TraceError(f"{len(exported)} {kind}s exported ({names}), asked {len(asked)}", hint=_OUTPUTS)
    for want, got in zip(asked, exported, strict=True):
        if got != want:
            raise TraceError(
                f"{kind} {want.name}: exported {got.name} {got.dtype}{list(got.shape)}, "
                f"expected {want.dtype}{list(want.shape)}",
                hint=_FROZEN if got.dtype == want.dtype else _RETYPED,
            )


_OUTPUTS = "the system's inputs and outputs must be those of its modules' forward"
_FROZEN = "the exporter froze or freed an axis; try a fixed --batch"
_RETYPED = "the exporter changed the type; try another --set trace.opset=N"


def _check_batches(module: nn.Module, path: Path, request: TraceRequest, traced_at: int) -> list[str]:
    """Run other batch sizes than the traced one and compare with PyTorch: a frozen axis shows here."""
    if not request.batch.dynamic:
        return [f"batch is fixed at {request.batch.opt}"]
    from deploy.backends import load_backend
    from deploy.backends.base import BuildOptions

    sizes = sorted({request.batch.min, request.batch.min + 1, min(request.batch.max, 3)} - {traced_at})
    backend = load_backend("onnxruntime")
    options = BuildOptions(batch=request.batch, inputs=request.inputs, threads=1)
    (engine,) = backend.build(path, path.parent, options)
    with backend.open(engine, path.parent, options) as runner:
        for size in sizes:
            _compare_batch(module, runner, request, size)
    return [f"batch {size} runs and agrees with PyTorch (traced at {traced_at})" for size in sizes]


def _compare_batch(module: nn.Module, runner: Any, request: TraceRequest, size: int) -> None:
    arguments = example_inputs(request.inputs, size, seed=size)
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(request.inputs, arguments, strict=True)}
    expected = run_module(module, feeds, request.outputs)
    got = runner.infer(feeds)
    if request.apart is not None:
        if request.apart(expected, got)[1] > _RUN_TOLERANCE:
            raise TraceError(f"the outputs are wrong at batch {size}", hint=_FROZEN)
        return
    for name, value in expected.items():
        scale = float(np.abs(value).max()) or 1.0
        if got[name].shape != value.shape or float(np.abs(got[name] - value).max()) > _RUN_TOLERANCE * scale:
            raise TraceError(f"output {name} is wrong at batch {size}", hint=_FROZEN)
