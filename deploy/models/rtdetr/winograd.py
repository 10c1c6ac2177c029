"""Winograd's minimal filtering F(4x4, 3x3): a 3x3 convolution with 36 products for 16 outputs instead of 144.

(Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, arXiv 1509.09308.) ONNX Runtime's CPU
provider multiplies all 144, so the graph does the filtering, in operators that it has fast kernels for:

    tiles     6x6 pixels, 4 apart, each through B^T d B: a strided convolution, every channel an image of its own
    products  a 1x1 convolution with 36 groups, one for each pair of points; the bias goes where the outputs' transform
              has only ones
    outputs   A^T m A: a product from 36 to the 16 pixels of a tile, the activation, then depth to space

The filters' transform G g G^T is a product of constants in the graph: a file keeps the nine numbers of a filter, and
the runtime computes the 36 when it opens the file. The algebra is exact; in float32 it rounds about five times as much
as a direct convolution, and float16 has no digits for it, so ``keep_fp32`` of the system names these nodes.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, cast

import torch
from onnxscript import opset20 as op
from torch import Tensor, nn
from torch.nn import functional

from deploy.models.operators import written_as
from deploy.models.rtdetr.layers import ACTIVATIONS, FusedConv

TILE, KERNEL = 4, 3
SIDE = TILE + KERNEL - 1
POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "1/2", "-2"))
"""Where polynomials are evaluated, besides infinity: of the customary choices the one that rounds least."""

MIN_CHANNELS = 128  # with 64 the transforms cost more than the products save
MIN_WORK = 128 * 40  # channels times the shorter side; below, there are too few tiles for the products to be fast


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return A^T [4,6], G [6,3] and B^T [6,6] of F(4, 3) in float64, by the construction of Cook and Toom."""
    others = [[q for q in POINTS if q != p] for p in POINTS]
    outputs = [[p**i for p in POINTS] + [Fraction(i == TILE - 1)] for i in range(TILE)]
    scales = [functools.reduce(operator.mul, (p - q for q in rest)) for p, rest in zip(POINTS, others, strict=True)]
    filters = [[p**j / scale for j in range(KERNEL)] for p, scale in zip(POINTS, scales, strict=True)]
    filters.append([Fraction(j == KERNEL - 1) for j in range(KERNEL)])
    inputs = [[*_with_roots(rest), Fraction(0)] for rest in others] + [_with_roots(POINTS)]
    return _matrix(outputs), _matrix(filters), _matrix(inputs)


def _matrix(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def _with_roots(roots: Iterable[Fraction]) -> list[Fraction]:
    """Return the coefficients of the polynomial with these roots, lowest power first."""
    out = [Fraction(1)]
    for root in roots:
        out = [high - root * low for high, low in zip([Fraction(0), *out], [*out, Fraction(0)], strict=True)]
    return out


class Winograd(nn.Module):
    """A 3x3 convolution with padding 1 and its activation, [N,C,H,W] to [N,out,H,W]; sides are multiples of 4."""

    tiles: Tensor
    filters: Tensor
    outputs: Tensor
    bias: Tensor

    def __init__(self, like: FusedConv) -> None:
        super().__init__()
        conv = like.conv
        self.weight, self.activation = conv.weight, ACTIVATIONS[like.act]
        a, g, b = transforms()
        constants = {
            "tiles": torch.einsum("ia,jb->ijab", b, b).reshape(-1, 1, SIDE, SIDE),
            "filters": torch.einsum("ia,jb->ijab", g, g).reshape(-1, KERNEL * KERNEL),
            "outputs": torch.einsum("ia,jb->ijab", a, a).reshape(TILE * TILE, -1),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.to(conv.weight.dtype), persistent=False)
        ones = POINTS.index(Fraction(1)) * (SIDE + 1)  # the pair of points (1, 1), whose outputs are all 1
        bias = torch.zeros(SIDE * SIDE, conv.out_channels, dtype=conv.weight.dtype)
        bias[ones] = cast(Tensor, conv.bias).detach()
        self.register_buffer("bias", bias.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filter."""
        out, channels = self.weight.shape[:2]
        height, width = x.shape[2] // TILE, x.shape[3] // TILE
        tiles = functional.conv2d(x.reshape(-1, 1, *x.shape[2:]), self.tiles, stride=TILE, padding=1)
        tiles = tiles.reshape(-1, channels, SIDE * SIDE, height * width).transpose(1, 2)
        weight = (self.filters @ self.weight.reshape(-1, KERNEL * KERNEL).t()).reshape(-1, channels, 1, 1)
        tiles = tiles.reshape(-1, SIDE * SIDE * channels, height, width)
        products = functional.conv2d(tiles, weight, self.bias, groups=SIDE * SIDE)
        pixels = self.activation(self.outputs @ products.reshape(-1, SIDE * SIDE, out * height * width))
        return joined_tiles(pixels.reshape(-1, TILE * TILE * out, height, width))


@torch.library.custom_op("effdeploy::joined_tiles", mutates_args=())
def joined_tiles(x: Tensor) -> Tensor:
    """Lay tiles out as a map, [N,16*C,h,w] with a tile's pixels outside its channels to [N,C,4*h,4*w]."""
    count, deep, height, width = x.shape
    pixels = x.reshape(count, TILE, TILE, deep // TILE**2, height, width)
    # Cloned, because an operator must not return a view of its input, and single pixels would be one.
    ordered = pixels.permute(0, 3, 4, 1, 5, 2).clone(memory_format=torch.contiguous_format)
    return ordered.view(count, -1, height * TILE, width * TILE)


@joined_tiles.register_fake
def _map_of_tiles(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // TILE**2, x.shape[2] * TILE, x.shape[3] * TILE)


@written_as(joined_tiles)
def _depth_to_space(x: Any) -> Any:
    """Write one operator; the exporter has one for the other order of pixels and channels only."""
    return op.DepthToSpace(x, blocksize=TILE, mode="DCR")


class EitherConv(nn.Module):
    """A folded convolution that filters where that is faster; on other maps it is direct."""

    def __init__(self, conv: FusedConv, *, always: bool) -> None:
        super().__init__()
        self.direct, self.winograd, self.always = conv, Winograd(conv), always

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and activate."""
        return self.winograd(x) if self.filters(x) else self.direct(x)

    def filters(self, x: Tensor) -> bool:
        """Whether maps of this size are filtered; sides are known when the graph is traced."""
        height, width = x.shape[2:]
        fewest = min(self.direct.conv.in_channels, self.direct.conv.out_channels)
        worth = fewest >= MIN_CHANNELS and fewest * min(height, width) >= MIN_WORK
        return not (height % TILE or width % TILE) and (worth or self.always)


def with_winograd(module: nn.Module, *, always: bool = False) -> nn.Module:
    """Return a copy of a folded module whose 3x3 convolutions filter; what has none is shared, not copied.

    Args:
        module: As ``folded`` returns it.
        always: Also where it is slower, on all maps whose sides are multiples of 4.
    """
    if isinstance(module, FusedConv):
        conv = module.conv
        plain = (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
        return EitherConv(module, always=always) if plain else module
    clone = copy.copy(module)
    clone._modules = {name: child and with_winograd(child, always=always) for name, child in module._modules.items()}
    return clone
