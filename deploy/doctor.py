"""``effdeploy doctor``: what is installed, what can run here and why not, what is known to go wrong."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from deploy import __version__, units
from deploy.artifacts import CACHE_VARIABLE, cache_folder, environment
from deploy.backends import BACKENDS, load_backend
from deploy.backends.gpu import Gpu, first_gpu
from deploy.backends.openvino import NEEDS, cannot_compute
from deploy.console import Console
from deploy.cpu import CPU_FEATURES as CPU_FEATURES
from deploy.cpu import cpu_features
from deploy.cpu import cpu_flags as cpu_flags
from deploy.errors import BackendUnavailableError
from deploy.known_bad import KnownBad, matching
from deploy.records import record

DEFAULT_BACKEND = "onnxruntime"
RUNTIMES = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "onnxruntime", "onnxruntime-gpu", "openvino")
TOOLS = (
    "onnx",
    "onnxscript",
    "onnx-graphsurgeon",
    "polygraphy",
    "torch",
    "numpy",
    "timm",
    "transformers",
    "cuda-python",
)
ORT_WHEELS = ("onnxruntime", "onnxruntime-gpu")
ORT_THREAD = "https://github.com/microsoft/onnxruntime/issues/26996"
NEEDED_BYTES = 2_000_000_000  # a bundle of a large model: every stage of it, the engine and scratch space

# What makes INT8 and BF16 faster than FP32 on x86: any of the flags.
FAST_TYPES: Mapping[str, frozenset[str]] = {
    "AVX-512": frozenset({"avx512f"}), "VNNI": frozenset({"avx512_vnni", "avx_vnni"}),
    "BF16": frozenset({"avx512_bf16", "amx_bf16"}), "AMX": frozenset({"amx_int8", "amx_bf16"}),
}  # fmt: skip
# First compute capability whose tensor cores take the type (CUDA C++ Programming Guide, arithmetic throughput).
GPU_TYPES: Mapping[str, int] = {"FP16": 70, "INT8": 75, "TF32": 80, "BF16": 80, "FP8": 89, "FP4": 100}


@record
class Check:
    """One finding: ``state`` is "good", "warn" or "bad"; ``hint`` the next command where something is wrong."""

    name: str
    state: str
    statement: str
    hint: str = ""


@record
class Diagnosis:
    """Everything ``doctor`` found. ``ok`` says whether the default road (``effdeploy export SYSTEM``) can run."""

    ok: bool
    packages: Mapping[str, str]
    checks: tuple[Check, ...]
    known_bad: tuple[KnownBad, ...]


def examine(bundles: Path) -> Diagnosis:
    """Look at the installation and the machine.

    Args:
        bundles: Where bundles will be written; its disk is looked at.
    """
    packages = installed()
    gpu = first_gpu()
    checks = (
        *_requirements(packages),
        *_onnxruntime_wheels(packages),
        *_backends(packages, gpu),
        *_cpu(),
        *_gpu(gpu),
        *_torch(packages, gpu),
        *_disk(bundles),
    )
    return Diagnosis(
        ok=all(check.state != "bad" for check in checks),
        packages=packages,
        checks=checks,
        known_bad=matching(_names_for_the_table(packages), sm=gpu.sm if gpu else None),
    )


def report(diagnosis: Diagnosis, console: Console) -> None:
    """Write a diagnosis.

    Raises:
        BackendUnavailableError: the default road cannot run here.
    """
    versions = list(diagnosis.packages.items())
    console.table("versions", ("package", "version"), [("python", platform.python_version()), *versions])
    for check in diagnosis.checks:
        tone = {"good": "", "warn": "warn", "bad": "bad"}[check.state]
        console.line(f"{check.state.ljust(4)}  {check.name}: {check.statement}", tone)
        if check.hint:
            console.line(f"      {check.hint}", "strong")
    if diagnosis.known_bad:
        console.line()
        console.line("Known traps of the installed versions (they warn; parity is what proves):", "strong")
    for trap in diagnosis.known_bad:
        about = ", ".join((*trap.models, *trap.operators)) or "any model"
        console.line(f"{trap.effect}  {trap.package} {trap.versions}, {about}: {trap.symptom}", "warn")
        console.line(f"      {trap.workaround}")
        console.line(f"      {trap.threads[0]}", "quiet")
    console.result(diagnosis)
    if not diagnosis.ok:
        bad = [check for check in diagnosis.checks if check.state == "bad"]
        raise BackendUnavailableError(
            f"effdeploy export cannot run here: {'; '.join(f'{c.name}: {c.statement}' for c in bad)}",
            hint=next((c.hint for c in bad if c.hint), "pip install --upgrade effdeploy"),
        )
    console.line()
    console.line("effdeploy export can run here", "good")


def installed() -> dict[str, str]:
    """Return the versions of what effdeploy uses, of those that are there."""
    found = {"effdeploy": __version__}
    for name in (*RUNTIMES, *TOOLS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _names_for_the_table(packages: Mapping[str, str]) -> dict[str, str]:
    """TensorRT is installed under three names; the table knows one."""
    found = dict(packages)
    for name in ("tensorrt-cu12", "tensorrt-cu13"):
        if name in packages:
            found.setdefault("tensorrt", packages[name])
    return found


def _requirements(packages: Mapping[str, str]) -> Iterator[Check]:
    """Hold what is installed against what effdeploy's own metadata asks for."""
    wrong = []
    try:
        wanted = importlib.metadata.requires("effdeploy") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            name="requirements", state="warn", statement="effdeploy itself is not installed", hint="pip install -e ."
        )
        return
    for requirement in (Requirement(text) for text in wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name, packages)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    if wrong:
        hint = "pip install --upgrade effdeploy"
        yield Check(name="requirements", state="bad", statement="; ".join(wrong), hint=hint)
    else:
        yield Check(name="requirements", state="good", statement="all there, in versions that are supported")


