"""Every named variant of ConvMixer, AlterNet, Castling-ViT and SparseFormer, built by TensorRT-RTX in FP16 for SM89.

    python benchmarks/variants.py --write
    python benchmarks/variants.py convmixer sparseformer_b --write     # of these, beside the others' last figures

Each variant with random weights goes from PyTorch to an engine as ``effdeploy export`` does it, batch 1, at its own
size. Kernels and fused blocks are of the build log (needs the extra ``tensorrt-rtx``): evidence that it builds in the
precision asked for, none for speed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, THREADS, engines, kernels, no_builder, write_results

from deploy.models import find_system
from deploy.models.base import load_model, resolve_options
from deploy.records import Target, to_json
from deploy.resolve import resolve_recipe

VARIANTS = {
    "sparseformer": ("t", "s", "b"),
    "alternet": ("18", "34", "50", "18_cifar", "34_cifar", "50_cifar"),
    "castling": ("deit_tiny", "deit_small", "deit_base"),
    "convmixer": ("1024_20", "768_32", "768_32_gelu", "1536_20"),
}


def built(name: str, variant: str, folder: Path) -> dict[str, Any]:
    """Build a variant; return its kernels, fused blocks, and whether the engine has the precision asked for."""
    start, system = time.perf_counter(), find_system(name)
    recipe = resolve_recipe(name, {"variant": ("", variant), "precision": ("", "fp16")})
    loaded = load_model(system, recipe, Target.TENSORRT)
    keep = system.keep_fp32(resolve_options(system, recipe))
    (engine,) = engines(loaded.deploy, loaded.inputs, folder, keep=keep)
    audit = engine.audit
    return {
        "size": list(recipe.size),
        "kernels": kernels(engine),
        "fused": to_json(audit.fused),
        "ok": audit.ok,
        "statement": audit.statement,
        "megabytes": round(engine.artifact.size / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of <system>_<variant>; all when left out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    if reason := no_builder():
        raise SystemExit(reason)
    torch.set_num_threads(THREADS)
    for name, variant in ((name, variant) for name, variants in VARIANTS.items() for variant in variants):
        if not f"{name}_{variant}".startswith(tuple(options.names)):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            row = built(name, variant, Path(scratch))
        print(f"{name} {variant}: {json.dumps(row)}", flush=True)
        if options.write:
            last = RESULTS / "variants.json"
            kept = json.loads(last.read_text())["fp16, sm89"] if last.exists() else {}
            command = "python benchmarks/variants.py --write"
            write_results("variants", {"command": command, "fp16, sm89": {**kept, f"{name}_{variant}": row}})


if __name__ == "__main__":
    main()
