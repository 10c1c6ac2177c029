"""How Castling-DeiT-S grows with the image against DeiT-S with softmax attention, on ONNX Runtime's CPU.

    python benchmarks/castling.py --write

Float32, batch 1, one thread, interleaved rounds; ratios of CPU time. Against (a) DeiT-S, softmax, through bare
``torch.onnx.export``; (b) DeiT-S on the same road as ours; (c) the training form of ours with its auxiliary branch
through bare export. Random weights. TensorRT-RTX: kernels in the log of an ahead-of-time build in FP16 for SM89 (needs
the extra ``tensorrt-rtx``).
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

SIZES = (224, 384, 512, 768)


def castling(size: int, target: Target = Target.ONNXRUNTIME) -> Loaded:
    recipe = resolve_recipe("castling", {"variant": ("", "deit_small"), "size": ("", size)})
    return load_model(find_system("castling"), recipe, target)


def softmax(size: int, target: Target = Target.ONNXRUNTIME) -> Loaded:
    asked = {"variant": ("", "deit_small_patch16_224"), "size": ("", size), "options.r": ("", 0)}
    return load_model(find_system("tome"), resolve_recipe("tome", asked), target)


def cpu(size: int, rounds: int, folder: Path) -> dict[str, object]:
    ours, theirs = castling(size), softmax(size)
    (spec,) = ours.inputs
    images = example_inputs((spec,), 1)[0].numpy()
    graphs = {
        "castling deploy": on_the_road(ours.deploy, spec, 1, Target.ONNXRUNTIME, folder / f"ours{size}"),
        "softmax DeiT-S, bare export": bare(theirs.reference, images, folder / f"softmax{size}"),
        "softmax DeiT-S, same road": on_the_road(theirs.deploy, spec, 1, Target.ONNXRUNTIME, folder / f"deit{size}"),
        "castling training form, bare export": bare(ours.reference, images, folder / f"bare{size}"),
    }
    return {
        "tokens": (size // 16) ** 2 + 1,
        **figures(race(graphs, images, rounds), f"{size} px"),
    }


def kernels(folder: Path) -> dict[str, int] | str:
    backend = load_backend("tensorrt_rtx")
    if reason := backend.available():
        return f"not built: {reason}"
    counts = {}
    for name, loaded in {
        "castling": castling(224, Target.TENSORRT),
        "softmax": softmax(224, Target.TENSORRT),
    }.items():
        place = folder / f"rtx-{name}"
        path = on_the_road(loaded.deploy, loaded.inputs[0], 1, Target.TENSORRT, place)
        typed = convert_precision(path, Precision.FP16, place, target=Target.TENSORRT)
        options = BuildOptions(precision=Precision.FP16, batch=Batch(), inputs=loaded.inputs, sm=(89,))
        (engine,) = backend.build(place / typed.artifact.name, place, options)
        counts[name] = sum(engine.audit.kernels.values())
        print(f"{name}: {counts[name]} kernels in FP16 on SM89")
    return counts


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="image sides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {f"{size} px": cpu(size, options.rounds, folder) for size in options.sizes}
        counted = kernels(folder)
    if options.write:
        command = "python benchmarks/castling.py --write"
        write_results("castling", {"command": command, "cpu": measured, "kernels": counted})


if __name__ == "__main__":
    main()
