"""An ONNX file as the rules see it: nodes of all levels, inferred types, constants, and nothing loaded without need.

Inference runs on a copy without the large weights, and goes on past what it cannot infer: a graph that contradicts
itself is what lint is for. Data outside the file is read one tensor at a time, when a rule asks for its values.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from deploy.errors import GraphPassError, StorageError
from deploy.graph.io import parse_model

Array = NDArray[Any]
Shape = tuple[int | str | None, ...]

DEFAULT_DOMAIN = ("", "ai.onnx")
_SMALL = 4096  # initialisers up to this many values are shown to the inference: they may be shapes or axes
_RANDOM = ("Random", "Bernoulli", "Multinomial")
_CHAIN = 16  # casts and copies between a constant and its reader


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Site:
    """A node, and its name for people: its own, or "of" and its first output."""

    node: NodeProto
    name: str
    level: int  # 0: the main graph; deeper: the body of an If, Loop or Scan


@dataclass(kw_only=True, eq=False)
class View:
    """A model with what the rules ask of it.

    Attributes:
        model: The parsed file; weights outside it are not loaded. Functions of the model are inlined.
        path: The file, for data beside it.
        types: Tensor name -> element type (``TensorProto.DataType``); unknown ones are missing.
        shapes: Tensor name -> axes: a size, a symbol, or ``None``; tensors of unknown rank are missing.
    """

    model: ModelProto
    path: Path
    types: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> View:
        """Read a file.

        Raises:
            StorageError: it cannot be read.
            GraphPassError: it is not a whole ONNX model.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}", hint=f"ls -l {path}") from error
        model = _inlined(parse_model(data, path.name), path.name)
        types, shapes = _inferred(model)
        return cls(model=model, path=path, types=types, shapes=shapes)

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    @functools.cached_property
    def opsets(self) -> Mapping[str, int]:
        """Domain -> version; the default domain is the empty text."""
        return {"" if o.domain in DEFAULT_DOMAIN else o.domain: o.version for o in self.model.opset_import}

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The nodes of the main graph and of every body in it."""
        return tuple(_sites(self.graph, 0))

    @functools.cached_property
    def initializers(self) -> Mapping[str, TensorProto]:
        """The initialisers of all levels, by name."""
        return {tensor.name: tensor for graph in _graphs(self.graph) for tensor in graph.initializer}

    @functools.cached_property
    def inputs(self) -> tuple[onnx.ValueInfoProto, ...]:
        """The inputs that a caller gives."""
        return tuple(value for value in self.graph.input if value.name not in self.initializers)

    @functools.cached_property
    def makers(self) -> Mapping[str, NodeProto]:
        """Tensor name -> the node that makes it."""
        return {name: site.node for site in self.sites for name in site.node.output if name}

    @functools.cached_property
    def consumers(self) -> Mapping[str, tuple[NodeProto, ...]]:
        """Tensor name -> the nodes that read it."""
        found: dict[str, list[NodeProto]] = {}
        for site in self.sites:
            for name in site.node.input:
                found.setdefault(name, []).append(site.node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @functools.cached_property
    def constants(self) -> frozenset[str]:
        """The tensors that a builder can compute: no input reaches them, or only through a fixed shape."""
        found = {"", *self.initializers}
        for site in self.sites:
            node = site.node
            fixed = node.op_type in ("Shape", "Size") and self._is_fixed(node.input[0] if node.input else "")
            if fixed or (all(name in found for name in node.input) and not node.op_type.startswith(_RANDOM)):
                found |= set(node.output)
        return frozenset(found)

    def type_of(self, node: NodeProto, place: int) -> int:
        """Return the element type of an input; 0 where it is absent or unknown."""
        return self.types.get(node.input[place], 0) if place < len(node.input) else 0

    def shape_of(self, node: NodeProto, place: int) -> Shape | None:
        """Return the axes of an input; ``None`` where it is absent or of unknown rank."""
        return self.shapes.get(node.input[place]) if place < len(node.input) else None

    def attribute(self, node: NodeProto, name: str, default: Any = None) -> Any:
        """Return an attribute's value, else the operator's default in this opset, else ``default``."""
        for attribute in node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        schema = self.schema(node)
        held = schema.attributes.get(name) if schema else None
        if held is None or not held.default_value.name:
            return default
        value = onnx.helper.get_attribute_value(held.default_value)
        return value.decode() if isinstance(value, bytes) else value

    def schema(self, node: NodeProto) -> onnx.defs.OpSchema | None:
        """Return the ONNX schema of a node in the opset of this file; ``None`` where there is none."""
        version = self.opsets.get("" if node.domain in DEFAULT_DOMAIN else node.domain, 0)
        domain = "" if node.domain in DEFAULT_DOMAIN else node.domain
        return _schema(node.op_type, version, domain)

    def value(self, name: str) -> Array | None:
        """Return the values of a constant: an initialiser, a Constant node, or a cast or copy of one."""
        for _ in range(_CHAIN):
            if (tensor := self.initializers.get(name)) is not None:
                return self.values(tensor)
            node = self.makers.get(name)
            if node is None:
                return None
            if node.op_type == "Constant":
                return _constant(node)
            if node.op_type not in ("Cast", "Identity") or not node.input:
                return None
            name = node.input[0]
        return None

    def values(self, tensor: TensorProto) -> Array | None:
        """Return a tensor's values; ``None`` where its data is missing, cut off or outside the model's folder."""
        try:
            if tensor.data_location != TensorProto.EXTERNAL:
                return onnx.numpy_helper.to_array(tensor)
            if (target := self.data_file(tensor)) is None or not target.is_file():
                return None
            return onnx.numpy_helper.to_array(tensor, str(self.path.parent))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, onnx.checker.ValidationError):
            return None

    def data_file(self, tensor: TensorProto) -> Path | None:
        """Return the file that holds a tensor's data; ``None`` where it would lie outside the model's folder."""
        folder = self.path.parent.resolve()
        location = external_fields(tensor).get("location", "")
        try:
            inside = bool(location) and (folder / location).resolve().is_relative_to(folder)
        except (OSError, ValueError):
            inside = False
        return folder / location if inside else None

    def tensors(self) -> Iterator[TensorProto]:
        """Yield every initialiser and every tensor in an attribute, of all levels."""
        for graph in _graphs(self.graph):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            for node in graph.node:
                yield from (a.t for a in node.attribute if a.type == AttributeProto.TENSOR)

    def _is_fixed(self, name: str) -> bool:
        shape = self.shapes.get(name)
        return shape is not None and all(isinstance(axis, int) for axis in shape)


def type_name(number: int) -> str:
    """Name an element type as NumPy does: 1 is float32."""
    known = number in TensorProto.DataType.values()
    name: str = TensorProto.DataType.Name(number).lower() if known else f"type {number}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def external_fields(tensor: TensorProto) -> dict[str, str]:
    """Return where a tensor's data lies: location, offset, length."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _inlined(model: ModelProto, name: str) -> ModelProto:
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise GraphPassError(f"{name}: its functions cannot be inlined: {error}", hint="export it again") from error


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.type == AttributeProto.GRAPH:
            yield from _graphs(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            for body in attribute.graphs:
                yield from _graphs(body)


def _sites(graph: GraphProto, level: int) -> Iterator[Site]:
    for node in graph.node:
        made = next((name for name in node.output if name), "")
        yield Site(node=node, name=node.name or f"of {made or 'nothing'}", level=level)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _sites(attribute.g, level + 1)
            elif attribute.type == AttributeProto.GRAPHS:
                for body in attribute.graphs:
                    yield from _sites(body, level + 1)


@functools.lru_cache(maxsize=1024)
def _schema(operator: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None


def _constant(node: NodeProto) -> Array | None:
    held = {a.name: a for a in node.attribute}
    if "value" in held:
        try:
            return onnx.numpy_helper.to_array(held["value"].t)
        except (ValueError, TypeError, KeyError):
            return None
    for name in ("value_float", "value_int", "value_floats", "value_ints"):
        if name in held:
            kind = np.float32 if "float" in name else np.int64
            return np.asarray(onnx.helper.get_attribute_value(held[name]), kind)
    return None


def _inferred(model: ModelProto) -> tuple[dict[str, int], dict[str, Shape]]:
    """Infer types and shapes on a copy without large weights; what cannot be inferred is left out."""
    bare = ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    for part in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(bare.graph, part).extend(getattr(model.graph, part))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    # Where the inference gives up, the file's own descriptions are left: contradictions are a rule's business.
    with contextlib.suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    types: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    for graph in _graphs(bare.graph):
        for value in (*graph.value_info, *graph.output, *graph.input):
            _describe(value, types, shapes)
        for tensor in graph.initializer:
            types[tensor.name], shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
    return types, shapes


def _describe(value: onnx.ValueInfoProto, types: dict[str, int], shapes: dict[str, Shape]) -> None:
    tensor = value.type.tensor_type
    if tensor.elem_type:
        types[value.name] = tensor.elem_type
    if tensor.HasField("shape"):
        dims = tensor.shape.dim
        shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
