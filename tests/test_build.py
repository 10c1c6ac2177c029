"""``effdeploy build`` through the command line, with real builds of TensorRT-RTX on the CPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import effdeploy

from deploy import known_bad
from deploy.artifacts import environment, open_artifact, read_manifest, sha256_of
from deploy.backends.gpu import first_gpu
from deploy.building import model_inputs, model_precision
from deploy.errors import BundleError, SizeError
from deploy.records import BuildRecord, Precision, Stage, from_json

rtx = pytest.mark.rtx
RTX = ("--backend", "tensorrt_rtx", "--sm", "89")


@pytest.fixture(autouse=True)
def _with_rtx(request):
    if request.node.get_closest_marker("rtx"):
        pytest.importorskip("tensorrt_rtx", reason="pip install 'effdeploy[tensorrt-rtx]'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a bundle without an engine, as it leaves the machine that exported it."""
    out = tmp_path_factory.mktemp("exports") / "tiny"
    result = effdeploy(
        "export", "riformer", "--variant", "tiny", "--size", "64", "--fp16", "--target", "tensorrt",
        "--batch", "1:2:4", "--until", "precision", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    return out


@pytest.fixture
def bundle(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "tiny"))


def network(path: Path, shape=("batch", 8), kind: int = TensorProto.FLOAT, depth: int = 1) -> Path:
    """Write ``y = relu(x @ w)``, ``depth`` times."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for n in range(depth):
        values = rng.standard_normal((8, 8)).astype(np.float32)
        weights.append(helper.make_tensor(f"w{n}", kind, values.shape, values.ravel()))
        nodes.append(helper.make_node("MatMul", ["x" if n == 0 else f"y{n - 1}", f"w{n}"], [f"h{n}"], name=f"fc{n}"))
        last = "y" if n == depth - 1 else f"y{n}"
        nodes.append(helper.make_node("Relu", [f"h{n}"], [last], name=f"act{n}"))
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, [*shape[:-1], 8])], weights,
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


@rtx
def test_a_bundle_gives_a_new_bundle_and_stays_as_it_is(bundle):
    before = hashes(bundle)
    result = effdeploy("build", bundle, *RTX, "--batch", "1", "--batch", "1:2:4", "--workspace", "1GiB", "--level", "2")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert hashes(bundle) == before
    built = bundle.with_name("tiny-tensorrt_rtx")
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["tiny", "tiny-tensorrt_rtx"]
    run = read_manifest(built)
    (engine,) = run.engines
    assert open_artifact(engine.artifact, built).name == "engine-sm89.rtx"
    assert (run.until, run.parity, run.bench) == (Stage.ENGINE, None, None)
    assert run.precision == read_manifest(bundle).precision
    assert all(hashes(built)[name] == before[name] for name in before if name.endswith(".onnx"))
    told = engine.options
    assert (told["batch"], told["workspace"], told["level"], told["tf32"]) == ("1,1:2:4", "1 GiB", "2", "False")
    assert run.recipe["engine"]["profiles"] == ["1", "1:2:4"]
    assert run.recipe["batch"] == "1:2:4"
    assert engine.audit.ok
    assert "not compared with PyTorch yet" in result.stdout
    assert f"effdeploy verify {built}" in result.stdout


@rtx
def test_the_built_bundle_goes_on(bundle, tmp_path):
    out = tmp_path / "built"
    assert effdeploy("build", bundle, *RTX, "--out", out).exit_code == 0
    result = effdeploy("verify", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert effdeploy("build", bundle, *RTX, "--out", out).exit_code == 0  # built again: replaced
    assert effdeploy("report", out).exit_code == 0
    result = effdeploy("build", out, *RTX)
    assert result.exit_code == 0, result.stderr
    assert read_manifest(tmp_path / "built-tensorrt_rtx").engines


def test_onnx_runtime_takes_the_file_itself(bundle):
    result = effdeploy("build", bundle, "--backend", "onnxruntime", "--fp16")
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(bundle.with_name("tiny-onnxruntime"))
    assert run.engines[0].artifact == run.precision.artifact
    assert run.recipe["target"] == "tensorrt"
    assert "--target onnxruntime gives the better graph" in result.stderr


def test_a_changed_file_is_never_built(bundle):
    with (bundle / "30-fp16.onnx").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\0")
    result = effdeploy("build", bundle, "--backend", "onnxruntime")
    assert result.exit_code == 17
    assert "30-fp16.onnx was changed" in result.stderr
    assert [p.name for p in bundle.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--backend", "tensorrt_rtx", "--sm", "90"), 12, ["SM [90]", "--sm 80,89,120"]),
        (("--backend", "tensorrt_rtx", "--strip"), 12, ["no refitting or stripping weights in ahead-of-time builds"]),
        (("--backend", "tensorrt_rtx", "--hardware", "ampere_plus"), 12, ["no hardware compatibility"]),
        (("--backend", "onnxruntime", "--batch", "1", "--batch", "1:2:4"), 12, ["no optimisation profiles"]),
        (("--backend", "onnxruntime", "--fp32"), 11, ["is typed FP16", "TensorRT 11 has no flag"]),
        (("--backend", "onnxruntime", "--batch", "4:2"), 3, ["expected one number or min:opt:max"]),
        (("--backend", "tensorrt_rtx", "--workspace", "lots", "--level", "7"), 3, ["--workspace", "4GiB", "--level"]),
        (("--backend", "tensort"), 4, ["did you mean 'tensorrt'"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bundle, options, code, words):
    if "tensorrt_rtx" in options:
        pytest.importorskip("tensorrt_rtx", reason="pip install 'effdeploy[tensorrt-rtx]'")
    result = effdeploy("build", bundle, *options)
    assert result.exit_code == code, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert [p.name for p in bundle.parent.iterdir()] == ["tiny"]


@pytest.mark.skipif(first_gpu() is not None, reason="this machine has a GPU")
def test_tensorrt_without_a_gpu_says_what_is_missing_and_what_works(bundle):
    result = effdeploy("build", bundle)
    assert result.exit_code == 12
    assert "no NVIDIA GPU or driver on this machine; --backend tensorrt_rtx builds without one" in result.stderr
    assert [p.name for p in bundle.parent.iterdir()] == ["tiny"]


def test_a_bundle_without_a_typed_file_and_a_source_that_is_none(bundle, tmp_path):
    manifest = bundle / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"precision": None, "until": "passes"}))
    result = effdeploy("build", bundle, "--backend", "onnxruntime")
    assert result.exit_code == 17
    assert "--until precision" in result.stderr
    assert effdeploy("build", tmp_path / "nothing", "--backend", "onnxruntime").exit_code == 17
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    result = effdeploy("build", tmp_path / "a.onnx", "--backend", "onnxruntime")
    assert result.exit_code == 17
    assert "cannot be read as ONNX" in result.stderr


def test_a_fixed_graph_takes_its_own_batch_only(tmp_path):
    model = network(tmp_path / "m.onnx", shape=(2, 8))
    result = effdeploy("build", model, "--backend", "onnxruntime", "--batch", "1:2:4")
    assert result.exit_code == 5
    assert "the graph is fixed: x [2, 8]" in result.stderr
    assert effdeploy("build", model, "--backend", "onnxruntime", "--batch", "2").exit_code == 0


def test_a_bundle_that_went_further_is_not_replaced(tiny_bundle):
    before = hashes(tiny_bundle)
    result = effdeploy("build", tiny_bundle, "--backend", "onnxruntime", "--out", tiny_bundle)
    assert result.exit_code == 19
    assert "went on to report; a run until engine would replace it" in result.stderr
    assert hashes(tiny_bundle) == before


@rtx
def test_a_model_file_gets_engines_beside_it_with_their_manifests(tmp_path):
    model = network(tmp_path / "m.onnx")
    result = effdeploy("build", model, "--backend", "tensorrt_rtx", "--sm", "80,89", "--batch", "1:2:4", "--json")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m.onnx", "m.sm80.rtx", "m.sm80.rtx.tensorrt_rtx.json", "m.sm89.rtx", "m.sm89.rtx.tensorrt_rtx.json",
    ]  # fmt: skip
    record = from_json(BuildRecord, json.loads((tmp_path / "m.sm89.rtx.tensorrt_rtx.json").read_text()))
    assert open_artifact(record.engine.artifact, tmp_path) == tmp_path / "m.sm89.rtx"
    assert record.model.sha256 == sha256_of(model)
    assert record.engine.options["batch"] == "1:2:4"
    assert record.inputs[0].shape == ("batch", 8)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["type"] for e in events if e["event"] == "result"] == ["BuildRecord"] * 2
    assert effdeploy("build", model, *RTX).exit_code == 0  # its own engine is replaced


@rtx
def test_an_engine_that_was_not_built_here_is_left_alone(tmp_path):
    model = network(tmp_path / "m.onnx", shape=(1, 8))
    (tmp_path / "m.sm89.rtx").write_bytes(b"somebody's")
    result = effdeploy("build", model, *RTX)
    assert result.exit_code == 19
    assert (tmp_path / "m.sm89.rtx").read_bytes() == b"somebody's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.sm89.rtx"]


def test_onnx_runtime_writes_a_manifest_only(tmp_path):
    model = network(tmp_path / "m.onnx")
    assert effdeploy("build", model, "--backend", "onnxruntime").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.onnxruntime.json"]


def test_only_the_batch_may_be_dynamic(tmp_path):
    with pytest.raises(SizeError, match=r"x \['batch', 'height'\]") as caught:
        model_inputs(network(tmp_path / "m.onnx", shape=("batch", "height")))
    assert "polygraphy surgeon sanitize" in caught.value.hint


def test_a_graph_without_inputs_is_no_model(tmp_path):
    proto = onnx.load(network(tmp_path / "m.onnx"))
    del proto.graph.input[:]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(BundleError, match="no inputs"):
        model_inputs(tmp_path / "m.onnx")


@pytest.mark.parametrize(("kind", "found"), [(TensorProto.FLOAT, "fp32"), (TensorProto.FLOAT16, "fp16")])
def test_the_precision_is_what_the_matrix_nodes_say(tmp_path, kind, found):
    assert model_precision(network(tmp_path / "m.onnx", kind=kind)) is Precision(found)


KILLED = """
import dataclasses, os, signal, sys
from deploy.backends.tensorrt_rtx import BACKEND
from deploy.cli import main

