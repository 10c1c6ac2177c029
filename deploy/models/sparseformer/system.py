"""SparseFormer's variants, forms and checkpoint layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from deploy.errors import RecipeError
from deploy.models import vit
from deploy.models.base import Form, System, Variant
from deploy.models.checkpoint import State, WeightMap
from deploy.models.rtdetr.sampling import FIXED
from deploy.models.sparseformer import looking
from deploy.models.sparseformer.deploy import SAMPLING, DeploySparseFormer
from deploy.models.sparseformer.network import CONSTANTS, SparseFormer
from deploy.records import Target


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build the training form of a release; any ``size`` fits the weights.

    Raises:
        RecipeError: constants or a form of sampling that nobody has.
    """
    for name, known in {"constants": ("layout", *CONSTANTS), "sampling": ("auto", *FIXED)}.items():
        if options[name] not in known:
            expected = ", ".join(known)
            raise RecipeError(f"options.{name}: got {options[name]!r}, expected {expected}", hint=f"{name}={known[0]}")
    return SparseFormer(options, size, layout).eval()


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the copy that is exported for a target, in the dtype of ``model``; ``model`` stays untouched."""
    source = cast(SparseFormer, model)
    with torch.no_grad():
        return DeploySparseFormer(source, target)


_IMAGENET = (
    ("adaptive_mixing.tuo_proj.", "adaptive_mixing.out_proj."), ("ffn.0.", "norm2."), ("ffn.1.", "mlp.fc1."),
    ("ffn.3.", "mlp.fc2."), ("ln_attn.", "norm1."), ("attn.in_proj_", "attn.qkv."), ("attn.out_proj.", "attn.proj."),
    ("head.norm.", "norm."), ("head.classifier.", "proj."),
)  # fmt: skip


def from_imagenet(key: str) -> str:
    """Map a key of ``imagenet/`` to ours."""
    for theirs, ours in _IMAGENET:
        key = key.replace(theirs, ours)
    return key


def to_imagenet(key: str) -> str:
    """Map our key to that of ``imagenet/``: the inverse of ``from_imagenet``."""
    inner = key.startswith("layers.")
    for theirs, ours in _IMAGENET:
        if inner or theirs.startswith("head."):
            key = key.replace(f".{ours}", f".{theirs}") if inner else re.sub(f"^{re.escape(ours)}", theirs, key)
    return key


def from_library(key: str) -> str:
    """Map a key of the library to ours; its own converter writes a head that its model does not have."""
    return key.replace("head.norm.", "norm.").replace("head.classifier.", "proj.")


def random(state: State) -> State:
    """Put random RoIs into the image, let tokens move them by a little, and give the mixing matrices unit gain.

    With moves as large as the RoIs, or matrices that multiply what was sampled by ten, five looks in a row amplify any
    rounding beyond what says something about an export. Trained networks do neither.
    """
    found = dict(state)
    for key, value in state.items():
        if key.endswith("_roi.weight"):
            middle, size = 0.5 + 0.2 * value[:, :2].tanh(), 0.3 + 0.1 * value[:, 2:].tanh()
            found[key] = torch.cat((middle - size / 2, middle + size / 2), 1)
        elif "roi_adjust_module.1" in key or "roi_offset_module.1" in key:
            found[key] = value * 0.2
        elif key.endswith("parameter_generator.2.weight"):
            channels, points = (len(state[key.replace("parameter_generator.2.weight", f"{x}_beta")]) for x in "ms")
            channel, spatial = torch.split(value, [channels**2, points**2])
            found[key] = torch.cat((channel / channels**0.5, spatial / points**0.5))
        elif key.endswith("roi_offset_bias"):
            found[key] = value * 10
    return found


def _variant(tokens: int, widths: list[int], depth: int, summary: str, **changes: Any) -> Variant:
    known = {"channels": 96, "points": 36, "repeats": 4, "heads": 64, "mlp_ratio": 4}
    given = {"tokens": tokens, "widths": widths, "depth": depth}
    own = {"constants": "layout", "sampling": "auto", "pad_heads": True, "looks": False}
    return Variant(options={**given, **known, **changes, **own}, summary=summary)


def keep_fp32(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which nodes stay float32: RoIs, points, and the sampling itself.

    GridSample takes its grid in the type of the map; float16 has steps of up to 0.05 pixels of a 224 x 224 image there.
    """
    return (r"\brois/", r"\bsampling/", *((r"\blooks/",) if options.get("looks") else ()))


