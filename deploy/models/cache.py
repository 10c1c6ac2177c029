"""Downloads in the cache folder: who writes to it, and how far a download is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.artifacts import CACHE_VARIABLE
from deploy.console import Console
from deploy.errors import StorageError


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Translate what a full or read-only disk raises below the cache folder into ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write the download to {folder}: {error.strerror or error}",
            hint=f"free some space, or set {CACHE_VARIABLE} to another folder",
        ) from error


@contextlib.contextmanager
def byte_progress(console: Console, total: int | None, title: str) -> Iterator[Callable[[int], None]]:
    """Show bytes as megabytes; without a known total nothing is shown."""
    if not total:
        yield lambda count: None
        return
    done, shown = 0, 0
    with console.progress(math.ceil(total / 1e6), f"{title}, MB") as advance:

        def add(count: int) -> None:
            nonlocal done, shown
            done += count
            if (whole := round(done / 1e6)) != shown:
                advance(whole - shown)
                shown = whole

        yield add


@contextlib.contextmanager
def locked(final: Path, name: str, console: Console) -> Iterator[None]:
    """Let one process at a time fetch a file; says so when another one is at it."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{final}.lock")
    with cache_errors(final.parent):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.line(f"another process downloads {name}; waiting for it", "quiet")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
