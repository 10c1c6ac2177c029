"""ConvMixer-1024/20's deploy graph against the bare export of the official form, on ONNX Runtime's CPU.

    python benchmarks/convmixer.py --write

Float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time. The official graph is at this runtime's limit:
``share`` is the part of the time that ONNX Runtime's own profile gives to the convolutions of the network, and
``gflops`` what each kind reaches, against a matrix product in PyTorch (``peak_gflops``) in the same process.
TensorRT-RTX: kernels in the logs of ahead-of-time builds in FP32 and FP16 for SM80 and SM89 (needs the extra
``tensorrt-rtx``): evidence for fusion, none for speed.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import THREADS, arguments, bare, builds, figures, on_the_road, race, write_results

from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM, VARIANT = "convmixer", "1024_20"
BATCHES, PRODUCT = (1, 8), 1024
PRODUCTS = ("Conv, pointwise", "Conv, depthwise", "Conv, stem")


def against_bare(ours: Loaded, batch: int, rounds: int, folder: Path) -> dict[str, object]:
    (spec,) = ours.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    graphs = {
        "deploy": on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"ours{batch}"),
        "official form, bare export": bare(ours.reference, images, folder / f"bare{batch}"),
    }
    return {
        **figures(race(graphs, images, rounds), f"batch {batch}"),
        "profile": profile(graphs["deploy"], images, rounds, folder),
    }


def profile(graph: Path, images: np.ndarray, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return milliseconds of one run and, of convolutions, GFLOP/s, by kind, from ONNX Runtime's profiler."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = THREADS, True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for _ in range(rounds):
        session.run(None, {"images": images})
    spent, work = Counter[str](), Counter[str]()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            name, flop = kind(event["args"])
            spent[name] += event["dur"]
            work[name] += flop
    return {
        name: {"ms": total / 1000 / rounds, **({"gflops": work[name] / total / 1000} if work[name] else {})}
        for name, total in spent.most_common()
    }


def kind(node: dict[str, Any]) -> tuple[str, int]:
    """Return what a node is, convolutions by their role, and the FLOP of a convolution.

    A batch norm runs as a depthwise 1x1 convolution.
    """
    if node["op_name"] != "Conv":
        return node["op_name"], 0
    (_, weight, *_), (output, *_) = (
        [shape for entry in node[key] for shape in entry.values()] for key in ("input_type_shape", "output_type_shape")
    )
    flop = 2 * math.prod(weight[1:]) * math.prod(output)
    depthwise, single = weight[1] == 1, weight[2] == 1
    role = ("batch norm" if single else "depthwise") if depthwise else "pointwise" if single else "stem"
    return f"Conv, {role}", 0 if role == "batch norm" else flop


def peak(rounds: int) -> float:
    """Return the median GFLOP/s of a float32 matrix product on one thread: what this machine gives."""
    left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        left @ right
        seconds.append(time.process_time() - start)
    return 2 * PRODUCT**3 / statistics.median(seconds) / 1e9


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(THREADS)
    recipe = resolve_recipe(SYSTEM, {"variant": ("", VARIANT)})
    ours, lowered = (
        load_model(find_system(SYSTEM), recipe, target) for target in (Target.ONNXRUNTIME, Target.TENSORRT)
    )
    with tempfile.TemporaryDirectory() as scratch:
        measured = {f"batch {batch}": against_bare(ours, batch, options.rounds, Path(scratch)) for batch in BATCHES}
        kernel_counts = builds(lowered, recipe, Path(scratch))
    spent = measured[f"batch {BATCHES[0]}"]["profile"]
    total = sum(entry["ms"] for entry in spent.values())
    limits = {"share": sum(spent[name]["ms"] for name in PRODUCTS) / total, "peak_gflops": peak(options.rounds)}
    print(f"{', '.join(PRODUCTS)}: {limits['share']:.1%} of the time; a product {limits['peak_gflops']:.0f} GFLOP/s")
    for name, entry in spent.items():
        print(f"{name}: {entry['ms']:.1f} ms, {entry.get('gflops', 0):.0f} GFLOP/s")
    if options.write:
        command = "python benchmarks/convmixer.py --write"
        write_results(SYSTEM, {"command": command, "cpu": measured, "limits": limits, "kernels": kernel_counts})


if __name__ == "__main__":
    main()
