"""What ConvMixer-1024/20 would gain from folding more of its batch norms, on ONNX Runtime's CPU and in TensorRT-RTX.

    python benchmarks/convmixer_norms.py --rounds 40 --write

The shipped form leaves every batch norm but the last. Against it: the norm behind each depthwise convolution in the
pointwise one, exact where the residual stream is divided by its gain; and the shipped form's and that form's norms
written as Mul and Add. All are the same function (checked), borders by padding, float32, batch 1, 224 x 224, one
thread, interleaved rounds, ratios of CPU time. TensorRT-RTX: kernels in the logs of builds in FP16 for SM89 (needs the
extra ``tensorrt-rtx``): evidence for fusion, none for speed.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import cast

import torch
from common import THREADS, arguments, engines, figures, kernels, no_builder, on_the_road, race, write_results
from torch import Tensor, nn

from deploy.models import find_system
from deploy.models.base import example_inputs, load_model
from deploy.models.convmixer import Residual
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM, VARIANT = "convmixer", "1024_20"


class MulAdd(nn.Module):
    """A batch norm as a product and a sum."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        gain, shift = affine(norm)
        self.gain = nn.Parameter(gain[:, None, None].clone(), requires_grad=False)
        self.shift = nn.Parameter(shift[:, None, None].clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return x * self.gain + self.shift


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    gain = norm.weight / torch.sqrt(cast(Tensor, norm.running_var) + norm.eps)
    return gain, norm.bias - cast(Tensor, norm.running_mean) * gain


def absorbed(model: nn.Module) -> nn.Module:
    """Return a copy whose depthwise convolutions have no norm behind them."""
    found = copy.deepcopy(model).requires_grad_(False)
    before = found.stem[2]
    for block in found.blocks:
        residual = cast(Residual, block[0])
        depthwise, activation, norm = cast(nn.Sequential, residual.fn)
        gain, shift = affine(norm)
        before.weight.div_(gain)
        before.bias.div_(gain)
        depthwise.weight.mul_(gain[:, None, None, None])
        block[1].bias.add_(block[1].weight[:, :, 0, 0] @ shift)
        block[1].weight.mul_(gain[None, :, None, None])
        residual.fn = nn.Sequential(depthwise, activation)
        before = block[3] if len(block) > 3 else None
    return found


def written(model: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are products and sums."""
    found = copy.deepcopy(model).requires_grad_(False)
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, MulAdd(child))
    return found


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(THREADS)
    asked = {"variant": ("", VARIANT), "options.border": ("", "padding")}
    ours = load_model(find_system(SYSTEM), resolve_recipe(SYSTEM, asked), Target.ONNXRUNTIME)
    folded = absorbed(ours.deploy)
    forms = {
        "shipped": ours.deploy,
        "absorbed": folded,
        "shipped, Mul and Add": written(ours.deploy),
        "absorbed, Mul and Add": written(folded),
    }
    images = example_inputs(ours.inputs, 1)[0]
    with torch.inference_mode():
        expected = ours.reference(images)
        off = {name: float(abs(form(images) - expected).max() / abs(expected).max()) for name, form in forms.items()}
    if max(off.values()) > 1e-4:
        raise ValueError(f"not the same function: {off}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graphs = {
            name: on_the_road(form, ours.inputs[0], 1, Target.ONNXRUNTIME, folder / name)
            for name, form in forms.items()
        }
        measured = figures(race(graphs, images.numpy(), options.rounds), "batch 1")
        counts: dict[str, int] | str = no_builder()
        if not counts:
            counts = {
                name: kernels(*engines(form, ours.inputs, folder / f"rtx {name}")) for name, form in forms.items()
            }
    print(off, counts)
    if options.write:
        command = f"python benchmarks/convmixer_norms.py --rounds {options.rounds} --write"
        data = {"command": command, "off": off, "cpu": measured, "kernels, fp16, sm89": counts}
        write_results("convmixer_norms", data)


if __name__ == "__main__":
    main()
