"""Engines that cannot lie: what is foreign, changed or of another machine is refused before a runtime sees it."""

from __future__ import annotations

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from recorded_api import SURFACES, RecordedModule

from deploy.artifacts import artifact_of, sha256_of, write_json
from deploy.backends import load_backend, loading
from deploy.backends import tensorrt as module
from deploy.backends.base import BuildOptions
from deploy.backends.gpu import Gpu
from deploy.backends.gpu_state import GpuState
from deploy.contents import inspect_engine
from deploy.errors import BackendUnavailableError, BundleError
from deploy.records import Audit, Batch, BuildRecord, EngineRecord, Environment, Precision, to_json

AUDIT = Audit(asked=Precision.FP16, evidence="", kernels={}, fused={}, ok=True, statement="all FP16")
OPTIONS = {"sm": "89", "driver": "580.65.06", "batch": "1:8:32", "model": "30-fp16.onnx"}
NAME = "engine-sm89.plan"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / NAME).write_bytes(b"an engine")
    (folder / "30-fp16.onnx").write_bytes(b"its weights")
    (tmp_path / NAME).write_bytes(b"an engine")  # the same bytes, outside
    return folder


def record(folder: Path, **options: str) -> EngineRecord:
    return EngineRecord(
        backend="tensorrt", backend_version="11.4.0.106", artifact=artifact_of(folder / NAME, folder), device="cuda:0",
        runnable=True, reason="", audit=AUDIT, options=OPTIONS | options, seconds=0.0,
    )  # fmt: skip


def named(engine: EngineRecord, name: str) -> EngineRecord:
    return dataclasses.replace(engine, artifact=dataclasses.replace(engine.artifact, name=name))


def test_the_engine_of_the_manifest_is_read(bundle):
    assert loading.engine_bytes(record(bundle), bundle) == b"an engine"


def test_a_bundle_behind_a_link_is_no_other_bundle(bundle, tmp_path):
    (tmp_path / "latest").symlink_to(bundle)
    assert loading.engine_bytes(record(bundle), tmp_path / "latest") == b"an engine"


def test_a_changed_engine_is_refused(bundle):
    engine = record(bundle)
    (bundle / NAME).write_bytes(b"another engine")
    with pytest.raises(BundleError, match="was changed: sha256"):
        loading.engine_bytes(engine, bundle)


def test_an_engine_that_changes_between_hash_and_load_is_refused(bundle, monkeypatch):
    engine = record(bundle)
    monkeypatch.setattr(loading, "open_artifact", lambda artifact, folder: Path(folder) / "30-fp16.onnx")
    with pytest.raises(BundleError, match="changed while it was read"):
        loading.engine_bytes(engine, bundle)


@pytest.mark.parametrize("name", [f"../{NAME}", f"sub/../../{NAME}", "{outside}"])
def test_a_path_outside_the_bundle_is_refused_though_its_bytes_are_right(name, bundle, tmp_path):
    (bundle / "sub").mkdir()
    name = name.format(outside=tmp_path / NAME)
    assert (bundle / name).read_bytes() == b"an engine"  # the control: the file is there and has the hash
    with pytest.raises(BundleError, match="points outside the bundle"):
        loading.engine_bytes(named(record(bundle), name), bundle)


