"""AlterNet: a pre-activation ResNet whose stages end in window attention (Park and Kim, ICLR 2022, arXiv 2202.06709).

Architecture and names follow the authors' release (github.com/xxxnell/how-do-vits-work, ``models/alternet.py``). A
stage of n blocks has convolution blocks, and in its last 2m blocks convolution and attention take turns.

    convolution  x = skip(x) + conv(relu(norm(conv(relu(norm(x))))));   a bottleneck has one more norm, relu, conv
    attention    x = x + out(attend(qkv(norm2(conv(gelu(norm1(x)))))))
    attend       softmax(q k / 8 + bias) v   in windows of w x w positions; one bias table for all heads and windows

A skip with a projection starts behind the block's first relu(norm(x)), any other at x itself. There is no MLP.

What folds, exactly up to rounding, in the dtype of the model:

* a norm behind a convolution goes into it: all but the first norm of each block, whose input is the residual stream
  that the skip needs as it is.
* between norm1's GELU and the softmax everything is linear: conv and norm2 are one convolution, the scale of the logits
  goes into the queries, and where conv does not narrow the map (18 and 34) it goes into q, k and v, whose one matrix
  is then cheaper than both.
* the bias table is gathered once: a constant of w^2 x w^2.

What is hard to export: the windows. The authors' einsum stays an Einsum in ONNX, and ONNX Runtime and TensorRT want the
tokens in opposite order (``ATTENTIONS``). Sides must be such that every map with attention is whole windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.errors import RecipeError
from deploy.models.base import Form, System, Variant
from deploy.models.checkpoint import WeightMap
from deploy.records import Target

STEM_WIDTH = 64
STRIDES = {"imagenet": 32, "cifar": 8}  # of the last map, which has attention


class Attention(nn.Module):
    """Attention over all positions of a window, [B,width,w,w] to [B,dim,w,w]; ``bias`` [w*w,w*w] is query by key."""

    def __init__(self, width: int, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Conv2d(width, heads * head_dim, 1, bias=False)
        self.to_kv = nn.Conv2d(width, 2 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * head_dim, dim, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend."""
        queries, keys, values = (
            part.unflatten(1, (self.heads, self.head_dim)).flatten(3).transpose(2, 3)
            for part in (self.to_q(x), *self.to_kv(x).chunk(2, 1))
        )
        logits = torch.einsum("bhid,bhjd->bhij", queries, keys) * self.head_dim**-0.5 + bias
        mixed = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), values)
        return self.to_out(mixed.transpose(2, 3).reshape(x.shape[0], -1, *x.shape[2:]))


class LocalAttention(nn.Module):
    """Attention in windows of a map, [N,width,H,W] to [N,dim,H,W], with relative positions."""

    def __init__(self, width: int, dim: int, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, dim, heads, head_dim)
        self.pos_embedding = nn.Parameter(torch.zeros(2 * window - 1, 2 * window - 1))

    def bias(self) -> Tensor:
        """Gather what is added to the logits, [w*w,w*w]: the table at (key - query) of rows and columns."""
        place = torch.arange(self.window, device=self.pos_embedding.device)
        row, column = place.repeat_interleave(self.window), place.repeat(self.window)
        offset = self.window - 1
        return self.pos_embedding[row - row[:, None] + offset, column - column[:, None] + offset]

    def forward(self, x: Tensor) -> Tensor:
        """Attend in every window."""
        return from_windows(self.attn(to_windows(x, self.window), self.bias()), x.shape[2:], self.window)


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cut a map [N,C,H,W] into windows [N*H*W/w^2,C,w,w], row by row."""
    channels, height, width = x.shape[1:]
    if (height, width) == (window, window):
        return x
    cut = x.reshape(-1, channels, height // window, window, width // window, window)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, window, window)


def from_windows(x: Tensor, size: Any, window: int) -> Tensor:
    """Put windows [N*H*W/w^2,C,w,w] back to a map [N,C,H,W]: the inverse of ``to_windows``."""
    height, width = size
    if (height, width) == (window, window):
        return x
    cut = x.reshape(-1, height // window, width // window, x.shape[1], window, window)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(-1, x.shape[1], height, width)


class AttentionBlock(nn.Module):
    """An attention block, [N,dim,H,W] to the same; ``width`` is the number of channels that it narrows to."""

    def __init__(self, dim: int, width: int, heads: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.attn = LocalAttention(width, dim, heads, options["head_dim"], options["window"])

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.attn(self.norm2(self.conv(functional.gelu(self.norm1(x)))))


class ConvBlock(nn.Module):
    """A convolution block [N,source,H,W] to [N,dim,H/stride,W/stride]; ``narrow`` makes it a bottleneck."""

    def __init__(self, source: int, width: int, dim: int, stride: int, narrow: bool) -> None:
        super().__init__()
        projects = stride != 1 or source != dim
        self.shortcut = nn.Sequential(*([nn.Conv2d(source, dim, 1, stride, bias=False)] if projects else []))
        self.bn = nn.BatchNorm2d(source)
        if narrow:
            self.conv1 = nn.Conv2d(source, width, 1, bias=False)
            self.conv2 = _activated(nn.Conv2d(width, width, 3, stride, padding=1, bias=False))
            self.conv3 = _activated(nn.Conv2d(width, dim, 1, bias=False))
        else:
            self.conv1 = nn.Conv2d(source, width, 3, stride, padding=1, bias=False)
            self.conv2 = _activated(nn.Conv2d(width, dim, 3, padding=1, bias=False))
            self.conv3 = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        active = functional.relu(self.bn(x))
        skip = self.shortcut(active) if len(self.shortcut) else x
        return skip + self.conv3(self.conv2(self.conv1(active)))


def _activated(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(convolution.in_channels), nn.ReLU(), convolution)


class Stem(nn.Module):
    """``imagenet``: a 7 x 7 convolution and a pool, a quarter of each side; ``cifar``: a 3 x 3 convolution."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        if kind == "imagenet":
            convolution = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.layer0 = nn.Sequential(convolution, nn.MaxPool2d(3, stride=2, padding=1))
        else:
            self.layer0 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        """Embed the images."""
        return self.layer0(images)


