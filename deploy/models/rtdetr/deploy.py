"""The decoder that is exported: the same function with everything linear composed beforehand.

What is folded, exactly up to rounding, in the dtype of the training form, which ``to_deploy`` gives in float64:

* ``decoder.input_proj`` is linear and only linear layers read it, so it disappears into them: the values of all layers
  come from one 1x1 convolution per map, V_i (W f + b) + v_i = (V_i W) f + (V_i b + v_i), and stay maps, so that no
  transpose stands before the sampling. The projection for the query selection is composed the same way.
* The offsets' scale (1/points, half a box, and a grid that runs from -1 to 1) is in the offsets' weights.
* The box head of the query selection runs on the selected queries only.
* Boxes travel as logits. logit(sigmoid(z)) is z, clamped where the training form clamps; so one clamp replaces a
  sigmoid, two clamps, a division and a logarithm per layer, and float16 keeps more digits of a box near 0 or 1.
* Anchors and the mask of valid ones are constants; an invalid anchor is ``FAR``, whose sigmoid is 1 as infinity's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.models.rtdetr.decoder import EPS, Decoder, DecoderLayer, DeformableAttention, LayerStack
from deploy.models.rtdetr.layers import ConvNorm, DeployAttention, fold_norm, linear, pointwise
from deploy.models.rtdetr.sampling import BILINEAR, DiscreteSampling

FAR = 1e4  # finite in float16 as well
LIMIT = math.log((1 - EPS) / EPS)


class DeployCrossAttention(nn.Module):
    """Deformable attention whose values come ready as maps."""

    def __init__(self, cross: DeformableAttention, form: str) -> None:
        super().__init__()
        self.heads, self.total = cross.heads, sum(cross.points)
        discrete = isinstance(cross.sampling, DiscreteSampling)
        self.sampling = (DiscreteSampling if discrete else BILINEAR[form])(cross.sizes, cross.points)
        offsets = cross.sampling_offsets
        share = torch.tensor([1 / n for n in cross.points for _ in range(n)], dtype=offsets.weight.dtype)
        scale = share[None, :, None].expand(cross.heads, -1, 2).reshape(-1)
        self.sampling_offsets = linear(offsets.weight * scale[:, None], offsets.bias * scale)
        self.attention_weights, self.output_proj = cross.attention_weights, cross.output_proj

    def forward(self, query: Tensor, boxes: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Attend from [N,Q,C] with boxes [N,Q,4] to maps [N,C,H_l,W_l]."""
        _, queries, dim = query.shape
        offsets = self.sampling_offsets(query).reshape(-1, queries, self.heads, self.total, 2).transpose(1, 2)
        boxes = boxes.reshape(-1, 1, queries, 1, 4)
        grid = (boxes[..., :2] * 2 - 1 + offsets * boxes[..., 2:]).reshape(-1, queries, self.total, 2)
        weights = self.attention_weights(query).reshape(-1, queries, self.heads, self.total).softmax(-1)
        weights = weights.transpose(1, 2).reshape(-1, 1, queries, self.total)
        values = [x.reshape(-1, dim // self.heads, x.shape[2], x.shape[3]) for x in maps]
        return self.output_proj(self.sampling(values, grid, weights).reshape(-1, dim, queries).transpose(1, 2))


class DeployLayer(nn.Module):
    """A decoder layer on ready values."""

    def __init__(self, layer: DecoderLayer, form: str) -> None:
        super().__init__()
        self.self_attn = DeployAttention(layer.self_attn)
        self.cross_attn = DeployCrossAttention(layer.cross_attn, form)
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3

    def forward(self, x: Tensor, position: Tensor, boxes: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Run the layer on queries [N,Q,C]."""
        x = self.norm1(x + self.self_attn(x + position, x))
        x = self.norm2(x + self.cross_attn(x + position, boxes, maps))
        return self.norm3(x + self.linear2(functional.relu(self.linear1(x))))


class QuerySelection(nn.Module):
    """Features and boxes of the positions with the best class scores, from the encoder's maps."""

    anchors: Tensor
    valid: Tensor
    shift: Tensor
    wide: Tensor

    def __init__(self, decoder: Decoder, projections: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        proj, self.norm = decoder.enc_output.linear, decoder.enc_output.norm
        self.masked, self.queries = not bool(decoder.valid.all()), decoder.queries
        self.maps = nn.ModuleList()
        for weight, bias in projections:
            # The mask zeroes a position before the projection: only the projection's own bias is left there.
            own = 0 if self.masked else proj.bias
            self.maps.append(pointwise(proj.weight @ weight, proj.weight @ bias + own))
        self.score_head, self.bbox_head = decoder.enc_score_head, decoder.enc_bbox_head
        anchors = torch.where(decoder.anchors.isinf(), FAR, decoder.anchors)[0]
        self.register_buffer("anchors", anchors.clone(), persistent=False)
        self.register_buffer("valid", decoder.valid.to(proj.weight.dtype), persistent=False)
        self.register_buffer("shift", proj.bias.detach().clone(), persistent=False)
        self.register_buffer("wide", torch.zeros(1, 1, proj.out_features, dtype=torch.int64), persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [N,Q,C], boxes as logits [N,Q,4], and the positions chosen [N,Q]."""
        x = torch.cat([project(m).flatten(2) for project, m in zip(self.maps, maps, strict=True)], 2).transpose(1, 2)
        features = self.norm(x * self.valid + self.shift if self.masked else x)
        _, index = self.score_head(features).amax(-1).topk(self.queries, dim=1)
        chosen = features.gather(1, index[..., None] + self.wide)
        return chosen, self.bbox_head(chosen) + functional.embedding(index, self.anchors), index


class DeployDecoder(nn.Module):
    """Maps to logits [N,Q,classes] and boxes [N,Q,4] of the selected queries.

    Args:
        decoder: The training form.
        form: Of the bilinear sampling, see ``deploy.models.rtdetr.sampling``.
        stacked: Compute the values of all layers by one convolution of each map.
    """

    def __init__(self, decoder: Decoder, form: str, *, stacked: bool = True) -> None:
        super().__init__()
        layers = [cast(DecoderLayer, layer) for layer in decoder.decoder.layers][: decoder.used]
        projections = []
        for block in decoder.input_proj:
            weight, bias = fold_norm(cast(ConvNorm, block))
            projections.append((weight.flatten(1), bias))
        self.selection = QuerySelection(decoder, projections)
        kind = StackedValues if stacked else SeparateValues
        self.values = nn.ModuleList(kind(layers, *projection) for projection in projections)
        self.decoder = LayerStack([DeployLayer(layer, form) for layer in layers])
        self.query_pos_head, self.score_head = decoder.query_pos_head, decoder.dec_score_head[decoder.used - 1]
        self.bbox_head = nn.ModuleList(list(decoder.dec_bbox_head)[: decoder.used])

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Detect."""
        x, boxes, _ = self.selection(maps)
        values = [value(m) for value, m in zip(self.values, maps, strict=True)]
        for index, (layer, head) in enumerate(zip(self.decoder.layers, self.bbox_head, strict=True)):
            shown = boxes.sigmoid()
            x = layer(x, self.query_pos_head(shown), shown, [level[index] for level in values])
            boxes = boxes.clamp(-LIMIT, LIMIT) + head(x)
        return self.score_head(x), boxes.sigmoid()


class SeparateValues(nn.ModuleList):
    """The values of each layer by a convolution of its own: what a runtime splits on the CPU, it copies."""

    def __init__(self, layers: Sequence[DecoderLayer], weight: Tensor, bias: Tensor) -> None:
        super().__init__(_values([layer], weight, bias) for layer in layers)

    def forward(self, image_map: Tensor) -> list[Tensor]:
        """Return the values [N,C,H,W] of each layer."""
        return [convolve(image_map) for convolve in self]


class StackedValues(nn.Module):
    """The values of all layers by one convolution: fewer and larger kernels."""

    def __init__(self, layers: Sequence[DecoderLayer], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.convolve, self.dim = _values(layers, weight, bias), layers[0].cross_attn.value_proj.out_features

    def forward(self, image_map: Tensor) -> tuple[Tensor, ...]:
        """Return the values [N,C,H,W] of each layer."""
        return self.convolve(image_map).split(self.dim, 1)


def _values(layers: Sequence[DecoderLayer], weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Compose the value projections of layers with a map's projection, stacked into one convolution."""
    projections = [layer.cross_attn.value_proj for layer in layers]
    composed = torch.cat([p.weight @ weight for p in projections])
    return pointwise(composed, torch.cat([p.weight @ bias + p.bias for p in projections]))
