"""Files that travel: names, hashes, the run folder that appears whole or not at all, the environment's fingerprint."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.errors import BundleError, StorageError
from deploy.records import SCHEMA_VERSION, Artifact, Environment, RunRecord, Stage, from_json, to_json

MANIFEST = "manifest.json"
TRACED, PATCHED = "10-traced.onnx", "20-patched.onnx"

# Packages whose version can change a graph, an engine or a number.
_FINGERPRINT = (
    "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "onnx-graphsurgeon", "polygraphy", "numpy",
    "tensorrt", "tensorrt-rtx",
)  # fmt: skip


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def artifact_of(path: Path, folder: Path) -> Artifact:
    """Describe a file of a bundle by name, hash and size."""
    return Artifact(name=path.relative_to(folder).as_posix(), sha256=sha256_of(path), size=path.stat().st_size)


def open_artifact(artifact: Artifact, folder: Path) -> Path:
    """Return the artifact's path after checking that it lies in the bundle and is unchanged.

    Raises:
        BundleError: it is missing, was changed, or its name points outside the bundle.
    """
    path = folder / artifact.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{artifact.name!r} points outside the bundle {folder}", hint="do not use this bundle")
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle", hint="export again")
    if (got := sha256_of(path)) != artifact.sha256:
        raise BundleError(
            f"{path} was changed: sha256 {got[:12]}..., the manifest says {artifact.sha256[:12]}...",
            hint="export again, or restore the file",
        )
    return path


def artifacts_of(run: RunRecord, before: Stage = Stage.REPORT) -> list[Artifact]:
    """List the files of a run's stages, those of ``before`` and later left out; a file of two stages comes once."""
    stages = (
        (Stage.TRACE, (run.trace,)),
        (Stage.PASSES, (run.passes,)),
        (Stage.PRECISION, (run.precision,)),
        (Stage.ENGINE, run.engines),
    )
    found = [r.artifact for stage, records in stages if stage.order < before.order for r in records if r is not None]
    return list({artifact.name: artifact for artifact in found}.values())


@contextlib.contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Translate what a full or read-only disk raises into ``StorageError``; the one border for ``OSError``."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, or choose another folder with --out",
            errno.EACCES: "choose a folder that you may write to with --out",
            errno.EROFS: "the file system is read-only; choose another folder with --out",
        }
        hint = hints.get(error.errno or 0, "choose another folder with --out")
        raise StorageError(f"{action}: {error.strerror or error}", hint=hint) from error


@contextlib.contextmanager
def run_folder(final: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``final``; the caller publishes it, and it is gone otherwise.

    It lies on the same file system, so that ``publish`` is a rename.

    Raises:
        StorageError: something that is not a bundle is in the way, or the disk refuses.
    """
    require_free(final)
    with storage_errors(f"cannot write beside {final}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, final: Path) -> None:
    """Rename a finished run folder to its final name; an earlier bundle there is replaced in one step.

    Raises:
        StorageError: something that is not a bundle is in the way.
    """
    require_free(final)
    with storage_errors(f"cannot publish {final}"):
        scratch.chmod(0o755)  # mkdtemp makes it private
        if not final.exists():
            scratch.rename(final)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
        final.rename(old / "bundle")
        try:
            scratch.rename(final)
        except OSError:
            (old / "bundle").rename(final)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def require_free(final: Path) -> None:
    """Refuse a place where something lies that is not a bundle.

    Raises:
        StorageError: so.
    """
    with storage_errors(f"cannot look at {final}"):
        taken = final.exists() and not (final / MANIFEST).is_file()
    if taken:
        raise StorageError(
            f"{final} exists and is not a bundle (no {MANIFEST}); it was left alone",
            hint="choose another folder with --out, or remove it yourself",
        )


def write_json(path: Path, data: Any) -> None:
    """Write JSON that sorts the same everywhere, through a temporary file and a rename."""
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with storage_errors(f"cannot write {path}"):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def write_manifest(run: RunRecord, folder: Path) -> None:
    """Write ``manifest.json``; written last, so a folder that has one is whole."""
    write_json(folder / MANIFEST, to_json(run))


def read_manifest(folder: Path) -> RunRecord:
    """Read a bundle's manifest.

    Raises:
        BundleError: no bundle there, or its manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}", hint="effdeploy export ... --out " + str(folder)
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="export again") from error
    _require_schema(path, data)
    return from_json(RunRecord, data)


def _require_schema(path: Path, data: Any) -> None:
    """Compare the version before the fields: a field that another version names otherwise would hide the cause."""
    if not isinstance(data, dict) or "schema_version" not in data:
        return  # no manifest of any version; from_json says what is wrong with it
    if (got := data["schema_version"]) != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema_version {got!r}, expected {SCHEMA_VERSION}",
            hint=f"it was written by effdeploy {data.get('effdeploy', 'of another version')}: "
            "use that version, or export again",
        )


def environment() -> Environment:
    """Describe the machine and the versions, without paths or host names."""
    packages = {}
    for name in _FINGERPRINT:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpu=_gpu_name(),
        packages=packages,
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    """Name the first NVIDIA GPU from the driver's own files; importing a CUDA library here would cost seconds."""
    with contextlib.suppress(OSError):
        for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
            for line in information.read_text(encoding="utf-8").splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
    return "none"
