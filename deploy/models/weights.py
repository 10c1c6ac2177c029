"""Deterministic random weights that keep a deep network alive, for runs without a checkpoint.

A freshly initialised network is useless for parity: with layer scales of 1e-5 every block is nearly the identity, and
an export that lost a whole branch would pass. Here every branch matters and activations stay of order one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch


def random_state(template: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Draw a state dict with the names, shapes and types of ``template``.

    Every tensor has its own stream, seeded by its name, so a tensor keeps its values when others come or go.

    Args:
        template: State dict, may be on the meta device.
        seed: Any non-negative number.
    """
    return {name: _draw(name, tensor, seed) for name, tensor in template.items()}


def _draw(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    shape = tuple(like.shape)
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype)
    stream = np.random.default_rng([seed, zlib.crc32(name.encode())])
    leaf = name.rpartition(".")[2]
    if leaf == "running_var" or "layer_scale" in leaf or leaf == "gamma":
        values = stream.uniform(0.5, 1.5, shape) if leaf == "running_var" else stream.uniform(0.1, 1.0, shape)
        return torch.from_numpy(values.astype(np.float32).reshape(shape))
    normal = stream.standard_normal(shape, dtype=np.float32)
    if leaf.endswith("_token") or leaf.startswith("pos_embed"):
        # Learned tokens and positions are added to activations of order one: as small weights they would not matter.
        return torch.from_numpy(normal * np.float32(0.5))
    if len(shape) >= 2:
        # Unit gain: the variance of a sum of fan-in products of unit-variance terms is the fan-in.
        return torch.from_numpy(normal / np.float32(np.sqrt(max(1, int(np.prod(shape[1:]))))))
    gain = leaf == "weight"
    return torch.from_numpy(np.asarray(np.float32(1.0 if gain else 0.0) + np.float32(0.1) * normal))
