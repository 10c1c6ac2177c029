"""SparseFormer: recognition with few tokens that look where they want (Gao et al., ICLR 2024, arXiv 2304.03768).

Two releases of the authors (showlab/sparseformer) have the same network under different names: ``imagenet/`` and the
library ``sparseformer/``. Ours are the library's. They normalise differently (``CONSTANTS``), which moves logits by
0.1: a checkpoint takes the constants of the release whose names it has, unless ``options.constants`` says otherwise.

    stem       conv 7x7/2, ReLU, max pool/2, each pixel normalised over its channels
    unit       attention; RoI adjustment; sampling + adaptive mixing; MLP       all pre-norm and residual
    focusing   one unit of that kind, several times with the same weights, on narrow tokens
    cortex     one more such unit on wide tokens, then plain transformer blocks; mean, norm, classifier

    RoI        centre += d_xy * size, size *= exp(d_size), from the token
    sampling   points in the RoI from the token, standardised over the points; bilinear from the stem's map
    mixing     GELU(M x + b) over channels, GELU(S x + b) over points, with M and S from the token; flatten; project

Deploy form, exact up to rounding:

* Tokens and RoIs do not know the image before the first sampling, so the first attention, RoIs, points and both
  matrices are constants; they join the batch at the first mixing.
* The three norms before RoI, points and mixing read the same tokens: one standardises, their gains go into the linears.
* The points' mean is taken off in the weights, RoIs are kept as centre and size in GridSample's -1..1.
* Mixing keeps channels before points, as they are sampled: M and S are generated transposed, the projection reordered.
* For TensorRT, heads of 4 to 12 channels are padded with zeros to 16, below which no fused attention kernel exists.

What is hard to export: coordinates need float32 in every precision, and a constant must not be expanded to the batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.errors import RecipeError
from deploy.models import looking, vit
from deploy.models.base import Form, System, Variant
from deploy.models.checkpoint import State, WeightMap
from deploy.models.rtdetr.sampling import BILINEAR, FIXED
from deploy.records import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """What the releases do not share.

    Attributes:
        unbiased: 1 where the stem's variance over C channels is divided by C - 1, 0 where by C.
        stem: Added to that variance.
        points: Added to the standard deviation of the sampling points.
    """

    unbiased: int
    stem: float
    points: float


CONSTANTS: Mapping[str, Constants] = {
    "imagenet": Constants(unbiased=1, stem=1e-7, points=1e-7),
    "library": Constants(unbiased=0, stem=1e-5, points=1e-5),
}


class Stem(nn.Module):
    """The early convolution, [N,3,H,W] to [N,C,H/4,W/4]."""

    def __init__(self, channels: int, constants: Constants) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3)
        self.constants, self.count = constants, channels - constants.unbiased

    def forward(self, images: Tensor) -> Tensor:
        """Return the map that is sampled."""
        x = functional.max_pool2d(functional.relu(self.conv1(images)), 3, 2, 1)
        x = x - x.mean(1, keepdim=True)
        variance = (x * x).sum(1, keepdim=True) / self.count
        return x / (variance + self.constants.stem).sqrt()


class AdaptiveMixing(nn.Module):
    """Mixing with matrices made from the token, [N,T,points,C] to [N,T,width]."""

    def __init__(self, width: int, channels: int, points: int) -> None:
        super().__init__()
        self.channels, self.points = channels, points
        self.parameter_generator = nn.Sequential(
            nn.LayerNorm(width, eps=vit.EPS),
            nn.Linear(width, width // 4),
            nn.Linear(width // 4, channels * channels + points * points),
        )
        self.m_beta = nn.Parameter(torch.zeros(channels))
        self.s_beta = nn.Parameter(torch.zeros(points))
        self.out_proj = nn.Linear(channels * points, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Mix channels, then points."""
        made = self.parameter_generator(tokens)
        channel, spatial = torch.split(made, [self.channels**2, self.points**2], -1)
        x = functional.gelu(x @ channel.reshape(*made.shape[:2], self.channels, self.channels) + self.m_beta)
        spatial = spatial.reshape(*made.shape[:2], self.points, self.points)
        x = functional.gelu(spatial @ x + self.s_beta[:, None])
        return self.out_proj(x.flatten(2))


