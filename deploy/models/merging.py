"""What token merging tells the rest of effdeploy: how its choices are judged, drawn and tuned.

Apart from ``deploy.models.tome``, which is the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy.models import vit
from deploy.models.decisions import Arrays, Decisions, Outputs
from deploy.models.drawing import Drawing, Panel, Picture
from deploy.models.tuning import Tuning


def places_of(plan: Any, got: Outputs) -> Tensor:
    """Return where each token goes by a plan's outputs, int64 [N,T]; -1 where it goes nowhere.

    Reads both forms: rows of the flattened batch that stay, those that are merged and their receivers; or the matrix of
    weights; and places themselves.
    """
    sides = plan.sides
    if len(got) == 1:
        return got[0]
    if got[0].ndim == 3:
        taken = got[0][..., : sides.tokens] > 0  # behind them it is padded
        return torch.where(taken.any(1), taken.float().argmax(1), -1)
    r, count = plan.r, sides.tokens - plan.r
    stay, merged, receiver = (part.long().reshape(-1, n) for part, n in zip(got, (count, r, r), strict=True))
    start = torch.arange(stay.shape[0])[:, None] * sides.tokens
    places = torch.full((stay.shape[0], sides.tokens + 1), -1)
    places.scatter_(1, _within(stay - start, sides.tokens), torch.arange(count).expand_as(stay))
    places.scatter_(1, _within(merged - start, sides.tokens), count - sides.receivers + receiver)
    return places[:, : sides.tokens]


def _within(index: Tensor, count: int) -> Tensor:
    """Send what points outside of ``count`` to a place behind it."""
    return torch.where((index >= 0) & (index < count), index, count)


def flips(plan: nn.Module, inputs: Outputs, expected: Outputs, got: Outputs) -> tuple[Tensor, Tensor]:
    """Count proposals that are decided otherwise, and how much the plan's own scores preferred its decision."""
    known = cast(Any, plan)
    sides, r = known.sides, known.r
    metric = known.metric(inputs[0])
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, sides.a :: 2] @ metric[:, sides.b :: 2].transpose(1, 2)
    best = scores.amax(-1)
    ranked = best.sort(-1, descending=True).values
    before = sides.protected + sides.proposers - r
    mine, theirs = (places_of(plan, outputs)[:, sides.a :: 2] for outputs in (expected, got))
    merged, taken = mine >= before, theirs >= before
    receiver = (theirs - before).clamp(0, sides.receivers - 1)
    chosen = torch.where(taken, best - scores.gather(2, receiver[..., None]).squeeze(2), 0)
    last_merged = ranked[:, r - 1 : r]
    first_kept = ranked[:, r : r + 1] if r < sides.proposers else torch.full_like(last_merged, -torch.inf)
    margin = torch.where(merged & ~taken, best - first_kept, torch.where(taken & ~merged, last_merged - best, 0))
    differs = (merged != taken) | (merged & taken & (mine != theirs))
    if not sides.sort:
        kept = ~merged & ~taken
        wanted = ranked.gather(1, (r + theirs - sides.protected).clamp(0, sides.proposers - 1))
        margin = torch.where(kept & (mine != theirs), (wanted - best).abs(), margin)
        differs |= kept & (mine != theirs)
    margin = torch.where(differs, torch.maximum(margin, chosen), 0).amax(1)
    impossible = _impossible(sides, r, places_of(plan, got))
    return differs.sum(1), torch.where(impossible, torch.inf, margin)


