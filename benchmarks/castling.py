"""How Castling-DeiT-S grows with the image against DeiT-S with softmax attention, on ONNX Runtime's CPU.

    python benchmarks/castling.py --write

Float32, batch 1, one thread, interleaved rounds; ratios of CPU time. Against (a) DeiT-S, softmax, through bare
``torch.onnx.export``; (b) DeiT-S on the same road as ours; (c) the training form of ours with its auxiliary branch
through bare export. Random weights. TensorRT-RTX: kernels in the logs of ahead-of-time builds in FP32 and FP16 for SM80
and SM89 (needs the extra ``tensorrt-rtx``): evidence for fusion, none for speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import (
    arguments,
    bare,
    builds,
    engines,
    figures,
    kernels,
    no_builder,
    on_the_road,
    race,
    write_results,
)

from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.records import Target
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


def counted(folder: Path) -> dict[str, object] | str:
    if reason := no_builder():
        return reason
    recipe = resolve_recipe("castling", {"variant": ("", "deit_small")})
    counts: dict[str, object] = {"castling": builds(castling(224, Target.TENSORRT), recipe, folder / "castling")}
    plain = softmax(224, Target.TENSORRT)
    (engine,) = engines(plain.deploy, plain.inputs, folder / "softmax")
    counts["softmax, fp16, sm89"] = kernels(engine)
    print(f"softmax: {kernels(engine)} kernels in FP16 on SM89")
    return counts


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="image sides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {f"{size} px": cpu(size, options.rounds, folder) for size in options.sizes}
        kernel_counts = counted(folder)
    if options.write:
        command = "python benchmarks/castling.py --write"
        write_results("castling", {"command": command, "cpu": measured, "kernels": kernel_counts})


if __name__ == "__main__":
    main()
