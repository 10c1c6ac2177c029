"""ConvMixer: patches mixed by convolutions alone (Trockman and Kolter, 2022, arXiv 2201.09792).

Written from the paper; the module names are timm's (``timm/models/convmixer.py``). Nothing but the stem changes the
resolution:

    stem       x = norm(act(patches(x)))
    block      x = x + norm(act(depthwise(x)));   x = norm(act(pointwise(x)))
    logits     head(mean over positions of x)

The batch norm comes AFTER the activation, so no convolution before it can take it. What folds forwards:

* the last norm goes into the head, exactly: a mean over positions commutes with a gain and a shift per channel.
* the norm after the depthwise convolution could go into the pointwise one, if the residual stream were rescaled by
  its gain. That is exact where no gain is 0, brings no speed-up on ONNX Runtime (1.00 times) and saves TensorRT-RTX no
  kernel (63 and 63): left.
* the norm before a depthwise convolution cannot go: the padding of zeros comes after its shift, so at the border the
  shift is no constant of the channel. Left.
* written as Mul and Add, the norms that are left make ONNX Runtime take 1.05 times as long: it runs BatchNormalization
  inside its blocked layout. TensorRT-RTX needs 63 kernels either way (1024_20; benchmarks/convmixer_norms.py).

What can be faster is the depthwise convolution. ONNX Runtime's CPU kernel computes outputs that see the left or right
border one at a time, the others six at a time: with a kernel of 9 on maps 16 wide that is every second one. Where
half of a row is border (``wide_border``), a float32 graph for that runtime writes the columns of zeros first, by a
convolution with a weight of 1, which stays in the blocked layout where a Pad would leave it; the sums are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deploy.errors import RecipeError, did_you_mean
from deploy.models.base import Form, System, Variant
from deploy.models.checkpoint import WeightMap
from deploy.recipe import Recipe
from deploy.records import Precision, Target

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
BORDERS = ("padding", "written")  # of the depthwise convolutions, left and right: by themselves, or in front of them


class Residual(nn.Module):
    """``x + fn(x)``, [N,C,H,W] to the same."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Run the branch and add its input."""
        return self.fn(x) + x


def mix(convolution: nn.Conv2d, activation: str) -> list[nn.Module]:
    """Return a convolution, its activation and the batch norm after it."""
    return [convolution, ACTIVATIONS[activation](), nn.BatchNorm2d(convolution.out_channels)]


