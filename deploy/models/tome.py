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
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.errors import RecipeError
from deploy.models import vit
from deploy.models.base import Flag, Form, System, Variant
from deploy.models.merging import DECISIONS, DRAWING, tuning
from deploy.records import Target

SCHEDULES = {"constant": 0.0, "decreasing": -1.0, "increasing": 1.0}
ALIGNED, MULTIPLE = "aligned", 8


def schedule_of(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
    """Return the number of tokens that each block merges away, clipped as in the paper.

    Raises:
        RecipeError: a negative number, a list of another length than the depth, or an unknown schedule.
    """
    asked, depth = _asked(options), int(options["depth"])
    tokens = vit.patch_count(options, size) + vit.prefix_count(options)
    protected = bool(options["class_token"]) + bool(options["distilled"])
    clipped, left = [], tokens
    for r in asked:
        clipped.append(max(0, min(r, (left - protected) // 2)))
        left -= clipped[-1]
    if options["schedule"] == ALIGNED:
        return _aligned(tokens, tokens - left, depth, protected)
    return tuple(clipped)


def _asked(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Read ``r`` and ``schedule`` to one number a block, before clipping."""
    r, schedule, depth = options["r"], options["schedule"], int(options["depth"])
    if isinstance(schedule, str):
        schedule = _number(schedule)
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
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


def _number(text: str) -> Any:
    """Read what stands in one command-line word: a name, an inflection, or numbers with commas."""
    if "," in text:
        return [part.strip() for part in text.strip("[]").split(",")]
    try:
        return float(text)
    except ValueError:
        return text


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Where the two sets lie among ``tokens`` tokens: places ``a``, ``a``+2, ... propose, ``b``, ``b``+2, ... receive.

    The first ``protected`` places belong to neither. ``sort``: kept tokens stay in their order.
    """

    tokens: int
    protected: int
    sort: bool

    @property
    def a(self) -> int:
        """First place of A: behind the class token."""
        return 2 if self.protected else 0

    @property
    def b(self) -> int:
        """First place of B: behind the distillation token."""
        return 3 if self.protected == 2 else 1

    @property
    def proposers(self) -> int:
        """How many tokens A has."""
        return len(range(self.a, self.tokens, 2))

    @property
    def receivers(self) -> int:
        """How many tokens B has."""
        return len(range(self.b, self.tokens, 2))


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
        self.protected = bool(options["class_token"]) + bool(options["distilled"])

    def sides(self) -> list[Sides]:
        """Return the sets of every block."""
        left, found = self.patches + self.prefix, []
        for r in self.schedule:
            found.append(Sides(tokens=left, protected=self.protected, sort=self.protected > 0))
            left -= r
        return found

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
                places = new_places(keys.mean(1), r, sides)
                x, size = merge(x, size, places, sides.tokens - r)
                group, started = places.gather(1, group), True
            x = block.feed(x)
            groups.append(group)
        logits = self.classify(x, size)
        return (logits, torch.stack(groups, 1)) if self.groups else logits


Plan = tuple[Tensor, ...]


class FewRowPlan(nn.Module):
    """Decides with two sorts, so that ties can neither lose nor double a token.

    The class token proposes too, but worse than any cosine, so that it always stays first.
    """

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sides, self.r = sides, r
        self.kept = len(range(0, sides.tokens, 2)) - r
        handicap = torch.zeros(self.kept + r, dtype=dtype)
        handicap[: sides.a // 2] = -4
        self.handicap = nn.Buffer(handicap, persistent=False)
        self.fixed = nn.Buffer(torch.arange(sides.b, sides.tokens, 2)[None], persistent=False)

    def forward(self, keys: Tensor, row: Tensor) -> Plan:
        """Read keys [N,T,heads,d]; return which rows stay, in their new order, which are merged away, and receivers.

        Rows are those of the flattened batch, int64 [N,T-r] and [N,r]; receivers count from the first of B, [N,r].
        """
        metric = keys.mean(2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, self.sides.b :: 2].transpose(1, 2)
        best, receiver = scores.max(2)
        if self.sides.protected:
            best = best + self.handicap
        merged, kept = best.topk(self.kept + self.r).indices.split((self.r, self.kept), 1)
        if self.sides.sort:
            kept = kept.topk(self.kept, largest=False).values
        if self.sides.protected == 2:  # the distillation token comes second
            kept = functional.pad(kept[:, 1:] * 2, (1, 0), value=1)
            kept = functional.pad(kept, (1, 0))
        else:
            kept = kept * 2
        if keys.shape[0] == 1:
            return torch.cat((kept, self.fixed), 1), merged * 2, receiver.gather(1, merged)
        start = row * self.sides.tokens
        return torch.cat((kept + start, self.fixed + start), 1), merged * 2 + start, receiver.gather(1, merged)


class FewRowMerge(nn.Module):
    """Merging for ONNX Runtime: rows that stay are gathered, and only the r others go through a one-hot product."""

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sides, self.plan, self.count = sides, FewRowPlan(sides, r, dtype), sides.tokens - r
        places = torch.arange(self.count) - (self.count - sides.receivers)
        self.receivers = nn.Buffer(places[None, :, None], persistent=False)

    def forward(self, x: Tensor, size: Tensor | None, keys: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Merge.

        Args:
            x: Tokens [N,T,C].
            size: [N,T,1], or ``None`` for ones.
            keys: [N,T,heads,d].
            row: int64 [N,1]: 0 to N-1.

        Returns:
            Tokens [N,T-r,C], their sizes [N,T-r,1], and the plan.
        """
        plan = stay, merged, receiver = self.plan(keys, row)
        hot = (receiver[:, None] == self.receivers).to(x.dtype)
        gone = rows(x, merged)
        if size is None:
            total = hot.sum(2, keepdim=True) + 1
            share = 1 / total
        else:
            weight = rows(size, merged)
            own, gone = rows(size, stay), gone * weight
            total = own + hot @ weight
            share = own / total
        return rows(x, stay) * share + (hot / total) @ gone, total, plan

    def places(self, plan: Plan) -> Tensor:
        """Return where each token goes by a plan, int64 [N,T]."""
        stay, merged, receiver = plan
        order = torch.cat((stay, merged), 1).topk(self.sides.tokens, largest=False).indices
        targets = torch.arange(self.count, device=stay.device).expand(stay.shape[0], -1)
        return torch.cat((targets, self.count - self.sides.receivers + receiver), 1).gather(1, order)


def rows(x: Tensor, places: Tensor) -> Tensor:
    """Gather rows [N,K,C] of the flattened batch of [N,T,C]."""
    return functional.embedding(places, x.flatten(0, 1))


class MatrixPlan(nn.Module):
    """Decides by counting, without TopK, slices or scatters: who is no proposer or receiver is masked by constants.

    A token's rank is the number of better proposals, equal ones counted when they come earlier; its place is the number
    of tokens that stay before it. All of it is element-wise arithmetic and reductions, which TensorRT fuses.
    """

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.r, self.sides, self.sort = r, sides, sides.sort
        tokens, kept = sides.tokens, sides.proposers - r
        proposes, receives = torch.zeros(tokens, dtype=dtype), torch.zeros(tokens, dtype=dtype)
        proposes[sides.a :: 2], receives[sides.b :: 2] = 1, 1
        earlier = torch.ones(tokens, tokens, dtype=dtype).tril(-1)
        before = sides.protected + kept
        place = torch.arange(tokens, dtype=dtype)
        place[sides.a :: 2] = sides.protected + torch.arange(sides.proposers, dtype=dtype)
        place[sides.b :: 2] = before + torch.arange(sides.receivers, dtype=dtype)
        self.mask = self._constant(4 * (proposes[:, None] * receives - 1))  # a cosine is at least -1
        self.place, self.proposes = self._constant(place), self._constant(proposes)
        self.earlier = self._constant(earlier > 0)
        self.staying = self._constant(earlier * proposes[:, None] * proposes)
        self.rows = self._constant(torch.arange(tokens - r, dtype=dtype)[:, None])

    @staticmethod
    def _constant(value: Tensor) -> nn.Buffer:
        return nn.Buffer(value, persistent=False)

    def forward(self, keys: Tensor, size: Tensor | None) -> Plan:
        """Read keys [N,T,heads,d] and sizes [N,T,1]; return weights [N,T-r,T], new sizes [N,T-r,1], places [N,T]."""
        metric = keys.mean(2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric @ metric.transpose(1, 2) + self.mask
        best = scores.amax(2)
        receiver = torch.where(scores == best[:, :, None], self.place, float(self.mask.shape[0])).amin(2)
        mine, other = best[:, :, None], best[:, None]
        ranks = ((other > mine) | ((other == mine) & self.earlier)).to(keys.dtype).sum(2)
        merged = ranks < self.r
        if self.sort:
            own = self.place - (self.staying * merged.to(keys.dtype)[:, None]).sum(2)
        else:
            own = torch.where(self.proposes > 0, ranks - self.r, self.place)
        places = torch.where(merged, receiver, own)
        weights = (places[:, None] == self.rows).to(keys.dtype)
        weights = weights if size is None else weights * size.transpose(1, 2)
        sizes = weights.sum(2, keepdim=True)
        return weights / sizes, sizes, places


class MatrixMerge(nn.Module):
    """Merging for TensorRT: one product with a matrix of weights."""

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan = MatrixPlan(sides, r, dtype)

    def forward(self, x: Tensor, size: Tensor | None, keys: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Merge, as ``FewRowMerge``."""
        plan = self.plan(keys, size)
        return plan[0] @ x, plan[1], plan

    def places(self, plan: Plan) -> Tensor:
        """Return where each token goes by a plan, int64 [N,T]."""
        return plan[2].long()


class DeployToMe(nn.Module):
    """The classifier that is exported: the same function with a constant number of tokens in every block."""

    def __init__(self, model: ToMe, target: Target) -> None:
        super().__init__()
        blocks = cast(list[vit.Block], list(model.blocks))
        self.embed, self.head = vit.DeployEmbed(model), vit.DeployHead(model)
        self.prop_attn, self.groups = model.prop_attn, model.groups
        schedule, sides = list(model.schedule), model.sides()
        # The head of a class token reads one row: on a CPU the last block computes only that one, and merges nothing.
        # TensorRT's fused attention is one kernel either way.
        queries = self.head.reads if target is Target.ONNXRUNTIME and not model.groups else 0
        if queries:
            schedule[-1] = 0
        self.blocks = nn.ModuleList(vit.DeployBlock(block) for block in blocks[:-1])
        self.blocks.append(vit.DeployBlock(blocks[-1], queries))
        self.merges = nn.ModuleList(
            MERGES[target](side, r, model.pos_embed.dtype) if r else nn.Identity()
            for side, r in zip(sides, schedule, strict=True)
        )

    def forward(self, images: Tensor) -> Any:
        """Classify."""
        x = self.embed(images)
        row = torch.arange(images.shape[0], device=images.device)[:, None]
        size: Tensor | None = None
        group = torch.arange(x.shape[1], device=x.device).expand(images.shape[0], -1)
        groups = []
        for block, merging in zip(cast(list[vit.DeployBlock], list(self.blocks)), self.merges, strict=True):
            bias = size.log().transpose(1, 2)[:, None] if size is not None and self.prop_attn else None
            x, keys = block.attend(x, bias)
            if not isinstance(merging, nn.Identity):
                x, size, plan = merging(x, size, keys, row)
                group = (
                    cast("FewRowMerge | MatrixMerge", merging).places(plan).gather(1, group) if self.groups else group
                )
            x = block.feed(x)
            groups.append(group)
        logits = self.head(x, size)
        return (logits, torch.stack(groups, 1)) if self.groups else logits


MERGES = {Target.ONNXRUNTIME: FewRowMerge, Target.TENSORRT: MatrixMerge}


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
    return (r"^merges\.\d+\.plan/",) if any(_asked(options)) else ()


def _variant(name: str, architecture: Mapping[str, Any]) -> Variant:
    """Merge about as much of the image as the paper does: 13 of 197 tokens in 12 blocks, 8 in 24, 7 in 32."""
    side = int(name.rpartition("_")[2])
    tokens, depth = vit.patch_count(architecture, (side, side)), architecture["depth"]
    r = round(tokens * {12: 0.066, 24: 0.04, 32: 0.027}[depth])
    return Variant(options={**architecture, **_MERGING, "r": r, "prop_attn": architecture["pool"] != "weighted"})


_MERGING = {"r": 0, "schedule": "constant", "prop_attn": True, "groups": False}
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
            name="kept rows gathered, merged rows by a one-hot product; the last block for the class token alone",
            reason="a product with the whole merge matrix costs as many multiply-adds as attention "
            "(benchmarks/tome.py)",
        ),
        Target.TENSORRT: Form(
            name="places by counting, merged by one matrix product",
            reason="6 (tiny) to 10 (DeiT-S) kernels per merging block in FP16 for SM89; attention stays one kernel "
            "(TensorRT-RTX build log, benchmarks/tome.py)",
        ),
    },
    recipe={"system": "tome", "variant": "deit_small_patch16_224", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99953 with the head in INT8, 0.99968 without.
    keep_high=lambda options: {
        r"^head": "head: hardly any work, 32 % of the error",
        r"^merges\.": "merging: rounded similarities and counts merge other tokens",
    },
    stride="patch",
    adapt=vit.adapt,
    extra_outputs=extra_outputs,
    keep_fp32=keep_fp32,
    decisions=DECISIONS,
    drawing=DRAWING,
    tuning=tuning(schedule_of),
    flags=(
        Flag(name="r", key="options.r", help="tokens that each block merges away; 0 is the plain model"),
        Flag(
            name="schedule",
            key="options.schedule",
            help="constant, decreasing, increasing, aligned, an inflection from -1 to 1, or one number a block",
        ),
    ),
)
