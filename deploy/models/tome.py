"""Token merging for vision transformers (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461).

Between the attention and the MLP of every block r tokens are merged away, without training. Written from the paper:
tokens at even places (A) each propose the token at an odd place (B) with the most similar key (cosine of the mean over
heads); the r best proposals are merged, averaged by how many patches each token stands for.

    block      x = x + attn(norm1(x), log size);   x, size = merge(x, size, keys);   x = x + mlp(norm2(x))
    order      kept tokens of A (in their order where there is a class token, else by falling similarity), then B
    protected  the class token (first of A) is never merged away, the distillation token (first of B) never merged into

The order decides the next block's A and B, so it belongs to the function. Register tokens are not protected, as in the
authors' release. r = 0 in every block is the plain vision transformer.

The reference merges with a scatter that adds. What is hard to export is just that: TensorRT has it as a
non-deterministic plugin, TensorRT-RTX refuses it. r is a constant of each block here, so the deploy forms use static
shapes and no scatter (``MERGES``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deploy.errors import RecipeError
from deploy.models import vit
from deploy.models.base import Flag, Form, System, Variant
from deploy.models.merge_forms import MatrixMerge, RowMerge, Sides
from deploy.models.merging import DECISIONS, DRAWING, most_merged, tuning
from deploy.models.vit_rows import RowBlock
from deploy.records import Target

SCHEDULES = {"constant": 0.0, "decreasing": -1.0, "increasing": 1.0}
ALIGNED, MULTIPLE = "aligned", 8


def schedule_of(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
    """Return the number of tokens that each block merges away, clipped as in the paper.

    Raises:
        RecipeError: a negative number, one that no block can merge, a list of another length than the depth, or an
            unknown schedule.
    """
    tokens = vit.patch_count(options, size) + vit.prefix_count(options)
    asked, depth = _asked(options), int(options["depth"])
    _check_most(options, asked, tokens)
    clipped, left = [], tokens
    for r in asked:
        clipped.append(min(r, most_merged(options, left)))
        left -= clipped[-1]
    if options["schedule"] == ALIGNED:
        return _aligned(tokens, tokens - left, depth, bool(options["class_token"]) + bool(options["distilled"]))
    return tuple(clipped)


def clipping(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[str, ...]:
    """Say which schedule runs, where a block before the last has too few tokens left for the one that was asked."""
    asked, runs = _asked(options), schedule_of(options, size)
    clipped = [block for block in range(len(asked) - 1) if asked[block] > runs[block]]
    if not clipped or options["schedule"] == ALIGNED:
        return ()
    wants, has = (",".join(map(str, schedule)) for schedule in (asked, runs))
    return (f"from block {clipped[0] + 1} on too few tokens are left: the schedule is {has} instead of {wants}",)


def _asked(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Read ``r`` and ``schedule`` to one number a block, before clipping."""
    r, schedule, depth = options["r"], _read(options["schedule"]), int(options["depth"])
    if _is_list(schedule):
        return _listed(schedule, depth)
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise RecipeError(f"options.r: got {r!r}, expected 0 or more tokens to merge in each block", hint="--r 8")
    inflection = SCHEDULES.get(str(schedule), 0.0 if schedule == ALIGNED else schedule)
    if isinstance(inflection, (str, bool)) or not isinstance(inflection, (int, float)) or not -1 <= inflection <= 1:
        raise RecipeError(
            f"options.schedule: got {schedule!r}, expected {', '.join((*SCHEDULES, ALIGNED))}, an inflection from -1 "
            "to 1, or one number a block",
            hint="--schedule decreasing",
        )
    first = int(r * (1 - inflection))
    step = (2 * (r - first)) / max(1, depth - 1)
    return tuple(int(first + step * block) for block in range(depth))


