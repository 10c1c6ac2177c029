"""ONNX files in and out: foreign and truncated files become our errors, and the same model gives the same bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.external_data_helper
import onnx.shape_inference
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from deploy.artifacts import storage_errors
from deploy.errors import GraphPassError, StorageError
from deploy.records import TensorSpec

PRODUCER = "effdeploy"
OWN_METADATA = "effdeploy."
"""What the keys of metadata begin with that files keep (docs/preprocessing.md); every other is dropped."""

# What onnx_graphsurgeon carries through; it drops attributes of every other type without an error.
_CARRIED_ATTRIBUTES = frozenset(
    getattr(onnx.AttributeProto, kind)
    for kind in ("FLOAT", "INT", "STRING", "TENSOR", "GRAPH", "FLOATS", "INTS", "STRINGS")
)
# Shape inference reads the values of small integer tensors (shapes, axes) only; weights are not handed to it.
_INFERENCE_BYTES = 4096


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, with its external data when that lies in the same folder.

    Raises:
        StorageError: the file cannot be read.
        GraphPassError: it is not a whole ONNX model, or its external data points outside its folder.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}", hint=f"ls -l {path}") from error
    return _with_external_data(parse_model(data, path.name), path)


def parse_model(data: bytes, name: str) -> onnx.ModelProto:
    """Parse the bytes of an ONNX model; ``name`` is what the error calls it.

    Raises:
        GraphPassError: the bytes are not a whole ONNX model.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise GraphPassError(
            f"{name} is not a whole ONNX model ({len(data)} bytes): {error}", hint="export it again"
        ) from error
    # An empty file, or one cut between two fields, parses without an error.
    if not model.opset_import or not model.graph.output:
        raise GraphPassError(
            f"{name} is not a whole ONNX model ({len(data)} bytes): got {len(model.opset_import)} opsets and "
            f"{len(model.graph.output)} outputs, expected at least one of each",
            hint="export it again",
        )
    if broken := next((text for text in _texts(model) if isinstance(text, bytes)), None):
        raise GraphPassError(
            f"{name} is broken: a name in it is no text, {broken[:40]!r} is not UTF-8", hint="export it again"
        )
    return model


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Yield every name; protobuf hands one that is not UTF-8 over as bytes, and only when it is read."""
    yield from (model.producer_name, model.producer_version, model.domain)
    yield from (each.domain for each in model.opset_import)
    yield from (text for each in model.metadata_props for text in (each.key, each.value))
    for graph in (model.graph, *model.functions):
        yield from _texts_of(graph)


def _texts_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[str | bytes]:
    yield graph.name
    if isinstance(graph, onnx.GraphProto):
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for weight in graph.initializer:
            yield weight.name
            yield from (text for each in weight.external_data for text in (each.key, each.value))
    else:
        yield from (graph.domain, *graph.input, *graph.output, *graph.attribute)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (text for each in node.metadata_props for text in (each.key, each.value))
        for attribute in node.attribute:
            yield attribute.name
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _texts_of(inner)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model so that the same model gives the same bytes.

    Producer, IR version and documentation of ``model`` are normalised in place: exporters write machine paths there.

    Raises:
        GraphPassError: the model is larger than protobuf's 2 GiB.
        StorageError: the file cannot be written.
    """
    write_model(model_bytes(model), path)


def write_model(data: bytes, path: Path) -> None:
    """Write a serialised model through a temporary file and a rename.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(f"cannot write {path}"):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def model_bytes(model: onnx.ModelProto) -> bytes:
    """Normalise a model in place and serialise it deterministically.

    Raises:
        GraphPassError: the model is larger than protobuf's 2 GiB.
    """
    _normalise(model)
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise GraphPassError(
            f"the model cannot be written as one ONNX file: {error}", hint="2 GiB is the limit"
        ) from error
    return data


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata of effdeploy's own in a model, without the prefix of its keys."""
    own = [prop for prop in model.metadata_props if prop.key.startswith(OWN_METADATA)]
    return {prop.key.removeprefix(OWN_METADATA): prop.value for prop in own}


def set_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace all metadata of a model in place, sorted by key; ``metadata`` is as ``metadata_of`` gives it."""
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {f"{OWN_METADATA}{key}": metadata[key] for key in sorted(metadata)})


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Count the nodes of the main graph by operator, sorted by name; operators of other domains carry theirs."""
    counts = Counter(
        f"{n.domain}::{n.op_type}" if n.domain not in ("", "ai.onnx") else n.op_type for n in model.graph.node
    )
    return dict(sorted(counts.items()))


