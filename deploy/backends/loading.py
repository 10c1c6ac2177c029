"""What an engine is held against before a runtime sees a byte of it: its entry in the manifest.

The manifest names the file, its hash, the runtime's version, the GPU, the driver, the profiles and the precision audit.
A file that the manifest does not name, that lies elsewhere, that was changed, or that is of another machine is refused
with the reason. TensorRT gets the bytes that were hashed; ONNX Runtime and OpenVINO read the file again, by its path,
for the weights that lie beside it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.artifacts import open_artifact
from deploy.backends.gpu import Gpu
from deploy.backends.trt_config import ranges_of, ranges_text
from deploy.errors import BackendUnavailableError, BundleError, RecipeError
from deploy.records import Artifact, Batch, EngineRecord

BUILD_HERE = "build it here: effdeploy build BUNDLE --backend tensorrt"
_DAMAGED = "export or build again; do not use this bundle"


def engine_file(engine: EngineRecord, folder: Path) -> Path:
    """Return an engine's path after holding the file and the audit in its record.

    Raises:
        BundleError: the file is missing, was changed, or lies outside the bundle; or its precision audit failed.
    """
    if not engine.audit.ok:
        raise BundleError(
            f"{engine.artifact.name} failed its precision audit: {engine.audit.statement}",
            hint="build it again; an engine that computes in another precision than asked is not used",
        )
    return open_artifact(engine.artifact, folder)


def engine_bytes(engine: EngineRecord, folder: Path) -> bytes:
    """Return an engine's bytes, held against the manifest's hash once more as they will be loaded.

    Raises:
        BundleError: as ``engine_file``.
    """
    data = engine_file(engine, folder).read_bytes()
    if hashlib.sha256(data).hexdigest() != engine.artifact.sha256:
        raise BundleError(f"{engine.artifact.name} was changed while it was read", hint=_DAMAGED)
    return data


def weights_file(engine: EngineRecord, folder: Path) -> Path | None:
    """Return the ONNX file that a stripped engine takes its weights from; ``None`` for a whole engine.

    Raises:
        BundleError: the record does not say which file by name and hash, or it is another one by now.
    """
    if engine.options.get("strip") != "yes":
        return None
    name, sha256 = engine.options.get("model", ""), engine.options.get("model_sha256", "")
    if not (name and sha256):
        raise BundleError(
            f"{engine.artifact.name} was written without weights, and its record does not name the ONNX file they are "
            "in with its hash",
            hint=BUILD_HERE,
        )
    return open_artifact(Artifact(name=name, sha256=sha256, size=0), folder)


def recorded_ranges(engine: EngineRecord) -> tuple[Batch, ...]:
    """Return the profiles that an engine's record names.

    Raises:
        BundleError: it names none.
    """
    try:
        return ranges_of(engine.options)
    except (KeyError, RecipeError) as error:
        raise BundleError(
            f"the record of {engine.artifact.name} has no profile ranges: it was not written by effdeploy build",
            hint=BUILD_HERE,
        ) from error


def require_version(engine: EngineRecord, here: str) -> None:
    """Refuse an engine of another TensorRT, unless it was built to be version compatible.

    Raises:
        BackendUnavailableError: so.
    """
    built = engine.backend_version
    compatible = engine.options.get("version_compatible") == "yes" and built.split(".")[0] == here.split(".")[0]
    if built != here and not compatible:
        raise BackendUnavailableError(
            f"{engine.artifact.name} was built by TensorRT {built}, this machine has {here}",
            hint=f"{BUILD_HERE} (--version-compatible for later minor ones)",
        )


def require_gpu(engine: EngineRecord, gpu: Gpu) -> None:
    """Refuse an engine for another compute capability, unless it was built to be hardware compatible.

    Raises:
        BackendUnavailableError: so.
        BundleError: the record does not say which one it is for.
    """
    named = engine.options.get("sm", "")
    if not named.isdigit():
        raise BundleError(
            f"the record of {engine.artifact.name} does not say which compute capability it is for: got {named!r}",
            hint=BUILD_HERE,
        )
    built, level = int(named), engine.options.get("hardware", "none")
    if built != gpu.sm and not (level == "ampere_plus" and min(built, gpu.sm) >= 80):
        raise BackendUnavailableError(
            f"{engine.artifact.name} is for SM {built} (hardware compatibility: {level}), this GPU is SM {gpu.sm}",
            hint=BUILD_HERE,
        )


def require_driver(engine: EngineRecord, here: str | None) -> None:
    """Refuse a driver of an older branch than the engine was built and audited with.

    Raises:
        BackendUnavailableError: so; a driver that neither side could read is not judged.
    """
    built = engine.options.get("driver", "unknown")
    branches = [re.match(r"\d+", text or "") for text in (built, here)]
    if all(branches) and int(branches[0][0]) > int(branches[1][0]):  # type: ignore[index]
        raise BackendUnavailableError(
            f"{engine.artifact.name} was built with driver {built}, this machine has the older {here}",
            hint=f"update the driver, or {BUILD_HERE}",
        )


def require_profiles(cuda_engine: Any, ranges: tuple[Batch, ...], name: str, inputs: Mapping[str, bool]) -> None:
    """Hold a loaded engine's profiles against those of its record.

    Args:
        cuda_engine: The deserialised engine.
        ranges: What the record says.
        name: Of the file, for the error.
        inputs: Name of each input to whether its axis 0 is dynamic.

    Raises:
        BundleError: the engine was built for other batches than the manifest says.
    """
    dynamic = [tensor for tensor, moves in inputs.items() if moves]
    count = int(cuda_engine.num_optimization_profiles)
    found = {tensor: tuple(_profile(cuda_engine, tensor, index) for index in range(count)) for tensor in dynamic}
    told = [f"batches {ranges_text(got)} at {tensor!r}" for tensor, got in found.items() if got != ranges]
    if not dynamic and any(batch.dynamic for batch in ranges):
        told = ["one fixed batch"]
    if told:
        raise BundleError(
            f"{name} takes {told[0]}, its record says {ranges_text(ranges)}: it is another engine than the manifest "
            "describes",
            hint=_DAMAGED,
        )


def _profile(cuda_engine: Any, tensor: str, index: int) -> Batch:
    low, opt, high = (int(shape[0]) for shape in cuda_engine.get_tensor_profile_shape(tensor, index))
    return Batch(min=low, opt=opt, max=high)
