"""ConvMixer-1024/20's deploy graph against the bare export of the official form, on ONNX Runtime's CPU.

    python benchmarks/convmixer.py --write

Float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time. The official graph is at this runtime's limit:
``share`` is the part of the time that ONNX Runtime's own profile gives to convolutions (batch norms among them, which
it runs as such) and GELU, and ``gflops`` what all of the graph reaches against a matrix product of the pointwise
convolution's shape on the same machine, in the same process.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from common import THREADS, arguments, bare, figures, on_the_road, race, write_results

from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

SYSTEM, VARIANT = "convmixer", "1024_20"
BATCHES, PRODUCT = (1, 8), 1024


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


def profile(graph: Path, images: np.ndarray, rounds: int, folder: Path) -> dict[str, float]:
    """Return milliseconds of one run by operator, from ONNX Runtime's profiler."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = THREADS, True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for _ in range(rounds):
        session.run(None, {"images": images})
    events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: total / 1000 / rounds for name, total in spent.most_common()}


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
    ours = load_model(find_system(SYSTEM), resolve_recipe(SYSTEM, {"variant": ("", VARIANT)}), Target.ONNXRUNTIME)
    with tempfile.TemporaryDirectory() as scratch:
        measured = {f"batch {batch}": against_bare(ours, batch, options.rounds, Path(scratch)) for batch in BATCHES}
    spent = measured[f"batch {BATCHES[0]}"]["profile"]
    total = sum(spent.values())
    limits = {
        "share": (spent["Conv"] + spent["Gelu"]) / total,
        "gflops": 2 * ours.record.macs * BATCHES[0] / total / 1e6,
        "peak_gflops": peak(options.rounds),
    }
    print(f"convolutions and GELU {limits['share']:.1%}; {limits['gflops']:.0f} of {limits['peak_gflops']:.0f} GFLOP/s")
    if options.write:
        command = "python benchmarks/convmixer.py --write"
        write_results(SYSTEM, {"command": command, "cpu": measured, "limits": limits})


if __name__ == "__main__":
    main()
