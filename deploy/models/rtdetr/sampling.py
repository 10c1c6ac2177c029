"""Multi-scale sampling: values of the maps at points, weighted and summed, in forms that give the same numbers.

Every form takes the maps [N*heads,d,H_l,W_l] (stride 8 first), a grid [N*heads,Q,P,2] of (x, y) in -1..1, whose points
lie level by level, and weights [N*heads,1,Q,P]; it returns [N*heads,d,Q]. The bilinear forms take ``None`` for the
weights of a single point each. Bilinear, zero outside, pixel centres at half
steps (``align_corners=False``).

    grid_sample   one GridSample per level: few nodes, and the fastest on ONNX Runtime
    gather        four corners of zero-padded maps by one Gather per layer: no operator that a runtime could have wrong
    plugin        as grid_sample up to the builder, which gets TensorRT's multi-scale deformable attention instead

RT-DETRv2's ``discrete`` checkpoints do not interpolate: they take the pixel that a point falls on. They have one form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

MapSize = tuple[int, int]


class GridSampling(nn.Module):
    """``torch.nn.functional.grid_sample`` per level."""

    def __init__(self, sizes: Sequence[MapSize], points: Sequence[int]) -> None:
        super().__init__()
        self.points = list(points)

    def forward(self, maps: Sequence[Tensor], grid: Tensor, weights: Tensor | None) -> Tensor:
        """Sample, weight and sum."""
        parts = [
            functional.grid_sample(x, level, mode="bilinear", padding_mode="zeros", align_corners=False)
            for x, level in zip(maps, torch.split(grid, self.points, 2), strict=True)
        ]
        return parts[0].squeeze(3) if weights is None else (torch.cat(parts, 3) * weights).sum(3)


class GatherSampling(nn.Module):
    """Four corners by one gather from all levels at once.

    Each map gets a border of zeros, one pixel before and two behind. A point is clamped to the border, where all it can
    reach is zero; so no corner needs a mask.
    """

    scale: Tensor
    shift: Tensor
    far: Tensor
    last: Tensor
    row: Tensor
    start: Tensor
    corners: Tensor

    def __init__(self, sizes: Sequence[MapSize], points: Sequence[int]) -> None:
        super().__init__()
        sides = torch.tensor([(w, h) for (h, w), n in zip(sizes, points, strict=True) for _ in range(n)])
        rows = sides[:, 0] + 3
        starts = accumulate(((h + 3) * (w + 3) for h, w in sizes[:-1]), initial=0)
        first = torch.tensor([s for s, n in zip(starts, points, strict=True) for _ in range(n)])
        constants = {
            "scale": sides / 2,  # pixel = grid * side / 2 + (side - 1) / 2
            "shift": (sides - 1) / 2,
            "far": sides.float(),
            "last": sides,
            "row": rows,
            "start": first + rows + 1,  # pixel (0, 0) lies behind a row and a column of zeros
            "corners": torch.stack([torch.zeros_like(rows), torch.ones_like(rows), rows, rows + 1], 1),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, maps: Sequence[Tensor], grid: Tensor, weights: Tensor | None) -> Tensor:
        """Sample, weight and sum."""
        index, fraction = self.locate(grid)
        values = torch.cat([self.bordered(x) for x in maps], 2)
        taken = gather_columns(values, index).reshape(-1, values.shape[1], grid.shape[1], grid.shape[2] * 4)
        return (taken * self.bilinear(fraction, weights)).sum(3)

    @staticmethod
    def bordered(x: Tensor) -> Tensor:
        """Put the border around a map and flatten it, [n,d,H,W] to [n,d,(H + 3) * (W + 3)]."""
        return functional.pad(x, (1, 2, 1, 2)).flatten(2)

    def locate(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the corners int64 [n,1,Q * P * 4] in the bordered maps, and where between them the points lie."""
        _, queries, points, _ = grid.shape
        pixel = (grid * self.scale + self.shift).clamp_min(-1.0).minimum(self.far)
        low = pixel.floor()
        corner = low.to(torch.int64).clamp_min(-1).minimum(self.last)  # for NaN alone, whose index would be anything
        index = corner[..., 1] * self.row + corner[..., 0] + self.start
        index = (index[..., None] + self.corners).reshape(-1, 1, queries * points * 4)
        return index, pixel - low

    @staticmethod
    def bilinear(fraction: Tensor, weights: Tensor | None) -> Tensor:
        """Return the weights [n,1,Q,4P] of the corners, rows first, times the points' own."""
        x, y = fraction[..., 0], fraction[..., 1]
        lower = 1 - y if weights is None else weights[:, 0] * (1 - y)
        upper = y if weights is None else weights[:, 0] * y
        corners = torch.stack([lower * (1 - x), lower * x, upper * (1 - x), upper * x], 3)
        return corners.reshape(-1, 1, corners.shape[1], corners.shape[2] * 4)


