"""Castling-ViT: a vision transformer with linear-angular attention (You et al., CVPR 2023, arXiv 2211.10526).

The authors' release (GATECH-EIC/Castling-ViT) holds the attention alone, ``LinAngularAttention``; here it stands in
DeiT, as in the paper. Tensor names are timm's, with the release's ``attn.dconv``. With unit rows q and k per head:

    angular    m = v / 2 + q (k^T v) / pi       first-order expansion of the kernel 1 - angle / pi
    auxiliary  m = m + P v,  P = softmax(raw q k^T / sqrt(d)) where it is above 0.02, zero elsewhere
    out        m / |m| + the depthwise convolution of v along the tokens, 9 taps a head

Keys times values come first, so the cost grows linearly with the number of tokens; only the auxiliary branch ever
makes a tokens-by-tokens matrix. It guides training, and the paper lets it fade out. It has no weights, so a checkpoint
does not say whether it still mattered:

    training   with the branch (``auxiliary: true``)
    deploy     without it, and the position embedding, the patch bias and the prefix in one constant

Dropping the branch is no algebra: the export measures what it changes and holds it to ``parity.max_drift``. With
``auxiliary: false`` the training form has none either, and the deploy form is exact.

What is hard to export: |m| grows with the number of tokens (a sum of squares leaves FP16 from a norm of 256 on), so the
norms and their divisions stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deploy.models import vit
from deploy.models.base import Flag, Form, System, Variant
from deploy.models.checkpoint import State, WeightMap
from deploy.records import Target

THRESHOLD = 0.02  # of a probability in the auxiliary branch; fixed in the release
TAPS = 9
TINIEST = 1e-12  # the release divides zero rows by zero


def unit(x: Tensor) -> Tensor:
    """Divide the last axis by its norm; rows of zeros stay zeros."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(TINIEST)


