"""The official implementations' reference cases through the command line, in FP32 and FP16, from checkpoint files.

    python benchmarks/reference_cases.py --write
    python benchmarks/reference_cases.py alternet_50 --write     # of one case, beside the others' last figures

Of ConvMixer, AlterNet, Castling-ViT and SparseFormer, as far as they are whole networks: the attentions alone are in
``tests/models/test_castling.py``. Each case is a checkpoint in the layout of its release, exported in FP16 up to parity
for ONNX Runtime, which judges the FP32 file as well. ``official`` is how far a file is from the official
implementation's logits and ``parity`` how far from PyTorch over the parity images (of the largest logit), ``top1`` the
share of those images with the same best class. ``gaps`` holds, for each other image, how far apart PyTorch has the two
classes (of the largest logit), and ``ties`` counts those that PyTorch's own rounding explains
(``deploy/parity/rounding.py``). FP16 is judged as ONNX Runtime runs it and, under ``rounded``, with every FP16 tensor
rounded; ``notes`` are those of the report. ``weights alone`` is PyTorch in float32 with nothing but its weights rounded
to FP16: what no FP16 file can do better than by luck, whatever it computes in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write_results

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import rtdetr_fill
from support import REFERENCE, Case, effdeploy, reference_case

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.recipe import Recipe, layer_of_data, resolve
from deploy.records import Comparison, Target
from deploy.resolve import parity_inputs

_CIFAR = ("--size", "32", "--set", "classes=10", "--set", "options.dim=256", "--set", "options.depth=8",
          "--set", "options.kernel=5", "--set", "options.patch=2")  # fmt: skip
CASES = {
    "convmixer_256_8_k5_p2_cifar_official": ("convmixer", "1024_20", *_CIFAR),
    "convmixer_768_32_timm": ("convmixer", "768_32"),
    "convmixer_768_32_k7_p7_official": ("convmixer", "768_32_gelu"),
    "convmixer_768_32_mmpretrain": ("convmixer", "768_32_gelu"),
    "alternet_18_cifar_w4": ("alternet", "18_cifar"),
    "alternet_18_imagenet": ("alternet", "18"),
    "alternet_50_imagenet": ("alternet", "50"),
    "castling_deit_tiny_224": ("castling", "deit_tiny", "--auxiliary", "false"),
    # What the branch that the deploy form drops still gave: 2.2 % here, refused unless told.
    "castling_deit_tiny_224_aux": ("castling", "deit_tiny", "--set", "parity.max_drift=0.03"),
    "sparseformer_tiny_imagenet_224x224": ("sparseformer", "t"),
    "sparseformer_tiny_imagenet_192x320": ("sparseformer", "t", "--size", "192x320"),
    "sparseformer_tiny_v1lib_224x224": ("sparseformer", "t"),
    "sparseformer_small_imagenet_224x224": ("sparseformer", "s"),
}


def case_of(name: str) -> Case:
    """Rebuild a case; those of SparseFormer have a filling and images of their own."""
    about = json.loads((REFERENCE / f"{name}.json").read_text())
    if about.get("fill") != "fill_det.fill":
        return reference_case(name)
    state = {key: torch.from_numpy(rtdetr_fill.fill(key, tuple(shape))) for key, shape in about["keys"].items()}
    shape = (1, *about["input_shape"][1:])
    images = np.concatenate([rtdetr_fill.image(shape, seed=seed) for seed in about["input"]["seeds"]])
    return Case(name=name, state=state, images=images, logits=np.load(REFERENCE / f"{name}.npz")["logits"])


def exported(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """Export a case and return the figures of its FP32 and FP16 files."""
    system, variant, *asked = CASES[case.name]
    out = folder / "bundle"
    result = effdeploy(
        "export", system, "--variant", variant, *asked, "--weights", case.save(folder / "official.pth"), "--batch", 2,
        "--fp16", "--until", "parity", "--out", out,
    )  # fmt: skip
    bundle = out if out.exists() else out.with_name(f"{out.name}.failed")
    run = read_manifest(bundle)
    if run.parity is None or run.model is None or run.passes is None or run.precision is None:
        raise ValueError(result.stdout + result.stderr)
    about = {"exit": result.exit_code, "layout": run.model.weights.layout, "verdict": run.parity.verdict}
    found = {}
    for stage, name, file in (("patched", "fp32", run.passes.artifact), ("engine", "fp16", run.precision.artifact)):
        judged = next(c for c in run.parity.comparisons if c.stage == stage)
        with open_model(bundle / file.name, BuildOptions(threads=1)) as runner:
            got = runner.infer({"images": case.images})["logits"]
        found[name] = {
            **about,
            "official": float(abs(got - case.logits).max() / abs(case.logits).max()),
            "official_top1": float((got.argmax(1) == case.logits.argmax(1)).mean()),
            "parity": judged.max_relative,
            "natural": judged.per_input["natural"],
            **agreement(judged),
            "drift": run.model.drift.fp32_relative if run.model.drift else None,
        }
    rounded = next(c for c in run.parity.comparisons if c.stage == "fp16, rounded")
    found["fp16"] |= {
        "rounded": {"parity": rounded.max_relative, **agreement(rounded)},
        "notes": list(run.parity.notes),
        "weights alone": weights_alone(resolve([layer_of_data("manifest", run.recipe)])),
    }
    return found


def weights_alone(recipe: Recipe) -> dict[str, float]:
    """Round the weights of the training form to FP16 and nothing else, and compare it with itself in float32."""
    system = find_system(recipe.system)
    images = [torch.from_numpy(chunk.feeds["images"]) for chunk in parity_inputs(system, recipe).chunks]
    model = load_model(system, recipe, Target.ONNXRUNTIME).reference
    with torch.inference_mode():
        exact = torch.cat([model(chunk) for chunk in images])
        for value in itertools.chain(model.parameters(), model.buffers()):
            if value.is_floating_point():
                value.copy_(value.half())
        rounded = torch.cat([model(chunk) for chunk in images])
    off = (rounded - exact).abs().amax(1) / exact.abs().amax(1)
    return {"parity": float(off.max()), "top1": float((rounded.argmax(1) == exact.argmax(1)).double().mean())}


def agreement(judged: Comparison) -> dict[str, Any]:
    """Return what became of the best class, and what judged it."""
    return {
        "judged_by": judged.precision,
        "top1": judged.top1,
        "ties": judged.top1_ties,
        "gaps": list(judged.top1_gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[""], help="parts of names; all when left out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in CASES if any(part in name for part in options.names)):
        case = case_of(name)
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = exported(case, Path(scratch))
        for precision, row in found[name].items():
            print(f"{name}, {precision}: {json.dumps(row)}", flush=True)
    if options.write:
        last = RESULTS / "reference_cases.json"
        kept = json.loads(last.read_text())["cases"] if last.exists() else {}
        command = "python benchmarks/reference_cases.py --write"
        write_results("reference_cases", {"command": command, "cases": {**kept, **found}})


if __name__ == "__main__":
    main()