class DiscreteSampling(nn.Module):
    """The pixel that a point falls on, by one gather from all levels.

    The release bounds both coordinates by the map's height, which on a wide image leaves the right part unread; the
    checkpoints are trained on squares, where nothing differs. Taller than wide it would read outside, so the width
    bounds as well.
    """

    sides: Tensor
    last: Tensor
    row: Tensor
    start: Tensor

    def __init__(self, sizes: Sequence[MapSize], points: Sequence[int]) -> None:
        super().__init__()
        level = [(size, start) for size, start in zip(sizes, accumulate((h * w for h, w in sizes), initial=0))]  # noqa: B905
        chosen = [entry for entry, n in zip(level, points, strict=True) for _ in range(n)]
        constants = {
            "sides": torch.tensor([(float(w), float(h)) for (h, w), _ in chosen]),
            "last": torch.tensor([(min(h, w) - 1, h - 1) for (h, w), _ in chosen]),
            "row": torch.tensor([w for (_, w), _ in chosen]),
            "start": torch.tensor([start for _, start in chosen]),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, maps: Sequence[Tensor], grid: Tensor, weights: Tensor) -> Tensor:
        """Take, weight and sum."""
        _, queries, points, _ = grid.shape
        # Truncation moves towards zero: it and a clamp at zero are a floor of the clamped value.
        pixel = ((grid + 1) * 0.5 * self.sides + 0.5).to(torch.int64).clamp_min(0).minimum(self.last)
        index = (pixel[..., 1] * self.row + pixel[..., 0] + self.start).reshape(-1, 1, queries * points)
        values = torch.cat([x.flatten(2) for x in maps], 2)
        taken = gather_columns(values, index).reshape(-1, values.shape[1], queries, points)
        return (taken * weights).sum(3)


def gather_columns(values: Tensor, index: Tensor) -> Tensor:
    """Take columns: [n,d,L] and an index [n,1,K] give [n,d,K].

    The index is widened by adding zeros: an Expand would read the batch from a Shape operator.
    """
    return values.gather(2, index + torch.zeros(1, values.shape[1], 1, dtype=torch.int64, device=index.device))


class PluginSampling(nn.Module):
    """``GridSampling`` by the name that ``deploy.graph.plugins`` replaces in front of TensorRT's builder."""

    def __init__(self, sizes: Sequence[MapSize], points: Sequence[int]) -> None:
        super().__init__()
        self.plugin = GridSampling(sizes, points)

    def forward(self, maps: Sequence[Tensor], grid: Tensor, weights: Tensor | None) -> Tensor:
        """Sample, weight and sum."""
        return cast(Tensor, self.plugin(maps, grid, weights))


Sampling = Callable[[Sequence[MapSize], Sequence[int]], nn.Module]
BILINEAR: Mapping[str, Sampling] = {
    "grid_sample": GridSampling,
    "gather": GatherSampling,
    "plugin": PluginSampling,
}


class FixedGrid(nn.Module):
    """``GridSample`` at constant points: the batch goes into the channels, since a grid has as many rows as the map."""

    def __init__(self, grid: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = nn.Buffer(grid.clone(), persistent=False)
        self.sampling = BILINEAR["grid_sample"]([size], [1])

    def forward(self, image_map: Tensor) -> Tensor:
        """Sample [N,C,H,W] to [N,C,points]."""
        merged = image_map.reshape(1, -1, *image_map.shape[2:])
        return self.sampling([merged], self.grid, None).reshape(-1, image_map.shape[1], self.grid.shape[1])


class FixedGather(nn.Module):
    """Four corners at constant places."""

    def __init__(self, grid: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        sampling = GatherSampling([size], [1])
        index, fraction = sampling.locate(grid)
        self.index = nn.Buffer(index.flatten(), persistent=False)
        self.weights = nn.Buffer(sampling.bilinear(fraction, None).to(grid.dtype), persistent=False)

    def forward(self, image_map: Tensor) -> Tensor:
        """Sample [N,C,H,W] to [N,C,points]."""
        padded = GatherSampling.bordered(image_map)
        taken = padded.index_select(2, self.index).reshape(-1, padded.shape[1], self.weights.shape[2], 4)
        return (taken * self.weights).sum(3)


FIXED = {"grid_sample": FixedGrid, "gather": FixedGather}