class Unit(vit.Block):
    """A transformer block that also moves its RoIs, samples and mixes."""

    def __init__(self, options: Mapping[str, Any], width: int, eps: float) -> None:
        super().__init__(block_options(options, width))
        points, self.eps = options["points"], eps
        self.roi_adjust_module = nn.Sequential(nn.LayerNorm(width, eps=vit.EPS), nn.Linear(width, 4, bias=False))
        self.roi_offset_module = nn.Sequential(
            nn.LayerNorm(width, eps=vit.EPS), nn.Linear(width, 2 * points, bias=False)
        )
        self.roi_offset_bias = nn.Parameter(torch.zeros(2 * points))
        self.adaptive_mixing = AdaptiveMixing(width, options["channels"], points)

    def adjust(self, x: Tensor, rois: Tensor) -> Tensor:
        """Move the RoIs [N,T,4] (x1, y1, x2, y2 in 0..1, but free to leave it)."""
        by = self.roi_adjust_module(x)
        centre, size = (rois[..., :2] + rois[..., 2:]) / 2, (rois[..., 2:] - rois[..., :2]).abs()
        centre, size = centre + by[..., :2] * size, size * by[..., 2:].exp()
        return torch.cat((centre - size / 2, centre + size / 2), -1)

    def sampling_points(self, x: Tensor, rois: Tensor) -> Tensor:
        """Return where the tokens look [N,T,points,2] (x, y)."""
        offsets = (self.roi_offset_module(x) + self.roi_offset_bias).unflatten(-1, (-1, 2))
        offsets = offsets - offsets.mean(2, keepdim=True)
        spread = (offsets.square().sum(2, keepdim=True) / (offsets.shape[2] - 1)).sqrt()
        offsets = offsets / (3 * (spread + self.eps))
        centre, size = (rois[..., :2] + rois[..., 2:]) / 2, rois[..., 2:] - rois[..., :2]
        return centre[:, :, None] + offsets * size[:, :, None]

    def look(self, features: Tensor, x: Tensor, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the unit once; return tokens, RoIs and points."""
        x = self.attend(x)[0]
        rois = self.adjust(x, rois)
        points = self.sampling_points(x, rois)
        grid = points * 2 - 1
        taken = functional.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return self.feed(x + self.adaptive_mixing(taken.permute(0, 2, 3, 1), x)), rois, points


class SparseFormer(nn.Module):
    """The classifier as in the checkpoint: ``images`` [N,3,H,W] to ``logits`` [N,classes].

    With the option ``looks`` also ``looks`` [N,L,T,2 + points,2] of ``deploy.models.looking``. The layouts keep their
    releases' names of the initial RoIs and tokens: it is what tells checkpoints apart.
    """

    def __init__(self, options: Mapping[str, Any], size: tuple[int, int], layout: str) -> None:
        super().__init__()
        self.size = size  # the deploy form's constants hold the size of the map
        constants = CONSTANTS[layout if options["constants"] == "layout" else options["constants"]]
        self.prefix = "token" if layout == "imagenet" else "initial"
        self.repeats, (narrow, wide) = options["repeats"], options["widths"]
        self.sampling, self.pad_heads = options["sampling"], bool(options["pad_heads"])
        self.looks = bool(options["looks"])
        self.feat_extractor = Stem(options["channels"], constants)
        self.add_module(f"{self.prefix}_roi", nn.Embedding(options["tokens"], 4))
        self.add_module(f"{self.prefix}_embedding", nn.Embedding(options["tokens"], narrow))
        transition = nn.Sequential(nn.Linear(narrow, wide), nn.LayerNorm(wide, eps=vit.EPS))
        blocks = [vit.Block(block_options(options, wide)) for _ in range(options["depth"] - 1)]
        units = [Unit(options, width, constants.points) for width in (narrow, wide)]
        self.layers = nn.ModuleList([units[0], transition, units[1], *blocks])
        self.norm = nn.LayerNorm(wide, eps=vit.EPS)
        self.proj = nn.Linear(wide, options["classes"])

    def start(self) -> tuple[Tensor, Tensor]:
        """Return the learned tokens [1,T,width] and RoIs [1,T,4]."""
        tokens, rois = (getattr(self, f"{self.prefix}_{name}").weight[None] for name in ("embedding", "roi"))
        return tokens, rois

    @property
    def focusing(self) -> tuple[Unit, nn.Module, Unit, list[vit.Block]]:
        """Return the parts in order: the shared unit, the transition, the wide unit, the plain blocks."""
        first, transition, second, *blocks = list(self.layers)
        return cast(Unit, first), transition, cast(Unit, second), cast(list[vit.Block], blocks)

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last tokens [N,T,width] and every look [N,T,2 + points,2]."""
        first, transition, second, blocks = self.focusing
        image_map = self.feat_extractor(images)
        x, rois = (tensor.expand(images.shape[0], -1, -1) for tensor in self.start())
        seen = []
        for _ in range(self.repeats):
            x, rois, points = first.look(image_map, x, rois)
            seen.append(looking.one_look(rois, points))
        x, rois, points = second.look(image_map, transition(x), rois)
        for block in blocks:
            x = block(x)
        return x, [*seen, looking.one_look(rois, points)]

    def forward(self, images: Tensor) -> Any:
        """Classify."""
        x, seen = self.features(images)
        logits = self.proj(self.norm(x.mean(1)))
        return (logits, torch.stack(seen, 1)) if self.looks else logits


def block_options(options: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return the options of a transformer block; the releases have 64 heads, or as many as channels."""
    return vit.options_of(width, heads=min(options["heads"], width), mlp_ratio=options["mlp_ratio"])


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


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build the training form of a release; any ``size`` fits the weights.

    Raises:
        RecipeError: constants or a form of sampling that nobody has.
    """
    for name, known in {"constants": ("layout", *CONSTANTS), "sampling": ("auto", *FIXED)}.items():
        if options[name] not in known:
            expected = ", ".join(known)
            raise RecipeError(f"options.{name}: got {options[name]!r}, expected {expected}", hint=f"{name}={known[0]}")
    return SparseFormer(options, size, layout).eval()


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the copy that is exported for a target, in the dtype of ``model``; ``model`` stays untouched."""
    source = cast(SparseFormer, model)
    with torch.no_grad():
        return DeploySparseFormer(source, target)


_IMAGENET = (
    ("adaptive_mixing.tuo_proj.", "adaptive_mixing.out_proj."), ("ffn.0.", "norm2."), ("ffn.1.", "mlp.fc1."),
    ("ffn.3.", "mlp.fc2."), ("ln_attn.", "norm1."), ("attn.in_proj_", "attn.qkv."), ("attn.out_proj.", "attn.proj."),
    ("head.norm.", "norm."), ("head.classifier.", "proj."),
)  # fmt: skip


def from_imagenet(key: str) -> str:
    """Map a key of ``imagenet/`` to ours."""
    for theirs, ours in _IMAGENET:
        key = key.replace(theirs, ours)
    return key


def to_imagenet(key: str) -> str:
    """Map our key to that of ``imagenet/``: the inverse of ``from_imagenet``."""
    inner = key.startswith("layers.")
    for theirs, ours in _IMAGENET:
        if inner or theirs.startswith("head."):
            key = key.replace(f".{ours}", f".{theirs}") if inner else re.sub(f"^{re.escape(ours)}", theirs, key)
    return key


def from_library(key: str) -> str:
    """Map a key of the library to ours; its own converter writes a head that its model does not have."""
    return key.replace("head.norm.", "norm.").replace("head.classifier.", "proj.")


def random(state: State) -> State:
    """Put random RoIs into the image, let tokens move them by a little, and give the mixing matrices unit gain.

    With moves as large as the RoIs, or matrices that multiply what was sampled by ten, five looks in a row amplify any
    rounding beyond what says something about an export. Trained networks do neither.
    """
    found = dict(state)
    for key, value in state.items():
        if key.endswith("_roi.weight"):
            middle, size = 0.5 + 0.2 * value[:, :2].tanh(), 0.3 + 0.1 * value[:, 2:].tanh()
            found[key] = torch.cat((middle - size / 2, middle + size / 2), 1)
        elif "roi_adjust_module.1" in key or "roi_offset_module.1" in key:
            found[key] = value * 0.2
        elif key.endswith("parameter_generator.2.weight"):
            channels, points = (len(state[key.replace("parameter_generator.2.weight", f"{x}_beta")]) for x in "ms")
            channel, spatial = torch.split(value, [channels**2, points**2])
            found[key] = torch.cat((channel / channels**0.5, spatial / points**0.5))
        elif key.endswith("roi_offset_bias"):
            found[key] = value * 10
    return found


def _variant(tokens: int, widths: list[int], depth: int, summary: str, **changes: Any) -> Variant:
    known = {"channels": 96, "points": 36, "repeats": 4, "heads": 64, "mlp_ratio": 4}
    given = {"tokens": tokens, "widths": widths, "depth": depth}
    own = {"constants": "layout", "sampling": "auto", "pad_heads": True, "looks": False}
    return Variant(options={**given, **known, **changes, **own}, summary=summary)


SYSTEM = System(
    name="sparseformer",
    task="classification",
    paper="SparseFormer: Sparse Visual Recognition via Limited Latent Tokens, ICLR 2024, arXiv 2304.03768",
    variants={
        "t": _variant(49, [256, 512], 8, "release: 81.0 % top-1 at 224"),
        "s": _variant(64, [320, 640], 8, "release: 82.0 % top-1 at 224"),
        "b": _variant(81, [384, 768], 10, "release: 82.6 % top-1 at 224"),
        "tiny": _variant(9, [32, 64], 2, "for tests", channels=16, points=4, repeats=2, heads=8),
    },
    build=build,
    weight_maps=(
        WeightMap(name="imagenet release", layout="imagenet", rename=from_imagenet, inverse=to_imagenet),
        WeightMap(name="library release", layout="library", rename=from_library, inverse=vit.as_it_is),
    ),
    to_deploy=to_deploy,
    forms={
        Target.ONNXRUNTIME: Form(
            name="first look constant, channels before points, GridSample",
            reason="1.08 times as fast as the release's order of operations, 1.18 times as fast as with Gather "
            "(t; benchmarks/sparseformer.py)",
        ),
        Target.TENSORRT: Form(
            name="first look constant, channels before points, Gather, heads padded to 16",
            reason="all attentions fuse in FP16: 179 kernels for SM89, 250 without padding, 188 with GridSample, which "
            "is wrong in some versions (deploy/data/known_bad.yaml)",
        ),
    },
    recipe={"system": "sparseformer", "variant": "t", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99986 with every linear layer in INT8, 0.99996 with
    # those of the blocks behind the RoIs alone.
    keep_high=lambda options: {
        r"^(focusing|cortex)\.": "RoIs, offsets and mixing: their rounding moves where the image is looked at",
        r"^proj/": "head: hardly any work, 19 % of the error",
    },
    extra_outputs=lambda options: (looking.OUTPUT,) if options["looks"] else (),
    keep_fp32=lambda options: (r"\brois/", r"\blooks/") if options.get("looks") else (r"\brois/",),
    drawing=looking.DRAWING,
    random=random,
)