model, name = sys.argv[1:]
build = BACKEND.build
def ended(model, folder, options):
    def progress(phase, done, total):
        if phase == "Building engine" and done == 1:
            os.kill(os.getpid(), getattr(signal, name))
    return build(model, folder, dataclasses.replace(options, progress=progress))
BACKEND.build = ended
sys.argv = ["effdeploy", "build", model, "--backend", "tensorrt_rtx", "--sm", "89"]
main()
"""


@rtx
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)])
def test_a_build_that_is_ended_leaves_no_engine(tmp_path, name, code):
    """The signal arrives inside TensorRT's own callback: an exception there would abort the process."""
    model = network(tmp_path / "m.onnx", shape=(1, 8), depth=4)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(model), name], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    left = [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")]
    assert left == ["m.onnx"]
    if name == "SIGKILL":  # nobody could clean up: the next build does
        assert effdeploy("build", model, *RTX).exit_code == 0
        assert len(list(tmp_path.iterdir())) == 3
    else:
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(("operators", "met"), [(["MatMul"], True), (["GridSample"], False)])
def test_known_traps_of_the_graph_are_told_before_the_build(tmp_path, monkeypatch, operators, met):
    package = "onnxruntime" if "onnxruntime" in environment().packages else "onnxruntime-gpu"
    version = environment().packages[package]
    (sure,) = [trap for trap in known_bad.known_bad() if trap.id == "gridsample-opset-20"]
    trap = dataclasses.replace(sure, package=package, versions=f"=={version}", operators=tuple(operators), sm=())
    monkeypatch.setattr(known_bad, "known_bad", lambda: (trap,))
    result = effdeploy("build", network(tmp_path / "m.onnx"), "--backend", "onnxruntime")
    assert result.exit_code == 0, result.stderr
    assert (f"known trap of {package} =={version} (wrong): {trap.symptom[:20]}" in result.stderr) is met
