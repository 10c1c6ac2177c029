"""SparseFormer's deploy form: the same function up to rounding, for images of one size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models import vit
from deploy.models.rtdetr.sampling import BILINEAR, FIXED
from deploy.models.sparseformer import looking
from deploy.models.sparseformer.network import AdaptiveMixing, SparseFormer, Unit
from deploy.records import Target


class DeployMixing(nn.Module):
    """Mixing of [N,T,C,points] with generated matrices."""

    def __init__(self, mixing: AdaptiveMixing) -> None:
        super().__init__()
        c, p = self.channels, self.points = mixing.channels, mixing.points
        made = cast(nn.Linear, mixing.parameter_generator[2])
        weights, biases = torch.split(made.weight, [c * c, p * p]), torch.split(made.bias, [c * c, p * p])
        self.channel = vit.linear(_transposed(weights[0], c), _transposed(biases[0], c))
        self.spatial = vit.linear(_transposed(weights[1], p), _transposed(biases[1], p))
        # With one axis, ONNX Runtime would fuse s_beta into a BiasGelu: slower than Add and Gelu on rows this short.
        self.m_beta, self.s_beta = vit.frozen(mixing.m_beta[:, None]), vit.frozen(mixing.s_beta[None])
        reordered = mixing.out_proj.weight.reshape(-1, p, c).transpose(1, 2).flatten(1)
        self.out_proj = vit.linear(reordered, mixing.out_proj.bias)

    def matrices(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Make M [N,T,C,C] and S [N,T,points,points] from the generator's middle [N,T,width/4]."""
        tokens = hidden.shape[1]
        channel = self.channel(hidden).reshape(-1, tokens, self.channels, self.channels)
        return channel, self.spatial(hidden).reshape(-1, tokens, self.points, self.points)

    def forward(self, x: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        """Mix channels, then points; return [N,T,width]."""
        x = functional.gelu(channel @ x + self.m_beta)
        x = functional.gelu(x @ spatial + self.s_beta)
        return self.out_proj(x.flatten(2))


def _transposed(rows: Tensor, side: int) -> Tensor:
    """Reorder the rows that make a square matrix so that they make its transpose."""
    return rows.reshape(side, side, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)


class Rois(nn.Module):
    """RoI and point arithmetic, float32 in every precision; a RoI is centre and size [N,T,2] in GridSample's -1..1."""

    def __init__(self, points: int, eps: float) -> None:
        super().__init__()
        self.points, self.eps = points, eps

    def forward(self, asked: Tensor, centre: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move the RoIs by ``asked`` [N,T,4 + 2 * points]; return centre, size and the grid [N,T,points,2].

        The offsets come without their mean.
        """
        move, grow, offsets = torch.split(asked, [2, 2, 2 * self.points], -1)
        centre, size = centre + move * size, size * grow.exp()
        offsets = offsets.reshape(-1, offsets.shape[1], self.points, 2)
        spread = ((offsets * offsets).sum(2) / (self.points - 1)).sqrt()
        scale = size / ((spread + self.eps) * 3)
        return centre, size, centre[:, :, None] + offsets * scale[:, :, None]


class DeployUnit(vit.DeployBlock):
    """A unit with one norm for RoIs, points and mixing."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit)
        points = unit.adaptive_mixing.points
        adjust, offset = _without_gain(unit.roi_adjust_module), _without_gain(unit.roi_offset_module)
        offset = (_centred(offset[0], points), _centred(offset[1] + unit.roi_offset_bias, points))
        self.asked = vit.linear(torch.cat((adjust[0], offset[0])), torch.cat((adjust[1], offset[1])))
        self.hidden = vit.linear(*_without_gain(unit.adaptive_mixing.parameter_generator))
        self.rois = Rois(points, unit.eps)
        self.mixing = DeployMixing(unit.adaptive_mixing)

    def plan(self, x: Tensor, centre: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Return centre, size, grid [N,T,points,2], M and S for tokens after attention."""
        standardised = functional.layer_norm(x, x.shape[-1:], eps=vit.EPS)
        return *self.rois(self.asked(standardised), centre, size), *self.mixing.matrices(self.hidden(standardised))


def _without_gain(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer that reads the standardised input of the norm before it."""
    norm, layer = cast(nn.LayerNorm, layers[0]), cast(nn.Linear, layers[1])
    shift = layer.weight @ norm.bias
    return layer.weight * norm.weight, shift if layer.bias is None else layer.bias + shift


def _centred(rows: Tensor, points: int) -> Tensor:
    """Take the mean over the points off rows [2 * points, ...]."""
    split = rows.reshape(points, 2, *rows.shape[1:])
    return (split - split.mean(0, keepdim=True)).flatten(0, 1)


SAMPLING = {Target.ONNXRUNTIME: "grid_sample", Target.TENSORRT: "gather"}


class FirstLook(nn.Module):
    """The first look of the first unit, where everything but the image is constant."""

    tokens: Tensor
    centre: Tensor
    extent: Tensor
    grid: Tensor
    channel: Tensor
    spatial: Tensor

    def __init__(self, unit: DeployUnit, model: SparseFormer, size: tuple[int, int], form: str) -> None:
        super().__init__()
        tokens, rois = model.start()
        centre, extent = rois[..., :2] + rois[..., 2:] - 1, (rois[..., 2:] - rois[..., :2]).abs() * 2
        tokens = unit.attend(tokens)[0]
        centre, extent, grid, channel, spatial = unit.plan(tokens, centre, extent)
        constants = {"tokens": tokens, "centre": centre, "extent": extent, "channel": channel, "spatial": spatial}
        for name, value in {**constants, "grid": grid}.items():
            self.register_parameter(name, vit.frozen(value))
        self.points = grid.shape[2]
        self.sampling = FIXED[form](grid.reshape(1, -1, 1, 2), size)

    def forward(self, image_map: Tensor, mixing: nn.Module) -> Tensor:
        """Return the tokens [N,T,width] before the MLP."""
        mixed = mixing(by_token(self.sampling(image_map), self.points), self.channel, self.spatial)
        return self.tokens + mixed


def by_token(taken: Tensor, points: int) -> Tensor:
    """Turn [N,C,T * points] into [N,T,C,points]."""
    return taken.reshape(-1, taken.shape[1], taken.shape[2] // points, points).transpose(1, 2)


class DeploySparseFormer(nn.Module):
    """The classifier that is exported: the same function for images of one size."""

    def __init__(self, model: SparseFormer, target: Target) -> None:
        super().__init__()
        first, transition, second, blocks = model.focusing
        form = SAMPLING[target] if model.sampling == "auto" else model.sampling
        self.stem, self.transition, self.repeats = model.feat_extractor, transition, model.repeats
        self.focusing, self.cortex = DeployUnit(first), DeployUnit(second)
        self.blocks = nn.ModuleList(vit.DeployBlock(block) for block in blocks)
        map_size = cast(tuple[int, int], tuple(((side + 1) // 2 + 1) // 2 for side in model.size))
        self.first = FirstLook(self.focusing, model, map_size, form)
        self.sampling = BILINEAR[form]([map_size], [1])
        self.norm, self.proj = model.norm, model.proj
        if target is Target.TENSORRT and model.pad_heads:
            for block in (self.focusing, self.cortex, *self.blocks):
                vit.pad_heads(cast(vit.DeployBlock, block).attn)
        self.looks = looking.Looks() if model.looks else None

    def forward(self, images: Tensor) -> Any:
        """Classify."""
        image_map = self.stem(images)
        x = self.focusing.feed(self.first(image_map, self.focusing.mixing))
        seen = [(self.first.centre, self.first.extent, self.first.grid)]
        for _ in range(self.repeats - 1):
            x = self.look(self.focusing, image_map, x, seen)
        x = self.look(self.cortex, image_map, self.transition(x), seen)
        for block in self.blocks:
            x = block(x)
        logits = self.proj(self.norm(x.mean(1)))
        return logits if self.looks is None else (logits, self.looks(seen))

    def look(self, unit: DeployUnit, image_map: Tensor, x: Tensor, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Run a unit once, from the last (centre, size, grid) of ``seen``; append its own."""
        x = unit.attend(x)[0]
        centre, size, grid, channel, spatial = unit.plan(x, *seen[-1][:2])
        seen.append((centre, size, grid))
        points = grid.shape[2]
        taken = self.sampling([image_map], grid.reshape(-1, grid.shape[1] * points, 1, 2), None)
        return unit.feed(x + unit.mixing(by_token(taken, points), channel, spatial))
