"""The hybrid encoder: attention on the stride-32 map, then a top-down and a bottom-up pyramid of CSP blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models.rtdetr.layers import Attention, ConvNorm, RepVGG

TEMPERATURE = 10000.0


def position_table(height: int, width: int, dim: int, order: str) -> Tensor:
    """Return the sine and cosine embedding of a map's positions, [height*width, dim].

    Tokens are row-major. ``order`` "official" walks the grid with the column outside, so that on maps that are not
    square the rows of the table do not belong to the tokens they are added to; checkpoints of the release are trained
    with it and need it. "huggingface" is row-major. On square maps both are the same numbers.
    """
    omega = TEMPERATURE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    outer, inner = (width, height) if order == "official" else (height, width)
    first, second = torch.meshgrid(
        torch.arange(outer, dtype=torch.float64), torch.arange(inner, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * omega for axis in (first, second)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


class EncoderLayer(nn.Module):
    """Post-norm self-attention and an exact-GELU MLP on [N,tokens,C]; positions go to query and key, not to value."""

    def __init__(self, dim: int, heads: int, hidden: int, *, packed: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads, packed=packed)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Run the layer."""
        x = self.norm1(x + self.self_attn(x + position, x))
        return self.norm2(x + self.linear2(functional.gelu(self.linear1(x))))


class TransformerEncoder(nn.Module):
    """Encoder layers with one table of positions."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.layers:
            x = layer(x, position)
        return x


class CspBlock(nn.Module):
    """Two 1x1 convolutions, RepVGG blocks behind the first, both ADDED, and a 1x1 convolution back to the width."""

    def __init__(self, channels: int, out: int, hidden: int, depth: int, *, converted: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (ConvNorm(channels, hidden, 1, act="silu") for _ in range(2))
        self.bottlenecks = nn.Sequential(*(RepVGG(hidden, converted=converted) for _ in range(depth)))
        self.conv3 = nn.Identity() if hidden == out else ConvNorm(hidden, out, 1, act="silu")

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Run the block on two maps, the first of the second's size or half of it."""
        x = torch.cat([enlarged(first, second), second], 1)
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """Repeat pixels until a map is as large as the other."""
    scale = like.shape[3] // x.shape[3]
    return x if scale == 1 else functional.interpolate(x, scale_factor=float(scale))


class HybridEncoder(nn.Module):
    """Maps [N,C_i,H/8..H/32,W/8..W/32] to as many maps of ``dim`` channels.

    Args:
        channels: C_i, stride 8 first.
        dim: Width of all outputs.
        size: Image height and width; decides the table of positions.
        heads: Of the attention.
        hidden: Of its MLP.
        expansion: Width inside the CSP blocks, over ``dim``.
        depth: RepVGG blocks in each.
        position: ``order`` of ``position_table``.
        packed: How attention weights are kept, see ``Attention``.
        converted: Whether the checkpoint holds fused RepVGG convolutions.
    """

    position: Tensor

    def __init__(
        self, channels: list[int], dim: int, size: tuple[int, int], *, heads: int, hidden: int, expansion: float,
        depth: int, position: str, packed: bool, converted: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = int(dim * expansion)
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, 1) for c in channels)
        self.encoder = nn.ModuleList([TransformerEncoder([EncoderLayer(dim, heads, hidden, packed=packed)])])
        steps = range(len(channels) - 1)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, 1, act="silu") for _ in steps)
        self.fpn_blocks = nn.ModuleList(CspBlock(2 * dim, dim, inner, depth, converted=converted) for _ in steps)
        self.downsample_convs = nn.ModuleList(ConvNorm(dim, dim, 3, 2, act="silu") for _ in steps)
        self.pan_blocks = nn.ModuleList(CspBlock(2 * dim, dim, inner, depth, converted=converted) for _ in steps)
        table = position_table(-(-size[0] // 32), -(-size[1] // 32), dim, position)
        self.register_buffer("position", table, persistent=False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Run attention on the last map, then the pyramids."""
        maps = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        top = [self.attend(maps[-1])]
        for lateral, block, low in zip(self.lateral_convs, self.fpn_blocks, maps[-2::-1], strict=True):
            # The convolved map replaces the one above: the way back up reads it too.
            top[0] = lateral(top[0])
            top.insert(0, block(top[0], low))
        out = [top[0]]
        for downsample, block, high in zip(self.downsample_convs, self.pan_blocks, top[1:], strict=True):
            out.append(block(downsample(out[-1]), high))
        return out

    def attend(self, x: Tensor) -> Tensor:
        """Run the transformer on a map."""
        _, dim, height, width = x.shape
        tokens = self.encoder[0](x.flatten(2).transpose(1, 2), self.position)
        return tokens.transpose(1, 2).reshape(-1, dim, height, width)
