"""Helpers of the precision tests: small graphs from ONNX's textual syntax, converted, inspected and run."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, numpy_helper

from deploy.precision.convert import convert_precision
from deploy.precision.emulate import emulated
from deploy.precision.view import tensor_types
from deploy.records import Precision, PrecisionRecord, Target

KIND = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def parse(text: str, weights: dict[str, np.ndarray] | None = None, opset: int = 20) -> onnx.ModelProto:
    """Read a graph; nodes are named ``m/<first output>``."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n' + textwrap.dedent(text))
    for node in model.graph.node:
        node.name = f"m/{node.output[0]}"
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in (weights or {}).items())
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A typed graph, read back from its file."""

    record: PrecisionRecord
    path: Path
    model: onnx.ModelProto
    types: dict[str, int]

    def node(self, name: str) -> onnx.NodeProto:
        return next(n for n in self.model.graph.node if n.name == name)

    def weight(self, name: str) -> onnx.TensorProto | None:
        return next((t for t in self.model.graph.initializer if t.name == name), None)

    def kind(self, name: str) -> str:
        """Type of the first output of the node ``m/<name>``."""
        return KIND[self.types[self.node(f"m/{name}").output[0]]]

    def reads(self, name: str) -> list[str]:
        """Float types that the node ``m/<name>`` reads, by slot."""
        return [KIND.get(self.types.get(i, 0), "-") for i in self.node(f"m/{name}").input]

    def casts(self) -> list[tuple[str, str, str]]:
        """(source, result, type) of every cast between float types."""
        return [
            (n.input[0], n.output[0], KIND[self.types[n.output[0]]])
            for n in self.model.graph.node
            if n.op_type == "Cast" and self.types.get(n.input[0]) in KIND and self.types.get(n.output[0]) in KIND
        ]

    def reason(self, name: str) -> str:
        """Why ``m/<name>`` stays float32."""
        return next(k.reason for k in self.record.kept if f"m/{name}" in k.examples)


def convert(
    model: onnx.ModelProto,
    folder: Path,
    precision: Precision = Precision.FP16,
    *,
    feeds: dict[str, np.ndarray] | None = None,
    keep: tuple[str, ...] = (),
    target: Target = Target.TENSORRT,
) -> Converted:
    source = folder / "20-patched.onnx"
    source.write_bytes(model.SerializeToString())
    record = convert_precision(source, precision, folder, feeds=feeds, keep=keep, target=target)
    path = folder / record.artifact.name
    typed = onnx.load(path)
    well_formed(typed)
    return Converted(record=record, path=path, model=typed, types=tensor_types(typed))


def well_formed(model: onnx.ModelProto) -> None:
    """What every typed graph must be, whatever the rules say."""
    onnx.checker.check_model(model, full_check=True)
    types = tensor_types(model)
    declared = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert all(types[name] == kind for name, kind in declared.items())
    known = {i.name for i in model.graph.input} | {t.name for t in model.graph.initializer}
    cast_of: dict[tuple[str, int], str] = {}
    made_by_cast = set()
    for node in model.graph.node:
        assert {n for n in node.input if n} <= known, f"{node.name} comes before its inputs"
        assert known.isdisjoint(node.output), f"{node.name} makes a tensor twice"
        known.update(node.output)
        if node.op_type == "Cast" and node.name.rpartition("/")[2].startswith("Cast_"):
            key = (node.input[0], types[node.output[0]])
            assert key not in cast_of, f"{node.input[0]} is cast twice to the same type"
            assert node.input[0] not in made_by_cast, f"{node.name} casts a cast"
            cast_of[key] = node.name
            made_by_cast.add(node.output[0])
    names = [n.name for n in model.graph.node if n.name]
    assert len(names) == len(set(names))
    read = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
    read |= {name for n in model.graph.node for a in n.attribute if a.HasField("g") for name in _all_reads(a.g)}
    assert {t.name for t in model.graph.initializer} <= read, "an initialiser is left that nobody reads"


def _all_reads(graph: onnx.GraphProto) -> set[str]:
    return {i for n in graph.node for i in n.input} | {o.name for o in graph.output}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, optimise: bool = True) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def close(source: onnx.ModelProto, typed: Converted, feeds: dict[str, np.ndarray], limit: float) -> None:
    """Hold the typed graph, itself (float16 only) and emulated, against its float32 source."""
    wanted = run(source, feeds)
    twins = [emulated(typed.model)] + ([typed.model] if typed.record.precision is Precision.FP16 else [])
    for twin in twins:
        for want, got in zip(wanted, run(twin, feeds), strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            if got.dtype == np.float32:
                assert np.abs(got - want).max() <= limit * max(1.0, float(np.abs(want).max()))
            else:
                assert np.array_equal(got, want)


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