@pytest.mark.parametrize("name", ["x" * 20_000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name, bundle):
    with pytest.raises(BundleError, match="is no name of a file"):
        loading.engine_bytes(named(record(bundle), name), bundle)


def test_a_link_out_of_the_bundle_is_refused_though_its_bytes_are_right(bundle, tmp_path):
    engine = record(bundle)
    (bundle / NAME).unlink()
    (bundle / NAME).symlink_to(tmp_path / NAME)
    assert sha256_of(bundle / NAME) == engine.artifact.sha256
    with pytest.raises(BundleError, match="points outside the bundle"):
        loading.engine_bytes(engine, bundle)


def test_a_link_to_another_file_of_the_bundle_is_refused(bundle):
    engine = record(bundle)
    (bundle / NAME).unlink()
    (bundle / NAME).symlink_to(bundle / "30-fp16.onnx")
    with pytest.raises(BundleError, match="was changed"):
        loading.engine_bytes(engine, bundle)


def test_an_engine_whose_audit_failed_is_refused(bundle):
    audit = dataclasses.replace(AUDIT, ok=False, statement="12 products are not in FP16: head")
    with pytest.raises(BundleError, match="failed its precision audit: 12 products are not in FP16: head"):
        loading.engine_bytes(dataclasses.replace(record(bundle), audit=audit), bundle)


@pytest.mark.parametrize(("built", "here", "fine"), [
    ("580.65.06", "580.65.06", True), ("580.65.06", "570.10", False), ("580.95", "580.65", True),
    ("570.10", "580.65.06", True), ("unknown", "570.10", True), ("580.65.06", None, True),
])  # fmt: skip
def test_a_driver_of_an_older_branch_is_refused(built, here, fine, bundle):
    engine = record(bundle, driver=built)
    if fine:
        loading.require_driver(engine, here)
    else:
        with pytest.raises(BackendUnavailableError, match=r"built with driver 580\.65\.06, this machine has the older"):
            loading.require_driver(engine, here)


def test_records_without_a_gpu_or_profiles_are_foreign(bundle):
    with pytest.raises(BundleError, match="does not say which compute capability"):
        loading.require_gpu(record(bundle, sm=""), Gpu(name="", sm=89))
    for batch in ("", "many"):
        with pytest.raises(BundleError, match="has no profile ranges"):
            loading.recorded_ranges(record(bundle, batch=batch))
    assert loading.recorded_ranges(record(bundle, batch="1,1:8:32")) == (Batch(), Batch(min=1, opt=8, max=32))


def cuda_engine(surface: RecordedModule, profiles: list[tuple[int, int, int]], axis: int = -1):
    """A deserialised engine as the bindings of one version name its methods."""
    engine = surface.new(
        "ICudaEngine",
        get_tensor_profile_shape=lambda name, index: [(size, 3, 8, 8) for size in profiles[index]],
        get_tensor_name=lambda index: ("images", "logits")[index],
        get_tensor_mode=lambda name: "TensorIOMode.INPUT" if name == "images" else "TensorIOMode.OUTPUT",
        get_tensor_shape=lambda name: (axis, 3, 8, 8),
    )
    for name, value in (("num_optimization_profiles", len(profiles)), ("num_io_tensors", 2)):
        object.__setattr__(engine, name, value)
    return engine


@pytest.mark.parametrize("path", SURFACES, ids=lambda p: p.stem)
def test_profiles_of_a_loaded_engine_are_held_against_the_record(path):
    surface, ranges = RecordedModule(path), (Batch(), Batch(min=1, opt=8, max=32))
    right, wrong = cuda_engine(surface, [(1, 1, 1), (1, 8, 32)]), cuda_engine(surface, [(1, 1, 1), (1, 8, 16)])
    inputs = module._dynamic_inputs(surface, right)
    assert inputs == {"images": True}
    loading.require_profiles(right, ranges, NAME, inputs)
    with pytest.raises(BundleError, match=r"takes batches 1,1:8:16 at 'images', its record says 1,1:8:32"):
        loading.require_profiles(wrong, ranges, NAME, inputs)
    with pytest.raises(BundleError, match="takes batches 1 at"):
        loading.require_profiles(cuda_engine(surface, [(1, 1, 1)]), ranges, NAME, inputs)


@pytest.mark.parametrize("path", SURFACES, ids=lambda p: p.stem)
def test_a_fixed_engine_has_no_range(path):
    fixed = cuda_engine(RecordedModule(path), [(4, 4, 4)], axis=4)
    inputs = module._dynamic_inputs(RecordedModule(path), fixed)
    assert inputs == {"images": False}
    loading.require_profiles(fixed, (Batch(min=4, opt=4, max=4),), NAME, inputs)
    with pytest.raises(BundleError, match="takes one fixed batch, its record says 1:2:4"):
        loading.require_profiles(fixed, (Batch(min=1, opt=2, max=4),), NAME, inputs)


def test_a_stripped_engine_takes_weights_from_the_recorded_file_alone(bundle, tmp_path):
    digest = sha256_of(bundle / "30-fp16.onnx")
    stripped = record(bundle, strip="yes", model_sha256=digest)
    assert loading.weights_file(record(bundle), bundle) is None
    assert loading.weights_file(stripped, bundle) == bundle / "30-fp16.onnx"
    with pytest.raises(BundleError, match="does not name the ONNX file they are in with its hash"):
        loading.weights_file(record(bundle, strip="yes"), bundle)
    shutil.copy(bundle / "30-fp16.onnx", tmp_path)
    with pytest.raises(BundleError, match="points outside the bundle"):
        loading.weights_file(record(bundle, strip="yes", model_sha256=digest, model="../30-fp16.onnx"), bundle)
    (bundle / "30-fp16.onnx").write_bytes(b"other weights")
    with pytest.raises(BundleError, match="was changed"):
        loading.weights_file(stripped, bundle)


def pretend(monkeypatch: pytest.MonkeyPatch, *, version="11.4.0.106", sm=89, driver="580.65.06") -> list[tuple]:
    """A machine with a GPU; what would be handed to the runtime is returned instead."""
    loaded: list[tuple] = []
    state = GpuState(driver=driver, sm_clock=None, memory_clock=None, max_clock=None, temperature=None, power=None,
                     reasons=0)  # fmt: skip
    monkeypatch.setattr(module, "_runtime", lambda: types.SimpleNamespace(__version__=version))
    monkeypatch.setattr(module, "first_gpu", lambda: Gpu(name="pretended", sm=sm))
    monkeypatch.setattr(module, "read_state", lambda gpu: state)
    monkeypatch.setattr(module, "TensorRtRunner", lambda *arguments: loaded.append(arguments))
    return loaded


def test_on_its_own_machine_the_engine_reaches_the_runtime(bundle, monkeypatch):
    loaded = pretend(monkeypatch)
    module.BACKEND.open(record(bundle), bundle, BuildOptions())
    assert loaded == [(b"an engine", (Batch(min=1, opt=8, max=32),), None, NAME)]


@pytest.mark.parametrize(("here", "words"), [
    ({"version": "11.5.0.1"}, r"built by TensorRT 11\.4\.0\.106, this machine has 11\.5\.0\.1"),
    ({"sm": 90}, r"is for SM 89 \(hardware compatibility: none\), this GPU is SM 90"),
    ({"driver": "550.54"}, r"this machine has the older 550\.54"),
])  # fmt: skip
def test_on_another_machine_nothing_reaches_the_runtime(here, words, bundle, monkeypatch):
    loaded = pretend(monkeypatch, **here)
    with pytest.raises(BackendUnavailableError, match=words):
        module.BACKEND.open(record(bundle), bundle, BuildOptions())
    assert loaded == []


def test_a_changed_engine_does_not_reach_the_runtime(bundle, monkeypatch):
    loaded, engine = pretend(monkeypatch), record(bundle)
    (bundle / NAME).write_bytes(b"something else")
    with pytest.raises(BundleError, match="was changed"):
        module.BACKEND.open(engine, bundle, BuildOptions())
    assert loaded == []


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_runtimes_of_the_cpu_open_the_named_file_alone(backend, graph, tmp_path):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'effdeploy[openvino]'")
    path, runtime = graph("network"), load_backend(backend)
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copy(path, folder / "model.onnx")
    shutil.copy(path, tmp_path / "model.onnx")
    (engine,) = runtime.build(folder / "model.onnx", folder, BuildOptions(threads=1))
    with runtime.open(engine, folder, BuildOptions(threads=1)) as runner:
        assert all(np.isfinite(v).all() for v in runner.infer(
            {s.name: np.ones([1 if isinstance(n, str) else n for n in s.shape], s.dtype) for s in runner.inputs}
        ).values())  # fmt: skip
    with pytest.raises(BundleError, match="points outside the bundle"):
        runtime.open(named(engine, "../model.onnx"), folder, BuildOptions(threads=1))
    failed = dataclasses.replace(engine, audit=dataclasses.replace(engine.audit, ok=False))
    with pytest.raises(BundleError, match="failed its precision audit"):
        runtime.open(failed, folder, BuildOptions(threads=1))
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="points outside the bundle"):
        runtime.open(engine, folder, BuildOptions(threads=1))


def test_an_engine_of_an_onnx_file_is_known_by_the_manifest_beside_it(bundle):
    own = BuildRecord(
        schema_version=1, effdeploy="0", created="", model=artifact_of(bundle / "30-fp16.onnx", bundle), inputs=(),
        engine=record(bundle),
        environment=Environment(python="", platform="", cpu="", cores=1, gpu="", packages={}),
    )  # fmt: skip
    manifest = bundle / f"{NAME}.tensorrt.json"
    with pytest.raises(BundleError, match=r"has no manifest\.json beside it"):
        inspect_engine(bundle / NAME)
    write_json(manifest, to_json(own))
    assert inspect_engine(bundle / NAME).engine == own.engine
    write_json(manifest, to_json(dataclasses.replace(own, engine=named(own.engine, "other.plan"))))
    with pytest.raises(BundleError, match=r"is of other\.plan"):
        inspect_engine(bundle / NAME)
    write_json(manifest, to_json(own))
    (bundle / NAME).write_bytes(b"another engine")
    with pytest.raises(BundleError, match="was changed"):
        inspect_engine(bundle / NAME)
