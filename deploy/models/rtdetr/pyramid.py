"""The hybrid encoder for ONNX Runtime's CPU: no map is concatenated, and none is convolved larger than it has to be.

A 1x1 convolution of a concatenation is the sum of one convolution for each part, W [a; b] = W_a a + W_b b. That gives,
exactly up to rounding and composed in the encoder's dtype, which ``to_deploy`` makes float64:

* no concatenation of two maps of up to 80x80, and the sum runs inside the second convolution;
* the way down convolves the map of half the size and enlarges the result: repeating pixels and a 1x1 convolution change
  places;
* ``input_proj`` of the two lower maps, which is linear and read by such a convolution only, is composed into it where
  that takes fewer products.
"""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from deploy.models.rtdetr.encoder import CspBlock, HybridEncoder, enlarged
from deploy.models.rtdetr.layers import FusedConv, pointwise


class SumCsp(nn.Module):
    """A folded CSP block without its concatenation.

    Args:
        block: The block.
        below: The linear projection that makes the second map, to be composed into the block.
    """

    def __init__(self, block: CspBlock, below: FusedConv | None = None) -> None:
        super().__init__()
        branches = [cast(FusedConv, conv).conv for conv in (block.conv1, block.conv2)]
        dim = branches[0].in_channels // 2
        self.first = nn.ModuleList(pointwise(conv.weight[:, :dim, 0, 0]) for conv in branches)
        self.second = nn.ModuleList(_after(below, conv, dim) for conv in branches)
        self.bottlenecks, self.conv3 = block.bottlenecks, block.conv3

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Run the block, as ``CspBlock``."""
        left, right = (
            functional.silu(b(second) + enlarged(a(first), second))
            for a, b in zip(self.first, self.second, strict=True)
        )
        return self.conv3(self.bottlenecks(left) + right)


def without_concatenation(encoder: HybridEncoder) -> HybridEncoder:
    """Return a copy of a folded encoder whose blocks add; what does not change is shared."""
    clone = copy.copy(encoder)
    clone._modules = dict(encoder._modules)
    projections = list(encoder.input_proj)
    lowering = []
    for block, level in zip(encoder.fpn_blocks, reversed(range(len(projections) - 1)), strict=True):
        below = cast(FusedConv, projections[level])
        composed = _composes(cast(CspBlock, block), below.conv)
        lowering.append(SumCsp(cast(CspBlock, block), below if composed else None))
        projections[level] = nn.Identity() if composed else below
    clone.input_proj, clone.fpn_blocks = nn.ModuleList(projections), nn.ModuleList(lowering)
    clone.pan_blocks = nn.ModuleList(SumCsp(cast(CspBlock, block)) for block in encoder.pan_blocks)
    return clone


def _composes(block: CspBlock, below: nn.Conv2d) -> bool:
    """Whether a block takes fewer products with the projection inside."""
    hidden = 2 * cast(FusedConv, block.conv1).conv.out_channels
    source, dim = below.in_channels, below.out_channels
    return source * hidden <= source * dim + dim * hidden


def _after(below: FusedConv | None, conv: nn.Conv2d, dim: int) -> nn.Conv2d:
    """Return the part of a 1x1 convolution for the second map, with that map's projection in it if there is one."""
    weight, bias = conv.weight[:, dim:, 0, 0], cast(Tensor, conv.bias)
    if below is None:
        return pointwise(weight, bias)
    inner, shift = below.conv.weight[:, :, 0, 0], cast(Tensor, below.conv.bias)
    return pointwise(weight @ inner, weight @ shift + bias)
