"""The official implementations' RT-DETR outputs, and checkpoints that hold the weights they were made with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from reference import rtdetr_fill

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One image's outputs: logits of some rows, boxes of all, and the position that each row was selected from."""

    name: str
    images: np.ndarray
    index: np.ndarray
    rows: np.ndarray
    logits: np.ndarray
    boxes: np.ndarray

    @property
    def size(self) -> str:
        """Height x width."""
        return f"{self.images.shape[2]}x{self.images.shape[3]}"


def about(name: str) -> dict:
    """Read a case's description, with the keys of the case that it shares them with."""
    found = json.loads((FOLDER / f"{name}.json").read_text())
    return {**found, "keys": about(found["keys_of"])["keys"]} if "keys_of" in found else found


def arrays(name: str) -> dict[str, np.ndarray]:
    """Read a case's numbers."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@lru_cache(maxsize=1)
def state_of(name: str) -> dict[str, torch.Tensor]:
    """Rebuild a case's state dict; tables that the model computes are zeros, which nothing may read.

    The last one is kept: callers must not change it.
    """
    state = {}
    for key, shape in about(name)["keys"].items():
        values = rtdetr_fill.fill(key, tuple(shape))
        state[key] = torch.zeros(shape) if values is None else torch.from_numpy(values)
    return state


def case_of(name: str) -> Case:
    """Rebuild a case."""
    described, numbers = about(name), arrays(name)
    return Case(
        name=name,
        images=rtdetr_fill.image(tuple(described["input_shape"]), seed=described["input_seed"]),
        index=numbers["topk_ind"],
        rows=numbers["rows"],
        logits=numbers["pred_logits"],
        boxes=numbers["pred_boxes"],
    )
