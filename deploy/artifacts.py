"""Files that travel: names, hashes, the run folder that appears whole or not at all, the environment's fingerprint."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from deploy.cpu import cpu_features
from deploy.errors import BundleError, StorageError
from deploy.records import SCHEMA_VERSION, Artifact, Environment, RunRecord, Stage, from_json, to_json

if sys.platform != "win32":
    import fcntl

MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
TRACED, PATCHED, WITH_PLUGINS = "10-traced.onnx", "20-patched.onnx", "40-plugins.onnx"

CACHE_VARIABLE = "EFFDEPLOY_CACHE"

# Packages whose version can change a graph, an engine or a number.
_FINGERPRINT = (
    "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "onnx-graphsurgeon", "polygraphy",
    "numpy", "pillow", "safetensors", "tensorrt", "tensorrt-rtx", "openvino",
)  # fmt: skip

# What a disk that takes no more says, and what can be done.
FULL = {
    errno.ENOSPC: "free some space, or choose another folder with --out",
    errno.EDQUOT: "the quota is used up; free some space, or choose another folder with --out",
    errno.EFBIG: "a limit on the size of files is in the way (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another folder with --out",
}
_REFUSALS = {
    **FULL,
    errno.EACCES: "choose a folder that you may write to with --out",
    errno.EPERM: "choose a folder that you may write to with --out",
}


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
    try:
        inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a null in it
        told = getattr(error, "strerror", None) or str(error)[:80]
        raise BundleError(f"{artifact.name[:80]!r} is no name of a file: {told}", hint="export again") from error
    if not inside:
        raise BundleError(f"{artifact.name!r} points outside the bundle {folder}", hint="do not use this bundle")
    if not there:
        raise BundleError(f"{path} is missing from the bundle", hint="export again")
    if (got := sha256_of(path)) != artifact.sha256:
        raise BundleError(
            f"{path} was changed: sha256 {got[:12]}..., the manifest says {artifact.sha256[:12]}...",
            hint="export again, or restore the file",
        )
    return path


def cache_folder() -> Path:
    """Return where effdeploy keeps what it can make or fetch again: ``EFFDEPLOY_CACHE``, or the platform's place.

    Finished stages, downloads and TensorRT's timings have a folder each in it.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effdeploy"


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
def storage_errors(action: str, option: str = "--out") -> Iterator[None]:
    """Translate what a full or read-only disk raises into ``StorageError``; the one border for ``OSError``.

    Args:
        action: What could not be done.
        option: The one that chooses another folder.
    """
    try:
        yield
    except OSError as error:
        raise _storage_error(action, error, option) from error


@contextlib.contextmanager
def refused_writes(action: str) -> Iterator[None]:
    """Find a full or read-only disk behind whatever a library made of it; other errors pass."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise _storage_error(action, error) from error
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise _storage_error(action, cause) from error


def _storage_error(action: str, error: OSError, option: str = "--out") -> StorageError:
    hint = _REFUSALS.get(error.errno or 0, "choose another folder with --out").replace("--out", option)
    return StorageError(f"{action}: {error.strerror or error}", hint=hint)


def failed_name(final: Path) -> Path:
    """Return where a run whose parity fails is published."""
    return final.with_name(final.name + ".failed")


@contextlib.contextmanager
def run_folder(final: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``final``; the caller publishes it, and it is gone otherwise.

    It lies on the same file system, so that ``publish`` is a rename. Meanwhile no other run writes to ``final``. What
    a killed run left is cleared away first, and a bundle that it had moved aside is put back.

    Raises:
        StorageError: something that is not a bundle is in the way, another run is writing it, or the disk refuses.
    """
    with storage_errors(f"cannot write beside {final}"):
        final.parent.mkdir(parents=True, exist_ok=True)
    with _alone(final):
        with storage_errors(f"cannot write beside {final}"):
            _clear_leftovers(final)
            _clear_leftovers(failed_name(final))
        require_free(final)
        with storage_errors(f"cannot write beside {final}"):
            scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Hold the bundle's lock; the system frees it when the process ends, however it ends."""
    if sys.platform == "win32":
        yield
        return
    path = final.with_name(f".{final.name}.lock")
    with storage_errors(f"cannot lock {final}"):
        stream = _locked(path, final)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who has it open already sees below that it is not the file any more
        stream.close()


def _locked(path: Path, final: Path) -> IO[str]:
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            other = stream.read().strip() or "unknown"
            stream.close()
            raise StorageError(
                f"another run is writing {final} (process {other})",
                hint="wait until it has ended, or choose another folder with --out",
            ) from None
        with contextlib.suppress(FileNotFoundError):
            held, named = os.fstat(stream.fileno()), path.stat()
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                stream.truncate(0)
                stream.write(str(os.getpid()))
                stream.flush()
                return stream
        stream.close()  # the run that held it has just removed the file: take the one that is there now


def publish(scratch: Path, final: Path) -> None:
    """Rename a finished run folder to its final name; an earlier bundle there is replaced, and never lost.

    A run that is killed between the two renames leaves the earlier bundle in a hidden folder; the next ``run_folder``
    puts it back.

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
        try:
            final.rename(old / "bundle")
            scratch.rename(final)
        finally:
            _restore(old, final)


def _restore(old: Path, final: Path) -> None:
    """Put a bundle that was moved aside back to its place, unless another one lies there by now."""
    if not final.exists() and (old / "bundle" / MANIFEST).is_file():
        (old / "bundle").rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(final: Path) -> None:
    """Clear away what killed runs left; with the lock held, every hidden folder of this bundle is of a dead one."""
    pattern = re.compile(re.escape(f".{final.name}.") + r"(partial|old)-[a-z0-9_]{8}")  # as mkdtemp names them
    for path in [p for p in final.parent.iterdir() if pattern.fullmatch(p.name)]:
        _restore(path, final)


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


def require_place(out: Path, until: Stage) -> None:
    """Refuse, before any work, a place that a run until this stage may not take.

    Raises:
        StorageError: something else lies at ``out`` or where its failure would go, or a bundle that went further.
    """
    refuse_to_shorten(out, until)
    require_free(out)
    require_free(failed_name(out))


def refuse_to_shorten(out: Path, until: Stage) -> None:
    """Keep a bundle that went further down the road than a run until this stage would.

    One that cannot be read is kept as well, unless the run goes all the way: its own error says to export again.

    Raises:
        StorageError: ``out`` holds such a bundle.
    """
    if not (out / MANIFEST).is_file():
        return
    other = "choose another folder with --out, or remove it yourself"
    try:
        old = read_manifest(out)
    except BundleError as error:
        if until is Stage.REPORT:
            return
        raise StorageError(
            f"{error.message}; a run until {until.value} might replace more than it makes", hint=other
        ) from error
    if old.until.order > until.order:
        raise StorageError(
            f"{out} holds a bundle that went on to {old.until.value}; a run until {until.value} would replace it",
            hint=other,
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
        if folder.is_file():
            raise BundleError(f"{folder} is a file, expected a bundle folder", hint=f"{folder.parent}, if that is one")
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint=_bundles_near(folder))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="export again") from error
    _require_schema(path, data)
    return from_json(RunRecord, data)


def _bundles_near(folder: Path) -> str:
    """Say which bundles lie in the folder, or else beside it, newest first; or how to make one."""
    for place in (folder, folder.parent):
        with contextlib.suppress(OSError):
            found = sorted(place.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime, reverse=True)
            if found:
                return "bundles there: " + ", ".join(str(p.parent) for p in found[:5])
    return f"effdeploy export SYSTEM --out {folder}"


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
        cpu_features=cpu_features(),
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