def token_convolution(heads: int) -> nn.Conv2d:
    """Return the convolution along the tokens of [N,heads,T,d], one filter a head."""
    return nn.Conv2d(heads, heads, (TAPS, 1), padding=(TAPS // 2, 0), groups=heads, bias=False)


class LinearAngularAttention(nn.Module):
    """The release's attention, [N,T,C] to the same; ``auxiliary`` is its ``sparse_reg``."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, auxiliary: bool) -> None:
        super().__init__()
        self.heads, self.auxiliary = heads, auxiliary
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dconv = token_convolution(heads)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend; also returns the keys [N,heads,T,d]. A bias has no logits to be added to and must be left out."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = v * 0.5 + unit(q) @ (unit(k).transpose(-2, -1) @ v) / math.pi
        if self.auxiliary:
            mixed = mixed + strong(torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)) @ v
        mixed = unit(mixed) + self.dconv(v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width)), k


def strong(probabilities: Tensor) -> Tensor:
    """Zero what is not above the threshold; the rest is not normalised again."""
    return torch.where(probabilities > THRESHOLD, probabilities, torch.zeros_like(probabilities))


class Castling(vit.VisionTransformer):
    """The classifier as in the checkpoint: ``images`` [N,3,H,W] to ``logits`` [N,classes]."""

    def __init__(self, options: Mapping[str, Any], size: tuple[int, int]) -> None:
        super().__init__(options, size)
        attention = (options["width"], options["heads"], options["qkv_bias"], options["auxiliary"])
        for block in cast(list[vit.Block], list(self.blocks)):
            block.attn = cast(vit.Attention, LinearAngularAttention(*attention))


class DeployAttention(nn.Module):
    """Attention without the auxiliary branch, with three projections, so that nothing has to be split."""

    def __init__(self, attention: LinearAngularAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        weights = attention.qkv.weight.chunk(3)
        biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        self.q, self.k, self.v = (vit.linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.proj, self.dconv = attention.proj, attention.dconv

    def forward(self, x: Tensor, queries: int = 0) -> Tensor:
        """Attend.

        Args:
            x: [N,T,C].
            queries: Compute the outputs of the first so many tokens only; 0: of all.
        """
        k, v = self._heads(self.k(x)), self._heads(self.v(x)).transpose(1, 2)
        context = unit(k).permute(0, 2, 3, 1) @ v
        q = unit(self._heads(self.q(x[:, :queries] if queries else x))).transpose(1, 2)
        near = v[:, :, : queries + TAPS // 2] if queries else v
        local = self.dconv(near)
        own, local = (v[:, :, :queries], local[:, :, :queries]) if queries else (v, local)
        mixed = unit(own * 0.5 + q @ context * (1 / math.pi)) + local
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1)


class DeployBlock(nn.Module):
    """A block; ``queries`` as in ``DeployAttention``."""

    def __init__(self, block: vit.Block, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = DeployAttention(cast(LinearAngularAttention, block.attn))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = (x[:, : self.queries] if self.queries else x) + self.attn(self.norm1(x), self.queries)
        return x + self.mlp(self.norm2(x))


class DeployCastling(nn.Module):
    """The classifier that is exported; the last block computes the tokens that the head reads and no others."""

    def __init__(self, model: Castling) -> None:
        super().__init__()
        self.embed, self.head = vit.DeployEmbed(model), vit.DeployHead(model)
        blocks = cast(list[vit.Block], list(model.blocks))
        read = [0] * (len(blocks) - 1) + [self.head.reads]
        self.blocks = nn.ModuleList(DeployBlock(block, queries) for block, queries in zip(blocks, read, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build the training form; the position embedding belongs to ``size``."""
    return Castling(options, size).eval()


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the copy that is exported, in the dtype of ``model``; ``model`` stays untouched."""
    with torch.no_grad():
        return DeployCastling(cast(Castling, model))


def approximate(options: Mapping[str, Any]) -> bool:
    """Say whether the deploy form leaves something of the training form out."""
    return bool(options["auxiliary"])


def random(state: State) -> State:
    """Let the auxiliary branch have faded out, as at the end of the training in the paper: queries and keys shrink.

    Their products then make no probability above ``THRESHOLD`` where there are more than 1 / ``THRESHOLD`` tokens. The
    linear branch is what it was: it reads queries and keys by their direction only.
    """
    found = dict(state)
    for key, value in state.items():
        if ".attn.qkv." in key:
            queries, keys, values = value.chunk(3)
            found[key] = torch.cat((queries * 0.1, keys * 0.1, values))
    return found


def _variant(width: int, **changes: Any) -> Variant:
    options = {**vit.options_of(width, **changes), "auxiliary": True}
    return Variant(options=options, summary="no weights are published" if width > 32 else "for tests")


_FORM = Form(
    name="linear-angular, keys times values first, no auxiliary branch",
    reason="no tokens-by-tokens matrix: cost grows linearly with the tokens (benchmarks/castling.py)",
)

SYSTEM = System(
    name="castling",
    task="classification",
    paper="Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular Attention at Vision "
    "Transformer Inference, CVPR 2023, arXiv 2211.10526",
    variants={
        "deit_tiny": _variant(192),
        "deit_small": _variant(384),
        "deit_base": _variant(768),
        "tiny": _variant(32, patch=8, depth=3, heads=2),
    },
    build=build,
    weight_maps=(WeightMap(name="timm's DeiT with the release's attention", layout="training", rename=vit.as_it_is),),
    to_deploy=to_deploy,
    forms={Target.ONNXRUNTIME: _FORM, Target.TENSORRT: _FORM},
    recipe={"system": "castling", "variant": "deit_small", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99948 with all of it in INT8, 0.99971 without the
    # convolution over tokens, 0.99950 without the head. The denominators are reductions, which are never quantised.
    keep_high=lambda options: {
        r"\.attn\.dconv/": "convolution over tokens: hardly any work, 44 % of the error",
        r"^head": "head: hardly any work, and the logits are its rounding",
    },
    stride="patch",
    adapt=vit.adapt,
    approximate=approximate,
    random=random,
    flags=(
        Flag(
            name="auxiliary",
            key="options.auxiliary",
            help="whether the checkpoint was trained up to its end with the masked softmax branch",
        ),
    ),
)
