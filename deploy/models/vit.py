"""Vision transformers (Dosovitskiy et al., ICLR 2021; DeiT, ICML 2021; MAE, CVPR 2022; SWAG, CVPR 2022).

No system of its own: what the systems that are vision transformers share. Tensor names are timm's; the releases of
DeiT and MAE use them too, SWAG's and torchvision's are renamed (``WEIGHT_MAPS``).

    training   x = x + ls1 * proj(softmax(q k^T / sqrt(d)) v);   x = x + ls2 * fc2(gelu(fc1(norm2(x))))
    deploy     the same with the scale folded into q, the layer scales into proj and fc2, the patch embedding's bias,
               the position embedding and the prefix tokens into one constant

The prefix is the class token, the distillation token and the register tokens, in this order, where the variant has
them. What is hard to export: attention must stay a chain that ONNX Runtime and TensorRT recognise, with at most an
additive bias [N,1,1,T]; and a prefix that is concatenated needs the batch size as a tensor, so it is padded instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.errors import RecipeError
from deploy.models.checkpoint import State, WeightMap

EPS = 1e-6
POOLS = ("token", "avg", "weighted")
HEAD_CHANNELS = 16  # the narrowest head that TensorRT has a fused kernel for


class PatchEmbed(nn.Module):
    """Non-overlapping patches, [N,3,H,W] to [N,H/patch * W/patch,C]."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Cut and project."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [N,T,C] to the same."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend; ``bias`` [N,1,1,T] is added to the scaled logits. Also returns the keys [N,heads,T,C/heads]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        mixed = torch.softmax(logits if bias is None else logits + bias, -1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width)), k


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU, [N,T,C] to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, activate, project."""
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, scaled = options["width"], options["layer_scale"]
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, options["heads"], options["qkv_bias"])
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * options["mlp_ratio"]))
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the attention half; also returns the keys."""
        mixed, keys = self.attn(self.norm1(x), bias)
        return x + self.ls1(mixed), keys

    def feed(self, x: Tensor) -> Tensor:
        """Run the MLP half."""
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return self.feed(self.attend(x)[0])


