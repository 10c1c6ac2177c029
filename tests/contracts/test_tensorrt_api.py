"""Every name of TensorRT's API that the backends use must exist in 10.16 and in 11.4: one code path for both.

Two kinds of use are collected from the source: ``trt.X.Y``, and methods of objects that the backends name by convention
(``builder``, ``network``, ``parser``, ...). The surfaces in tests/data are the public names of the two bindings.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SURFACES = sorted((ROOT / "tests" / "data" / "tensorrt-api").glob("*.json"))
SOURCES = ["tensorrt", "tensorrt_rtx", "trt_config", "timing_cache", "loading"]
MODULES = {"trt", "tensorrt", "tensorrt_rtx"}
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "cuda_engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "cache": "ITimingCache",
    "refitter": "Refitter",
    "onnx_refitter": "OnnxParserRefitter",
}
# Of TensorRT-RTX alone: the target of an ahead-of-time build.
RTX_ONLY = {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
# Arguments of polygraphy's CreateConfig that 11 has no flag for.
PRECISION_ARGUMENTS = {
    "fp16", "int8", "fp8", "bf16", "calibrator", "precision_constraints", "algorithm_selector", "quantization_flags",
}  # fmt: skip


def source_of(name: str) -> str:
    return (ROOT / "deploy" / "backends" / f"{name}.py").read_text(encoding="utf-8")


def chain_of(node: ast.Attribute) -> list[str]:
    parts = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    return [value.id, *reversed(parts)] if isinstance(value, ast.Name) else []


def used_names(source: str) -> set[str]:
    """Return ``"X"`` or ``"X.Y"`` for each use of the API in a source."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not (chain := chain_of(node)):
            continue
        if any(part.startswith("__") for part in chain):
            continue
        if chain[0] in MODULES:
            names.add(".".join(chain[1:3]))
        elif chain[0] in OBJECTS:
            names.add(f"{OBJECTS[chain[0]]}.{chain[1]}")
    return names


def missing_names(source: str, surface: dict) -> set[str]:
    members = surface["classes"] | surface["enums"]

    def exists(name: str) -> bool:
        owner, _, member = name.partition(".")
        return owner in members and (not member or member in members[owner])

    return {name for name in used_names(source) if not exists(name)}


def precision_arguments(source: str) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg in PRECISION_ARGUMENTS}


@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", SOURCES)
def test_every_name_exists_in_both_versions(name, path):
    missing = missing_names(source_of(name), json.loads(path.read_text(encoding="utf-8")))
    assert missing == ({"ComputeCapability", *RTX_ONLY} if name == "tensorrt_rtx" else set())


def test_both_surfaces_are_there():
    assert [path.stem for path in SURFACES] == ["10.16.1.11", "11.4.0.106"]


def test_the_scan_sees_what_the_backends_use():
    seen = {name: used_names(source_of(name)) for name in SOURCES}
    assert {"LayerInformationFormat.JSON", "IExecutionContext.execute_async_v3", "Refitter"} <= seen["tensorrt"]
    assert {"NetworkDefinitionCreationFlag.STRONGLY_TYPED", "Builder.create_network"} <= seen["tensorrt_rtx"]
    assert {"BuilderFlag.TF32", "MemoryPoolType.WORKSPACE", "ProfilingVerbosity.DETAILED"} <= seen["trt_config"]
    assert {"ITimingCache.combine", "IBuilderConfig.set_timing_cache"} <= seen["timing_cache"]


def methods_of_subclasses(source: str) -> dict[str, set[str]]:
    """Return the methods of each class that is derived from one of the API's; TensorRT calls them by their names."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        bases = [base.attr for base in getattr(node, "bases", ()) if isinstance(base, ast.Attribute)]
        if isinstance(node, ast.ClassDef) and bases:
            found[bases[0]] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.stem)
def test_callbacks_have_the_names_that_are_called(path):
    surface = json.loads(path.read_text(encoding="utf-8"))["classes"]
    callbacks = methods_of_subclasses(source_of("trt_config"))
    assert set(callbacks) == {"IProgressMonitor"}
    assert {m for m in callbacks["IProgressMonitor"] if not m.startswith("_")} == set(surface["IProgressMonitor"])


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'effdeploy[tensorrt-rtx]' to check its names"
)
@pytest.mark.rtx
def test_the_names_of_tensorrt_rtx_exist_in_the_installed_package():
    import tensorrt_rtx

    for name in used_names(source_of("tensorrt_rtx")) | used_names(source_of("trt_config")):
        owner, _, member = name.partition(".")
        assert hasattr(tensorrt_rtx, owner), name
        assert not member or hasattr(getattr(tensorrt_rtx, owner), member), name


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
        ("config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS"),
        ("1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator"),
        ("builder.platform_has_fast_fp16", "Builder.platform_has_fast_fp16"),
        ("cuda_engine.device_memory_size", "ICudaEngine.device_memory_size"),
        ("class C(trt.IInt8EntropyCalibrator2): pass", "IInt8EntropyCalibrator2"),
    ],
)
def test_names_that_11_removed_are_caught(line, name):
    newest = json.loads(SURFACES[-1].read_text(encoding="utf-8"))
    assert missing_names(line, newest) - {"IBuilderConfig.set_flag"} == {name}


@pytest.mark.parametrize("name", SOURCES)
def test_no_precision_argument_is_passed(name):
    assert precision_arguments(source_of(name)) == set()


def test_precision_arguments_are_caught():
    assert precision_arguments("CreateConfig(fp16=True, tf32=False, calibrator=None)") == {"fp16", "calibrator"}


def test_the_network_is_always_strongly_typed():
    assert "strongly_typed=True" in source_of("tensorrt")
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in source_of("tensorrt_rtx")