class Classifier(nn.Module):
    """Norm, relu, mean over positions and a linear layer, [N,C,H,W] to [N,classes]."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim)
        self.dense = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.dense(functional.relu(self.bn(x)).mean((2, 3)))


class AlterNet(nn.Module):
    """The classifier: ``images`` [N,3,H,W] to ``logits`` [N,classes]; both forms differ in their blocks only."""

    def __init__(self, stem: nn.Module, stages: list[nn.Sequential], classifier: nn.Module) -> None:
        super().__init__()
        self.layer0 = stem
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.classifier = nn.Sequential(classifier)

    def stages(self) -> list[nn.Sequential]:
        """Return the four stages."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        x = self.layer0(images)
        for stage in self.stages():
            x = stage(x)
        return self.classifier(x)


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build AlterNet; any ``size`` fits the weights.

    Raises:
        RecipeError: another number of stages than four.
    """
    blocks, expansion, dim = options["blocks"], 4 if options["bottleneck"] else 1, STEM_WIDTH
    if not len(blocks) == len(options["attentions"]) == len(options["heads"]) == len(options["widths"]) == 4:
        raise RecipeError(
            f"options: got {len(blocks)} blocks, {len(options['attentions'])} attentions, {len(options['heads'])} "
            f"heads, {len(options['widths'])} widths, expected 4 of each, one a stage",
            hint="--set 'options.blocks=[2,2,2,2]'",
        )
    stages = []
    for index, width in enumerate(options["widths"]):
        stages.append(_stage(dim, width, expansion * width, index, options))
        dim = expansion * width
    return AlterNet(Stem(options["stem"], STEM_WIDTH), stages, Classifier(dim, options["classes"])).eval()


def _stage(source: int, width: int, dim: int, index: int, options: Mapping[str, Any]) -> nn.Sequential:
    """Return stage ``index``: convolution blocks, the last ones in turn with attention."""
    blocks: list[nn.Module] = []
    plain = options["blocks"][index] - 2 * options["attentions"][index]
    for place in range(options["blocks"][index]):
        if place > plain and (place - plain) % 2:
            blocks.append(AttentionBlock(dim, width, options["heads"][index], options))
        else:
            stride = 2 if place == 0 and index else 1
            blocks.append(ConvBlock(source if place == 0 else dim, width, dim, stride, options["bottleneck"]))
    return nn.Sequential(*blocks)


class Projections:
    """The folded linear maps of an attention block: into the windows, to queries, keys and values, and out.

    Attributes:
        narrow: 1x1 convolution in front, or ``None`` where it is part of ``weight``.
        weight: [3,heads*d,C]: queries (with the scale of the logits), keys, values.
        shift: [3,heads*d].
        bias: [w*w,w*w], added to the logits.
    """

    def __init__(self, block: AttentionBlock) -> None:
        attention = block.attn.attn
        self.heads, self.head_dim, self.window = attention.heads, attention.head_dim, block.attn.window
        queries = attention.to_q.weight.flatten(1) * self.head_dim**-0.5
        self.weight = torch.cat((queries, attention.to_kv.weight.flatten(1)))
        self.shift = self.weight.new_zeros(len(self.weight))
        self.bias = block.attn.bias()
        self.out = cast(nn.Conv2d, attention.to_out[0])
        narrow = folded(block.conv, block.norm2)
        dim, width, rows = narrow.in_channels, narrow.out_channels, len(self.weight)
        self.narrow: nn.Conv2d | None = narrow
        if dim * rows <= dim * width + width * rows:
            self.narrow = None
            self.shift = self.weight @ cast(Tensor, narrow.bias)
            self.weight = self.weight @ narrow.weight.flatten(1)


class WindowChannels(nn.Module):
    """Attention for ONNX Runtime: windows are cut where channels are few, and channels stay in front of positions.

    q, k and v are three convolutions, since a Split copies. The one behind runs on the map: it takes the residual sum
    along and stays in the blocked layout of the convolutions around it.
    """

    def __init__(self, folds: Projections) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window = folds.heads, folds.head_dim, folds.window
        weights, shifts = folds.weight.chunk(3), folds.shift.chunk(3)
        self.qkv = nn.ModuleList(_convolution(*pair) for pair in zip(weights, shifts, strict=True))
        self.bias, self.out = _frozen(folds.bias), folds.out

    def forward(self, x: Tensor) -> Tensor:
        """Attend, [N,C,H,W] to [N,dim,H,W]."""
        windows = to_windows(x, self.window)
        shape = (-1, self.heads, self.head_dim, self.window**2)
        queries, keys, values = (part(windows).reshape(shape) for part in self.qkv)
        logits = queries.transpose(2, 3) @ keys + self.bias
        mixed = values @ logits.softmax(-1).transpose(2, 3)
        mixed = mixed.reshape(-1, self.heads * self.head_dim, self.window, self.window)
        return self.out(from_windows(mixed, x.shape[2:], self.window))


class WindowTokens(nn.Module):
    """Attention for TensorRT: q, k and v of the whole map first, then windows as tokens for its fused kernel."""

    def __init__(self, folds: Projections) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window = folds.heads, folds.head_dim, folds.window
        self.qkv = _convolution(folds.weight, folds.shift)
        self.bias, self.out = _frozen(folds.bias), folds.out

    def forward(self, x: Tensor) -> Tensor:
        """Attend, [N,C,H,W] to [N,dim,H,W]."""
        height, width = x.shape[2:]
        rows, columns, tokens = height // self.window, width // self.window, self.window**2
        cut = self.qkv(x).reshape(-1, 3, self.heads, self.head_dim, rows, self.window, columns, self.window)
        parts = cut.permute(1, 0, 4, 6, 2, 5, 7, 3).reshape(3, -1, self.heads, tokens, self.head_dim)
        queries, keys, values = parts.unbind(0)
        logits = queries @ keys.transpose(2, 3) + self.bias
        mixed = (logits.softmax(-1) @ values).reshape(
            -1, rows, columns, self.heads, self.window, self.window, self.head_dim
        )
        return self.out(mixed.permute(0, 3, 6, 1, 4, 2, 5).reshape(-1, self.heads * self.head_dim, height, width))


ATTENTIONS: Mapping[Target, Callable[[Projections], nn.Module]] = {
    Target.ONNXRUNTIME: WindowChannels,
    Target.TENSORRT: WindowTokens,
}


class DeployAttentionBlock(nn.Module):
    """The attention block with everything linear folded, [N,dim,H,W] to the same."""

    def __init__(self, block: AttentionBlock, target: Target) -> None:
        super().__init__()
        folds = Projections(block)
        self.norm, self.narrow = block.norm1, folds.narrow or nn.Sequential()
        self.attention = ATTENTIONS[target](folds)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.attention(self.narrow(functional.gelu(self.norm(x))))


class DeployConvBlock(nn.Module):
    """The convolution block with all but its first norm folded."""

    def __init__(self, block: ConvBlock) -> None:
        super().__init__()
        self.norm, self.shortcut = block.bn, block.shortcut
        steps: list[nn.Module] = []
        last = block.conv1
        for step in (block.conv2, block.conv3):
            if len(step):
                steps += [folded(last, cast(nn.BatchNorm2d, step[0])), nn.ReLU()]
                last = cast(nn.Conv2d, step[2])
        self.branch = nn.Sequential(*steps, last)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        active = functional.relu(self.norm(x))
        skip = self.shortcut(active) if len(self.shortcut) else x
        return skip + self.branch(active)


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution without bias and the norm behind it as one convolution."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    gain = norm.weight / torch.sqrt(variance + norm.eps)
    both = nn.Conv2d(
        convolution.in_channels, convolution.out_channels, cast(tuple[int, int], convolution.kernel_size),
        cast(tuple[int, int], convolution.stride), cast(tuple[int, int], convolution.padding),
    )  # fmt: skip
    both.weight = _frozen(convolution.weight * gain[:, None, None, None])
    both.bias = _frozen(norm.bias - mean * gain)
    return both


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a 1x1 convolution of a matrix; without a bias where that is zero."""
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bool(bias.any()))
    made.weight = _frozen(weight[:, :, None, None])
    if made.bias is not None:
        made.bias = _frozen(bias)
    return made


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _deploy_block(block: nn.Module, target: Target) -> nn.Module:
    if isinstance(block, AttentionBlock):
        return DeployAttentionBlock(block, target)
    return DeployConvBlock(cast(ConvBlock, block))


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the folded copy for a target, in the dtype of ``model``; ``model`` stays untouched."""
    source = cast(AlterNet, model)
    with torch.no_grad():
        stages = [nn.Sequential(*(_deploy_block(block, target) for block in stage)) for stage in source.stages()]
    return AlterNet(source.layer0, stages, source.classifier[0])


def from_release(key: str) -> str:
    """Return the key: the module names are those of the authors' release."""
    return key


