"""How tokens are merged in the graphs that are exported: one form a target, the same function (``deploy.models.tome``).

Both forms decide in a module of its own, whose outputs are the decision and nothing else (``deploy.parity.decisions``
looks at them), and average after it. r is a constant of each block, so shapes are static and nothing is added by a
scatter.

    RowMerge      ONNX Runtime: tokens of the whole batch are rows. A small cost for every operator, so few of them, and
                  none on all rows but the gather that drops the merged ones; the r receivers are averaged apart
    MatrixMerge   TensorRT: places by counting, one product with a matrix of weights; element-wise chains fuse there
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Plan = tuple[Tensor, ...]
ALIGNED = 8  # TensorRT pads other sizes of a product by itself, each with a kernel


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


class RowPlan(nn.Module):
    """Decides with two TopK, so that ties can neither lose nor double a token.

    The second one sorts all tokens by where they go: protected ones, kept ones of A, B; those merged away come last and
    are cut off.
    """

    def __init__(self, sides: Sides, r: int) -> None:
        super().__init__()
        self.sides, self.r = sides, r
        tokens = sides.tokens
        ranks = torch.arange(tokens)
        ranks[sides.a :: 2] = tokens + torch.arange(sides.proposers)
        ranks[sides.b :: 2] = 2 * tokens + torch.arange(sides.receivers)
        self.ranks = nn.Buffer(ranks, persistent=False)
        self.fixed = nn.Buffer(torch.arange(sides.b, tokens, 2), persistent=False)

    @staticmethod
    def given(keys: Tensor) -> Tensor:
        """Return what ``forward`` takes of keys [N,heads,T,d]."""
        return keys.sum(1)

    @staticmethod
    def metric(given: Tensor) -> Tensor:
        """Return the tokens' keys [N,T,d], up to a factor, from what ``forward`` takes."""
        return given

    def forward(self, metric: Tensor, image: Tensor) -> Plan:
        """Choose.

        Args:
            metric: Keys summed over the heads [N,T,d]; the norm takes away what a mean would divide by.
            image: int64 [N,1]: 0 to N-1.

        Returns:
            int64: rows that stay, in their new order [N,T-r], rows that are merged away [N,r], and the receivers of
            the latter, counted from the first of B [N,r]. Rows are those of the batch, [N*T].
        """
        batch, sides = metric.shape[0], self.sides
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, sides.a :: 2] @ metric[:, sides.b :: 2].transpose(1, 2)
        best, receiver = scores.amax(-1), scores.argmax(-1)
        if sides.sort:
            merged = best.topk(self.r).indices
            gone = merged * 2 + sides.a
            stay = self._sorted(gone, batch)
        else:
            ranked = best.topk(sides.proposers).indices
            merged = ranked[:, : self.r]
            gone, kept = merged * 2, ranked[:, self.r :] * 2
            stay = torch.cat((kept, self.fixed.expand(batch, -1)), -1)
        receiver = receiver.gather(-1, merged)
        if batch == 1:
            return stay, gone, receiver
        start = image * sides.tokens
        return stay + start, gone + start, receiver

    def _sorted(self, gone: Tensor, batch: int) -> Tensor:
        ranks = self.ranks.expand(batch, -1)
        tokens = self.sides.tokens
        return ranks.scatter(-1, gone, 4 * tokens).topk(tokens - self.r, largest=False).indices


