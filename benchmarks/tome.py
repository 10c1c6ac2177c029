"""ToMe's merged graphs against what users have today, and against what a free merge would give, on ONNX Runtime's CPU.

    python benchmarks/tome.py --write

Float32, one thread, interleaved rounds, ratios of CPU time, per model, batch and r:

* against the bare ``torch.onnx.export`` of timm's unmerged model,
* against our own graph with r = 0, beside the ratio of multiply-adds,
* against the drop bound: the same schedule on the same road, tokens sliced away without similarity, merge or log-size.
  The distance to it is the overhead of merging, a share of the merged graph's time.

TensorRT-RTX: kernels in the log of FP16 builds for SM89, merged and not (needs the extra ``tensorrt-rtx``): evidence
for fusion, none for speed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from common import arguments, bare, on_the_road, race, write_results
from torch import Tensor, nn

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.models.tome import DeployToMe
from deploy.precision.convert import convert_precision
from deploy.records import Batch, BenchRecord, Precision, Target, to_json
from deploy.resolve import resolve_recipe

SYSTEM = find_system("tome")
MODELS = {"deit_small_patch16_224": (1, 8), "vit_base_patch16_224": (1, 8), "vit_large_patch16_224": (1,)}
RATES = (0, 8, 13, 16)


class Drop(nn.Module):
    """Keeps the first tokens: what merging would cost if it were free."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor, size: Tensor | None, keys: Tensor, row: Tensor) -> Any:
        """Keep tokens [N,T,C] as if they were merged."""
        return x[:, : self.keep], None, ()


def load(variant: str, r: int, target: Target) -> Loaded:
    return load_model(SYSTEM, resolve_recipe("tome", {"variant": ("", variant), "options.r": ("", r)}), target)


def drop_bound(loaded: Loaded) -> nn.Module:
    """Replace every merge of a deploy form by a slice."""
    form = SYSTEM.to_deploy(loaded.reference, loaded.target)
    assert isinstance(form, DeployToMe)
    for index, (merging, sides) in enumerate(zip(form.merges, loaded.reference.sides(), strict=True)):
        if not isinstance(merging, nn.Identity):
            form.merges[index] = Drop(sides.tokens - loaded.reference.schedule[index])
    return form.eval()


def measure(variant: str, batch: int, rates: tuple[int, ...], rounds: int, folder: Path) -> list[dict[str, object]]:
    plain = load(variant, 0, Target.ONNXRUNTIME)
    (spec,) = plain.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    unmerged = timm.create_model(variant).eval()
    unmerged.load_state_dict(plain.reference.state_dict())
    fixed = {
        "bare export of timm's model": bare(unmerged.requires_grad_(False), images, folder / "bare"),
        "r = 0": on_the_road(plain.deploy, spec, batch, Target.ONNXRUNTIME, folder / "0"),
    }
    found = []
    for r in rates:
        loaded = load(variant, r, Target.ONNXRUNTIME) if r else plain
        graphs = {"ours": on_the_road(loaded.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"{r}"), **fixed}
        if r:
            graphs["drop bound"] = on_the_road(drop_bound(loaded), spec, batch, Target.ONNXRUNTIME, folder / f"d{r}")
        else:
            del graphs["r = 0"]
        found.append(row(variant, batch, r, plain.record.macs / loaded.record.macs, race(graphs, images, rounds)))
    return found


def row(variant: str, batch: int, r: int, macs: float, record: BenchRecord) -> dict[str, object]:
    """Print one line and return what is written."""
    ratios = {ratio.baseline: ratio.median for ratio in record.ratios}
    words = [f"{value:.3f}x {name}" for name, value in ratios.items()]
    if "drop bound" in ratios:
        words.append(f"overhead {1 - ratios['drop bound']:.1%}")
    if r and ratios["r = 0"] <= 1:
        words.append("merging gains nothing here")
    print(f"{variant} batch {batch} r {r}: {', '.join(words)}; {macs:.2f}x fewer multiply-adds", flush=True)
    return {
        "model": variant, "batch": batch, "r": r, "macs": macs, "ratios": to_json(record.ratios),
        "p50_ms": {c.name: c.p50 for c in record.latencies}, "method": record.method,
    }  # fmt: skip


def kernels(variants: list[str], folder: Path) -> dict[str, object] | str:
    backend = load_backend("tensorrt_rtx")
    if reason := backend.available():
        return f"not built: {reason}"
    counts: dict[str, object] = {}
    for variant in variants:
        for r in (0, 8):
            loaded, place = load(variant, r, Target.TENSORRT), folder / f"rtx-{variant}-{r}"
            path = on_the_road(loaded.deploy, loaded.inputs[0], 1, Target.TENSORRT, place)
            keep = SYSTEM.keep_fp32({**SYSTEM.variants[variant].options, "r": r})
            typed = convert_precision(path, Precision.FP16, place, keep=keep, target=Target.TENSORRT)
            options = BuildOptions(precision=Precision.FP16, batch=Batch(), inputs=loaded.inputs, sm=(89,))
            (engine,) = backend.build(place / typed.artifact.name, place, options)
            counts[f"{variant} r={r}"] = {"kernels": sum(engine.audit.kernels.values()), "fused": engine.audit.fused}
            print(f"{variant} r {r}: {counts[f'{variant} r={r}']} in FP16 on SM89", flush=True)
    return counts


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="fewer models")
    parser.add_argument("--rates", nargs="+", type=int, default=list(RATES), help="tokens merged in each block")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="fewer batch sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = []
    for variant in options.models:
        for batch in (b for b in MODELS[variant] if b in options.batches):
            with tempfile.TemporaryDirectory() as scratch:
                measured += measure(variant, batch, tuple(options.rates), options.rounds, Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        counted = kernels(options.models[:1], Path(scratch))
    if options.write:
        command = f"python benchmarks/tome.py --rounds {options.rounds} --write"
        write_results("tome", {"command": command, "cpu": measured, "kernels": counted})


if __name__ == "__main__":
    main()
