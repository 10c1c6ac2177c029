"""What an ONNX file holds: interface, operators, types, parameters, multiply-adds, the biggest modules.

Weights are never loaded when they lie outside the file, and the graph is not executed: shapes are inferred for one
batch size, and what could not be counted is listed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path

import onnx
import onnx.helper
import onnx.inliner
import onnx.shape_inference

from deploy.errors import GraphPassError, RecipeError, StorageError, did_you_mean
from deploy.graph.io import module_of, op_counts, parse_model, tensor_specs
from deploy.graph.macs import RULES, Shape, UnknownShapeError, is_opaque, macs_of
from deploy.records import TensorSpec, record

NO_MODULE = "(no module)"
_INFERENCE_VALUES = 512  # initialisers up to this many values may be shapes or axes and are shown to the inference
_NOT_WEIGHTS = frozenset({"int64", "int32", "bool", "string"})  # indices, shapes and masks

Values = dict[str, tuple[str, Shape | None]]  # tensor name -> dtype, shape


@record
class ModuleCost:
    """Parameters, multiply-adds and nodes under one module path."""

    path: str
    parameters: int
    macs: int
    nodes: int


@record
class GraphReport:
    """An ONNX file. ``macs`` are for the dynamic sizes in ``assumed``; ``uncounted`` says what they leave out.

    ``size`` is in bytes, external data included. ``weight_types`` counts values, ``activation_types`` tensors.
    ``metadata`` is what the file says about itself (``metadata_props``), by key.
    """

    name: str
    size: int
    external_files: tuple[str, ...]
    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    assumed: Mapping[str, int]
    ops: Mapping[str, int]
    weight_types: Mapping[str, int]
    activation_types: Mapping[str, int]
    parameters: int
    macs: int
    uncounted: tuple[str, ...]
    modules: tuple[ModuleCost, ...]
    depth: int
    metadata: Mapping[str, str] = field(default_factory=dict)


def inspect_graph(
    path: Path, *, batch: int | None = None, sizes: Mapping[str, int] | None = None, depth: int = 2
) -> GraphReport:
    """Describe an ONNX file without running it.

    Args:
        path: The file; external data beside it is checked for presence, not read.
        batch: Size of dynamic first axes of inputs; 1 when left out.
        sizes: Sizes of other dynamic axes by name; 1 for those not named.
        depth: Components of the module path to sum up to.

    Raises:
        StorageError: the file cannot be read.
        GraphPassError: it is no whole ONNX model, or its external data is missing, cut off or outside its folder.
        RecipeError: ``batch`` or ``sizes`` name what is not dynamic.
    """
    model = _read(path)
    external = _external_files(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    weights = {i.name for i in model.graph.initializer} | {s.values.name for s in model.graph.sparse_initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    assumed = _assumed_sizes(path.name, inputs, batch, sizes or {})
    values, problem = _inferred(model, inputs, assumed)
    macs, uncounted = _multiply_adds(model.graph, values)
    parameters = dict(_parameters(model.graph))
    return GraphReport(
        name=path.name,
        size=path.stat().st_size + sum((path.parent / name).stat().st_size for name in external),
        external_files=external,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        ir_version=model.ir_version,
        opsets={o.domain or "ai.onnx": o.version for o in model.opset_import},
        inputs=tensor_specs(inputs),
        outputs=tensor_specs(model.graph.output),
        assumed=assumed,
        ops=op_counts(model),
        weight_types=_weight_types(model.graph),
        activation_types=_activation_types(model.graph, values),
        parameters=sum(parameters.values()),
        macs=sum(macs.values()),
        uncounted=(*problem, *uncounted),
        modules=_modules(model.graph, parameters, macs, depth),
        depth=depth,
        metadata={prop.key: prop.value for prop in model.metadata_props},
    )


def _read(path: Path) -> onnx.ModelProto:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}", hint=f"ls -l {path}") from error
    try:
        return parse_model(data, path.name)
    except GraphPassError as error:
        raise GraphPassError(
            error.message,
            hint="inspect reads ONNX files, checkpoints (.pth, .pt, .ckpt, .bin, .safetensors) and bundles",
        ) from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == onnx.AttributeProto.GRAPH:
            yield from _tensors(attribute.g)


def _external_files(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Name the files of external data after checking that each holds the bytes that the model points at."""
    folder, found = path.parent.resolve(), set()
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        name = fields.get("location", "")
        target = folder / name
        if not name or not target.resolve().is_relative_to(folder):
            raise GraphPassError(
                f"{path.name}: the data of {tensor.name!r} points outside its folder: {name!r}",
                hint="do not use this file; export it again",
            )
        if not target.is_file():
            raise GraphPassError(
                f"{path.name}: its external data {name!r} is missing", hint=f"copy {name} beside {path.name}"
            )
        end = int(fields.get("offset") or 0) + int(fields.get("length") or 0)
        if (size := target.stat().st_size) < end:
            raise GraphPassError(
                f"{path.name}: {name!r} has {size} bytes, {tensor.name!r} ends at byte {end}",
                hint=f"{name} was cut off; copy it again",
            )
        found.add(name)
    return tuple(sorted(found))


def _axis_name(value: onnx.ValueInfoProto, axis: int) -> str:
    return value.type.tensor_type.shape.dim[axis].dim_param or f"{value.name}[{axis}]"


