"""The decoder of the training form: query selection, deformable cross-attention, boxes refined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models.rtdetr.layers import Attention, ConvNorm, Mlp
from deploy.models.rtdetr.sampling import DiscreteSampling, GridSampling, MapSize

STRIDES = (8, 16, 32)
EPS = 1e-5  # of the inverse sigmoid
ANCHOR_SIDE = 0.05  # of the image, at stride 8; doubled with every level


def map_sizes(size: MapSize) -> list[MapSize]:
    """Return height and width of the maps of an image, stride 8 first."""
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in STRIDES]


def anchors_of(sizes: Sequence[MapSize]) -> tuple[Tensor, Tensor]:
    """Return anchors [1,L,4] as logits of (cx, cy, w, h), and which are valid [1,L,1].

    An anchor is valid when all four lie strictly between 0.01 and 0.99; others are infinite. With a side above 400
    pixels that takes away the border of the stride-8 map.
    """
    levels = []
    for level, (height, width) in enumerate(sizes):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centre = torch.stack([x / width, y / height], -1).reshape(-1, 2)
        levels.append(torch.cat([centre, torch.full_like(centre, ANCHOR_SIDE * 2.0**level)], 1))
    anchors = torch.cat(levels)[None]
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return torch.where(valid, torch.log(anchors / (1 - anchors)), torch.inf), valid


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Return the logit of a probability, both sides kept at least ``EPS`` from 0."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp_min(EPS) / (1 - x).clamp_min(EPS))


class DeformableAttention(nn.Module):
    """Cross-attention to a few points of each map, placed relative to the query's box.

    Args:
        dim: C.
        heads: Each has C/heads channels of the value.
        sizes: Height and width of the maps.
        points: Points per level.
        discrete: Take pixels instead of interpolating (RT-DETRv2's ``discrete`` checkpoints).
    """

    def __init__(
        self, dim: int, heads: int, sizes: Sequence[MapSize], points: Sequence[int], *, discrete: bool
    ) -> None:
        super().__init__()
        total = sum(points)
        self.heads, self.points, self.sizes = heads, list(points), list(sizes)
        self.sampling_offsets = nn.Linear(dim, heads * total * 2)  # rows: head, level, point, (x, y)
        self.attention_weights = nn.Linear(dim, heads * total)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sampling = (DiscreteSampling if discrete else GridSampling)(sizes, points)

    def forward(self, query: Tensor, boxes: Tensor, memory: Tensor) -> Tensor:
        """Attend.

        Args:
            query: [N,Q,C].
            boxes: [N,Q,4], (cx, cy, w, h) in 0..1.
            memory: [N,L,C].

        Returns:
            [N,Q,C].
        """
        batch, queries, dim = query.shape
        total = sum(self.points)
        value = self.value_proj(memory).transpose(1, 2)
        maps = [
            part.reshape(batch * self.heads, dim // self.heads, height, width)
            for part, (height, width) in zip(value.split([h * w for h, w in self.sizes], 2), self.sizes, strict=True)
        ]
        offsets = self.sampling_offsets(query).reshape(batch, queries, self.heads, total, 2)
        share = torch.tensor([1 / n for n in self.points for _ in range(n)], dtype=query.dtype, device=query.device)
        boxes = boxes[:, :, None, None]
        location = boxes[..., :2] + offsets * share[:, None] * boxes[..., 2:] * 0.5
        weights = self.attention_weights(query).reshape(batch, queries, self.heads, total).softmax(-1)
        grid = (2 * location - 1).transpose(1, 2).reshape(batch * self.heads, queries, total, 2)
        weights = weights.transpose(1, 2).reshape(batch * self.heads, 1, queries, total)
        sampled = self.sampling(maps, grid, weights).reshape(batch, dim, queries)
        return self.output_proj(sampled.transpose(1, 2))


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention, MLP; each with a residual and a norm behind it."""

    def __init__(self, dim: int, heads: int, hidden: int, cross: DeformableAttention, *, packed: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads, packed=packed)
        self.cross_attn = cross
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, boxes: Tensor, memory: Tensor) -> Tensor:
        """Run the layer on queries [N,Q,C]."""
        x = self.norm1(x + self.self_attn(x + position, x))
        x = self.norm2(x + self.cross_attn(x + position, boxes, memory))
        return self.norm3(x + self.linear2(functional.relu(self.linear1(x))))


class LayerStack(nn.Module):
    """The decoder's layers, under the name that checkpoints give them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Projection(nn.Module):
    """Linear layer and norm in front of the query selection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Project and normalise [N,L,C]."""
        return self.norm(self.linear(x))


class Decoder(nn.Module):
    """Three maps to logits [N,Q,classes] and boxes [N,Q,4] (cx, cy, w, h in 0..1) of the best Q positions.

    Args:
        channels: Of each map.
        size: Image height and width; decides anchors and the mask of valid ones.
        classes: Without background.
        dim, heads, hidden, depth: Of the layers.
        eval_idx: The layer that answers; later ones exist in the checkpoint only. -1 is the last.
        points: Per level.
        queries: Q.
        discrete: See ``DeformableAttention``.
        packed: See ``Attention``.
    """

    anchors: Tensor
    valid: Tensor

    def __init__(
        self, channels: list[int], size: MapSize, classes: int, *, dim: int, heads: int, hidden: int, depth: int,
        eval_idx: int, points: Sequence[int], queries: int, discrete: bool, packed: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = map_sizes(size)
        self.queries, self.used = queries, (eval_idx if eval_idx >= 0 else depth + eval_idx) + 1
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, 1) for c in channels)
        crosses = [DeformableAttention(dim, heads, sizes, points, discrete=discrete) for _ in range(depth)]
        self.decoder = LayerStack([DecoderLayer(dim, heads, hidden, cross, packed=packed) for cross in crosses])
        self.denoising_class_embed = nn.Embedding(classes + 1, dim)  # read in training only
        self.query_pos_head = Mlp(4, 2 * dim, dim, 2)
        self.enc_output = Projection(dim)
        self.enc_score_head, self.enc_bbox_head = nn.Linear(dim, classes), Mlp(dim, dim, 4, 3)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, classes) for _ in range(depth))
        self.dec_bbox_head = nn.ModuleList(Mlp(dim, dim, 4, 3) for _ in range(depth))
        anchors, valid = anchors_of(sizes)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("valid", valid, persistent=False)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Detect."""
        memory = self.memory(maps)
        x, logit_boxes, _ = self.select(memory)
        boxes = logit_boxes.sigmoid()
        for layer, head in list(zip(self.decoder.layers, self.dec_bbox_head, strict=True))[: self.used]:
            x = layer(x, self.query_pos_head(boxes), boxes, memory)
            boxes = (head(x) + inverse_sigmoid(boxes)).sigmoid()
        return self.dec_score_head[self.used - 1](x), boxes

    def memory(self, maps: list[Tensor]) -> Tensor:
        """Project and join the maps, [N,L,C]."""
        return torch.cat([p(x).flatten(2) for p, x in zip(self.input_proj, maps, strict=True)], 2).transpose(1, 2)

    def select(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [N,Q,C], boxes as logits [N,Q,4] and positions [N,Q] with the best class scores.

        Invalid positions are zeroed here and nowhere else: they all get one score, a constant of the weights.
        """
        features = self.enc_output(memory * self.valid)
        boxes = self.enc_bbox_head(features) + self.anchors
        _, index = self.enc_score_head(features).amax(-1).topk(self.queries, dim=1)
        taken = [x.gather(1, index[..., None].expand(-1, -1, x.shape[2])) for x in (features, boxes)]
        return taken[0], taken[1], index