def _check_most(options: Mapping[str, Any], asked: Sequence[int], tokens: int) -> None:
    """Refuse what not even the first block could merge; later blocks are clipped, as in the paper."""
    listed, most = _is_list(_read(options["schedule"])), most_merged(options, tokens)
    name, r = ("schedule", max(asked)) if listed else ("r", int(options["r"]))
    if r > most:
        raise RecipeError(
            f"options.{name}: got {r}, expected at most {most}: a block merges half of its tokens, and this image has "
            f"{tokens}",
            hint=f"--{name} {most}" if not listed else "--schedule decreasing",
        )


def _is_list(schedule: Any) -> bool:
    return isinstance(schedule, Sequence) and not isinstance(schedule, str)


def _read(schedule: Any) -> Any:
    """Read what stands in one command-line word: a name, an inflection, or numbers with commas."""
    if not isinstance(schedule, str):
        return schedule
    if "," in schedule:
        return [part.strip() for part in schedule.strip("[]").split(",")]
    try:
        return float(schedule)
    except ValueError:
        return schedule


def _listed(schedule: Sequence[Any], depth: int) -> tuple[int, ...]:
    if wrong := [n for n in schedule if not str(n).isdecimal()]:
        raise RecipeError(f"options.schedule: got {wrong[0]!r}, expected whole numbers from 0", hint="--schedule 8,8,4")
    if len(schedule) != depth:
        raise RecipeError(
            f"options.schedule: got {len(schedule)} numbers, expected {depth}, one a block",
            hint="blocks that shall not merge get a 0",
        )
    return tuple(int(n) for n in schedule)