def _assumed_sizes(
    name: str, inputs: list[onnx.ValueInfoProto], batch: int | None, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Give every dynamic axis of the inputs a size."""
    found: dict[str, int] = {}
    takes_batch = False
    for value in inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                continue
            key = _axis_name(value, axis)
            takes_batch = takes_batch or axis == 0
            found.setdefault(key, sizes.get(key, batch or 1 if axis == 0 else 1))
    if batch is not None and not takes_batch:
        raise RecipeError(
            f"--batch {batch}: the first axis of every input of {name} is fixed", hint="leave --batch out"
        )
    if unknown := sorted(set(sizes) - set(found)):
        known = did_you_mean(unknown[0], found) if found else "it has none"
        raise RecipeError(f"--axis: {name} has no dynamic axis {', '.join(unknown)}", hint=known)
    return found


def _inferred(
    model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto], assumed: Mapping[str, int]
) -> tuple[Values, tuple[str, ...]]:
    """Infer types and shapes for the assumed sizes on a copy without weights; what the inference refuses is said."""
    bare = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    bare.graph.input.extend(_with_sizes(value, assumed) for value in inputs)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _INFERENCE_VALUES and tensor.data_location != onnx.TensorProto.EXTERNAL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    # The exporter's own notes help where an operator is unknown to the inference.
    bare.graph.value_info.extend(_with_sizes(value, assumed) for value in model.graph.value_info)
    bare.graph.output.extend(_with_sizes(value, assumed) for value in model.graph.output)
    problem: tuple[str, ...] = ()
    try:
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        problem = (f"shape inference stopped: {str(error).strip().splitlines()[0][:200]}",)
    found = {v.name: _described(v) for v in (*bare.graph.input, *bare.graph.value_info, *bare.graph.output)}
    found.update({t.name: (_dtype(t.data_type), tuple(t.dims)) for t in model.graph.initializer})
    return found, problem


def _with_sizes(value: onnx.ValueInfoProto, assumed: Mapping[str, int]) -> onnx.ValueInfoProto:
    """Copy a description with the assumed sizes; a symbol that has none is forgotten."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    for axis, dim in enumerate(copy.type.tensor_type.shape.dim):
        if dim.HasField("dim_value"):
            continue
        size = assumed.get(_axis_name(value, axis))
        dim.Clear()
        if size is not None:
            dim.dim_value = size
    return copy


def _described(value: onnx.ValueInfoProto) -> tuple[str, Shape | None]:
    tensor = value.type.tensor_type
    known = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
    return _dtype(tensor.elem_type), tuple(d.dim_value for d in tensor.shape.dim) if known else None


def _dtype(number: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(number).lower()
    return {"float": "float32", "double": "float64", "undefined": "unknown"}.get(name, name)


def _multiply_adds(graph: onnx.GraphProto, values: Values) -> tuple[dict[int, int], tuple[str, ...]]:
    """Return multiply-adds by node position, and a sentence for each kind of node that could not be counted."""
    found: dict[int, int] = {}
    missed: Counter[str] = Counter()
    unknown: tuple[str, Shape | None] = ("unknown", None)
    for position, node in enumerate(graph.node):
        if is_opaque(node):
            missed[f"{node.op_type}: its inside is not counted"] += 1
            continue
        if node.op_type not in RULES:
            continue
        inputs = [values.get(name, unknown)[1] for name in node.input]
        outputs = [values.get(name, unknown)[1] for name in node.output]
        try:
            found[position] = macs_of(node, inputs, outputs)
        except UnknownShapeError:
            missed[f"{node.op_type}: shapes unknown"] += 1
    return found, tuple(f"{count} x {what}" for what, count in sorted(missed.items()))


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield the initialisers and the values of Constant nodes, with the names that the nodes read them by."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], a.t) for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)


def _parameters(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """Yield name and number of values of every weight: floating-point, or integer of at most 16 bits."""
    for name, tensor in _constants(graph):
        if _dtype(tensor.data_type) not in _NOT_WEIGHTS:
            yield name, math.prod(tensor.dims)


def _weight_types(graph: onnx.GraphProto) -> dict[str, int]:
    found: Counter[str] = Counter()
    for _, tensor in _constants(graph):
        found[_dtype(tensor.data_type)] += math.prod(tensor.dims)
    return dict(found.most_common())


def _activation_types(graph: onnx.GraphProto, values: Values) -> dict[str, int]:
    made = (name for node in graph.node if node.op_type != "Constant" for name in node.output if name)
    return dict(Counter(values.get(name, ("unknown", None))[0] for name in made).most_common())


def _modules(
    graph: onnx.GraphProto, parameters: Mapping[str, int], macs: Mapping[int, int], depth: int
) -> tuple[ModuleCost, ...]:
    """Sum up by module path, most multiply-adds first; a shared weight belongs to the first node that reads it."""
    sums: dict[str, list[int]] = {}
    left = dict(parameters)
    for position, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        entry = sums.setdefault(module_path(node.name, depth), [0, 0, 0])
        entry[0] += sum(left.pop(name, 0) for name in node.input)
        entry[1] += macs.get(position, 0)
        entry[2] += 1
    if rest := sum(left.values()):
        sums.setdefault(NO_MODULE, [0, 0, 0])[0] += rest
    ranked = sorted(sums.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))
    return tuple(ModuleCost(path=path, parameters=p, macs=m, nodes=n) for path, (p, m, n) in ranked)


def module_path(node_name: str, depth: int) -> str:
    """Return the first ``depth`` components of a node's module path, for our names and for torch's older exporter.

    ``stages.2.mlp/Conv_1`` gives ``stages.2`` at depth 2, ``/layer1/layer1.0/conv1/Conv`` gives ``layer1/layer1.0``.
    """
    path = module_of(node_name).strip("/")
    separator = "/" if "/" in path else "."
    return separator.join(path.split(separator)[:depth]) or NO_MODULE
