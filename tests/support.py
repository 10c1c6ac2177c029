"""What several test rooms use: the official reference cases, checkpoint files made of them, and the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference.fill import fill, make_input
from typer.testing import CliRunner

from deploy.cli import app

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


def effdeploy(*arguments: object) -> Any:
    """Run the command line in this process; the result has ``exit_code``, ``stdout`` and ``stderr``."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
