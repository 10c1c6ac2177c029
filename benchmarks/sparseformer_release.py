"""SparseFormer in the order of operations of the authors' release (``imagenet/``), around the weights of our model.

What a user of the release exports today, so what ``sparseformer.py`` is timed against: tokens [T,N,C],
``nn.MultiheadAttention``, tokens and RoIs repeated to the batch, a norm for each use, RoIs as corners, samples brought
to points before channels, and ``baddbmm`` for the mixing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models import vit
from deploy.models.sparseformer.network import AdaptiveMixing, SparseFormer, Stem, Unit


class ReleaseForm(nn.Module):
    """The classifier, ``images`` [N,3,H,W] to ``logits`` [N,classes]; shares the weights of ``model``."""

    def __init__(self, model: SparseFormer) -> None:
        super().__init__()
        self.model = model
        self.attentions = nn.ModuleList(
            multihead(block.attn) for block in model.layers if isinstance(block, vit.Block)
        ).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        first, transition, second, blocks = self.model.focusing
        features = stem(self.model.feat_extractor, images)
        x, rois = (value[0].unsqueeze(1).repeat(1, images.shape[0], 1) for value in self.model.start())
        for _ in range(self.model.repeats):
            x, rois = look(first, self.attentions[0], features, x, rois)
        x, rois = look(second, self.attentions[1], features, transition(x), rois)
        for block, attention in zip(blocks, self.attentions[2:], strict=True):
            x = block.feed(attend(block, attention, x))
        return self.model.proj(self.model.norm(x.mean(0)))


def multihead(attention: vit.Attention) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(attention.proj.in_features, attention.heads)
    made.in_proj_weight, made.in_proj_bias = attention.qkv.weight, attention.qkv.bias
    made.out_proj.weight, made.out_proj.bias = attention.proj.weight, attention.proj.bias
    return made


def stem(early: Stem, images: Tensor) -> Tensor:
    x = functional.max_pool2d(functional.relu(early.conv1(images)), 3, 2, 1)
    x = x - x.mean(1, keepdim=True)
    return x / (x.var(1, keepdim=True, correction=early.constants.unbiased) + early.constants.stem).sqrt()


def attend(block: vit.Block, attention: nn.Module, x: Tensor) -> Tensor:
    normed = block.norm1(x)
    return x + attention(normed, normed, normed)[0]


def look(unit: Unit, attention: nn.Module, features: Tensor, x: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    x = attend(unit, attention, x)
    rois = unit.adjust(x, rois)
    points = sampling_points(unit, x, rois.transpose(0, 1))
    taken = functional.grid_sample(features, points * 2 - 1, align_corners=False)
    batch, channels, tokens, count = taken.shape
    taken = taken.reshape(batch, 1, channels, tokens, 1, count).permute(0, 3, 4, 1, 5, 2)
    return unit.feed(x + mix(unit.adaptive_mixing, taken, x.transpose(0, 1)).transpose(0, 1)), rois


def sampling_points(unit: Unit, x: Tensor, rois: Tensor) -> Tensor:
    """Return [N,T,points,2] in 0..1 from tokens [T,N,C] and RoIs [N,T,4]."""
    tokens, batch = x.shape[:2]
    asked = unit.roi_offset_bias[None, None].repeat(tokens, batch, 1) + unit.roi_offset_module(x)
    asked = asked.transpose(0, 1).reshape(batch, tokens, 1, -1, 2)
    spread = asked.std(-2, keepdim=True) + unit.eps
    asked = (asked - asked.mean(-2, keepdim=True)) / (3 * spread)
    centre, size = (rois[..., 2:] + rois[..., :2]) / 2, rois[..., 2:] - rois[..., :2]
    return (centre[:, :, None, None] + asked * size[:, :, None, None]).flatten(2, 3)


def mix(mixing: AdaptiveMixing, taken: Tensor, tokens: Tensor) -> Tensor:
    """Mix [N,T,1,1,points,C] with matrices of the tokens [N,T,C]."""
    batch, count = tokens.shape[:2]
    points, channels = mixing.points, mixing.channels
    made = mixing.parameter_generator(tokens).reshape(batch * count, -1)
    channel, spatial = torch.split(made, [channels**2, points**2], -1)
    x = taken.reshape(batch * count, points, channels)
    x = torch.baddbmm(mixing.m_beta[None, None], x, channel.reshape(-1, channels, channels))
    x = torch.baddbmm(mixing.s_beta[None, :, None], spatial.reshape(-1, points, points), functional.gelu(x))
    return mixing.out_proj(functional.gelu(x).reshape(batch, count, -1))
