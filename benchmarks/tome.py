"""ToMe's merged graphs against what users have today, and against what a free merge would give, on ONNX Runtime's CPU.

    python benchmarks/tome.py --models deit_small_patch16_224 --batches 1 --write
    python benchmarks/tome.py --kernels --write

Each run with ``--write`` replaces its own rows of the result file and keeps the others.

Float32, one thread, interleaved rounds, ratios of CPU time, per model, batch and r. Where a session's memory lies moves
a ratio by more than the rounds do, so the graphs are opened several times; the median is that of the openings' medians.

* against the bare ``torch.onnx.export`` of timm's unmerged model,
* against our own graph with r = 0, beside the ratio of multiply-adds,
* against the drop bound: the same schedule on the same road, tokens sliced away without similarity, merge or log-size.
  The distance to it is the overhead of merging, a share of the merged graph's time.

``--kernels``: kernels in the logs of TensorRT-RTX builds in FP32 and FP16 for SM80 and SM89, merged and not (needs the
extra ``tensorrt-rtx``): evidence for fusion, none for speed.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from common import RESULTS, arguments, bare, on_the_road, race, write_results
from torch import Tensor, nn

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.models import find_system
from deploy.models.base import Loaded, example_inputs, load_model
from deploy.models.tome import DeployToMe
from deploy.precision.convert import convert_precision
from deploy.records import Batch, BenchRecord, Precision, Ratio, Target
from deploy.resolve import resolve_recipe

SYSTEM = find_system("tome")
MODELS = {"deit_small_patch16_224": (1, 8), "vit_base_patch16_224": (1, 8), "vit_large_patch16_224": (1,)}
RATES = (0, 8, 13, 16)
SMS = {"sm80": 80, "sm89": 89}
Row = dict[str, Any]


class Drop(nn.Module):
    """Keeps the first tokens: what merging would cost if it were free."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor, size: Tensor | None, metric: Tensor, image: Tensor) -> Any:
        """Keep tokens, rows [N*T,C], as if they were merged."""
        if len(metric) == 1:
            return x[: self.keep], None, ()
        return x.reshape(len(metric), -1, x.shape[1])[:, : self.keep].reshape(-1, x.shape[1]), None, ()


def load(variant: str, r: int, target: Target, depth: int = 0) -> Loaded:
    """Load a variant with random weights; ``depth``: of its first blocks only."""
    chosen = {"variant": ("", variant), "options.r": ("", r), **({"options.depth": ("", depth)} if depth else {})}
    return load_model(SYSTEM, resolve_recipe("tome", chosen), target)


def drop_bound(loaded: Loaded) -> nn.Module:
    """Replace every merge of a deploy form by a slice."""
    form = SYSTEM.to_deploy(loaded.reference, loaded.target)
    assert isinstance(form, DeployToMe)
    for index, (merging, sides) in enumerate(zip(form.merges, loaded.reference.sides(), strict=True)):
        if not isinstance(merging, nn.Identity):
            form.merges[index] = Drop(sides.tokens - loaded.reference.schedule[index])
    return form.eval()


def measure(variant: str, batch: int, rates: list[int], rounds: int, openings: int, folder: Path) -> Iterator[Row]:
    """Yield a row for each r, as soon as it is measured."""
    plain = load(variant, 0, Target.ONNXRUNTIME)
    (spec,) = plain.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    unmerged = timm.create_model(variant).eval()
    unmerged.load_state_dict(plain.reference.state_dict())
    fixed = {
        "bare export of timm's model": bare(unmerged.requires_grad_(False), images, folder / "bare"),
        "r = 0": on_the_road(plain.deploy, spec, batch, Target.ONNXRUNTIME, folder / "0"),
    }
    for r in rates:
        loaded = load(variant, r, Target.ONNXRUNTIME) if r else plain
        graphs = {"ours": on_the_road(loaded.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"{r}"), **fixed}
        if r:
            graphs["drop bound"] = on_the_road(drop_bound(loaded), spec, batch, Target.ONNXRUNTIME, folder / f"d{r}")
        else:
            del graphs["r = 0"]
        records = [race(graphs, images, rounds) for _ in range(openings)]
        yield row(variant, batch, r, plain.record.macs / loaded.record.macs, records)