_SAMPLED = {"grid_sample": "GridSample", "gather": "Gather"}
_SAMPLED_FOR = {
    Target.ONNXRUNTIME: "1.09 times as fast as the release's order of operations, 1.21 times as fast as with Gather "
    "(t; benchmarks/sparseformer.py)",
    Target.TENSORRT: "GridSample engines of some TensorRT versions build, run and give something else "
    "(deploy/data/known_bad.yaml); with Gather 179 kernels in FP16 for SM89, with a low GridSample 188 (t)",
}
_PADDED = {
    True: "all attentions fuse in FP16 (t for SM89: 71 kernels fewer than without padding)",
    False: "options.pad_heads=false asks for heads as they are: no attention fuses",
}


def forms(options: Mapping[str, Any]) -> dict[Target, Form]:
    """Return the form of each target under these options, with its measured reason."""
    return {target: _form(options, target) for target in Target}


def _form(options: Mapping[str, Any], target: Target) -> Form:
    asked = options["sampling"]
    form = SAMPLING[target] if asked == "auto" else asked
    names = ["first look constant", "channels before points", _SAMPLED[form]]
    reasons = [
        _SAMPLED_FOR[target] if form == SAMPLING[target] else f"options.sampling={asked} asks for {_SAMPLED[form]}"
    ]
    if target is Target.TENSORRT:
        padded = bool(options["pad_heads"])
        names += ["heads padded to 16"] * padded
        reasons.append(_PADDED[padded])
    return Form(name=", ".join(names), reason="; ".join(reasons))


SYSTEM = System(
    name="sparseformer",
    task="classification",
    paper="SparseFormer: Sparse Visual Recognition via Limited Latent Tokens, ICLR 2024, arXiv 2304.03768",
    variants={
        "t": _variant(49, [256, 512], 8, "release: 81.0 % top-1 at 224"),
        "s": _variant(64, [320, 640], 8, "release: 82.0 % top-1 at 224"),
        "b": _variant(81, [384, 768], 10, "release: 82.6 % top-1 at 224"),
        "tiny": _variant(9, [32, 64], 2, "for tests", channels=16, points=4, repeats=2, heads=8),
    },
    build=build,
    weight_maps=(
        WeightMap(name="imagenet release", layout="imagenet", rename=from_imagenet, inverse=to_imagenet),
        WeightMap(name="library release", layout="library", rename=from_library, inverse=vit.as_it_is),
    ),
    to_deploy=to_deploy,
    forms=forms({"sampling": "auto", "pad_heads": True}),
    recipe={"system": "sparseformer", "variant": "t", "size": 224},
    # Cosine of the logits (tiny, random weights, 8 images): 0.99986 with every linear layer in INT8, 0.99996 with
    # those of the blocks behind the RoIs alone.
    keep_high=lambda options: {
        r"^(focusing|cortex)\.": "RoIs, offsets and mixing: their rounding moves where the image is looked at",
        r"^proj/": "head: hardly any work, 19 % of the error",
    },
    extra_outputs=lambda options: (looking.OUTPUT,) if options["looks"] else (),
    keep_fp32=keep_fp32,
    interface=lambda options: {"forms": forms(options)} if options["sampling"] in ("auto", *_SAMPLED) else {},
    drawing=looking.DRAWING,
    random=random,
)