def interface(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the stride of image sides: the last map, and with it every map with attention, is whole windows.

    Raises:
        RecipeError: an unknown stem.
    """
    if options["stem"] not in STRIDES:
        raise RecipeError(
            f"options.stem: got {options['stem']!r}, expected {' or '.join(STRIDES)}", hint="--set options.stem=cifar"
        )
    return {"stride": STRIDES[options["stem"]] * options["window"]}


def keep_fp32(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which nodes stay float32: the bias is added to a window's logits in the softmax's own precision.

    That costs TensorRT nothing: 92 kernels and 6 fused attentions with and without. The product in front stays low: in
    float32 no attention would fuse (130 kernels).
    """
    return (r"^layer\d\.\d+\.attention/Add$",) if any(options["attentions"]) else ()


def _variant(depth: int, blocks: list[int], attentions: list[int], stem: str, summary: str) -> Variant:
    options = {"blocks": blocks, "attentions": attentions, "bottleneck": depth >= 50, "stem": stem}
    window = 7 if stem == "imagenet" else 4
    sizes = {"widths": [64, 128, 256, 512], "heads": [3, 6, 12, 24], "head_dim": 64, "window": window}
    return Variant(options={**options, **sizes}, summary=summary)


_BLOCKS = {18: ([2, 2, 2, 2], [0, 1, 1, 1]), 34: ([3, 4, 6, 4], [0, 1, 3, 2]), 50: ([3, 4, 6, 4], [0, 1, 3, 2])}
_TINY = {
    "blocks": [1, 2, 2, 3], "attentions": [0, 1, 1, 1], "bottleneck": True, "stem": "imagenet",
    "widths": [4, 8, 12, 16], "heads": [1, 1, 2, 3], "head_dim": 16, "window": 7,
}  # fmt: skip

SYSTEM = System(
    name="alternet",
    task="classification",
    paper="How Do Vision Transformers Work?, ICLR 2022, arXiv 2202.06709",
    variants={
        **{
            str(depth): _variant(depth, *blocks, "imagenet", "no released weights") for depth, blocks in _BLOCKS.items()
        },
        **{
            f"{depth}_cifar": _variant(depth, *blocks, "cifar", "for CIFAR, 32 x 32, windows of 4 x 4")
            for depth, blocks in _BLOCKS.items()
        },
        "tiny": Variant(options=_TINY, summary="for tests"),
    },
    build=build,
    weight_maps=(WeightMap(name="authors' release", layout="training", rename=from_release, inverse=from_release),),
    to_deploy=to_deploy,
    forms={
        Target.ONNXRUNTIME: Form(
            name="folded, windows cut before q, k and v, channels first",
            reason="small products: 1.05 times as fast as the authors' einsum form, 1.15 times as fast as the form for "
            "TensorRT (50; benchmarks/alternet.py)",
        ),
        Target.TENSORRT: Form(
            name="folded, q, k and v of the whole map, then windows as tokens",
            reason="92 kernels in an FP16 build of 50 for SM89, all 6 attentions fused (benchmarks/alternet.py)",
        ),
    },
    recipe={"system": "alternet", "variant": "50", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99991 with the head in INT8, 0.99993 without.
    keep_high=lambda options: {r"^classifier\.": "head: hardly any work, 20 % of the error"},
    interface=interface,
    keep_fp32=keep_fp32,
)
