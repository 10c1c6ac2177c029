"""What the benchmarks share: graphs, interleaved timing, kernels of TensorRT-RTX builds, results with environment."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deploy.artifacts import environment
from deploy.backends import load_backend
from deploy.backends.base import BuildOptions, Runner
from deploy.backends.onnxruntime import open_model
from deploy.bench import BenchCandidate, BenchOptions, measure
from deploy.graph.pipeline import run_passes
from deploy.models.base import Arrays, Loaded, resolve_options
from deploy.precision.convert import convert_precision
from deploy.recipe import Recipe
from deploy.records import Batch, BenchRecord, EngineRecord, Precision, Target, TensorSpec, to_json
from deploy.trace import TraceRequest, bare_export, choose_opset, onnx_from_torch

RESULTS = Path(__file__).parent / "results"
THREADS = 1


def on_the_road(module: nn.Module, spec: TensorSpec, batch: int, target: Target, folder: Path) -> Path:
    """Trace a module as ``effdeploy export`` does and run the target's passes."""
    folder.mkdir(parents=True, exist_ok=True)
    request = TraceRequest(
        inputs=(spec,), outputs=("logits",), batch=Batch.parse(batch), opset=choose_opset(None, target, False)
    )
    traced = onnx_from_torch(module, request, folder)
    return folder / run_passes(folder / traced.artifact.name, target, folder).artifact.name


def bare(module: nn.Module, images: np.ndarray, folder: Path) -> Path:
    """Export with ``torch.onnx.export`` and its defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    return bare_export(module, (torch.from_numpy(images),), folder / "bare.onnx", ("images",))


@contextlib.contextmanager
def opened(graphs: Mapping[str, Path], images: np.ndarray) -> Iterator[list[BenchCandidate]]:
    """Open graphs on ONNX Runtime's CPU provider for timing on fixed images."""
    options = BuildOptions(threads=THREADS, device="cpu")
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(open_model(path, options)) for name, path in graphs.items()}
        yield [_candidate(name, runner, {"images": images}) for name, runner in runners.items()]


def _candidate(name: str, runner: Runner, feeds: Arrays) -> BenchCandidate:
    call: Callable[[], object] = lambda: runner.infer(feeds)  # noqa: E731
    return BenchCandidate(name=name, call=call, batch=len(feeds["images"]), threads=THREADS, device="cpu")


def race(graphs: Mapping[str, Path], images: np.ndarray, rounds: int) -> BenchRecord:
    """Time graphs against each other; the first is compared with every other."""
    with opened(graphs, images) as candidates:
        return measure(
            candidates, BenchOptions(min_rounds=rounds, min_seconds=1.0, max_seconds=600, slice_seconds=0.01)
        )


def figures(record: BenchRecord, label: str) -> dict[str, object]:
    """Print the ratios of a race, and return what its result file keeps."""
    for ratio in record.ratios:
        sure = "" if ratio.interval is None else "; median surely in {:.3f} to {:.3f}".format(*ratio.interval)
        print(f"{label}: {ratio.median:.3f}x ({ratio.p10:.3f} to {ratio.p90:.3f}{sure}) {ratio.baseline}")
    return {
        "ratios": to_json(record.ratios),
        "p50_ms": {candidate.name: candidate.p50 for candidate in record.latencies},
        "method": record.method,
    }


def no_builder() -> str:
    """Say why TensorRT-RTX cannot build here; empty where it can."""
    reason = load_backend("tensorrt_rtx").available()
    return f"not built: {reason}" if reason else ""


def engines(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    folder: Path,
    *,
    precision: Precision = Precision.FP16,
    keep: Sequence[str] = (),
    sm: tuple[int, ...] = (89,),
) -> tuple[EngineRecord, ...]:
    """Build a module ahead of time with TensorRT-RTX, batch 1, one engine per compute capability."""
    path = on_the_road(module, inputs[0], 1, Target.TENSORRT, folder)
    if precision is not Precision.FP32:
        path = folder / convert_precision(path, precision, folder, target=Target.TENSORRT, keep=keep).artifact.name
    options = BuildOptions(precision=precision, batch=Batch(), inputs=tuple(inputs), sm=sm)
    return load_backend("tensorrt_rtx").build(path, folder, options)


def kernels(engine: EngineRecord) -> int:
    """Count the kernels in an engine's build log."""
    return sum(engine.audit.kernels.values())


PRECISIONS, CAPABILITIES = (Precision.FP32, Precision.FP16), (80, 89)


def builds(ours: Loaded, recipe: Recipe, folder: Path) -> dict[str, object] | str:
    """Build a system's deploy form in FP32 and FP16 for Ampere and Ada; return kernels and fused blocks of each."""
    if reason := no_builder():
        return reason
    keep, counts = ours.system.keep_fp32(resolve_options(ours.system, recipe)), dict[str, object]()
    for precision in PRECISIONS:
        place = folder / f"rtx-{precision.value}"
        for engine in engines(ours.deploy, ours.inputs, place, precision=precision, keep=keep, sm=CAPABILITIES):
            name = f"{precision.value}, {engine.device}"
            counts[name] = {"kernels": kernels(engine), "fused": to_json(engine.audit.fused), "ok": engine.audit.ok}
            print(f"{name}: {kernels(engine)} kernels; {engine.audit.statement}")
    return counts


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    return parser


def timing_arguments(description: str) -> argparse.ArgumentParser:
    """Return the options of benchmarks whose kernels need not be counted anew with every timing."""
    parser = arguments(description)
    parser.add_argument("--keep-kernels", action="store_true", help="time only; kernels stay as last written")
    return parser


def last_kernels(name: str) -> dict[str, object] | str:
    """Return the kernels of the last result."""
    kernel_counts: dict[str, object] | str = json.loads((RESULTS / f"{name}.json").read_text())["kernels"]
    return kernel_counts


BATCHES = (1, 8)


def rounds_of(batch: int, rounds: int) -> int:
    """Return how often to time a batch: one image is quick, and what it may gain is near the noise."""
    return 5 * rounds if batch == 1 else rounds


def write_results(name: str, data: Mapping[str, object]) -> None:
    """Write a result with the environment that it was measured in."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"environment": to_json(environment()), **data}, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
