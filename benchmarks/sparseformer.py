"""SparseFormer-T's deploy graph against the official form's export, on ONNX Runtime's CPU and in TensorRT-RTX's log.

    python benchmarks/sparseformer.py --write

CPU: float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time. Against the training form through bare
``torch.onnx.export``, and our form with the other sampling. Random weights. TensorRT-RTX: kernels in the log of
ahead-of-time builds in FP16 for SM89, heads padded and not (needs the extra ``tensorrt-rtx``): evidence for fusion,
none for speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import arguments, bare, figures, on_the_road, race, write_results

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.precision.convert import convert_precision
from deploy.records import Batch, Precision, Target
from deploy.resolve import resolve_recipe

BUILDS = {
    "gather, padded heads": {"options.sampling": "gather", "options.pad_heads": True},
    "gather": {"options.sampling": "gather", "options.pad_heads": False},
    "GridSample, padded heads": {"options.sampling": "grid_sample", "options.pad_heads": True},
}


def model(target: Target, **options: object) -> Loaded:
    asked = {"variant": ("", "t"), **{key: ("", value) for key, value in options.items()}}
    return load_model(find_system("sparseformer"), resolve_recipe("sparseformer", asked), target)


def cpu(batch: int, rounds: int, folder: Path) -> dict[str, object]:
    ours, gather = (model(Target.ONNXRUNTIME, **{"options.sampling": form}) for form in ("grid_sample", "gather"))
    (spec,) = ours.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    graphs = {
        "deploy": on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"ours{batch}"),
        "training form, bare export": bare(ours.reference, images, folder / f"bare{batch}"),
        "deploy with gather": on_the_road(gather.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"gather{batch}"),
    }
    return figures(race(graphs, images, rounds), f"batch {batch}")


def kernels(folder: Path) -> dict[str, int] | str:
    backend = load_backend("tensorrt_rtx")
    if reason := backend.available():
        return f"not built: {reason}"
    counts = {}
    for number, (name, asked) in enumerate(BUILDS.items()):
        ours, place = model(Target.TENSORRT, **asked), folder / f"rtx{number}"
        path = on_the_road(ours.deploy, ours.inputs[0], 1, Target.TENSORRT, place)
        keep = ours.system.keep_fp32({})
        typed = convert_precision(path, Precision.FP16, place, keep=keep, target=Target.TENSORRT)
        options = BuildOptions(precision=Precision.FP16, batch=Batch(), inputs=ours.inputs, sm=(89,))
        (engine,) = backend.build(place / typed.artifact.name, place, options)
        counts[name] = sum(engine.audit.kernels.values())
        print(f"{name}: {counts[name]} kernels in FP16 on SM89; {engine.audit.statement}")
    return counts


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {f"batch {batch}": cpu(batch, options.rounds, folder) for batch in (1, 8)}
        counted = kernels(folder)
    if options.write:
        command = "python benchmarks/sparseformer.py --write"
        write_results("sparseformer", {"command": command, "cpu": measured, "kernels": counted})


if __name__ == "__main__":
    main()
