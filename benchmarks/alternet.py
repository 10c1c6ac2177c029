"""AlterNet's deploy graph against the bare export of the authors' form, and its kernels in TensorRT-RTX's build log.

    python benchmarks/alternet.py --write

CPU: float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time of the form for ONNX Runtime against the
authors' (einsum) through bare ``torch.onnx.export``, and against the form for TensorRT. TensorRT-RTX: kernels and fused
attentions in the log of an ahead-of-time build in FP16 for SM89 (needs the extra ``tensorrt-rtx``), of both forms:
evidence for fusion, none for speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import THREADS, arguments, bare, figures, on_the_road, race, write_results

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model, resolve_options
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Precision, Target
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
    return figures(race(graphs, images, rounds), name)


def kernels(folder: Path) -> dict[str, object] | str:
    backend = load_backend("tensorrt_rtx")
    if reason := backend.available():
        return f"not built: {reason}"
    counts: dict[str, object] = {}
    for form in Target:
        ours = loaded(VARIANTS[0], form)
        kept = ours.system.keep_fp32(resolve_options(ours.system, resolve_recipe(SYSTEM)))
        place = folder / f"rtx-{form.value}"
        path = on_the_road(ours.deploy, ours.inputs[0], 1, Target.TENSORRT, place)
        typed = convert_precision(path, Precision.FP16, place, target=Target.TENSORRT, keep=kept)
        options = BuildOptions(precision=Precision.FP16, batch=Batch(), inputs=ours.inputs, sm=(89,))
        (engine,) = backend.build(place / typed.artifact.name, place, options)
        counts[f"form for {form.value}"] = {"kernels": dict(engine.audit.kernels), "fused": dict(engine.audit.fused)}
        print(f"form for {form.value}: {sum(engine.audit.kernels.values())} kernels, fused: {dict(engine.audit.fused)}")
    return counts


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {
            f"{variant}, batch {batch}": cpu(variant, batch, options.rounds, folder)
            for variant in VARIANTS
            for batch in (1, 8)
        }
        counted = kernels(folder)
    if options.write:
        command = "python benchmarks/alternet.py --write"
        write_results(SYSTEM, {"command": command, "cpu": measured, "kernels": counted})


if __name__ == "__main__":
    main()