def _aligned(tokens: int, total: int, depth: int, protected: int) -> tuple[int, ...]:
    """Merge ``total`` tokens so that the counts between are multiples of ``MULTIPLE``, near the even schedule.

    A block can at most halve what is not protected, so from the end backwards each count has an upper limit.
    """
    last = tokens - total
    limits = [last]
    while len(limits) < depth:
        limits.append(max(last, MULTIPLE * ((2 * limits[-1] - protected) // MULTIPLE)))
    counts = [tokens]
    for block, limit in enumerate(reversed(limits), 1):
        near = MULTIPLE * round((tokens - total * block / depth) / MULTIPLE)
        want = max(last, min(near, limit))
        counts.append(max(min(want, counts[-1]), counts[-1] - (counts[-1] - protected) // 2))
    return tuple(before - after for before, after in itertools.pairwise(counts))


def new_places(metric: Tensor, r: int, sides: Sides) -> Tensor:
    """Return where each token goes, int64 [N,T]: the decision of one merge, as in the paper.

    Args:
        metric: Keys, mean over heads [N,T,d].
        r: Tokens to merge away.
        sides: Of the T tokens.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, sides.a :: 2] @ metric[:, sides.b :: 2].transpose(1, 2)
    best, receiver = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged, kept = order[:, :r], order[:, r:]
    kept = kept.sort(-1).values if sides.sort else kept
    before = sides.protected + kept.shape[1]
    places = torch.arange(sides.tokens, device=metric.device).expand(metric.shape[0], -1).clone()
    places[:, sides.b :: 2] = before + torch.arange(sides.receivers, device=metric.device)
    ranks = torch.arange(sides.protected, before, device=metric.device).expand_as(kept)
    proposers = torch.empty_like(order).scatter(1, kept, ranks).scatter(1, merged, before + receiver.gather(1, merged))
    places[:, sides.a :: 2] = proposers
    return places


def merge(x: Tensor, size: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average the tokens [N,T,C] that go to one of ``count`` places, weighted by size [N,T,1]; add their sizes."""
    sums = x.new_zeros(x.shape[0], count, x.shape[2]).scatter_add(1, places[..., None].expand_as(x), x * size)
    sizes = size.new_zeros(x.shape[0], count, 1).scatter_add(1, places[..., None], size)
    return sums / sizes, sizes


class ToMe(vit.VisionTransformer):
    """A vision transformer that merges tokens: ``images`` [N,3,H,W] to ``logits`` [N,classes].

    With the option ``groups`` also ``groups`` int64 [N,depth,T]: the token that each of the first T tokens is part of
    after each block.
    """

    def __init__(self, options: Mapping[str, Any], size: tuple[int, int]) -> None:
        super().__init__(options, size)
        self.schedule = schedule_of(options, size)
        self.prop_attn, self.groups = bool(options["prop_attn"]), bool(options["groups"])
        self.pieces = bool(options["pieces"])
        self.protected = bool(options["class_token"]) + bool(options["distilled"])

    def sides(self) -> list[Sides]:
        """Return the sets of every block."""
        left, found = self.patches + self.prefix, []
        for r in self.schedule:
            found.append(Sides(tokens=left, protected=self.protected, sort=self.protected > 0))
            left -= r
        return found

    def choose(self, keys: Tensor, r: int, sides: Sides) -> Tensor:
        """Return where each token goes, int64 [N,T], by the keys [N,heads,T,d] of a block."""
        return new_places(keys.mean(1), r, sides)

    def forward(self, images: Tensor) -> Any:
        """Classify."""
        x = self.embed(images)
        size = x.new_ones(x.shape[0], x.shape[1], 1)
        group = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        groups, started = [], False
        for block, r, sides in zip(cast(list[vit.Block], list(self.blocks)), self.schedule, self.sides(), strict=True):
            bias = size.log().transpose(1, 2)[:, None] if started and self.prop_attn else None
            x, keys = block.attend(x, bias)
            if r:
                places = self.choose(keys, r, sides)
                x, size = merge(x, size, places, sides.tokens - r)
                group, started = places.gather(1, group), True
            x = block.feed(x)
            groups.append(group)
        logits = self.classify(x, size)
        return (logits, torch.stack(groups, 1)) if self.groups else logits


class DeployToMe(nn.Module):
    """The classifier that is exported: the same function with a constant number of tokens in every block."""

    def __init__(self, model: ToMe, target: Target) -> None:
        super().__init__()
        blocks = cast(list[vit.Block], list(model.blocks))
        self.embed, self.head = vit.DeployEmbed(model), vit.DeployHead(model)
        self.prop_attn, self.groups = model.prop_attn, model.groups
        self.rows = target is Target.ONNXRUNTIME
        schedule, sides = list(model.schedule), model.sides()
        # The head of a class token reads one row: on a CPU the last block computes only that one, and merges nothing.
        # TensorRT's fused attention is one kernel either way.
        queries = self.head.reads if self.rows and not model.groups else 0
        if queries:
            schedule[-1] = 0
        kind = partial(RowBlock, pieces=model.pieces) if self.rows else vit.DeployBlock
        self.blocks = nn.ModuleList(kind(block) for block in blocks[:-1])
        self.blocks.append(kind(blocks[-1], queries))
        self.merges = nn.ModuleList(
            MERGES[target](side, r, model.pos_embed.dtype) if r else nn.Identity()
            for side, r in zip(sides, schedule, strict=True)
        )

    def forward(self, images: Tensor) -> Any:
        """Classify."""
        x = self.embed(images)
        batch = x.shape[0]
        image = torch.arange(batch, device=x.device)[:, None]
        group = torch.arange(x.shape[1], device=x.device).expand(batch, -1)
        size, groups = cast("Tensor | None", None), []
        x = x.flatten(0, 1) if self.rows else x
        for block, merging in zip(self.blocks, self.merges, strict=True):
            x, metric = self._attend(block, x, size if self.prop_attn else None, batch)
            if not isinstance(merging, nn.Identity):
                x, size, plan = merging(x, size, metric, image)
                if self.groups:
                    group = cast("RowMerge | MatrixMerge", merging).places(plan, batch).gather(1, group)
            x = cast(RowBlock, block).feed(x, batch) if self.rows else cast(vit.DeployBlock, block).feed(x)
            groups.append(group)
        if self.rows:
            x = x.reshape(batch, -1, x.shape[-1])
            size = None if size is None else size.reshape(batch, -1, 1)
        logits = self.head(x, size)
        return (logits, torch.stack(groups, 1)) if self.groups else logits

    def _attend(self, block: nn.Module, x: Tensor, size: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Run the attention half of a block; the logarithm of its size weighs each key where ``size`` is given."""
        if self.rows:
            bias = None if size is None else size.log().reshape(batch, 1, 1, -1)
            return cast(RowBlock, block).attend(x, bias, batch)
        return cast(vit.DeployBlock, block).attend(x, None if size is None else size.log().transpose(1, 2)[:, None])


MERGES = {Target.ONNXRUNTIME: RowMerge, Target.TENSORRT: MatrixMerge}


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build the training form; the position embedding belongs to ``size``."""
    return ToMe(options, size).eval()


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the copy that is exported for a target, in the dtype of ``model``; ``model`` stays untouched."""
    with torch.no_grad():
        return DeployToMe(cast(ToMe, model), target)


def extra_outputs(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the outputs besides ``logits``."""
    return ("groups",) if options["groups"] else ()


def keep_fp32(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which nodes stay float32: the choice of what is merged, where rounding makes ties."""
    return (r"^(merges\.\d+\.plan|blocks\.\d+\.metric)/",) if any(_asked(options)) else ()


def _variant(name: str, architecture: Mapping[str, Any]) -> Variant:
    """Merge about as much of the image as the paper does: 13 of 197 tokens in 12 blocks, 8 in 24, 7 in 32."""
    side = int(name.rpartition("_")[2])
    tokens, depth = vit.patch_count(architecture, (side, side)), architecture["depth"]
    r = round(tokens * {12: 0.066, 24: 0.04, 32: 0.027}[depth])
    return Variant(options={**architecture, **_MERGING, "r": r, "prop_attn": architecture["pool"] != "weighted"})


_MERGING = {"r": 0, "schedule": "constant", "prop_attn": True, "groups": False, "pieces": True}
_TINY = {**vit.options_of(32, 32, depth=4, heads=2), **_MERGING, "r": 6}

SYSTEM = System(
    name="tome",
    task="classification",
    paper="Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461",
    variants={
        **{name: _variant(name, architecture) for name, architecture in vit.ARCHITECTURES.items()},
        "tiny": Variant(options=_TINY, summary="for tests"),
    },
    build=build,
    weight_maps=vit.WEIGHT_MAPS,
    to_deploy=to_deploy,
    forms={
        Target.ONNXRUNTIME: Form(
            name="tokens of a batch as rows: the kept ones gathered, only receivers averaged; the last block for the "
            "class token alone",
            reason="a product with the whole merge matrix costs as many multiply-adds as attention "
            "(benchmarks/tome.py)",
        ),
        Target.TENSORRT: Form(
            name="places by counting, merged by one matrix product",
            reason="8 kernels per merging block in FP16 for SM89 (DeiT-S); attention stays one kernel "
            "(TensorRT-RTX build log)",
        ),
    },
    recipe={"system": "tome", "variant": "deit_small_patch16_224", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99953 with the head in INT8, 0.99968 without.
    keep_high=lambda options: {
        r"^head": "head: hardly any work, 32 % of the error",
        r"^merges\.|^blocks\.\d+\.metric/": "merging: rounded similarities and counts merge other tokens",
    },
    stride="patch",
    adapt=vit.adapt,
    extra_outputs=extra_outputs,
    keep_fp32=keep_fp32,
    options_for=lambda recipe: {"pieces": False} if recipe.precision.quantised else {},
    decisions=DECISIONS,
    drawing=DRAWING,
    tuning=tuning(schedule_of),
    notes=clipping,
    flags=(
        Flag(name="r", key="options.r", help="tokens that each block merges away; 0 is the plain model"),
        Flag(
            name="schedule",
            key="options.schedule",
            help="constant, decreasing, increasing, aligned, an inflection from -1 to 1, or one number a block",
        ),
    ),
)
