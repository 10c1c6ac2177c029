"""The same build and the same measurement with NVIDIA's own tools, as command lines; text only, nothing is run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from deploy.records import Batch, EngineRecord, RunRecord, TensorSpec

_HARDWARE = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
# What trtexec 11 does by itself and 10 does only when asked (trtexec migration guide, 10.x to 11.x).
_TIMING_FLAGS_OF_10 = ("--noDataTransfers", "--useSpinWait", "--useCudaGraph", "--separateProfileRun")


def trtexec_build(engine: EngineRecord, inputs: Sequence[TensorSpec]) -> str:
    """Return the ``trtexec`` line that builds the same engine, or nothing where it is no TensorRT engine.

    trtexec comes with TensorRT's tar, deb and container, not with its Python wheels.
    """
    options = engine.options
    if engine.backend != "tensorrt" or "model" not in options:  # records of before this was kept
        return ""
    words = ["trtexec", f"--onnx={options['model']}", f"--saveEngine={engine.artifact.name}", "--skipInference"]
    if _major(engine) < 11:
        words.append("--stronglyTyped")
    words += _profiles(inputs, options["batch"])
    words += [f"--builderOptimizationLevel={options['level']}", "--profilingVerbosity=detailed"]
    words += _workspace(options["workspace"])
    words += [] if options["tf32"] == "True" else ["--noTF32"]
    words += ["--versionCompatible"] if options["version_compatible"] == "yes" else []
    words += [f"--hardwareCompatibilityLevel={_HARDWARE[h]}"] if (h := options["hardware"]) in _HARDWARE else []
    words += ["--refit"] if options["refit"] == "yes" else []
    words += ["--stripWeights"] if options["strip"] == "yes" else []
    return shlex.join(words)


def trtexec_timing(engine: EngineRecord, inputs: Sequence[TensorSpec], batch: int, seconds: float) -> str:
    """Return the ``trtexec`` line that times the engine as ``effdeploy bench`` does: CUDA graph, copies left out."""
    if engine.backend != "tensorrt":
        return ""
    shapes = [spec for spec in inputs if any(isinstance(axis, str) for axis in spec.shape)]
    words = ["trtexec", f"--loadEngine={engine.artifact.name}"]
    words += [f"--shapes={','.join(_shape(spec, batch) for spec in shapes)}"] if shapes else []
    words += ["--warmUp=500", f"--duration={max(1, round(seconds))}"]
    words += _TIMING_FLAGS_OF_10 if _major(engine) < 11 else ()
    return shlex.join(words)


def polygraphy_engine(run: RunRecord, engine: EngineRecord) -> str:
    """Return the ``polygraphy`` line that compares TensorRT with ONNX Runtime on the file the engine was built from."""
    if engine.backend != "tensorrt" or run.trace is None or run.precision is None:
        return ""
    words = ["polygraphy", "run", run.precision.artifact.name, "--trt", "--onnxrt", "--strongly-typed", "--seed", "0"]
    dynamic = [spec for spec in run.trace.inputs if any(isinstance(axis, str) for axis in spec.shape)]
    for text in engine.options["batch"].split(",") if dynamic else ():
        batch = Batch.parse(text)
        for bound, size in (("min", batch.min), ("opt", batch.opt), ("max", batch.max)):
            words += [f"--trt-{bound}-shapes", *(f"{s.name}:[{_dims(s, size, ',')}]" for s in dynamic)]
    words += [*pixel_range(run.trace.inputs), "--builder-optimization-level", engine.options["level"]]
    words += ["--tf32"] if engine.options["tf32"] == "True" else []
    tolerance = run.parity.tolerances.get(run.precision.precision.value) if run.parity else None
    if tolerance and tolerance.cosine is not None:
        words += ["--compare", "cosine_similarity", "--cosine-similarity-threshold", repr(tolerance.cosine)]
    return shlex.join(words)


def pixel_range(inputs: Sequence[TensorSpec]) -> list[str]:
    """Return the words that let polygraphy draw pixels: it takes numbers from 0 to 1 else, for integers too."""
    pixels = [f"{spec.name}:[0,255]" for spec in inputs if spec.dtype == "uint8"]
    return ["--val-range", *pixels] if pixels else []


def tensorrt_commands(run: RunRecord) -> str:
    """Return every line for the TensorRT engines of a run, one a line; empty where there are none."""
    if run.trace is None:
        return ""
    seconds = float(run.recipe.get("bench", {}).get("seconds", 3.0))
    lines: list[str] = []
    for engine in run.engines:
        batch = run.bench.latencies[0].batch if run.bench and run.bench.latencies else run.trace.batch.opt
        lines += [
            trtexec_build(engine, run.trace.inputs),
            trtexec_timing(engine, run.trace.inputs, batch, seconds),
            polygraphy_engine(run, engine),
        ]
    return "\n".join(line for line in lines if line)


def _major(engine: EngineRecord) -> int:
    return int(engine.backend_version.split(".")[0])


def _profiles(inputs: Sequence[TensorSpec], batches: str) -> list[str]:
    dynamic = [spec for spec in inputs if any(isinstance(axis, str) for axis in spec.shape)]
    ranges = [Batch.parse(text) for text in batches.split(",")] if dynamic else []
    words: list[str] = []
    for number, batch in enumerate(ranges):
        words += [f"--profile={number}"] if len(ranges) > 1 else []
        for bound, size in (("min", batch.min), ("opt", batch.opt), ("max", batch.max)):
            words.append(f"--{bound}Shapes={','.join(_shape(spec, size) for spec in dynamic)}")
    return words


def _shape(spec: TensorSpec, batch: int) -> str:
    return f"{spec.name}:{_dims(spec, batch, 'x')}"


def _dims(spec: TensorSpec, batch: int, between: str) -> str:
    return between.join(str(batch if isinstance(axis, str) else axis) for axis in spec.shape)


def _workspace(text: str) -> list[str]:
    """Read the record's exact binary size; trtexec's own suffixes are binary too."""
    if text == "no limit":
        return []
    number, unit = text.split(" ")
    return [f"--memPoolSize=workspace:{number}{unit[0]}"]
