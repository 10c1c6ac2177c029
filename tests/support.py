"""What several test rooms use: the official reference cases, checkpoint files made of them, and the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from reference.fill import fill, make_input
from typer.testing import CliRunner

from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.cli import app
from deploy.graph.io import load_model, save_model
from deploy.precision import decide, policy
from deploy.precision.emulate import emulated

REFERENCE = Path(__file__).parent / "reference"


@dataclass(frozen=True)
class Case:
    """One official implementation's outputs for deterministic weights and input."""

    name: str
    state: dict[str, torch.Tensor]
    images: np.ndarray
    logits: np.ndarray

    def save(self, path: Path, **wrapping: Any) -> Path:
        """Write the weights as a checkpoint in the official layout."""
        torch.save({"state_dict": self.state, **wrapping}, path)
        return path


def reference_case(name: str) -> Case:
    """Rebuild a case from its names and shapes."""
    about = json.loads((REFERENCE / f"{name}.json").read_text())
    keys = about["keys"].items()
    state = {key: torch.from_numpy(fill(key, shape, **about["fill_kwargs"])) for key, shape in keys}
    outputs = np.load(REFERENCE / f"{name}.npz")
    images = make_input(about["input_name"], about["input_shape"])
    return Case(name=name, state=state, images=images, logits=outputs[outputs.files[0]])


def types_of(path: Path) -> dict[str, str]:
    """Return the type of what each node of an ONNX file makes, by the node's name, e.g. ``"FLOAT16"``."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return {n.name: onnx.TensorProto.DataType.Name(types[n.output[0]]) for n in graph.node if n.output[0] in types}


def without_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the rules away that keep sums, norms and coordinates float32: the negative control of islands."""
    kept = {op: reason for op, reason in policy.KEPT_OPS.items() if not op.startswith("Reduce")}
    monkeypatch.setattr(policy, "KEPT_OPS", kept)
    monkeypatch.setattr(decide, "_by_path", lambda view: {})


def rounding_of(typed: Path, graph: Path, images: np.ndarray) -> float:
    """Return how far a 16-bit graph, every low tensor rounded, is from its float32 graph: root of the mean square."""
    twin = typed.with_name("twin.onnx")
    save_model(emulated(load_model(typed)), twin)
    logits = []
    for path in (twin, graph):
        with open_model(path, BuildOptions(threads=1)) as runner:
            logits.append(runner.infer({"images": images})["logits"].astype(np.float64))
    return float(np.sqrt(((logits[0] - logits[1]) ** 2).mean()))


def effdeploy(*arguments: object) -> Any:
    """Run the command line in this process; the result has ``exit_code``, ``stdout`` and ``stderr``."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
