"""SparseFormer-T's deploy graph against the release's form, on ONNX Runtime's CPU and in TensorRT-RTX's log.

    python benchmarks/sparseformer.py --write

CPU: float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time. Against the release's order of operations
(``sparseformer_release.py``) and our training form, both through bare ``torch.onnx.export``, and our form with the
other sampling. Random weights. TensorRT-RTX: kernels in the logs of ahead-of-time builds in FP32 and FP16 for SM80 and
SM89, and in FP16 for SM89 with heads not padded and with GridSample (needs the extra ``tensorrt-rtx``): evidence for
fusion, none for speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from common import (
    BATCHES,
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
from sparseformer_release import ReleaseForm

from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

OTHERS = {
    "heads not padded": {"options.pad_heads": False},
    "GridSample": {"options.sampling": "grid_sample"},
    "GridSample, heads not padded": {"options.sampling": "grid_sample", "options.pad_heads": False},
}


def model(target: Target, **options: object) -> Loaded:
    asked = {"variant": ("", "t"), **{key: ("", value) for key, value in options.items()}}
    return load_model(find_system("sparseformer"), resolve_recipe("sparseformer", asked), target)


def cpu(batch: int, rounds: int, folder: Path) -> dict[str, object]:
    ours, gather = (model(Target.ONNXRUNTIME, **{"options.sampling": form}) for form in ("grid_sample", "gather"))
    (spec,) = ours.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    release = ReleaseForm(ours.reference).eval()
    check_same(release, ours.reference, images)
    graphs = {
        "deploy": on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"ours{batch}"),
        "release's form, bare export": bare(release, images, folder / f"release{batch}"),
        "training form, bare export": bare(ours.reference, images, folder / f"bare{batch}"),
        "deploy with gather": on_the_road(gather.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"gather{batch}"),
    }
    return figures(race(graphs, images, rounds_of(batch, rounds)), f"batch {batch}")


def check_same(release: torch.nn.Module, reference: torch.nn.Module, images: np.ndarray) -> None:
    with torch.inference_mode():
        expected, got = reference(torch.from_numpy(images)), release(torch.from_numpy(images))
    if not abs(got - expected).max() <= 1e-4 * abs(expected).max():
        raise ValueError("the release's form is another function: its time says nothing")


def counted(folder: Path) -> dict[str, object] | str:
    if reason := no_builder():
        return reason
    recipe = resolve_recipe("sparseformer", {"variant": ("", "t")})
    counts: dict[str, object] = {"shipped": builds(model(Target.TENSORRT), recipe, folder / "shipped")}
    for name, asked in OTHERS.items():
        ours = model(Target.TENSORRT, **asked)
        keep = ours.system.keep_fp32({})
        (engine,) = engines(ours.deploy, ours.inputs, folder / name, keep=keep)
        counts[f"{name}, fp16, sm89"] = {"kernels": kernels(engine), "fused": dict(engine.audit.fused)}
        print(f"{name}: {kernels(engine)} kernels in FP16 on SM89; {engine.audit.statement}")
    return counts


def main() -> None:
    options = timing_arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {f"batch {batch}": cpu(batch, options.rounds, folder) for batch in BATCHES}
        kernel_counts = last_kernels("sparseformer") if options.keep_kernels else counted(folder)
    if options.write:
        command = f"python benchmarks/sparseformer.py --rounds {options.rounds} --write"
        write_results("sparseformer", {"command": command, "cpu": measured, "kernels": kernel_counts})


if __name__ == "__main__":
    main()