def _impossible(sides: Any, r: int, places: Tensor) -> Tensor:
    """Tell rows [N] that are no merge of ``r`` tokens: one lost, an empty place, kept ones out of order."""
    before = sides.protected + sides.proposers - r
    proposers = places[:, sides.a :: 2]
    kept = proposers < before
    lost = (places < 0).any(1) | (places >= before + sides.receivers).any(1) | (kept.sum(1) != sides.proposers - r)
    counts = torch.zeros(places.shape[0], before + sides.receivers + 1, dtype=torch.long)
    counts.scatter_add_(1, _within(places, before + sides.receivers), torch.ones_like(places))
    receivers = places[:, sides.b :: 2] != before + torch.arange(sides.receivers)
    wrong = lost | (counts[:, :-1] == 0).any(1) | (counts[:, :before] != 1).any(1) | receivers.any(1)
    if sides.sort and sides.proposers > r:
        order = torch.where(kept, proposers, torch.arange(sides.proposers) + before)
        ascending = order.masked_fill(~kept, -1).cummax(1).values
        wrong |= (kept & (order < ascending)).any(1)
    return wrong


def shares(plans: Sequence[nn.Module], expected: Sequence[Outputs], got: Sequence[Outputs]) -> list[Tensor]:
    """Return after each plan the share [N] of the first tokens whose group begins with the same token."""
    found = []
    groups: list[Tensor] = []
    for plan, *outputs in zip(plans, expected, got, strict=True):
        places = [places_of(plan, one).clamp(min=0) for one in outputs]
        after = int(places[0].max())
        places = [p.clamp(max=after) for p in places]
        groups = [p.gather(1, g) for p, g in zip(places, groups, strict=True)] if groups else places
        mine, theirs = (first_members(group) for group in groups)
        found.append((mine == theirs).double().mean(1))
    return found


def follow(
    model: nn.Module, plans: Sequence[nn.Module], chosen: Sequence[Outputs] | None, images: Outputs
) -> tuple[Any, list[Outputs], list[Outputs]]:
    """Run the training form with the merges of a deploy form's plans, and keep what it would have merged itself."""
    given: list[Outputs] = []
    own: list[Outputs] = []

    def choose(keys: Tensor, r: int, sides: Any) -> Tensor:
        mine = cast(Any, model).choose(keys, r, sides)
        index = len(own)
        if index == len(plans):  # a last block that only the class token leaves, so that its graph merges nothing there
            return cast(Tensor, mine)
        given.append((cast(Any, plans[index]).given(keys),))
        own.append((mine,))
        taken = mine if chosen is None else places_of(plans[index], chosen[index])
        return cast(Tensor, taken.clamp(0, sides.tokens - r - 1))

    following = copy.copy(model)
    following.__dict__["choose"] = choose
    return following(*images), given, own


def first_members(groups: Tensor) -> Tensor:
    """Name each group after its first token: int64 [N,T] of any numbers below T to int64 [N,T]."""
    tokens = torch.arange(groups.shape[1]).expand_as(groups)
    first = torch.full_like(groups, groups.shape[1]).scatter_reduce(1, groups, tokens, "amin")
    return first.gather(1, groups)


DECISIONS = Decisions(what="merges", modules=r"merges\.\d+\.plan", flips=flips, shares=shares, follow=follow)

MOST_PANELS, PIXELS = 4, 24  # a panel has at least so many pixels a patch


