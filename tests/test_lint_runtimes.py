"""The lint table against the runtimes themselves: what it calls an error must fail there, what it passes must not.

TensorRT-RTX parses and builds every graph of the corpus for SM 89 on the CPU; ONNX Runtime loads and runs it on its CPU
provider. ``lint_corpus.EXCEPTIONS`` is the one place for disagreements, with their reasons.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from lint_corpus import CASES, EXCEPTIONS, NATIVE
from onnx import helper

from deploy.backends.tensorrt_rtx import parse
from deploy.errors import EffdeployError, EngineBuildError
from deploy.linting.run import lint_file
from deploy.linting.table import Goal

SOME = 2  # size of dynamic axes
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'effdeploy[tensorrt-rtx]'",
)


def builds(path: Path) -> str:
    """What TensorRT-RTX says to a file: nothing when it builds it."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    try:
        parse(trt, network, path, log)
    except EngineBuildError as error:
        return error.message
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if tensor.is_shape_tensor:
            values = [SOME] * max(1, *tensor.shape, 1)
            profile.set_shape_input(tensor.name, values, values, values)
        elif -1 in tensor.shape:
            sizes = [SOME if size < 0 else size for size in tensor.shape]
            profile.set_shape(tensor.name, sizes, sizes, sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return "" if plan is not None else "build: " + "; ".join(m for s, m in log.lines if "ERROR" in s)[-300:]


def runs(path: Path) -> str:
    """What ONNX Runtime says to a file and to ones as inputs: nothing when it runs; BF16 inputs cannot be fed."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(path, load_external_data=False)
        given = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in given]
        if all(value.type.tensor_type.elem_type != onnx.TensorProto.BFLOAT16 for value in inputs):
            session.run(None, {value.name: ones(value) for value in inputs})
    except Exception as error:
        return str(error)[:300] or type(error).__name__
    return ""


def ones(value: onnx.ValueInfoProto) -> np.ndarray:
    tensor = value.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else SOME for d in tensor.shape.dim]
    return np.ones(sizes, helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def disagreement(name: str, path: Path, runtime: str, version: str, said: str) -> str:
    """Compare lint's verdict with what a runtime said."""
    record = lint_file(path, (Goal(runtime=runtime, version=version),))
    errors = [f"{f.rule}: {f.what}" for f in record.findings if "error" in f.severities.values()]
    if bool(errors) == bool(said):
        return ""
    return f"{name}: lint says {errors or 'nothing'}, {runtime} says {said or 'nothing'}"


def compared(folder: Path, runtime: str, version: str, judge: Any) -> list[str]:
    found = []
    for name, case in CASES.items():
        if (name, runtime) in EXCEPTIONS:
            continue
        own = folder / name
        own.mkdir()
        path = case.write(own)
        found.append(disagreement(name, path, runtime, version, judge(path)))
    return [text for text in found if text]


@pytest.mark.slow
@pytest.mark.rtx
@needs_rtx
def test_tensorrt_rtx_agrees(tmp_path):
    assert compared(tmp_path, NATIVE, "1.7.1", builds) == []


def test_onnxruntime_agrees(tmp_path):
    assert compared(tmp_path, "onnxruntime", "1.31.1", runs) == []


@pytest.mark.rtx
@needs_rtx
@pytest.mark.parametrize(("name", "wrong"), [("topk3840", "nothing builds"), ("topk3841", "")])
def test_a_disagreement_is_noticed(name, wrong, tmp_path):
    """The control of the tests above: a runtime that says the opposite."""
    path = CASES[name].write(tmp_path)
    assert not disagreement(name, path, NATIVE, "1.7.1", builds(path))
    assert "lint says" in disagreement(name, path, NATIVE, "1.7.1", wrong)


@pytest.mark.rtx
@needs_rtx
def test_one_tensor_as_query_and_key_ends_the_builder(tmp_path):
    """In a process of its own, because the builder takes it along. Where this fails, the rule can go."""
    path = CASES["att16-qk-same"].write(tmp_path)
    code = f"from pathlib import Path; from test_lint_runtimes import builds; print(builds(Path({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, timeout=300)
    assert done.returncode < 0, done.stdout
    assert "attention-query-is-key" in {
        f.rule for f in lint_file(path, (Goal(runtime=NATIVE, version="1.7.1"),)).findings
    }


def test_exceptions_are_few_and_about_cases():
    assert {name for name, _ in EXCEPTIONS} <= set(CASES)
    assert len(EXCEPTIONS) == 1
    assert all(EXCEPTIONS.values())


def test_a_file_that_is_no_model_is_an_error_of_ours(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(EffdeployError):
        lint_file(tmp_path / "m.onnx", (Goal(runtime=NATIVE, version="1.7"),))
