"""The vision transformer's block as ONNX Runtime runs it fastest: tokens of the whole batch as rows, in pieces."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deploy.models.vit import Block, DeployBlock

MOST_BYTES, PIECE_BYTES = 6_500_000, 2_500_000  # of an MLP's hidden layer: computed at once, and of a piece


class RowBlock(DeployBlock):
    """The same over the tokens of a batch as rows [N*T,C], which saves ONNX Runtime two reshapes a linear layer.

    A large fixed batch goes through the layers a few images at a time, so that what they pass on stays in the cache:
    1576 rows of DeiT-S took 1.10 times as long at once as in pieces of 394 (benchmarks/README.md). A dynamic batch
    cannot be cut; INT8 must not be, because each piece would get scales of its own.
    """

    def __init__(self, block: Block, queries: int = 0, pieces: bool = True) -> None:
        super().__init__(block, queries)
        self.pieces, self.metric = pieces, HeadSum(block.attn.heads, block.attn.qkv.weight.dtype)

    def attend(self, x: Tensor, bias: Tensor | None = None, batch: int = 1) -> tuple[Tensor, Tensor]:
        """Run the attention half; also returns the keys, summed over the heads [N,T,C/heads].

        Args:
            x: [N*T,C].
            bias: [N,1,1,T], added to the logits.
            batch: N.
        """
        counts = self._counts(x, batch)
        if len(counts) == 1:
            return self._attend(x, bias, batch)
        rows = [count * (x.shape[0] // batch) for count in counts]
        biases = (None,) * len(counts) if bias is None else torch.split(bias, counts)
        parts = [self._attend(*each) for each in zip(torch.split(x, rows), biases, counts, strict=True)]
        mixed, metrics = zip(*parts, strict=True)
        return torch.cat(mixed), torch.cat(metrics)

    def feed(self, x: Tensor, batch: int = 1) -> Tensor:
        """Run the MLP half over [N*T,C]."""
        counts, whole = self._counts(x, batch), super().feed
        if len(counts) == 1:
            return whole(x)
        rows = [count * (x.shape[0] // batch) for count in counts]
        return torch.cat([whole(part) for part in torch.split(x, rows)])

    def _counts(self, x: Tensor, batch: int) -> list[int]:
        """Return how many images go through the layers together, by what the MLP's hidden layer takes of each."""
        if not self.pieces or not isinstance(batch, int) or batch == 1:
            return [batch]
        image = x.shape[0] // batch * self.mlp.fc1.out_features * 4
        if image * batch <= MOST_BYTES:
            return [batch]
        pieces = math.ceil(batch / max(1, PIECE_BYTES // image))
        return [batch * (i + 1) // pieces - batch * i // pieces for i in range(pieces)]

    def _attend(self, x: Tensor, bias: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        normed = self.norm1(x)
        queries, values = self.attn.q(self._first(normed, batch)), self._heads(self.attn.v(normed), batch)
        keys = self._heads(self.attn.k(normed), batch).transpose(-1, -2)  # moved once, for the logits and the metric
        logits = self._heads(queries, batch) @ keys
        mixed = torch.softmax(logits if bias is None else logits + bias, -1) @ values
        rows = mixed.transpose(1, 2).reshape(-1, x.shape[-1])
        return self._first(x, batch) + self.attn.proj(rows), self.metric(keys)

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        return x.reshape(batch, -1, self.attn.heads, x.shape[-1] // self.attn.heads).transpose(1, 2)

    def _first(self, x: Tensor, batch: int) -> Tensor:
        if not self.queries:
            return x
        if batch == 1:
            return x[: self.queries]
        return x.reshape(batch, -1, x.shape[-1])[:, : self.queries].reshape(-1, x.shape[-1])


class HeadSum(nn.Module):
    """Sums keys over the heads by a product with ones.

    ONNX Runtime's own sum over that axis is the slower operator for one image.
    """

    def __init__(self, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ones = nn.Buffer(torch.ones(1, heads, dtype=dtype), persistent=False)

    def forward(self, keys: Tensor) -> Tensor:
        """[N,heads,d,T] to [N,T,d]."""
        batch, heads, width, tokens = keys.shape
        return (self.ones @ keys.reshape(batch, heads, width * tokens)).reshape(batch, width, tokens).transpose(1, 2)