def row(variant: str, batch: int, r: int, macs: float, records: list[BenchRecord]) -> Row:
    """Print one line and return what is written."""
    found = [ratio_of(same) for same in zip(*(record.ratios for record in records), strict=True)]
    ratios = {ratio["baseline"]: ratio["median"] for ratio in found}
    words = [f"{value:.3f}x {name}" for name, value in ratios.items()]
    if "drop bound" in ratios:
        words.append(f"overhead {1 - ratios['drop bound']:.1%}")
    if r and ratios["r = 0"] <= 1:
        words.append("merging gains nothing here")
    print(f"{variant} batch {batch} r {r}: {', '.join(words)}; {macs:.2f}x fewer multiply-adds", flush=True)
    return {
        "model": variant, "batch": batch, "r": r, "macs": macs, "ratios": found, "method": records[0].method,
        "p50_ms": {
            same[0].name: statistics.median(latency.p50 for latency in same)
            for same in zip(*(record.latencies for record in records), strict=True)
        },
    }  # fmt: skip


def ratio_of(openings: Sequence[Ratio]) -> Row:
    """Join the same ratio of several openings."""
    medians = [ratio.median for ratio in openings]
    first = openings[0]
    return {
        "baseline": first.baseline,
        "median": statistics.median(medians),
        "openings": medians,
        "rounds": first.rounds,
    }


def kernels(variants: list[str], depth: int, folder: Path) -> Iterator[Row]:
    """Build each variant unmerged and merged as its recipe says; yield counts of kernels and fused attention."""
    if reason := load_backend("tensorrt_rtx").available():
        raise SystemExit(f"not built: {reason}")
    for variant in variants:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            plain, merged = (built(variant, r, depth, Path(scratch) / f"{r}") for r in (0, merged_by(variant)))
            for row, other in itertools.chain(zip(plain, plain, strict=True), zip(merged, plain, strict=True)):
                layers = row["merging"] or 1
                row["added"] = {sm: round((row[sm]["kernels"] - other[sm]["kernels"]) / layers, 2) for sm in SMS}
                print(json.dumps(row), flush=True)
                yield row


def merged_by(variant: str) -> int:
    """Return the variant's own r."""
    return int(SYSTEM.variants[variant].options["r"])


def built(variant: str, r: int, depth: int, folder: Path) -> list[Row]:
    """Build engines in FP16 and FP32, one a compute capability."""
    loaded = load(variant, r, Target.TENSORRT, depth)
    path = on_the_road(loaded.deploy, loaded.inputs[0], 1, Target.TENSORRT, folder)
    merging = sum(not isinstance(m, nn.Identity) for m in loaded.deploy.merges)
    blocks, rows = len(loaded.deploy.blocks), []
    for precision in (Precision.FP16, Precision.FP32):
        typed = path
        if precision is not Precision.FP32:
            keep = SYSTEM.keep_fp32({**SYSTEM.variants[variant].options, "r": r})
            typed = folder / convert_precision(path, precision, folder, keep=keep, target=Target.TENSORRT).artifact.name
        options = BuildOptions(precision=precision, batch=Batch(), inputs=loaded.inputs, sm=tuple(SMS.values()))
        engines = load_backend("tensorrt_rtx").build(typed, folder, options)
        counts = {
            name: {"kernels": sum(engine.audit.kernels.values()), "fused": engine.audit.fused.get("attention", 0)}
            for name, engine in zip(SMS, engines, strict=True)
        }
        about = {"model": variant, "precision": precision.value, "r": r, "blocks": blocks, "merging": merging}
        rows.append({**about, **counts})
    return rows


def keep(name: str, found: Row) -> None:
    """Write a row to the result file, in place of an earlier one of the same case."""
    path, case = RESULTS / "tome.json", ("model", "batch", "precision", "r", "blocks")
    data = json.loads(path.read_text()) if path.exists() else {"cpu": [], "kernels": []}
    others = [row for row in data[name] if any(row.get(key) != found.get(key) for key in case)]
    tables = {"cpu": data["cpu"], "kernels": data["kernels"], name: [*others, found]}
    write_results("tome", {"command": "python benchmarks/tome.py", **tables})


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(SYSTEM.variants), help="of these")
    parser.add_argument("--rates", nargs="+", type=int, default=list(RATES), help="tokens merged in each block")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of these batch sizes")
    parser.add_argument("--openings", type=int, default=5, help="sessions of each graph, each timed for all rounds")
    parser.add_argument("--kernels", action="store_true", help="count kernels instead of timing")
    parser.add_argument("--depth", type=int, default=0, help="with --kernels: so many blocks of each; 0: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.kernels:
            cases = [kernels(options.models, options.depth, Path(scratch))]
        else:
            cases = [
                measure(
                    variant,
                    batch,
                    options.rates,
                    options.rounds,
                    options.openings,
                    Path(scratch) / f"{variant}-{batch}",
                )
                for variant in options.models
                for batch in MODELS[variant]
                if batch in options.batches
            ]
        for found in itertools.chain(*cases):
            if options.write:
                keep("kernels" if options.kernels else "cpu", found)


if __name__ == "__main__":
    main()