def panels(options: Mapping[str, Any], picture: Picture, outputs: Arrays, other: Arrays) -> tuple[Panel, ...]:
    """Draw after several blocks each group of patches in its mean colour, with its outline; outlined in red: patches
    whose group is another one in the other run.
    """
    mine, theirs = (np.asarray(found["groups"])[0] for found in (outputs, other))
    prefix = mine.shape[1] - (picture.shape[0] // options["patch"]) * (picture.shape[1] // options["patch"])
    depth = len(mine)
    shown = sorted({round(depth * (n + 1) / MOST_PANELS) - 1 for n in range(min(MOST_PANELS, depth))})
    found = []
    for block in shown:
        own, others = (first_members(torch.from_numpy(g[None].copy()))[0].numpy() for g in (mine[block], theirs[block]))
        same = own == others
        agreement = float(same.mean())
        title = f"after block {block + 1}: {mine[block].max() + 1} of {mine.shape[1]} tokens"
        title += f", {agreement:.0%} alike"
        drawn = draw_groups(picture, own[prefix:], same[prefix:], int(options["patch"]))
        found.append(Panel(title=title, picture=drawn, agreement=agreement))
    return tuple(found)


def draw_groups(picture: Picture, groups: NDArray[np.int64], same: NDArray[np.bool_], patch: int) -> Picture:
    """Fill each group of patches with its mean colour and draw lines between groups, red around patches not ``same``.

    Args:
        picture: RGB uint8 [H,W,3].
        groups: The group of each patch, [H / patch * W / patch].
        same: Likewise.
        patch: Side of a patch in pixels.
    """
    zoom = -(-PIXELS // patch)
    rows, columns = picture.shape[0] // patch, picture.shape[1] // patch
    means = picture.reshape(rows, patch, columns, patch, 3).mean((1, 3)).reshape(rows * columns, 3)
    counts = np.bincount(groups)
    sums = np.stack([np.bincount(groups, means[:, c]) for c in range(3)], 1)
    colours = (sums / np.maximum(counts, 1)[:, None])[groups]
    big = picture.repeat(zoom, 0).repeat(zoom, 1).astype(np.float64)
    side = patch * zoom

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape(rows, columns, -1).repeat(side, 0).repeat(side, 1)

    merged = spread(counts[groups] > 1)
    big = np.where(merged, spread(colours), big)
    labels = spread(groups)[..., 0]
    big[_lines(labels, 1)] = 255
    wrong = spread(~same)[..., 0]
    big[_lines(wrong, 3) & wrong] = (220, 30, 30)
    return np.clip(np.rint(big), 0, 255).astype(np.uint8)


def _lines(labels: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Mark pixels within ``width`` of another label, above or to the left of the change and below or to its right."""
    found = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        change = np.diff(labels, axis=axis) != 0
        for shift in range(-width + 1, width + 1):
            moved = np.roll(np.pad(change, [(0, 1) if a == axis else (0, 0) for a in (0, 1)]), shift, axis)
            found |= moved
    return found


DRAWING = Drawing(what="merged patches", needs=("groups",), asked_by="options.groups=true", panels=panels)


def tuning(schedule_of: Callable[[Mapping[str, Any], tuple[int, int]], tuple[int, ...]]) -> Tuning:
    """Return what is tuned; ``schedule_of`` reads options as the network does."""

    def start(options: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        return vit.patch_count(options, size) + vit.prefix_count(options), int(options["depth"])

    def seeds(options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        tokens, depth = start(options, size)
        plain = {"r = 0": (0,) * depth}
        for share in (0.35, 0.6, 0.85):
            r = min(most_merged(options, tokens), max(1, round(share * tokens / depth)))
            plain[f"r = {r}"] = schedule_of({**options, "r": r, "schedule": "constant"}, size)
        r = max(1, round(0.6 * tokens / depth))
        plain[f"r = {r}, aligned"] = schedule_of({**options, "r": r, "schedule": "aligned"}, size)
        return plain

    return Tuning(
        what="tokens merged by each block", option="schedule", start=start, most=most_merged, seeds=seeds,
        layer=r"(?:blocks|merges)\.(\d+)\b", reschedule=rescheduled, plain="unmerged", taking="merging",
        schedule=schedule_of,
    )  # fmt: skip


def most_merged(options: Mapping[str, Any], left: int) -> int:
    """Return how many of so many tokens one block may merge: half of those that are not protected."""
    return max(0, (left - bool(options["class_token"]) - bool(options["distilled"])) // 2)


def rescheduled(model: nn.Module, schedule: tuple[int, ...]) -> nn.Module:
    """Return a copy of the training form with another schedule, which shares the weights."""
    other = copy.copy(model)
    other.schedule = schedule  # type: ignore[assignment]
    return other
