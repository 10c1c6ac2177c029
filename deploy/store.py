"""Finished stages, kept by the hash of what they consumed, in the user's cache folder.

An entry is a folder ``<stage>-<key>`` with ``entry.json`` and the files that the stage made. It is written beside its
place and renamed, so it is whole or absent; every file is held against its hash when it is taken. The store only saves
time: where it cannot be written, a run goes on without it and says so.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifacts import FULL, cache_folder, open_artifact
from deploy.errors import BundleError
from deploy.records import Artifact, from_json, to_json

LIMIT = 8 << 30  # bytes; what was not used for longest goes first
ENTRY = "entry.json"
_STALE_SECONDS = 24 * 3600  # a folder that no run can still be writing
_NAMED = 24  # digits of the key in a folder's name
_RULES = "data/*.yaml"
# Rooms that only show results: they change no stage.
_SHOWING = ("api.py", "catalogue.py", "cli", "console.py", "report", "summary.py", "units.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One finished stage: when it ran, what it consumed, its files, and its record as JSON data."""

    stage: str
    key: str
    made: str
    seconds: float
    consumed: Mapping[str, str]
    files: tuple[Artifact, ...]
    record: Any


def key_of(stage: str, consumed: Mapping[str, str]) -> str:
    """Return the hash of everything that a stage consumes."""
    return _digest([stage, sorted(consumed.items())])


@functools.cache
def code_version(package: Path = Path(__file__).parent) -> str:
    """Return the hash of the sources that decide what stages make, the rules of lint included."""
    digest = hashlib.sha256()
    for path in sorted((*package.rglob("*.py"), *package.glob(_RULES))):
        name = path.relative_to(package)
        if name.parts[0] not in _SHOWING:
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Store:
    """The finished stages of one user.

    Args:
        folder: Where they are kept; default: ``stages`` in the cache folder.
        limit: Bytes to keep at most.
    """

    def __init__(self, folder: Path | None = None, *, limit: int = LIMIT) -> None:
        self.folder = folder or cache_folder() / "stages"
        self.limit = limit

    def take(self, stage: str, key: str, into: Path | None = None) -> tuple[Entry | None, str]:
        """Copy the files of a finished stage into a run's folder.

        Returns:
            The entry, or ``None`` and what is wrong with it: empty where there is simply none.
        """
        place = self._place(stage, key)
        try:
            entry = _read(place)
            if entry is None or entry.key != key:
                return None, ""
            for artifact in entry.files if into else ():
                _copy(artifact, place, into or place)
            os.utime(place)
        except BundleError as error:
            return None, f"what was kept of it is damaged ({_brief(error)})"
        except OSError as error:
            if error.errno in FULL:  # the run's own folder cannot hold it, and could not hold a new one either
                raise
            return None, f"what was kept of it cannot be read ({error.strerror or error})"
        return entry, ""

    def put(self, entry: Entry, source: Path) -> str:
        """Keep a finished stage, in place of what is there; returns why that was not possible, or nothing."""
        place = self._place(entry.stage, entry.key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _beside(place) as scratch:
                for artifact in entry.files:
                    _copy(artifact, source, scratch)
                _write(entry, scratch)
                shutil.rmtree(place, ignore_errors=True)
                with _taken_by_another_run():
                    scratch.rename(place)
            self._prune(place)
        except BundleError as error:
            return _brief(error)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def nearest(self, stage: str, consumed: Mapping[str, str]) -> Entry | None:
        """Return the entry of a stage that consumed nearly the same; of several, the newest."""
        found = []
        for place in self.folder.glob(f"{stage}-*"):
            with contextlib.suppress(BundleError, OSError):
                if entry := _read(place):
                    found.append(entry)
        return min(
            sorted(found, key=lambda entry: entry.made, reverse=True),
            key=lambda entry: len(differences(entry.consumed, consumed)),
            default=None,
        )

    def _place(self, stage: str, key: str) -> Path:
        return self.folder / f"{stage}-{key[:_NAMED]}"

    def _prune(self, kept: Path) -> None:
        """Remove what was not used for longest until the rest fits, and what killed runs left half written."""
        ages = {}
        for place in self.folder.iterdir():
            with contextlib.suppress(OSError):
                ages[place] = place.stat().st_mtime
        entries = sorted((p for p in ages if not p.name.startswith(".")), key=lambda p: (p == kept, ages[p]))
        sizes = {place: _size(place) for place in entries}
        total = sum(sizes.values())
        for place in entries[:-1]:
            if total <= self.limit:
                break
            total -= sizes[place]
            shutil.rmtree(place, ignore_errors=True)
        for place in set(ages) - set(entries):
            if time.time() - ages[place] > _STALE_SECONDS:
                shutil.rmtree(place, ignore_errors=True)


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Name what two stages did not consume alike, in the order of the new one."""
    return [name for name in {**new, **old} if old.get(name) != new.get(name)]


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _taken_by_another_run() -> Iterator[None]:
    """Pass over an entry that another run has put at the same place meanwhile: keys are alike, so entries are."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _copy(artifact: Artifact, source: Path, into: Path) -> None:
    """Copy a file and hold the copy against the hash: one that changes meanwhile is noticed as well."""
    if not (source / artifact.name).is_file():
        raise BundleError(f"{artifact.name} is missing")
    (into / artifact.name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / artifact.name, into / artifact.name)
    try:
        open_artifact(artifact, into)
    except BundleError:
        (into / artifact.name).unlink(missing_ok=True)
        raise


def _write(entry: Entry, folder: Path) -> None:
    data = to_json(entry)
    text = json.dumps({"sha256": _digest(data), "entry": data}, sort_keys=True, allow_nan=False)
    (folder / ENTRY).write_text(text, encoding="utf-8")


def _read(place: Path) -> Entry | None:
    """Read an entry; ``None`` where there is none.

    Raises:
        BundleError: it was truncated or changed.
    """
    try:
        data = json.loads((place / ENTRY).read_text(encoding="utf-8"))
        if data["sha256"] != _digest(data["entry"]):
            raise BundleError(f"{ENTRY} was changed")
    except FileNotFoundError:
        if not place.is_dir():
            return None
        raise BundleError(f"{ENTRY} is missing") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{ENTRY} cannot be read") from error
    return from_json(Entry, data["entry"])


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _size(place: Path) -> int:
    total = 0
    for path in place.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _brief(error: BundleError) -> str:
    return error.message.replace(os.sep, "/").rpartition("/")[2]
