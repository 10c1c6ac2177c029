"""How long the road takes besides parity and benchmark, against the bare ``torch.onnx.export`` call.

    python benchmarks/road.py --write

One process, in turn: the stages model to engine of ``effdeploy export riformer``, and ``torch.onnx.export`` of the
loaded training form with its defaults. Wall time; imports are warm for both. Ratio = median over the rounds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from common import arguments, write_results

from deploy.models import find_system
from deploy.models.base import example_inputs, load_model
from deploy.pipeline import run
from deploy.records import Stage, Target
from deploy.resolve import resolve_recipe
from deploy.trace import bare_export


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    loaded = load_model(find_system("riformer"), resolve_recipe("riformer"), Target.ONNXRUNTIME)
    images = example_inputs(loaded.inputs, 1)
    seconds: dict[str, list[float]] = {"bare": [], "fp32": [], "fp16": []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.rounds + 1):
            for name, taken in seconds.items():
                start = time.perf_counter()
                if name == "bare":
                    bare_export(loaded.reference, images, Path(scratch) / "bare.onnx", ("images",))
                else:
                    recipe = resolve_recipe("riformer", {"precision": ("", name)})
                    run(recipe, Path(scratch) / name, until=Stage.ENGINE, reuse=False)
                if turn:  # the first turn pays for imports
                    taken.append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
        for name in ("fp32", "fp16")
    }
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {medians[name]:.2f} s, {ratio:.2f}x the bare export ({medians['bare']:.2f} s)")
    if options.write:
        command = f"python benchmarks/road.py --rounds {options.rounds} --write"
        write_results("road", {"command": command, "seconds": medians, "ratios": ratios})


if __name__ == "__main__":
    main()
