"""Preprocessing inside the network: what takes normalised images takes uint8 pixels as well.

A forward pre-hook scales and normalises, with the arithmetic of ``deploy.preprocess.normalise``, and passes normalised
images on. The modules and their names stay as they are, so checkpoints, patterns on node names, and what looks into
modules never know; the exporter writes the hook's operators before the first module's
(``deploy.graph.passes.fold_preprocess`` folds them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deploy.errors import RecipeError
from deploy.records import Preprocess, TensorSpec

IMAGES = "images"


def embed(module: nn.Module, spec: Preprocess) -> None:
    """Let a module take uint8 [N, height, width, 3] in place of its first input."""

    def hook(owner: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if given[0].dtype != torch.uint8:
            return None
        return (normalised(given[0], spec, next(owner.parameters()).dtype), *given[1:])

    module.register_forward_pre_hook(hook)


def normalised(pixels: Tensor, spec: Preprocess, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale and normalise uint8 [N, height, width, 3] to [N, 3, height, width].

    The cast comes first: TensorRT reads uint8 by a cast alone. What changes nothing is left out.
    """
    images = pixels.to(dtype).permute(0, 3, 1, 2).contiguous() / 255
    if any(spec.mean):
        images = images - torch.tensor(spec.mean, dtype=dtype).reshape(1, 3, 1, 1)
    if spec.std != (1.0, 1.0, 1.0):
        images = images / torch.tensor(spec.std, dtype=dtype).reshape(1, 3, 1, 1)
    return images


def pixel_inputs(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Return graph inputs whose images are pixels.

    Raises:
        RecipeError: the graph has no images to begin with.
    """
    if not inputs or inputs[0].name != IMAGES:
        names = ", ".join(spec.name for spec in inputs)
        raise RecipeError(
            f"preprocess.embed: the graph takes {names}, expected images first: there is nothing to normalise",
            hint="leave --embed-preprocess out, or export the whole network",
        )
    batch, channels, height, width = inputs[0].shape
    return (TensorSpec(name=IMAGES, dtype="uint8", shape=(batch, height, width, channels)), *inputs[1:])
