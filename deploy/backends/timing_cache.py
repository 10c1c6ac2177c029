"""TensorRT's timing cache: one file for each TensorRT version and GPU, in the user's cache folder.

A cache only saves build time, so it never stops a build: one that cannot be read or written is left out, and the
engine's record says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

FOLDER = "tensorrt-timing"  # in the cache folder


def cache_file(folder: Path, version: str, gpu: str, sm: int) -> Path:
    """Name the cache of a TensorRT version and a GPU: timings of another one would be wrong."""
    device = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"tensorrt-{version}-sm{sm}-{device}.cache"


class TimingCache:
    """A cache file during one build.

    Args:
        path: The file; ``None`` for no cache at all.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.statement = "off"

    def attach(self, config: Any) -> None:
        """Give the builder what earlier builds have timed; without a file it keeps timings for this build alone."""
        if self.path is None:
            return
        blob = _read(self.path)
        cache = config.create_timing_cache(blob)
        taken = bool(cache is not None and config.set_timing_cache(cache, False))
        if not taken:  # damaged, or written by another version under this name
            config.set_timing_cache(config.create_timing_cache(b""), False)
        state = f"{len(blob)} bytes loaded" if blob and taken else "damaged, begun anew" if blob else "new"
        self.statement = f"{self.path.name}, {state}"

    def save(self, config: Any) -> None:
        """Write what this build has timed, with what other builds wrote meanwhile, in one step."""
        if self.path is None:
            return
        cache = config.get_timing_cache()
        if cache is None:
            return
        if blob := _read(self.path):
            other = config.create_timing_cache(blob)
            if other is not None:
                cache.combine(other, True)
        try:
            _write(self.path, bytes(cache.serialize()))
        except OSError as error:
            self.statement += f"; not saved: {error.strerror or error}"


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def _write(path: Path, blob: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(blob)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