class VisionTransformer(nn.Module):
    """The classifier as in the checkpoint: ``images`` [N,3,H,W] to ``logits`` [N,classes]."""

    def __init__(self, options: Mapping[str, Any], size: tuple[int, int]) -> None:
        super().__init__()
        check_options(options)
        width, classes = options["width"], options["classes"]
        self.patches = patch_count(options, size)
        self.prefix = prefix_count(options)
        self.pool = str(options["pool"])
        self.embed_prefix = bool(options["embed_prefix"])
        if options["class_token"]:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if options["distilled"]:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        if options["registers"]:
            self.reg_token = nn.Parameter(torch.zeros(1, options["registers"], width))
        embedded = self.patches + (self.prefix if self.embed_prefix else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded, width))
        self.patch_embed = PatchEmbed(options["patch"], width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options["depth"]))
        final = has_fc_norm(options)
        self.norm = nn.Identity() if final else nn.LayerNorm(width, eps=EPS)
        self.fc_norm = nn.LayerNorm(width, eps=EPS) if final else nn.Identity()
        self.head = nn.Linear(width, classes)
        if options["distilled"]:
            self.head_dist = nn.Linear(width, classes)

    def prefix_tokens(self) -> Tensor:
        """Return the learned tokens before the patches [1,prefix,C]."""
        names = ("cls_token", "dist_token", "reg_token")
        found = [cast(Tensor, getattr(self, name)) for name in names if hasattr(self, name)]
        return torch.cat(found, 1) if found else self.pos_embed[:, :0]

    def embed(self, images: Tensor) -> Tensor:
        """Return prefix and patches with their positions [N,T,C]."""
        patches = self.patch_embed(images)
        prefix = self.prefix_tokens().expand(images.shape[0], -1, -1)
        if self.embed_prefix:
            return torch.cat((prefix, patches), 1) + self.pos_embed
        return torch.cat((prefix, patches + self.pos_embed), 1)

    def classify(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Norm, pool and head. ``size`` [N,T,1]: how many patches each token stands for; ones when left out."""
        x = self.norm(x)
        if self.pool == "weighted":
            x = (x if size is None else x * size)[:, self.prefix :].sum(1) / self.patches
        elif self.pool == "avg":
            x = x[:, self.prefix :].mean(1)
        elif hasattr(self, "head_dist"):
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        else:
            x = x[:, 0]
        return self.head(self.fc_norm(x))

    def forward(self, images: Tensor) -> Any:
        """Classify."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse architectures that cannot be.

    Raises:
        RecipeError: an unknown pool, or one that needs a token that is not there.
    """
    if options["pool"] not in POOLS:
        raise RecipeError(f"options.pool: got {options['pool']!r}, expected {', '.join(POOLS)}", hint="pool=token")
    if (options["pool"] == "token" or options["distilled"]) and not options["class_token"]:
        raise RecipeError("options.class_token: got false, but the head reads the class token", hint="options.pool=avg")
    if options["width"] % options["heads"]:
        raise RecipeError(
            f"options.heads: got {options['heads']}, expected a divisor of the width {options['width']}",
            hint="the variant's own value fits",
        )


def patch_count(options: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Number of patches of an image."""
    return (size[0] // options["patch"]) * (size[1] // options["patch"])


def prefix_count(options: Mapping[str, Any]) -> int:
    """Number of tokens before the patches."""
    return bool(options["class_token"]) + bool(options["distilled"]) + int(options["registers"])


def has_fc_norm(options: Mapping[str, Any]) -> bool:
    """Whether the norm comes after the pooling; unless said otherwise, it does for the averages, as in timm."""
    asked = options["fc_norm"]
    return options["pool"] != "token" if asked is None else bool(asked)


class DeployEmbed(nn.Module):
    """Patches and prefix from one convolution without bias, a pad and one constant [1,T,C]."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        proj = model.patch_embed.proj
        self.prefix = model.prefix
        self.proj = nn.Conv2d(3, proj.out_channels, proj.kernel_size[0], stride=proj.stride[0], bias=False)
        self.proj.weight = frozen(proj.weight)
        prefix = model.prefix_tokens()
        before = prefix.shape[1] if model.embed_prefix else 0
        placed = prefix + model.pos_embed[:, :before] if before else prefix
        patches = model.pos_embed[:, before:] + cast(Tensor, proj.bias)
        self.constant = frozen(torch.cat((placed, patches), 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return [N,T,C]."""
        patches = self.proj(images).flatten(2).transpose(1, 2)
        padded = functional.pad(patches, (0, 0, self.prefix, 0)) if self.prefix else patches
        return padded + self.constant


class DeployAttention(nn.Module):
    """Attention with three projections, so that nothing has to be split, and both scales folded."""

    def __init__(self, attention: Attention, scale: Tensor | None) -> None:
        super().__init__()
        self.heads = attention.heads
        weights = attention.qkv.weight.chunk(3)
        biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        root = 1 / math.sqrt(weights[0].shape[0] // self.heads)
        self.q = linear(weights[0] * root, None if biases[0] is None else biases[0] * root)
        self.k, self.v = (linear(w, b) for w, b in zip(weights[1:], biases[1:], strict=True))
        self.proj = scaled(attention.proj, scale)

    def forward(self, x: Tensor, bias: Tensor | None = None, queries: int = 0) -> tuple[Tensor, Tensor]:
        """Attend; also returns the keys [N,T,heads,C/heads].

        Args:
            x: [N,T,C].
            bias: [N,1,1,T], added to the logits.
            queries: Compute the outputs of the first so many tokens only; 0: of all.
        """
        keys = self._heads(self.k(x))
        q = self._heads(self.q(x[:, :queries] if queries else x)).transpose(1, 2)
        logits = q @ keys.permute(0, 2, 3, 1)
        mixed = torch.softmax(logits if bias is None else logits + bias, -1) @ self._heads(self.v(x)).transpose(1, 2)
        return self.proj(mixed.transpose(1, 2).flatten(2)), keys

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1)


def pad_heads(attention: DeployAttention) -> None:
    """Pad narrow heads with zero channels, in place: logits and outputs stay as they are."""
    width, heads = attention.q.out_features, attention.heads
    missing = HEAD_CHANNELS - width // heads
    if missing <= 0:
        return
    for name in ("q", "k", "v"):
        layer = cast(nn.Linear, getattr(attention, name))
        weight = functional.pad(layer.weight.reshape(heads, -1, layer.in_features), (0, 0, 0, missing)).flatten(0, 1)
        bias = functional.pad(layer.bias.reshape(heads, -1), (0, missing)).flatten()
        setattr(attention, name, linear(weight, bias))
    columns = functional.pad(attention.proj.weight.reshape(width, heads, -1), (0, missing)).flatten(1)
    attention.proj = linear(columns, attention.proj.bias)


class DeployBlock(nn.Module):
    """A block with its layer scales folded; ``queries`` as in ``DeployAttention``."""

    def __init__(self, block: Block, queries: int = 0) -> None:
        super().__init__()
        self.queries = queries
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = DeployAttention(block.attn, getattr(block.ls1, "gamma", None))
        self.mlp = Mlp(block.mlp.fc1.in_features, block.mlp.fc1.out_features)
        self.mlp.fc1 = block.mlp.fc1
        self.mlp.fc2 = scaled(block.mlp.fc2, getattr(block.ls2, "gamma", None))

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the attention half; also returns the keys."""
        mixed, keys = self.attn(self.norm1(x), bias, self.queries)
        return (x[:, : self.queries] if self.queries else x) + mixed, keys

    def feed(self, x: Tensor) -> Tensor:
        """Run the MLP half."""
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return self.feed(self.attend(x)[0])


class DeployHead(nn.Module):
    """Norm, pool and head; a class token is taken before the norm, which then reads one row."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.pool, self.prefix, self.patches = model.pool, model.prefix, model.patches
        self.norm, self.fc_norm, self.head = model.norm, model.fc_norm, model.head
        if hasattr(model, "head_dist"):
            self.head_dist = model.head_dist

    @property
    def reads(self) -> int:
        """How many of the first tokens the head reads; 0: all."""
        return 0 if self.pool != "token" else 2 if hasattr(self, "head_dist") else 1

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Classify; ``size`` [N,T,1]."""
        if self.pool == "token" and not hasattr(self, "head_dist"):
            return self.head(self.norm(x[:, 0]))
        x = self.norm(x[:, :2] if self.pool == "token" else x)
        if self.pool == "token":
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) * 0.5
        if self.pool == "weighted" and size is not None:
            pooled = (size[:, self.prefix :] * x[:, self.prefix :]).sum(1) / self.patches
        else:
            pooled = x[:, self.prefix :].mean(1)
        return self.head(self.fc_norm(pooled))


def frozen(value: Tensor) -> nn.Parameter:
    """Return a parameter with a copy of the values."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a layer of given weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = frozen(weight)
    if bias is not None:
        layer.bias = frozen(bias)
    return layer


def scaled(layer: nn.Linear, scale: Tensor | None) -> nn.Linear:
    """Fold a gain per output into a layer."""
    if scale is None:
        return layer
    return linear(layer.weight * scale[:, None], layer.bias * scale)


_SWAG = re.compile(r"^encoder\.layers\.(?:encoder_)?layer_(\d+)\.(.+)$")
_SWAG_NAMES = {
    "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "encoder.ln": "norm",
    "conv_proj": "patch_embed.proj", "head.layers.head": "head", "heads.head": "head", "ln_1": "norm1", "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj", "mlp.linear_1": "mlp.fc1",
    "mlp.linear_2": "mlp.fc2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2",
}  # fmt: skip


def from_swag(key: str) -> str:
    """Map a key of SWAG's release, or of torchvision's ``vit_*`` with SWAG weights, to timm's."""
    match = _SWAG.match(key)
    head, key = (f"blocks.{match[1]}.", match[2]) if match else ("", key)
    for theirs, ours in _SWAG_NAMES.items():
        if key.startswith(theirs):
            return head + ours + key.removeprefix(theirs)
    return head + key


def as_it_is(key: str) -> str:
    """Keep timm's names, which are ours."""
    return key


WEIGHT_MAPS = (
    WeightMap(name="timm (also DeiT's and MAE's releases)", layout="training", rename=as_it_is),
    WeightMap(name="SWAG or torchvision", layout="training", rename=from_swag),
)


def adapt(state: State, options: Mapping[str, Any], size: tuple[int, int]) -> State:
    """Bring a position embedding to this size and layout: resampled as timm does, SWAG's [T,1,C] turned."""
    embedding = state.get("pos_embed")
    if embedding is None or embedding.ndim != 3:
        return state
    if embedding.shape[1] == 1 and embedding.shape[0] > 1:
        embedding = embedding.transpose(0, 1).contiguous()
    prefix = prefix_count(options) if options["embed_prefix"] else 0
    grid = (size[0] // options["patch"], size[1] // options["patch"])
    return {**state, "pos_embed": resample(embedding, prefix, grid)}


def resample(embedding: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Resample a square grid of positions [1,prefix+side*side,C] to another grid, bicubic with antialiasing.

    The prefix stays as it is. An embedding that has no square grid is returned unchanged, for the strict fit to refuse.
    """
    count = embedding.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count or grid == (side, side):
        return embedding
    positions = embedding[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    moved = functional.interpolate(positions, size=grid, mode="bicubic", antialias=True)
    return torch.cat((embedding[:, :prefix], moved.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)), 1)


def options_of(width: int, patch: int = 16, **changes: Any) -> dict[str, Any]:
    """Return the architecture options of a ViT of a known width; anything may be changed."""
    depth, heads = {192: (12, 3), 384: (12, 6), 512: (12, 8), 768: (12, 12), 1024: (24, 16), 1280: (32, 16)}.get(
        width, (12, max(1, width // 64))
    )
    known: dict[str, Any] = {
        "width": width, "patch": patch, "depth": depth, "heads": heads, "mlp_ratio": 4, "class_token": True,
        "distilled": False, "registers": 0, "embed_prefix": True, "pool": "token", "fc_norm": None, "qkv_bias": True,
        "layer_scale": False,
    }  # fmt: skip
    return {**known, **changes}


_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}
_GAP: dict[str, Any] = {"class_token": False, "pool": "avg"}

ARCHITECTURES: Mapping[str, dict[str, Any]] = {
    **{f"deit_{name}_patch16_224": options_of(_WIDTHS[name]) for name in ("tiny", "small", "base")},
    "deit_base_patch16_384": options_of(768),
    **{
        f"deit_{name}_distilled_patch16_224": options_of(_WIDTHS[name], distilled=True)
        for name in ("tiny", "small", "base")
    },
    "deit_base_distilled_patch16_384": options_of(768, distilled=True),
    **{
        f"vit_{name}_patch{patch}_{size}": options_of(_WIDTHS[name], patch)
        for name, patch, sizes in (
            ("tiny", 16, (224, 384)), ("small", 8, (224,)), ("small", 16, (224, 384)), ("small", 32, (224, 384)),
            ("base", 8, (224,)), ("base", 16, (224, 384)), ("base", 32, (224, 384)), ("large", 14, (224,)),
            ("large", 16, (224, 384)), ("large", 32, (224, 384)), ("huge", 14, (224,)),
        )
        for size in sizes
    },
    "vit_base_patch16_gap_224": options_of(768, heads=16, fc_norm=False, **_GAP),
    "vit_medium_patch16_gap_256": options_of(512, fc_norm=False, qkv_bias=False, layer_scale=True, **_GAP),
    "vit_medium_patch16_reg4_gap_256": options_of(512, registers=4, embed_prefix=False, layer_scale=True, **_GAP),
    "vit_base_patch16_reg4_gap_256": options_of(768, registers=4, embed_prefix=False, **_GAP),
    "mae_base_patch16_224": options_of(768, pool="weighted"),
    "mae_large_patch16_224": options_of(1024, pool="weighted"),
    "mae_huge_patch14_224": options_of(1280, 14, pool="weighted"),
    "swag_base_patch16_384": options_of(768),
    "swag_large_patch16_512": options_of(1024),
    "swag_huge_patch14_518": options_of(1280, 14),
}  # fmt: skip
"""Options by name: timm's names where timm has the architecture."""