def block(dim: int, kernel: int, activation: str) -> nn.Sequential:
    """Return a block [N,C,H,W] to the same: positions first, then channels."""
    depthwise = nn.Conv2d(dim, dim, kernel, groups=dim, padding=kernel // 2)
    return nn.Sequential(Residual(nn.Sequential(*mix(depthwise, activation))), *mix(nn.Conv2d(dim, dim, 1), activation))


class ConvMixer(nn.Module):
    """The classifier: ``images`` [N,3,H,W] to ``logits`` [N,classes]."""

    def __init__(self, stem: nn.Module, blocks: nn.Module, head: nn.Linear, border: str = "padding") -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, blocks, head
        self.border = border  # that the deploy form shall have

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build ConvMixer; any ``size`` fits the weights.

    Raises:
        RecipeError: an unknown activation or border, or a depthwise kernel without a centre.
    """
    activation, dim, kernel, patch = (options[name] for name in ("activation", "dim", "kernel", "patch"))
    for name, known in {"activation": ACTIVATIONS, "border": BORDERS}.items():
        if options[name] not in known:
            raise RecipeError(
                f"options.{name}: got {options[name]!r}, expected {' or '.join(known)}",
                hint=did_you_mean(str(options[name]), known),
            )
    if kernel % 2 == 0:
        raise RecipeError(
            f"options.kernel: got {kernel}, expected an odd number", hint=f"--set options.kernel={kernel + 1}"
        )
    stem = nn.Sequential(*mix(nn.Conv2d(3, dim, patch, stride=patch), activation))
    blocks = nn.Sequential(*(block(dim, kernel, activation) for _ in range(options["depth"])))
    return ConvMixer(stem, blocks, nn.Linear(dim, options["classes"]), options["border"]).eval()


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the copy without its last norm, in the dtype of ``model``; ``model`` stays untouched.

    Stem, blocks and weights are shared with ``model`` where they do not change.
    """
    source = cast(ConvMixer, model)
    *earlier, last = cast(list[nn.Sequential], list(cast(nn.Sequential, source.blocks)))
    with torch.no_grad():
        head = _head_behind(cast(nn.BatchNorm2d, last[-1]), source.head)
        blocks = [*earlier, last[:-1]]
        if target is Target.ONNXRUNTIME and source.border == "written":
            blocks = [_with_border(block) for block in blocks]
    return ConvMixer(source.stem, nn.Sequential(*blocks), head)


def _with_border(block: nn.Sequential) -> nn.Sequential:
    """Return the block whose depthwise convolution reads a map with its border of zeros left and right."""
    residual, *rest = block
    depthwise, *after = cast(nn.Sequential, cast(Residual, residual).fn)
    return nn.Sequential(Residual(nn.Sequential(bordered(cast(nn.Conv2d, depthwise)), *after)), *rest)


def bordered(depthwise: nn.Conv2d) -> nn.Sequential:
    """Return the columns of zeros, written by a convolution with a weight of 1, and the depthwise convolution."""
    dim, (kernel, _), weight = depthwise.in_channels, depthwise.kernel_size, depthwise.weight
    border = nn.Conv2d(dim, dim, 1, padding=(0, kernel // 2), groups=dim, bias=False)
    border.weight = nn.Parameter(torch.ones_like(weight[:, :, :1, :1]), requires_grad=False)
    inner = nn.Conv2d(dim, dim, kernel, padding=(kernel // 2, 0), groups=dim)
    inner.weight, inner.bias = weight, depthwise.bias
    return nn.Sequential(border, inner)


def wide_border(recipe: Recipe) -> dict[str, Any]:
    """Have borders written in float32 for ONNX Runtime's CPU where they are half of a row."""
    engine, variant = recipe.engine, SYSTEM.variants.get(recipe.variant)
    known = {**(variant.options if variant else {}), **recipe.options}
    kernel, patch = known.get("kernel"), known.get("patch")
    if recipe.precision is not Precision.FP32 or engine.backend != "onnxruntime" or engine.device == "cuda":
        return {}
    if not isinstance(kernel, int) or not isinstance(patch, int) or patch < 1:
        return {}  # refused when the network is built
    return {"border": "written"} if 2 * (kernel - 1) >= recipe.size[1] // patch else {}


def _head_behind(norm: nn.BatchNorm2d, head: nn.Linear) -> nn.Linear:
    """Return the head with the norm before it folded in."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    gain = norm.weight / torch.sqrt(variance + norm.eps)
    folded = nn.Linear(head.in_features, head.out_features)
    folded.weight = nn.Parameter((head.weight * gain).detach().clone(), requires_grad=False)
    shifted = head.bias + head.weight @ (norm.bias - mean * gain)
    folded.bias = nn.Parameter(shifted.detach().clone(), requires_grad=False)
    return folded


_STEM = {"0": "stem.0", "2": "stem.2"}
_BLOCK = re.compile(r"^(\d+)\.((?:0\.fn\.[02]|[13])\..+)$")
_OUTER = re.compile(r"^(\d+)\.([a-z_]+)$")


def from_release(key: str) -> str:
    """Map a key of the authors' code, one flat Sequential, to ours: 0 and 2 the stem, 3 and on the blocks, the head."""
    if match := _BLOCK.match(key):
        return f"blocks.{int(match[1]) - 3}.{match[2]}"
    if match := _OUTER.match(key):
        return f"{_STEM.get(match[1], 'head')}.{match[2]}"
    return key


def from_openmmlab(key: str) -> str:
    """Map an OpenMMLab key, with or without ``backbone.`` and ``head.fc``, to ours."""
    key = key.removeprefix("backbone.")
    return re.sub(r"^stages\.", "blocks.", key).replace("head.fc.", "head.")


def to_openmmlab(key: str) -> str:
    """Map our key to OpenMMLab's: the inverse of ``from_openmmlab``."""
    if key.startswith("head."):
        return key.replace("head.", "head.fc.")
    return re.sub(r"^(?:backbone\.)?blocks\.", "backbone.stages.", re.sub(r"^stem\.", "backbone.stem.", key))


def from_timm(key: str) -> str:
    """Return the key: the module names are timm's."""
    return key


def _variant(dim: int, depth: int, kernel: int, patch: int, activation: str, summary: str) -> Variant:
    options = {"dim": dim, "depth": depth, "kernel": kernel, "patch": patch, "activation": activation}
    options["border"] = "padding"
    return Variant(options=options, summary=summary)


def forms(options: Mapping[str, Any]) -> dict[Target, Form]:
    """Return the form of each target under these options, with its measured reason."""
    kept = "last batch norm in the head, the others left after their activations"
    cannot = "the norm before a depthwise convolution cannot fold (zero padding)"
    why = (
        f"{cannot}, folding the one behind it gains nothing (1.00), and as Mul and Add they take 1.05 times as long "
        "(1024_20; benchmarks/convmixer_norms.py)"
    )
    if options["border"] == "written":
        name, faster = (
            f"{kept}; wide borders written out",
            ("with borders written out 1024_20 is 1.09 times as fast as the official graph (benchmarks/convmixer.py)"),
        )
    else:
        name, faster = kept, "node for node the official graph but for one norm, and as fast (benchmarks/convmixer.py)"
    plain = Form(
        name=kept,
        reason=f"{cannot}; 63 kernels in FP16 for SM89, whether the others fold or not (1024_20)",
    )
    return {Target.ONNXRUNTIME: Form(name=name, reason=f"{why}; {faster}"), Target.TENSORRT: plain}


SYSTEM = System(
    name="convmixer",
    task="classification",
    paper="Patches Are All You Need?, TMLR 2023, arXiv 2201.09792",
    variants={
        "1536_20": _variant(1536, 20, 9, 7, "gelu", "OpenMMLab: 81.37 % top-1"),
        "1024_20": _variant(1024, 20, 9, 14, "gelu", "OpenMMLab: 76.94 % top-1"),
        "768_32": _variant(
            768, 32, 7, 7, "relu", "OpenMMLab: 80.16 % top-1; ReLU, as all released weights of this size"
        ),
        "768_32_gelu": _variant(768, 32, 7, 7, "gelu", "as the authors' code defines it; no released weights"),
        "tiny": _variant(16, 2, 3, 32, "gelu", "for tests"),
    },
    build=build,
    weight_maps=(
        WeightMap(name="timm", layout="training", rename=from_timm, inverse=from_timm),
        # No inverse: the head's number is the depth plus 5, and a key alone does not tell the depth.
        WeightMap(name="authors' Sequential", layout="training", rename=from_release),
        WeightMap(name="OpenMMLab", layout="training", rename=from_openmmlab, inverse=to_openmmlab),
    ),
    to_deploy=to_deploy,
    forms=forms({"border": "padding"}),
    recipe={"system": "convmixer", "variant": "1024_20", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99991 with the head in INT8, 0.99995 without.
    keep_high=lambda options: {r"^head/": "head: hardly any work, 46 % of the error"},
    stride="patch",
    options_for=wide_border,
    interface=lambda options: {"forms": forms(options)},
)
