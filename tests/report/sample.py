"""Run records for the tests of terminal and report: one that has everything, and ways to take parts away.

The figures are made up in the size of real ones; they never leave the tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from typing import Any

from deploy.records import (
    Artifact,
    Audit,
    Batch,
    BatchCheck,
    BatchRecord,
    BenchRecord,
    BoundaryError,
    Comparison,
    Drift,
    EngineRecord,
    Environment,
    Kept,
    Latency,
    ModelRecord,
    ParityRecord,
    PassesRecord,
    PassRecord,
    Precision,
    PrecisionRecord,
    Preprocess,
    Ratio,
    RunRecord,
    Stage,
    Target,
    TensorSpec,
    Tolerance,
    TraceRecord,
    WeightsSource,
)

_MODULES = (
    ("stages.0", 0.171), ("stages.1", 0.183), ("stages.2", 0.402), ("stages.3", 0.181), ("patch_embed", 0.041),
    ("head", 0.022),
)  # fmt: skip
STATEMENT = "weights: random (seed 0): latency and numerics only, not accuracy"


def full_run(**changes: Any) -> RunRecord:
    """An FP16 export of RIFormer-S12 with every record filled in."""
    run = RunRecord(
        schema_version=1,
        effdeploy="0.1.0",
        name="riformer_s12-224x224-b1-fp16-onnxruntime",
        created="2025-06-01T12:00:00Z",
        until=Stage.REPORT,
        ok=True,
        verdict="the fp16 engine follows fp32 PyTorch: largest error 0.00126 of the largest logit, 0.02 allowed",
        recipe={
            "system": "riformer",
            "variant": "s12",
            "size": "224x224",
            "batch": "1",
            "precision": "fp16",
            "weights": "random",
            "target": None,
            "trace": {"opset": None, "attention_op": False},
            "engine": {"backend": "onnxruntime", "sm": [], "threads": 0},
            "parity": {"images": None, "seed": 0},
            "bench": {"baselines": ["naive", "eager"], "threads": 1},
        },
        environment=Environment(
            python="3.12.9",
            platform="Linux x86_64",
            cpu="Intel(R) Xeon(R) Processor",
            cores=2,
            gpu="none",
            packages={"torch": "2.15.0", "onnx": "1.23.0", "onnxruntime-gpu": "1.31.0", "polygraphy": "0.53.0"},
        ),
        model=_model(),
        trace=_trace(),
        passes=_passes(),
        precision=_precision(),
        engines=(_engine(),),
        parity=_parity(),
        bench=_bench(),
        stage_seconds={"model": 0.41, "trace": 2.68, "passes": 0.42, "precision": 0.63, "parity": 9.8, "latency": 61.2},
    )
    return dataclasses.replace(run, **changes)


def failed_run() -> RunRecord:
    """The same run with an engine beyond the tolerance."""
    run = full_run()
    assert run.parity is not None
    last = dataclasses.replace(
        run.parity.comparisons[-1],
        max_relative=0.31,
        cosine=0.91,
        top1=0.84,
        passed=False,
        failures=("max relative 0.31 > 0.02", "top-1 84.0 % < 100 %"),
    )
    parity = dataclasses.replace(
        run.parity,
        ok=False,
        verdict="engine: max relative 0.31 > 0.02",
        comparisons=(*run.parity.comparisons[:-1], last),
    )
    return dataclasses.replace(run, ok=False, verdict="the fp16 engine does not follow fp32 PyTorch", parity=parity)


def stopped_run() -> RunRecord:
    """``--until trace``: nothing after the traced file."""
    return full_run(
        until=Stage.TRACE, verdict="traced; nothing was judged", passes=None, precision=None, engines=(), parity=None,
        bench=None, stage_seconds={"model": 0.41, "trace": 2.68},
    )  # fmt: skip


def ahead_of_time_run() -> RunRecord:
    """TensorRT-RTX engines built on a machine without a GPU: nothing ran, so parity ends before the engine."""
    reason = "no NVIDIA GPU on this machine: the engine is for sm89"
    audit = Audit(
        asked=Precision.FP16, evidence="build log", kernels={"fp16": 93, "fp32": 4}, fused={"norm": 25}, ok=True,
        statement="asked fp16; 93 of 97 kernels compute in fp16 (build log)",
    )  # fmt: skip
    engine = EngineRecord(
        backend="tensorrt_rtx", backend_version="1.7.1", artifact=_file("40-sm89.engine", 24_100_000), device="sm89",
        runnable=False, reason=reason, audit=audit, options={"sm": "89", "tf32": "off"}, seconds=14.2,
    )  # fmt: skip
    run = full_run()
    assert run.parity is not None
    parity = dataclasses.replace(run.parity, comparisons=run.parity.comparisons[:-1])
    return dataclasses.replace(run, engines=(engine,), parity=parity, bench=None)


def broken_numbers_run() -> RunRecord:
    """NaN and infinity where figures should be, one latency sample, none in another, no baselines, no modules."""
    run = full_run()
    assert run.parity is not None
    assert run.bench is not None
    nan = math.nan
    last = dataclasses.replace(
        run.parity.comparisons[-1], max_abs=nan, mean_abs=nan, max_relative=nan, relative_l2=nan, cosine=nan,
        snr_db=-math.inf, top1=0.0, passed=False, failures=("the engine gave NaN",),
    )  # fmt: skip
    verdict = "parity fails at 'engine': the engine gave NaN"
    parity = dataclasses.replace(
        run.parity, ok=False, verdict=verdict, comparisons=(*run.parity.comparisons[:-1], last)
    )
    one = dataclasses.replace(run.bench.latencies[0], samples=(8.5,), cov=nan)
    none = dataclasses.replace(
        run.bench.latencies[1], samples=(), mean=nan, p50=nan, p90=nan, p95=nan, p99=nan, cov=nan, throughput=0.0
    )
    bench = dataclasses.replace(run.bench, latencies=(one, none), ratios=(), modules={})
    return dataclasses.replace(run, ok=False, verdict="the engine gave NaN", parity=parity, bench=bench)


def hostile_run() -> RunRecord:
    """Strings from foreign files that try to be markup, a template, a table border or a terminal command."""
    run = full_run()
    assert run.precision is not None
    assert run.passes is not None
    evil = "<script>alert('x')</script>|{{ 7*7 }}|\x1b[31m`**a**"
    kept = Kept(reason=evil, nodes=1, examples=(evil,))
    passes = dataclasses.replace(run.passes, passes=(dataclasses.replace(run.passes.passes[0], declined=(evil,)),))
    assert run.bench is not None
    bench = dataclasses.replace(run.bench, modules={evil: 0.9, "head": 0.1}, warnings=(evil,))
    return dataclasses.replace(
        run, name=evil, verdict=evil, recipe={evil: evil}, bench=bench, passes=passes,
        precision=dataclasses.replace(run.precision, kept=(kept,)),
    )  # fmt: skip


def _file(name: str, size: int) -> Artifact:
    return Artifact(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), size=size)


def _model() -> ModelRecord:
    return ModelRecord(
        system="riformer",
        variant="s12",
        task="classification",
        paper="RIFormer: Keep Your Vision Backbone Effective But Removing Token Mixer (CVPR 2023)",
        size=(224, 224),
        parameters=11_915_176,
        deploy_parameters=11_900_840,
        macs=1_822_000_000,
        weights=WeightsSource(kind="random", statement=STATEMENT, seed=0),
        preprocess=Preprocess(crop=0.9),
        form="instance_norm",
        form_reason="ONNX Runtime expands GroupNormalization on the CPU; InstanceNormalization is 1.09x faster",
        drift=Drift(fp32_max_abs=3.4e-6, fp32_relative=8.1e-7, fp64_max_abs=6.2e-15, fp64_relative=1.5e-15),
        seconds=0.41,
    )


def _trace() -> TraceRecord:
    return TraceRecord(
        artifact=_file("10-traced.onnx", 47_712_345),
        opset=20,
        batch=Batch(min=1, opt=1, max=1),
        inputs=(TensorSpec(name="images", dtype="float32", shape=(1, 3, 224, 224)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 1000)),),
        op_counts=_before(),
        checks=("opset is 20 as asked", "images is float32 [1, 3, 224, 224]", "two exports give the same bytes"),
        seconds=2.68,
    )


def _before() -> dict[str, int]:
    return {
        "Conv": 29, "InstanceNormalization": 25, "Reshape": 50, "Mul": 50, "Add": 49, "Gelu": 12,
        "ReduceMean": 1, "Gemm": 1, "Identity": 6, "Constant": 14,
    }  # fmt: skip


def _after() -> dict[str, int]:
    kept = {name: number for name, number in _before().items() if name not in ("Identity", "Constant")}
    return {**kept, "Mul": 25}


def _passes() -> PassesRecord:
    def one(name: str, reason: str, sites: int, before: int, after: int, *declined: str) -> PassRecord:
        return PassRecord(
            name=name, reason=reason, sites=sites, declined=declined, nodes_before=before, nodes_after=after,
            seconds=0.031, max_abs_change=1.2e-7 if sites else 0.0,
        )  # fmt: skip

    return PassesRecord(
        artifact=_file("20-patched.onnx", 47_690_112),
        target=Target.ONNXRUNTIME,
        passes=(
            one("fold_constants", "the exporter leaves shape arithmetic behind", 20, 237, 217),
            one("fold_batchnorm", "a convolution can hold the scale and the shift", 0, 217, 217),
            one(
                "fuse_layernorm", "one node instead of nine", 0, 217, 217,
                "stages.0.blocks.0.norm1: the mean runs over axes (1, 2, 3), LayerNormalization needs trailing axes",
                "stages.0.blocks.0.norm2: the mean runs over axes (1, 2, 3), LayerNormalization needs trailing axes",
            ),
            one("scale_into_conv", "a product with a constant folds into the weights", 25, 217, 192),
        ),
        op_counts_before=_before(),
        op_counts=_after(),
        seconds=0.42,
    )  # fmt: skip


def _precision() -> PrecisionRecord:
    return PrecisionRecord(
        artifact=_file("30-fp16.onnx", 23_911_002),
        precision=Precision.FP16,
        dtype_counts={"float32": 50, "float16": 142},
        casts=4,
        kept=(
            Kept(reason="sums of more than 1024 terms overflow FP16", nodes=25, examples=("stages.0.blocks.0.norm1",)),
            Kept(reason="inputs and outputs stay float32", nodes=2, examples=("images", "logits")),
        ),
        warnings=("stages.3.blocks.1.mlp.fc2 reaches 41,200 of FP16's 65,504",),
        largest_activation=41_200.0,
        seconds=0.63,
    )


def _engine() -> EngineRecord:
    return EngineRecord(
        backend="onnxruntime",
        backend_version="1.31.0",
        artifact=_file("40-onnxruntime.onnx", 23_950_400),
        device="cpu",
        runnable=True,
        reason="",
        audit=Audit(
            asked=Precision.FP16,
            evidence="optimised graph of the session",
            kernels={"fp32": 50, "fp16": 142},
            fused={"gelu": 12},
            ok=True,
            statement="asked fp16; 142 of 192 floating-point nodes compute in fp16 (optimised graph of the session)",
        ),
        options={"threads": "1", "graph optimisation": "all"},
        seconds=0.22,
    )


def _comparison(stage: str, relative: float, *, cosine: float, snr: float) -> Comparison:
    return Comparison(
        stage=stage, output="logits", images=24, max_abs=relative * 4.19, mean_abs=relative * 0.8,
        max_relative=relative, relative_l2=relative * 0.6, cosine=cosine, snr_db=snr,
        top1=1.0, top5=1.0, passed=True, failures=(), precision="fp16" if stage in ("fp16", "engine") else "fp32",
        per_input={"noise": relative * 0.7, "natural": relative, "extremes": relative * 0.9},
    )  # fmt: skip


def _parity() -> ParityRecord:
    return ParityRecord(
        ok=True,
        verdict="every stage is within its tolerance",
        tolerances={
            "fp32": Tolerance(max_relative=1e-4, cosine=0.99999, top1=1.0),
            "fp16": Tolerance(max_relative=0.02, cosine=0.9995, snr_db=35.0, top1=1.0),
        },
        comparisons=(
            _comparison("deploy form", 8.1e-7, cosine=1.0, snr=128.0),
            _comparison("traced", 1.13e-6, cosine=0.99999999992, snr=122.0),
            _comparison("patched", 1.21e-6, cosine=0.99999999991, snr=121.0),
            _comparison("fp16", 1.19e-3, cosine=0.9999984, snr=55.1),
            _comparison("engine", 1.26e-3, cosine=0.9999983, snr=54.8),
        ),
        inputs={"noise": 8, "natural": 8, "extremes": 8},
        notes=("no photographs were given (--images DIR): top-1 is over made inputs",),
        seconds=9.8,
        batches=_batches(),
        modules=_boundaries(),
    )


def _boundaries() -> tuple[BoundaryError, ...]:
    errors = (2.11e-4, 3.27e-4, 4.83e-4, 6.69e-4, 7.41e-4, 9.13e-4)
    return tuple(
        BoundaryError(module=name, tensor=f"{name}/out", before=before, after=after, jump=False)
        for name, before, after in zip([name for name, _ in _MODULES], (0.0, *errors), errors, strict=False)
    )


def _batches() -> BatchRecord:
    checks = [
        BatchCheck(stage="engine", check=name, batch=size, output="logits", row=1, error=error, limit=limit, ok=True)
        for size in (1, 3, 8)
        for name, error, limit in (("alone", 3.11e-4, 5e-3), ("permuted", 2.17e-4, 5e-3), ("neighbour", 0.0, 0.0))
    ]
    return BatchRecord(
        ok=True, verdict="rows are independent", checks=tuple(checks), sizes=(1, 3, 8), notes=(), seconds=2.4
    )


def _latency(name: str, batch: int, centre: float, *, build: float, memory: int) -> Latency:
    noise = random.Random(batch * centre)
    samples = tuple(round(centre * 0.985 * (1 + noise.lognormvariate(-4.2, 0.6)), 4) for _ in range(120))
    ordered = sorted(samples)
    mean = sum(samples) / len(samples)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in samples) / len(samples))
    return Latency(
        name=name, batch=batch, threads=1, device="cpu", samples=samples, mean=mean, p50=ordered[60], p90=ordered[108],
        p95=ordered[114], p99=ordered[118], cov=deviation / mean, throughput=1000 * batch / ordered[60],
        peak_memory=memory, build_seconds=build,
    )  # fmt: skip


def _bench() -> BenchRecord:
    return BenchRecord(
        latencies=(
            _latency("engine", 1, 31.9, build=0.22, memory=301_000_000),
            _latency("naive", 1, 34.4, build=3.1, memory=322_000_000),
            _latency("eager", 1, 47.6, build=0.0, memory=610_000_000),
        ),
        ratios=(
            Ratio(name="engine", baseline="naive", batch=1, median=1.078, p10=1.051, p90=1.093, rounds=120),
            Ratio(name="engine", baseline="eager", batch=1, median=1.492, p10=1.441, p90=1.533, rounds=120),
        ),
        warnings=("the clock of this machine is shared: CoV of eager is 3.1 %, above 2.5 %",),
        method="wall clock, 3 s warm-up, 120 interleaved rounds, 1 thread",
        modules=dict(_MODULES),
        seconds=61.2,
    )