def module_of(node_name: str) -> str:
    """Return the module path in a node's name: ``stages.2.mlp.fc1/Conv_1`` -> ``stages.2.mlp.fc1``, or ``""``."""
    return node_name.rpartition("/")[0]


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Describe ``model.graph.input`` or ``.output``; a dynamic axis without a name is ``"?"``."""
    return tuple(_spec(value) for value in values)


def control_flow(model: onnx.ModelProto) -> str:
    """Name the first node that holds a subgraph (If, Loop, Scan), or return ``""``."""
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            return f"{node.op_type} {node.name!r}"
    return ""


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    """Import a model for rewriting, every tensor with its inferred type and shape.

    The graph goes on reading the weights of ``model``, which must not be changed afterwards. Initialisers that no node
    reads, metadata and documentation are dropped.

    Raises:
        GraphPassError: the model holds something that onnx_graphsurgeon would lose.
    """
    _refuse_what_would_be_lost(model)
    inferred = _inferred_values(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred)
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        try:
            return gs.import_onnx(model)
        except (OnnxGraphSurgeonException, UnicodeDecodeError, KeyError) as error:
            raise GraphPassError(f"onnx_graphsurgeon cannot import the graph: {error}") from error


def model_of(graph: gs.Graph) -> onnx.ModelProto:
    """Export a rewritten graph.

    Raises:
        GraphPassError: the graph cannot be written as ONNX.
    """
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        try:
            model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
        except (OnnxGraphSurgeonException, AssertionError, TypeError, ValueError) as error:
            raise GraphPassError(f"onnx_graphsurgeon cannot export the graph: {error}") from error
    _normalise(model)
    return model


def _normalise(model: onnx.ModelProto) -> None:
    model.producer_name = PRODUCER
    for field in ("producer_version", "domain", "model_version", "doc_string"):
        model.ClearField(field)
    set_metadata(model, metadata_of(model))
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    for function in model.functions:
        _strip(function, function.node)
    _strip_graph(model.graph)


def _strip_graph(graph: onnx.GraphProto) -> None:
    _strip(graph, graph.node)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip(value, ())


def _strip(owner: Any, nodes: Iterable[onnx.NodeProto]) -> None:
    for field in ("doc_string", "metadata_props"):
        owner.ClearField(field)
    for node in nodes:
        _strip(node, ())
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip_graph(attribute.g)


def _with_external_data(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    folder = path.parent.resolve()
    external = [t for t in _tensors(model.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if not location or not (folder / location).resolve().is_relative_to(folder):
            raise GraphPassError(
                f"{path.name}: the data of {tensor.name!r} points outside its folder: {location!r}",
                hint="do not use this file; export it again",
            )
    if not external:
        return model
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(folder))
        short = next((t.name for t in external if len(t.raw_data) < _byte_size(t)), None)
        if short is not None:
            raise ValueError(f"it ends within {short!r}")
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise GraphPassError(
            f"{path.name}: its external data cannot be read: {error}",
            hint="keep the whole data file beside the .onnx file",
        ) from error
    return model


def _byte_size(tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor's values take at least; types below a byte are packed in pairs."""
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    packed = onnx.TensorProto.DataType.Name(tensor.data_type).endswith(("INT4", "4E2M1", "INT2"))
    size: int = math.prod(tensor.dims) * itemsize // (4 if packed else 1)
    return size


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from _tensors(attribute.g)
        elif attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return TensorSpec(name=value.name, dtype={"float": "float32", "double": "float64"}.get(name, name), shape=dims)


def _refuse_what_would_be_lost(model: onnx.ModelProto) -> None:
    defaults = {i.name for i in model.graph.initializer} & {i.name for i in model.graph.input}
    if defaults:
        raise GraphPassError(
            f"the inputs {sorted(defaults)} have default values, expected weights to be initialisers only",
            hint="export with keep_initializers_as_inputs=False",
        )
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type not in _CARRIED_ATTRIBUTES:
                kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
                raise GraphPassError(
                    f"node {node.name!r}: attribute {attribute.name!r} of type {kind} cannot be carried"
                )


def _inferred_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Infer types and shapes on a copy whose weights are inputs, so that megabytes are not serialised four times."""
    bare = onnx.ModelProto(
        ir_version=max(model.ir_version, 4), opset_import=model.opset_import, functions=model.functions
    )
    bare.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(bare.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) * 8 <= _INFERENCE_BYTES:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        values = list(onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph.value_info)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise GraphPassError(f"the types and shapes of the graph contradict each other: {error}") from error
    for dim in (d for value in values for d in value.type.tensor_type.shape.dim):
        if dim.dim_param.startswith("unk__"):  # made up by the inference; another run would number them anew
            dim.ClearField("dim_param")
    return values
