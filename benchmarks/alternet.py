"""AlterNet's deploy graph against the bare export of the authors' form, and its kernels in TensorRT-RTX's build log.

    python benchmarks/alternet.py --write

CPU: float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time of the form for ONNX Runtime against the
authors' (einsum) through bare ``torch.onnx.export``, and against the form for TensorRT. TensorRT-RTX: kernels and fused
attentions in the logs of ahead-of-time builds in FP32 and FP16 for SM80 and SM89, and of the other form in FP16 for
SM89 (needs the extra ``tensorrt-rtx``): evidence for fusion, none for speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import (
    BATCHES,
    THREADS,
    bare,
    builds,
    engines,
    figures,
    kernels,
    last_kernels,
    no_builder,
    on_the_road,
    race,
    rounds_of,
    timing_arguments,
    write_results,
)

from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model, resolve_options
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM, VARIANTS = "alternet", ("50", "18")


def loaded(variant: str, target: Target) -> Loaded:
    return load_model(find_system(SYSTEM), resolve_recipe(SYSTEM, {"variant": ("", variant)}), target)


def cpu(variant: str, batch: int, rounds: int, folder: Path) -> dict[str, object]:
    ours, other = (loaded(variant, target) for target in (Target.ONNXRUNTIME, Target.TENSORRT))
    (spec,) = ours.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    name = f"{variant}-{batch}"
    graphs = {
        "deploy": on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"ours{name}"),
        "authors' form, bare export": bare(ours.reference, images, folder / f"bare{name}"),
        "TensorRT's form": on_the_road(other.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"tokens{name}"),
    }
    return figures(race(graphs, images, rounds_of(batch, rounds)), name)


def counted(folder: Path) -> dict[str, object] | str:
    if reason := no_builder():
        return reason
    recipe = resolve_recipe(SYSTEM, {"variant": ("", VARIANTS[0])})
    ours, other = loaded(VARIANTS[0], Target.TENSORRT), loaded(VARIANTS[0], Target.ONNXRUNTIME)
    counts: dict[str, object] = {"form for tensorrt": builds(ours, recipe, folder / "tokens")}
    keep = other.system.keep_fp32(resolve_options(other.system, recipe))
    (engine,) = engines(other.deploy, other.inputs, folder / "channels", keep=keep)
    counts["form for onnxruntime, fp16, sm89"] = {"kernels": kernels(engine), "fused": dict(engine.audit.fused)}
    print(f"form for onnxruntime: {kernels(engine)} kernels, fused: {dict(engine.audit.fused)}")
    return counts


def main() -> None:
    options = timing_arguments(__doc__ or "").parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {
            f"{variant}, batch {batch}": cpu(variant, batch, options.rounds, folder)
            for variant in VARIANTS
            for batch in BATCHES
        }
        kernel_counts = last_kernels(SYSTEM) if options.keep_kernels else counted(folder)
    if options.write:
        command = f"python benchmarks/alternet.py --rounds {options.rounds} --write"
        write_results(SYSTEM, {"command": command, "cpu": measured, "kernels": kernel_counts})


if __name__ == "__main__":
    main()
