"""ConvMixer-1024/20's deploy graph against the bare export of the official form, on ONNX Runtime's CPU.

    python benchmarks/convmixer.py --write

Float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time, against the official form and against ours whose
depthwise convolutions pad by themselves. ``padding_leaves_out`` and ``padding_adds`` are what ONNX Runtime, after its
own optimisation, runs for the official graph alone and for the latter alone (operator, shapes of weights, attributes):
one norm and nothing, so without borders written out our graph is the official one. ``profiles`` hold milliseconds,
GFLOP/s and GB/s of a run by kind of node, and ``bound``: the least time that the machine could take (FLOP over
``peak_gflops``, a matrix product in PyTorch, or bytes over ``gigabytes``, a copy, whichever is more) over the time that
it takes; above 1 where maps are still in a cache.
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
import onnx
import onnxruntime
import torch
from common import (
    BATCHES,
    THREADS,
    bare,
    builds,
    figures,
    last_kernels,
    on_the_road,
    race,
    rounds_of,
    timing_arguments,
    write_results,
)

from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM, VARIANT = "convmixer", "1024_20"
PRODUCT = 1024


OFFICIAL, PADDING = "official form, bare export", "deploy, borders by padding"


def loaded(target: Target = Target.ONNXRUNTIME, **options: object) -> Loaded:
    asked = {"variant": ("", VARIANT), **{f"options.{key}": ("", value) for key, value in options.items()}}
    return load_model(find_system(SYSTEM), resolve_recipe(SYSTEM, asked), target)


def against_bare(batch: int, rounds: int, folder: Path) -> dict[str, Any]:
    ours, padding = loaded(), loaded(border="padding")
    (spec,) = ours.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    graphs = {
        "deploy": on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"ours{batch}"),
        OFFICIAL: bare(ours.reference, images, folder / f"bare{batch}"),
        PADDING: on_the_road(padding.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"padding{batch}"),
    }
    theirs, plain = (work_of(graphs[name], folder) for name in (OFFICIAL, PADDING))
    return {
        **figures(race(graphs, images, rounds_of(batch, rounds)), f"batch {batch}"),
        "padding_leaves_out": [[*node, count] for node, count in (theirs - plain).items()],
        "padding_adds": [[*node, count] for node, count in (plain - theirs).items()],
        "profiles": {name: profile(graphs[name], images, max(3, rounds // 4), folder) for name in ("deploy", OFFICIAL)},
    }


def work_of(graph: Path, folder: Path) -> Counter[tuple[object, ...]]:
    """Count the nodes that ONNX Runtime really runs, by operator and the shapes of their weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3  # a saved graph is for this machine only
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    found = onnx.load(folder / "optimised.onnx", load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in found.initializer}
    return Counter(
        (
            node.op_type,
            *(shapes[name] for name in node.input if name in shapes),
            str(sorted((a.name, onnx.helper.get_attribute_value(a)) for a in node.attribute)),
        )
        for node in found.node
    )


def profile(graph: Path, images: np.ndarray, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return milliseconds of one run, GFLOP and GB by kind of node, from ONNX Runtime's profiler."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = THREADS, True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for _ in range(rounds):
        session.run(None, {"images": images})
    found: dict[str, Counter[str]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            name, flop, moved = kind(event["args"])
            found.setdefault(name, Counter()).update(ms=event["dur"] / 1000, gflop=flop / 1e9, gb=moved / 1e9)
    entries = sorted(found.items(), key=lambda entry: -entry[1]["ms"])
    return {name: {key: value / rounds for key, value in entry.items()} for name, entry in entries}


def kind(node: dict[str, Any]) -> tuple[str, int, int]:
    """Return what a node is, convolutions by their role, the FLOP of a convolution and the bytes in and out.

    A batch norm runs as a depthwise 1x1 convolution; without a bias such a one writes a border.
    """
    inputs, outputs = (
        [shape for entry in node[key] for shape in entry.values()] for key in ("input_type_shape", "output_type_shape")
    )
    moved = 4 * sum(math.prod(shape) for shape in (*inputs, *outputs))
    if node["op_name"] != "Conv":
        return node["op_name"], 0, moved
    weight = inputs[1]
    depthwise, single = weight[1] == 1, weight[2] == 1
    small = "batch norm" if len(inputs) > 2 else "border"
    role = (small if single else "depthwise") if depthwise else "pointwise" if single else "stem"
    return f"Conv, {role}", 2 * math.prod(weight[1:]) * math.prod(outputs[0]), moved


def against_peaks(spent: dict[str, dict[str, float]], flops: float, bandwidth: float) -> dict[str, dict[str, float]]:
    """Return GFLOP/s, GB/s, and the least time that the machine could take over the time taken, by kind."""
    return {
        name: {
            "ms": entry["ms"],
            "gflops": 1e3 * entry["gflop"] / entry["ms"],
            "gigabytes": 1e3 * entry["gb"] / entry["ms"],
            "bound": 1e3 * max(entry["gflop"] / flops, entry["gb"] / bandwidth) / entry["ms"],
        }
        for name, entry in spent.items()
    }


def copied(rounds: int) -> float:
    """Return the median GB/s, read and written, of a copy of 256 MB on one thread."""
    source, target = np.ones(64 << 20, np.float32), np.zeros(64 << 20, np.float32)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        np.copyto(target, source)
        seconds.append(time.process_time() - start)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


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
    options = timing_arguments(__doc__ or "").parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        measured = {f"batch {batch}": against_bare(batch, options.rounds, Path(scratch)) for batch in BATCHES}
        recipe = resolve_recipe(SYSTEM, {"variant": ("", VARIANT)})
        kernel_counts = (
            last_kernels(SYSTEM) if options.keep_kernels else builds(loaded(Target.TENSORRT), recipe, Path(scratch))
        )
    machine = {"peak_gflops": peak(options.rounds), "gigabytes": copied(options.rounds)}
    print(f"a product {machine['peak_gflops']:.0f} GFLOP/s, a copy {machine['gigabytes']:.1f} GB/s")
    for batch, entry in measured.items():
        print(f"{batch}: padding leaves out {entry['padding_leaves_out']}, adds {entry['padding_adds']}")
        for graph, spent in entry["profiles"].items():
            entry["profiles"][graph] = against_peaks(spent, *machine.values())
            for name, found in entry["profiles"][graph].items():
                rates = f"{found['gflops']:.0f} GFLOP/s, {found['gigabytes']:.1f} GB/s"
                print(f"  {graph}: {name}: {found['ms']:.1f} ms, {rates}, the machine's least {found['bound']:.0%}")
    if options.write:
        command = f"python benchmarks/convmixer.py --rounds {options.rounds} --write"
        write_results(SYSTEM, {"command": command, "cpu": measured, "machine": machine, "kernels": kernel_counts})


if __name__ == "__main__":
    main()
