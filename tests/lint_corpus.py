"""Small graphs for the rules of ``effdeploy lint``: those of ``data/lint_corpus.yaml``, and a few that need more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import yaml
from onnx import TensorProto, helper, numpy_helper

TEXTS = Path(__file__).parent / "data" / "lint_corpus.yaml"
NATIVE = "tensorrt_rtx"

# Where lint and a runtime disagree on purpose: (case, runtime) -> why. tests/test_lint_runtimes.py keeps it short.
EXCEPTIONS = {
    ("att16-qk-same", NATIVE): "the builder ends with a segmentation fault; a test of its own shows that",
}


@dataclass(frozen=True)
class Case:
    """A graph, and exactly the rules that it breaks for all runtimes together."""

    name: str
    rules: frozenset[str]
    write: Callable[[Path], Path]


def text_model(graph: str, opset: int = 20, domains: tuple[str, ...] = ()) -> onnx.ModelProto:
    """Parse a graph in ONNX's text form."""
    imports = ", ".join([f'"": {opset}', *(f'"{domain}": 1' for domain in domains)])
    return onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> g {graph}")


def written(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model as it is."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def with_weight(values: np.ndarray) -> onnx.ModelProto:
    """Add a weight to an input of its type and shape."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    x, y = (helper.make_tensor_value_info(name, kind, values.shape) for name in "xy")
    node = helper.make_node("Add", ["x", "w"], ["y"], "add")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(values, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def with_data(folder: Path, size: int, location: str = "w.bin") -> Path:
    """Write a model whose 64 weights lie in a file of ``size`` bytes."""
    (folder / "inside").mkdir()
    model = with_weight(np.zeros(64, np.float32))
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "256")):
        weight.external_data.add(key=key, value=value)
    (folder / "inside" / location).write_bytes(b"\0" * size)
    return written(model, folder / "inside")


def with_version(folder: Path, version: int) -> Path:
    """Write a model of an IR version."""
    model = text_model("(float[4] x) => (float[4] y) { y = Relu(x) }")
    model.ir_version = version
    return written(model, folder)


def without_numbers(folder: Path) -> Path:
    """Write a model with a weight that is not a number."""
    return written(with_weight(np.array([0.0, np.nan], np.float32)), folder)


def with_transform(folder: Path, pixels: int) -> Path:
    """Write a product of a constant [pixels,36] with tiles, as filtered convolutions end."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, size, 8)) for n, size in (("x", 36), ("y", pixels)))
    node = helper.make_node("MatMul", ["w", "x"], ["y"], "outputs")
    weight = numpy_helper.from_array(np.ones((pixels, 36), np.float32), "w")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    return written(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder)


MADE = {
    "filtered": ({"filtered-convolution"}, lambda folder: with_transform(folder, 16)),
    "other-product": (set(), lambda folder: with_transform(folder, 12)),
    "ir-14": ({"ir-too-new"}, lambda folder: with_version(folder, 14)),
    "ir-13": (set(), lambda folder: with_version(folder, 13)),
    "weight-nan": ({"weight-nan"}, without_numbers),
    "data-whole": (set(), lambda folder: with_data(folder, 256)),
    "data-cut-off": ({"data-cut-off"}, lambda folder: with_data(folder, 100)),
    "data-outside": ({"data-outside"}, lambda folder: with_data(folder, 256, "../w.bin")),
}


def _read() -> dict[str, Case]:
    cases = {}
    for item in yaml.safe_load(TEXTS.read_text(encoding="utf-8")):

        def write(folder: Path, item: dict = item) -> Path:
            return written(text_model(item["graph"], item["opset"], tuple(item.get("domains", ()))), folder)

        cases[item["name"]] = Case(name=item["name"], rules=frozenset(item["rules"]), write=write)
    for name, (rules, make) in MADE.items():
        cases[name] = Case(name=name, rules=frozenset(rules), write=make)
    return cases


CASES = _read()