def _version(name: str, packages: Mapping[str, str]) -> str | None:
    """Return the installed version; either wheel of ONNX Runtime stands for the other."""
    names = ORT_WHEELS if name in ORT_WHEELS else (name,)
    for candidate in (name, *names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return packages.get(candidate) or importlib.metadata.version(candidate)
    return None


def _onnxruntime_wheels(packages: Mapping[str, str]) -> Iterator[Check]:
    both = [name for name in ORT_WHEELS if name in packages]
    if len(both) == 2:
        yield Check(
            name="onnxruntime wheels",
            state="warn",
            statement="onnxruntime and onnxruntime-gpu are both installed and share one folder: what was installed "
            f"last wins, the CUDA provider may be gone without a word ({ORT_THREAD})",
            hint="pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )


def _backends(packages: Mapping[str, str], gpu: Gpu | None) -> Iterator[Check]:
    for name in BACKENDS:
        reason = load_backend(name).available()
        if reason:
            state = "bad" if name == DEFAULT_BACKEND else "warn"
            yield Check(name=f"backend {name}", state=state, statement=f"cannot be used: {reason}")
        elif name == DEFAULT_BACKEND:
            yield Check(name=f"backend {name}", state="good", statement=f"builds and runs; {_providers(gpu)}")
        elif name == "openvino":
            yield Check(name=f"backend {name}", state="good", statement=f"builds and runs on the CPU; {_openvino()}")
        else:
            runs = "builds and runs" if gpu and name == "tensorrt" else "builds engines, none runs here without a GPU"
            yield Check(name=f"backend {name}", state="good", statement=runs)
    if "tensorrt" in packages and not any(f"tensorrt-cu{major}" in packages for major in (12, 13)):
        yield Check(
            name="tensorrt wheel",
            state="warn",
            statement="tensorrt is a stub that installs tensorrt_cu12 or tensorrt_cu13, and neither is there",
            hint="pip install --force-reinstall 'effdeploy[tensorrt]'",
        )


def _openvino() -> str:
    """Say which 16-bit types OpenVINO really computes in here."""
    reasons = {precision: cannot_compute(precision) for precision in NEEDS}
    can = ", ".join(["FP32", *(precision.value.upper() for precision, reason in reasons.items() if not reason)])
    return "; ".join([f"computes in {can}", *(reason for reason in reasons.values() if reason)])


def _providers(gpu: Gpu | None) -> str:
    """Name the providers of the installed wheel; that one is listed does not mean that its libraries load."""
    import onnxruntime  # quiet: the backend's available() imported it

    names = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    if "CUDA" in names and gpu is None:
        return f"the wheel has {', '.join(names)}, no GPU here"
    return f"the wheel has {', '.join(names)}"


def _cpu() -> Iterator[Check]:
    here = environment()
    flags = cpu_flags()
    features = cpu_features()
    quota = _cpu_quota()
    limit = f", limited to {units.number(quota)} by the container" if quota and quota < here.cores else ""
    yield Check(
        name="cpu",
        state="good",
        statement=f"{here.cpu}, {here.cores} threads for this process{limit}; "
        + (", ".join(features) if features else "vector extensions unknown on this system")
        + _lacking(flags),
    )
    if here.cores == 1 or (quota and quota < 1):
        yield Check(
            name="cpu", state="warn", statement="one core or less: latencies will vary with every other process"
        )
    if platform.machine().lower() in ("x86_64", "amd64") and flags and "avx2" not in flags:
        yield Check(name="cpu", state="warn", statement="no AVX2: ONNX Runtime's fast kernels do not run on this CPU")


def _lacking(flags: frozenset[str]) -> str:
    """Name what makes low precision fast on x86 and is not there; empty where nothing lacks or the CPU is another."""
    lacks = [name for name, either in FAST_TYPES.items() if not flags & either]
    return f"; no {', no '.join(lacks)}" if lacks and "sse4_1" in flags else ""


def _cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return the container's CPU limit in cores (cgroup v2), or ``None``."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = path.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    return None


def _gpu(gpu: Gpu | None) -> Iterator[Check]:
    if gpu is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"; CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else ""
        yield Check(
            name="gpu", state="good", statement=f"none that the NVIDIA driver offers{why}; the CPU road needs none"
        )
        return
    can = [name for name, first in GPU_TYPES.items() if gpu.sm >= first]
    cannot = [name for name, first in GPU_TYPES.items() if gpu.sm < first]
    cuda = driver_cuda()
    driver = f"driver for CUDA {cuda[0]}.{cuda[1]}" if cuda else "driver version unknown"
    yield Check(
        name="gpu",
        state="good",
        statement=f"{gpu.name}, SM {gpu.sm}, {driver}; tensor cores for {', '.join(can) or 'nothing'}"
        + (f", not for {', '.join(cannot)}" if cannot else ""),
    )


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the installed driver supports, or ``None`` without a driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    return None


def _torch(packages: Mapping[str, str], gpu: Gpu | None) -> Iterator[Check]:
    if "torch" not in packages:
        return
    build = torch_cuda(packages["torch"])
    yield torch_against_driver(build, driver_cuda(), gpu is not None)


def torch_cuda(version: str) -> tuple[int, int] | None:
    """Return the CUDA that a torch wheel was built for, from its version: ``2.9.1+cu128`` -> (12, 8)."""
    if match := re.search(r"\+cu(\d+)(\d)$", version):
        return int(match[1]), int(match[2])
    if "+cpu" in version:
        return None
    # Wheels from PyPI do not say it there; the package's own note does, and importing torch takes seconds.
    spec = importlib.util.find_spec("torch")
    note = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = note.read_text(encoding="utf-8") if note and note.is_file() else ""
    found = re.search(r"^cuda\b.*= ['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def torch_against_driver(build: tuple[int, int] | None, driver: tuple[int, int] | None, gpu: bool) -> Check:
    """Judge torch's CUDA build for the driver at hand: within a CUDA major, an older driver works."""
    name = "torch"
    if build is None:
        hint = "pip install torch from the index of your CUDA, see pytorch.org" if gpu else ""
        return Check(name=name, state="warn" if gpu else "good", statement="built for the CPU", hint=hint)
    built = f"built for CUDA {build[0]}.{build[1]}"
    if not gpu or driver is None:
        return Check(name=name, state="good", statement=f"{built}; runs on the CPU here")
    if driver[0] < build[0]:
        return Check(
            name=name,
            state="warn",
            statement=f"{built}, the driver supports CUDA {driver[0]}.{driver[1]} at most: torch cannot use the GPU",
            hint=f"update the NVIDIA driver, or install a torch build for CUDA {driver[0]}",
        )
    return Check(name=name, state="good", statement=f"{built}, the driver supports CUDA {driver[0]}.{driver[1]}")


def _disk(bundles: Path) -> Iterator[Check]:
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = (
        ("disk for bundles", bundles),
        ("disk for the weights' cache", hub),
        (f"disk for stages and downloads ({CACHE_VARIABLE})", cache_folder()),
    )
    for name, folder in places:
        yield disk_check(name, folder)


def disk_check(name: str, folder: Path, needed: int = NEEDED_BYTES) -> Check:
    """Look at the free space and the permission of a folder that may not exist yet."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Check(
            name=name, state="warn", statement=f"{there} is not writable", hint="choose another folder with --out"
        )
    if free < needed:
        statement = f"{units.size(free)} free at {folder}, {units.size(needed)} are wise"
        return Check(name=name, state="warn", statement=statement, hint="free some space, or choose another folder")
    return Check(name=name, state="good", statement=f"{units.size(free)} free at {folder}")
