"""What all rooms of RT-DETR are made of: convolution with norm, RepVGG block, attention, MLP, and how they fold."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": functional.relu,
    "silu": functional.silu,
}


class FrozenNorm(nn.Module):
    """Batch norm with the statistics of training, [N,C,H,W] to the same; all that inference needs of one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean, self.running_var = nn.Buffer(torch.zeros(channels)), nn.Buffer(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation; [N,C,H,W] to [N,out,H/stride,W/stride].

    An even kernel pads one pixel at the right and the bottom, an odd one evenly on all sides.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, act: str = "", groups: int = 1) -> None:
        super().__init__()
        self.act, self.pad_end = act, kernel % 2 == 0
        padding = 0 if self.pad_end else kernel // 2
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False)
        self.norm = FrozenNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        x = functional.pad(x, (0, 1, 0, 1)) if self.pad_end else x
        return ACTIVATIONS[self.act](self.norm(self.conv(x)))


class FusedConv(nn.Module):
    """A convolution with the norm in its weights and bias."""

    def __init__(self, weight: Tensor, bias: Tensor, like: ConvNorm, act: str) -> None:
        super().__init__()
        self.act, self.pad_end = act, like.pad_end
        self.conv = copy.copy(like.conv)
        self.conv._parameters = {"weight": frozen(weight), "bias": frozen(bias)}

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and activate."""
        x = functional.pad(x, (0, 1, 0, 1)) if self.pad_end else x
        return ACTIVATIONS[self.act](self.conv(x))


class RepVGG(nn.Module):
    """A 3x3 and a 1x1 convolution with norms, added, then SiLU; no identity branch.

    With ``converted`` it also holds the one convolution that the release's ``convert_to_deploy`` has added (and left
    the branches in place); that one is what computes then.
    """

    def __init__(self, channels: int, *, converted: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        if converted:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.converted = converted

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches, or their sum as one convolution."""
        return functional.silu(self.conv(x) if self.converted else self.conv1(x) + self.conv2(x))

    def fused(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one 3x3 convolution that equals both branches."""
        if self.converted:
            return self.conv.weight, cast(Tensor, self.conv.bias)
        wide, point = fold_norm(self.conv1), fold_norm(self.conv2)
        return wide[0] + functional.pad(point[0], (1, 1, 1, 1)), wide[1] + point[1]


class Mlp(nn.Module):
    """Linear layers with ReLU between them, [...,in] to [...,out]."""

    def __init__(self, channels: int, hidden: int, out: int, depth: int) -> None:
        super().__init__()
        sizes = [channels, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Multi-head attention on [N,tokens,C].

    ``packed`` keeps the three input projections in one matrix, rows in the order q, k, v, as ``nn.MultiheadAttention``
    and the official checkpoints do; otherwise they are three layers, as in Hugging Face's.
    """

    def __init__(self, dim: int, heads: int, *, packed: bool) -> None:
        super().__init__()
        self.heads, self.packed = heads, packed
        if packed:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
            nn.init.xavier_uniform_(self.in_proj_weight)
            nn.init.zeros_(self.in_proj_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight [C,C] and bias [C] of q, k and v."""
        if self.packed:
            return list(zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True))
        return [(layer.weight, layer.bias) for layer in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """Attend from ``query`` to itself and take ``value``; both [N,tokens,C]."""
        sources = (query, query, value)
        q, k, v = (
            split_heads(functional.linear(source, weight, bias), self.heads)
            for source, (weight, bias) in zip(sources, self.projections(), strict=True)
        )
        scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5
        return self.out_proj(join_heads(scores.softmax(-1) @ v))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N,tokens,C] to [N,heads,tokens,C/heads]; only the batch may be dynamic, so no shape is read in the graph."""
    return x.reshape(-1, x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[N,heads,tokens,d] to [N,tokens,heads*d]."""
    return x.transpose(1, 2).reshape(-1, x.shape[2], x.shape[1] * x.shape[3])


class DeployAttention(nn.Module):
    """``Attention`` with its scale in the query's weights."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        (wq, bq), key, value = attention.projections()
        scale = (wq.shape[0] // attention.heads) ** -0.5
        self.heads = attention.heads
        self.q_proj, self.k_proj, self.v_proj = linear(wq * scale, bq * scale), linear(*key), linear(*value)
        self.out_proj = attention.out_proj

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """Attend; arguments as ``Attention``."""
        q, k, v = (
            split_heads(layer(source), self.heads)
            for layer, source in ((self.q_proj, query), (self.k_proj, query), (self.v_proj, value))
        )
        return self.out_proj(join_heads((q @ k.transpose(2, 3)).softmax(-1) @ v))


def fold_norm(block: ConvNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution with its norm folded in, in the block's dtype."""
    norm = block.norm
    gain = norm.weight / torch.sqrt(norm.running_var + EPS)
    shift = norm.bias - norm.running_mean * gain
    return block.conv.weight * gain[:, None, None, None], shift


def folded(module: nn.Module) -> nn.Module:
    """Return a copy in which every norm and RepVGG block is one convolution; what has none is shared, not copied."""
    if isinstance(module, RepVGG):
        return FusedConv(*module.fused(), like=module.conv1, act="silu")
    if isinstance(module, ConvNorm):
        return FusedConv(*fold_norm(module), like=module, act=module.act)
    if isinstance(module, Attention):
        return DeployAttention(module)
    if isinstance(module, nn.AvgPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride)  # sides are multiples of 32: no map is odd
    clone = copy.copy(module)
    clone._modules = {name: child and folded(child) for name, child in module._modules.items()}
    return clone


def frozen(value: Tensor) -> nn.Parameter:
    """Return a detached copy as a parameter that is not trained."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a linear layer with copies of these weights [out,in] and [out]."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = frozen(weight), frozen(bias)
    return layer


def pointwise(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """Return a 1x1 convolution with copies of these weights [out,in] and [out]."""
    with torch.device("meta"):
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    layer.weight, layer.bias = frozen(weight[:, :, None, None]), None if bias is None else frozen(bias)
    return layer
