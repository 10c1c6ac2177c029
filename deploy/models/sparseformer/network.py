"""SparseFormer's training form, as in the checkpoint, and the constants that the releases do not share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models import vit
from deploy.models.sparseformer import looking


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

    With the option ``looks`` also ``looks`` [N,L,T,2 + points,2] of ``deploy.models.sparseformer.looking``. The layouts
    keep their releases' names of the initial RoIs and tokens: it is what tells checkpoints apart.
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
