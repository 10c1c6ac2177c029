"""The backbones: ResNet "vd" and PP-HGNetV2, images to maps at strides 8, 16 and 32."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models.rtdetr.layers import ConvNorm


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width (``bottleneck``).

    The first block of every stage projects its shortcut, also where the width stays. From stage 2 on the shortcut is
    averaged over 2x2 first, so that its 1x1 convolution is never strided. Odd maps average over the pixels that exist.
    """

    def __init__(self, channels: int, width: int, stride: int, *, bottleneck: bool, project: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            self.branch2a = ConvNorm(channels, width, 1, act="relu")
            self.branch2b = ConvNorm(width, width, 3, stride, act="relu")
            self.branch2c = ConvNorm(width, out, 1)
        else:
            self.branch2a = ConvNorm(channels, width, 3, stride, act="relu")
            self.branch2b = ConvNorm(width, width, 3)
        self.bottleneck, self.project = bottleneck, project
        if project and stride == 2:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True)
            self.short: nn.Module = nn.Sequential(OrderedDict(pool=pool, conv=ConvNorm(channels, out, 1)))
        elif project:
            self.short = ConvNorm(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches and add the shortcut."""
        y = self.branch2b(self.branch2a(x))
        y = self.branch2c(y) if self.bottleneck else y
        return functional.relu(y + (self.short(x) if self.project else x))


class Stage(nn.Module):
    """Blocks of one width at one resolution."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in turn."""
        for block in self.blocks:
            x = block(x)
        return x


class ResNet(nn.Module):
    """ResNet-vd: three 3x3 convolutions and a max-pool, then four stages; [N,3,H,W] to three maps."""

    def __init__(self, depths: list[int], width: int, *, bottleneck: bool) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv1_1=ConvNorm(3, half, 3, 2, act="relu"),
                conv1_2=ConvNorm(half, half, 3, act="relu"),
                conv1_3=ConvNorm(half, width, 3, act="relu"),
            )
        )
        widths = [width * 2**i for i in range(4)]
        outs = [w * 4 if bottleneck else w for w in widths]
        self.res_layers = nn.ModuleList(
            Stage(
                [
                    Block(
                        source if i == 0 else out,
                        w,
                        2 if i == 0 and stage > 0 else 1,
                        bottleneck=bottleneck,
                        project=i == 0,
                    )
                    for i in range(depth)
                ]
            )
            for stage, (source, out, w, depth) in enumerate(zip([width, *outs[:-1]], outs, widths, depths, strict=True))
        )
        self.channels = outs[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps at strides 8, 16 and 32."""
        x = functional.max_pool2d(self.conv1(images), 3, 2, 1)
        maps = []
        for stage in self.res_layers:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class LightConv(nn.Module):
    """A 1x1 convolution without activation, then a depthwise one with ReLU."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, out, 1)
        self.conv2 = ConvNorm(out, out, kernel, act="relu", groups=out)

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        return self.conv2(self.conv1(x))


class AggregationBlock(nn.Module):
    """HGNetV2's block: a chain of layers whose inputs and outputs are all concatenated and squeezed."""

    def __init__(
        self, channels: int, width: int, out: int, *, depth: int, kernel: int, light: bool, identity: bool
    ) -> None:
        super().__init__()
        sources = [channels, *[width] * (depth - 1)]
        self.layers = nn.ModuleList(
            LightConv(source, width, kernel) if light else ConvNorm(source, width, kernel, act="relu")
            for source in sources
        )
        self.aggregation_squeeze_conv = ConvNorm(channels + depth * width, out // 2, 1, act="relu")
        self.aggregation_excitation_conv = ConvNorm(out // 2, out, 1, act="relu")
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain and aggregate."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y = self.aggregation_excitation_conv(self.aggregation_squeeze_conv(torch.cat(outputs, 1)))
        return y + x if self.identity else y


class AggregationStage(nn.Module):
    """A depthwise stride-2 convolution (not in the first stage), then aggregation blocks."""

    def __init__(self, channels: int, blocks: list[nn.Module], *, downsample: bool) -> None:
        super().__init__()
        self.strided = downsample
        if downsample:
            self.downsample = ConvNorm(channels, channels, 3, 2, groups=channels)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage."""
        return self.blocks(self.downsample(x) if self.strided else x)


class Stem(nn.Module):
    """HGNetV2's stem: a strided convolution, a pooled and a convolved branch, a second strided convolution."""

    def __init__(self, middle: int, out: int) -> None:
        super().__init__()
        self.stem1 = ConvNorm(3, middle, 3, 2, act="relu")
        self.stem2a = ConvNorm(middle, middle // 2, 2, act="relu")
        self.stem2b = ConvNorm(middle // 2, middle, 2, act="relu")
        self.stem3 = ConvNorm(middle * 2, middle, 3, 2, act="relu")
        self.stem4 = ConvNorm(middle, out, 1, act="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the map at stride 4."""
        x = self.stem1(images)
        pooled = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, 1)
        return self.stem4(self.stem3(torch.cat([pooled, self.stem2b(self.stem2a(x))], 1)))


class HGNet(nn.Module):
    """PP-HGNetV2: [N,3,H,W] to three maps; light blocks with 5x5 kernels in stages 3 and 4."""

    def __init__(self, stem: list[int], widths: list[int], outs: list[int], depths: list[int], layers: int) -> None:
        super().__init__()
        self.stem = Stem(*stem)
        stages = []
        for stage, (source, out) in enumerate(itertools.pairwise([stem[1], *outs])):
            light = stage >= 2
            blocks: list[nn.Module] = [
                AggregationBlock(
                    source if i == 0 else out,
                    widths[stage],
                    out,
                    depth=layers,
                    kernel=5 if light else 3,
                    light=light,
                    identity=i > 0,
                )
                for i in range(depths[stage])
            ]
            stages.append(AggregationStage(source, blocks, downsample=stage > 0))
        self.stages = nn.ModuleList(stages)
        self.channels = outs[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps at strides 8, 16 and 32."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]
