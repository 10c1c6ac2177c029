"""The command lines of NVIDIA's tools; polygraphy's ONNX Runtime line is really run."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.artifacts import read_manifest
from deploy.graph.io import save_model
from deploy.records import Artifact, Audit, EngineRecord, Precision, TensorSpec
from deploy.report.equivalents import tensorrt_commands, trtexec_build, trtexec_timing
from deploy.report.provenance import polygraphy_commands

DYNAMIC = (TensorSpec(name="images", dtype="float32", shape=("batch", 3, 224, 224)),)
FIXED = (TensorSpec(name="images", dtype="float32", shape=(4, 3, 224, 224)),)
OPTIONS = {
    "model": "30-fp16.onnx", "batch": "1:8:32", "tf32": "False", "level": "3", "workspace": "no limit",
    "version_compatible": "no", "hardware": "none", "refit": "no", "strip": "no",
}  # fmt: skip


def engine(version: str = "11.4.0.106", backend: str = "tensorrt", **options: str) -> EngineRecord:
    audit = Audit(asked=Precision.FP16, evidence="", kernels={}, fused={}, ok=True, statement="")
    artifact = Artifact(name="engine-sm89.plan", sha256="", size=0)
    return EngineRecord(
        backend=backend, backend_version=version, artifact=artifact, device="cuda:0", runnable=True, reason="",
        audit=audit, options=OPTIONS | options, seconds=1.0,
    )  # fmt: skip


def test_the_build_line():
    assert trtexec_build(engine(), DYNAMIC) == (
        "trtexec --onnx=30-fp16.onnx --saveEngine=engine-sm89.plan --skipInference "
        "--minShapes=images:1x3x224x224 --optShapes=images:8x3x224x224 --maxShapes=images:32x3x224x224 "
        "--builderOptimizationLevel=3 --profilingVerbosity=detailed --noTF32"
    )


def test_what_10_must_be_told_and_11_does_by_itself():
    old, new = engine("10.16.1.11"), engine()
    assert "--stronglyTyped" in trtexec_build(old, DYNAMIC)
    assert "--stronglyTyped" not in trtexec_build(new, DYNAMIC)
    assert trtexec_timing(new, DYNAMIC, 8, 3.0) == (
        "trtexec --loadEngine=engine-sm89.plan --shapes=images:8x3x224x224 --warmUp=500 --duration=3"
    )
    assert trtexec_timing(old, DYNAMIC, 8, 3.0).endswith(
        " --noDataTransfers --useSpinWait --useCudaGraph --separateProfileRun"
    )


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("tf32", "True", None),
        ("workspace", "4 GiB", "--memPoolSize=workspace:4G"),
        ("workspace", "1536 MiB", "--memPoolSize=workspace:1536M"),
        ("version_compatible", "yes", "--versionCompatible"),
        ("hardware", "ampere_plus", "--hardwareCompatibilityLevel=ampere+"),
        ("hardware", "same_compute_capability", "--hardwareCompatibilityLevel=sameComputeCapability"),
        ("refit", "yes", "--refit"),
        ("strip", "yes", "--stripWeights"),
    ],
)
def test_each_option_of_the_record_is_in_the_line(option, value, words):
    plain, line = (
        shlex.split(trtexec_build(engine(), FIXED)),
        shlex.split(trtexec_build(engine(**{option: value}), FIXED)),
    )
    assert set(line) - set(plain) == ({words} if words else set())
    assert set(plain) - set(line) == (set() if words else {"--noTF32"})


def test_several_profiles_are_numbered_and_a_fixed_graph_has_none():
    line = trtexec_build(engine(batch="1,1:8:32"), DYNAMIC)
    assert line.index("--profile=0 --minShapes=images:1x3") < line.index("--profile=1 --minShapes=images:1x3")
    assert line.count("--maxShapes") == 2
    assert "Shapes" not in trtexec_build(engine(batch="4"), FIXED)
    assert "--shapes" not in trtexec_timing(engine(batch="4"), FIXED, 4, 3.0)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx"])
def test_other_runtimes_have_no_trtexec_line(backend):
    assert trtexec_build(engine(backend=backend), DYNAMIC) == ""
    assert trtexec_timing(engine(backend=backend), DYNAMIC, 1, 1.0) == ""


def test_a_run_with_a_tensorrt_engine_lists_build_timing_and_comparison(tiny_bundle):
    run = read_manifest(tiny_bundle)
    assert tensorrt_commands(run) == ""
    made = dataclasses.replace(run, engines=(engine(model="20-patched.onnx", batch="1"),))
    build, timing, compare = tensorrt_commands(made).splitlines()
    assert build.startswith("trtexec --onnx=20-patched.onnx")
    assert timing.startswith("trtexec --loadEngine=engine-sm89.plan")
    assert compare.startswith("polygraphy run 20-patched.onnx --trt --onnxrt --strongly-typed --seed 0")


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(line)
    command = [sys.executable, str(Path(sys.executable).parent / program), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_polygraphy_gives_the_same_verdict_and_can_fail(tiny_bundle, tmp_path):
    run = read_manifest(tiny_bundle)
    for name in ("10-traced.onnx", "20-patched.onnx"):
        (tmp_path / name).write_bytes((tiny_bundle / name).read_bytes())
    first, second = polygraphy_commands(run).splitlines()
    done = polygraphy(first, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = polygraphy(second, tmp_path)
    assert run.ok
    assert done.returncode == 0, done.stdout + done.stderr
    other = second.replace(" --seed 0 ", " --seed 1 ")  # other inputs: the outputs cannot agree
    assert other != second
    assert polygraphy(other, tmp_path).returncode != 0
    model = onnx.load(tiny_bundle / "20-patched.onnx")
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[::-1]), weight.name))  # filters reversed
    save_model(model, tmp_path / "20-patched.onnx")
    done = polygraphy(second, tmp_path)
    assert done.returncode != 0
    assert "cosine" in (done.stdout + done.stderr).lower()
