"""Four ONNX Runtime forms of RIFormer's norm: how exact, how fast.

    python benchmarks/norm_forms.py --write

S12 with random weights at 224 and 384 x 512, batch 1, one thread. Error: largest difference of the logits from float32
PyTorch over the parity inputs, relative to the largest logit of the image. Time: interleaved, the other form's time
over the shipped one's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import THREADS, arguments, on_the_road, race, write_results
from torch import Tensor
from torch.nn import functional

from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.models import find_system, riformer
from deploy.models.base import load_model
from deploy.records import Target, to_json
from deploy.resolve import parity_inputs, resolve_recipe

Forward = Callable[[riformer.SharedNorms, Tensor], tuple[Tensor, Tensor]]
SHIPPED = "shared moments (shipped)"


def two_norms(standardise: Callable[[Tensor], Tensor]) -> Forward:
    """Each norm by itself; gain and shift as a BatchNormalization with constant weights."""

    def forward(norms: riformer.SharedNorms, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros, ones = torch.zeros_like(norms.weight), torch.ones_like(norms.weight)
        x = x + functional.batch_norm(standardise(x), zeros, ones, norms.weight, norms.bias, eps=0.0)
        return x, standardise(x)

    return forward


def instance_norm(x: Tensor) -> Tensor:
    """What the exporter writes for GroupNorm at opset 20."""
    channels, height, width = x.shape[1:]
    flat = functional.instance_norm(x.reshape(-1, 1, channels * height * width), eps=riformer.EPS)
    return flat.reshape(-1, channels, height, width)


def two_pass(x: Tensor) -> Tensor:
    """Means of means; the mean comes off before squaring."""
    centred = x - x.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    variance = (centred * centred).mean((2, 3), keepdim=True).mean(1, keepdim=True)
    return centred * torch.rsqrt(variance + riformer.EPS)


def two_points(norms: riformer.SharedNorms, x: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of a map that has the same moments: two points a channel, its standard deviation above and below its mean.

    Both norms move the points of a channel on one line, so that where its two points go is where all of them go.
    """
    batch, channels, height, width = x.shape
    flat = x.reshape(batch * channels, height * width)
    mean = flat.mean(1, keepdim=True)
    variance = ((flat - mean) * (flat - mean)).mean(1)
    deviation, mean = variance.sqrt(), mean.flatten()
    low = mean - deviation
    points = torch.cat([end.reshape(batch, channels) for end in (mean + deviation, low)], 1)
    gain, shift = (value.repeat(2) for value in (norms.weight, norms.bias))
    moved = points + functional.layer_norm(points, points.shape[1:], gain, shift, riformer.EPS)
    standardised = functional.layer_norm(moved, points.shape[1:], None, None, riformer.EPS)

    def line(ends: Tensor) -> Tensor:
        high, at = (end.flatten() for end in ends.split(channels, 1))
        merged = x.reshape(1, batch * channels, height, width)
        return functional.batch_norm(merged, low, variance * 4, high - at, at, eps=1e-20).reshape(x.shape)

    return line(moved), line(standardised)


FORMS: dict[str, Forward] = {
    SHIPPED: riformer.SharedNorms.forward,
    "two-pass means": two_norms(two_pass),
    "two points a channel": two_points,
    "InstanceNormalization": two_norms(instance_norm),
}


def measure_size(size: str, rounds: int, folder: Path) -> dict[str, object]:
    system, recipe = find_system("riformer"), resolve_recipe("riformer", {"size": ("", size)})
    loaded = load_model(system, recipe, Target.ONNXRUNTIME)
    chunks = parity_inputs(system, recipe).chunks
    graphs, errors = {}, {}
    for name, forward in FORMS.items():
        riformer.SharedNorms.forward = forward  # type: ignore[method-assign]
        graphs[name] = on_the_road(loaded.deploy, loaded.inputs[0], 1, Target.ONNXRUNTIME, folder / f"{size}-{name}")
        with open_model(graphs[name], BuildOptions(threads=THREADS, device="cpu")) as runner:
            errors[name] = max(relative(runner.infer(c.feeds), loaded.run(c.feeds)) for c in chunks)
        print(f"{size}: {name}: error {errors[name]:.1e}")
    riformer.SharedNorms.forward = FORMS[SHIPPED]  # type: ignore[method-assign]
    record = race(graphs, np.asarray(chunks[0].feeds["images"]), rounds)
    for ratio in record.ratios:
        print(f"{size}: shipped form {ratio.median:.3f}x ({ratio.p10:.3f} to {ratio.p90:.3f}) {ratio.baseline}")
    return {"error": errors, "ratios": to_json(record.ratios)}


def relative(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    return float(abs(got["logits"] - want["logits"]).max() / abs(want["logits"]).max())


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measured = {size: measure_size(size, options.rounds, Path(scratch)) for size in ("224", "384x512")}
    if options.write:
        command = f"python benchmarks/norm_forms.py --rounds {options.rounds} --write"
        write_results("norm_forms", {"command": command, **measured})


if __name__ == "__main__":
    main()