class RowMerge(nn.Module):
    """Merging for ONNX Runtime: the rows that stay are gathered, and only the r receivers among them are written again.

    A receiver of several tokens is computed once for each of them, to the same value.
    """

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sides, self.r, self.plan = sides, r, RowPlan(sides, r)
        self.count = sides.tokens - r
        self.before = self.count - sides.receivers
        self.own = nn.Buffer(torch.eye(r, dtype=dtype)[None], persistent=False)

    def forward(self, x: Tensor, size: Tensor | None, metric: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Merge.

        Args:
            x: Tokens [N*T,C].
            size: [N*T,1], or ``None`` for ones.
            metric: Keys summed over the heads [N,T,d].
            image: int64 [N,1]: 0 to N-1.

        Returns:
            Tokens [N*(T-r),C], their sizes [N*(T-r),1], and the plan.
        """
        stay, gone, receiver = plan = self.plan(metric, image)
        receiving, at = receiver * 2 + self.sides.b, receiver + self.before  # rows before the merge, and after it
        if metric.shape[0] != 1:
            receiving, at = receiving + image * self.sides.tokens, at + image * self.count
        stay = stay.flatten()
        both = torch.cat((receiving, gone), 1)
        same = (receiver[..., None] == receiver[:, None]).to(x.dtype)
        weights = torch.cat((self.own.expand(same.shape[0], -1, -1), same), 2)
        if size is None:
            sizes = (stay >= 0).to(x.dtype)[:, None]  # ones, whose number no dynamic batch has to compute
        else:
            sizes, weights = rows(size, stay), weights * rows(size, both).transpose(1, 2)
        total = weights.sum(2, keepdim=True)
        mean = weights @ rows(x, both) / total
        return rows(x, stay).index_put((at,), mean), sizes.index_put((at,), total), plan

    def places(self, plan: Plan, batch: int) -> Tensor:
        """Return where each token goes by the plan of a batch, int64 [N,T]."""
        tokens = self.sides.tokens
        stay, gone, receiver = plan
        order = (torch.cat((stay, gone), 1) % tokens).topk(tokens, largest=False).indices
        targets = torch.arange(self.count, device=stay.device).expand(batch, -1)
        return torch.cat((targets, self.before + receiver), 1).gather(1, order)


def rows(x: Tensor, places: Tensor) -> Tensor:
    """Gather rows [...,C] of [T,C]."""
    return functional.embedding(places, x)


class MatrixPlan(nn.Module):
    """Decides by counting, without TopK, slices or scatters: who is no proposer or receiver is masked by constants.

    A token's rank is the number of better proposals, equal ones counted when they come earlier; its place is the number
    of tokens that stay before it. All of it is element-wise arithmetic and reductions, which TensorRT fuses; matrices
    are padded to a multiple of ``ALIGNED`` tokens, as TensorRT would with kernels of their own. What is padded neither
    proposes nor receives, and has no place.
    """

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.r, self.sides, self.sort = r, sides, sides.sort
        tokens, kept = sides.tokens, sides.proposers - r
        self.padding = -tokens % ALIGNED
        padded = tokens + self.padding
        proposes, receives = torch.zeros(padded, dtype=dtype), torch.zeros(padded, dtype=dtype)
        proposes[sides.a : tokens : 2], receives[sides.b : tokens : 2] = 1, 1
        earlier = torch.ones(padded, padded, dtype=dtype).tril(-1)
        before = sides.protected + kept
        place = torch.arange(padded, dtype=dtype)
        place[sides.a : tokens : 2] = sides.protected + torch.arange(sides.proposers, dtype=dtype)
        place[sides.b : tokens : 2] = before + torch.arange(sides.receivers, dtype=dtype)
        place[tokens:] = -1
        self.mask = self._constant(4 * (proposes[:, None] * receives - 1))  # a cosine is at least -1
        self.place, self.proposes = self._constant(place), self._constant(proposes)
        self.earlier = self._constant(earlier > 0)
        self.staying = self._constant(earlier * proposes[:, None] * proposes)
        self.rows = self._constant(torch.arange(tokens - r, dtype=dtype)[:, None])

    @staticmethod
    def _constant(value: Tensor) -> nn.Buffer:
        return nn.Buffer(value, persistent=False)

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """Pad [N,T,C] to the tokens of the matrices."""
        return functional.pad(x, (0, 0, 0, self.padding), value=value) if self.padding else x

    @staticmethod
    def given(keys: Tensor) -> Tensor:
        """Return what ``forward`` takes of keys [N,heads,T,d]."""
        return keys.transpose(1, 2)

    @staticmethod
    def metric(given: Tensor) -> Tensor:
        """Return the tokens' keys [N,T,d], up to a factor, from what ``forward`` takes."""
        return given.mean(2)

    def forward(self, keys: Tensor, size: Tensor | None) -> Plan:
        """Choose.

        Args:
            keys: [N,T,heads,d].
            size: [N,T,1], or ``None`` for ones.

        Returns:
            Weights [N,T-r,P], new sizes [N,T-r,1], places [N,P] for P tokens, T of them and the padding.
        """
        metric = self.pad(self.metric(keys), 1)
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
        weights = weights if size is None else weights * self.pad(size, 1).transpose(1, 2)
        sizes = weights.sum(2, keepdim=True)
        return weights / sizes, sizes, places


class MatrixMerge(nn.Module):
    """Merging for TensorRT: one product with a matrix of weights."""

    def __init__(self, sides: Sides, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan = MatrixPlan(sides, r, dtype)

    def forward(self, x: Tensor, size: Tensor | None, keys: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Merge tokens [N,T,C] of sizes [N,T,1] by keys [N,T,heads,d]; the rest as ``RowMerge``."""
        plan = self.plan(keys, size)
        return plan[0] @ self.plan.pad(x), plan[1], plan

    def places(self, plan: Plan, batch: int) -> Tensor:
        """Return where each token goes by the plan of a batch, int64 [N,T]."""
        return plan[2][:, : self.plan.sides.tokens].long()
