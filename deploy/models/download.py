"""Files over http(s): resumed, held against length and hash, and published whole or not at all.

A download lies in the cache folder under its final name only when it is whole. What came so far lies beside it as
``.partial`` with a note (``.json``) of what the server said, and the next run asks for the rest. A lock keeps two
processes from writing one file; it dies with its process.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import __version__, units
from deploy.artifacts import cache_folder, sha256_of
from deploy.console import Console, Mode
from deploy.errors import DownloadError
from deploy.models.answers import InterruptedTransferError, StalePartError, opened, read, validator_of
from deploy.models.cache import byte_progress, cache_errors, locked

_BLOCK = 1 << 18
_PROGRESS = 1 << 20  # a broken connection that brought this much is not counted against the attempts


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a bad connection is borne.

    Attributes:
        attempts: How often to ask in a row without a megabyte of progress.
        wait: Seconds before asking again; doubles each time.
        timeout: Seconds without a byte, also for connecting.
    """

    attempts: int = 4
    wait: float = 1.0
    timeout: float = 30.0


def download(url: str, name: str, sha256: str, console: Console, patience: Patience | None = None) -> tuple[Path, str]:
    """Return the local copy of a URL and its SHA-256; downloads it unless a whole copy is in the cache.

    Args:
        url: Without a fragment.
        name: File name, kept at the end of the cached one.
        sha256: Digits that the content's hash must begin with; empty to take what comes.
        console: Where progress goes.
        patience: How long a bad connection is borne.

    Raises:
        DownloadError: the server refuses, gives up, redirects in a circle, or sends other content than pinned.
        StorageError: the cache folder cannot be written, or is full.
    """
    transfer = _transfer(url, name, sha256, console, patience)
    final, folder = transfer.final, transfer.final.parent
    if found := transfer.finished():
        return final, found
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(final, name, console):
        return final, transfer.finished() or transfer.run()


def is_downloaded(url: str, name: str, sha256: str) -> bool:
    """Whether a whole copy is in the cache; asks no server."""
    return bool(_transfer(url, name, sha256, Console(Mode.SILENT), None).finished())


def _transfer(url: str, name: str, sha256: str, console: Console, patience: Patience | None) -> _Transfer:
    final = cache_folder() / "weights" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    return _Transfer(url=url, name=name, final=final, sha256=sha256, console=console, patience=patience or Patience())


@dataclass(kw_only=True, slots=True)
class _Transfer:
    """One URL on its way to one file."""

    url: str
    name: str
    final: Path
    sha256: str
    console: Console
    patience: Patience

    @property
    def partial(self) -> Path:
        return self.final.with_name(self.final.name + ".partial")

    @property
    def note(self) -> Path:
        return self.final.with_name(self.final.name + ".json")

    def finished(self) -> str:
        """Return the hash of a whole copy in the cache; empty when there is none, or it was changed since."""
        if not self.final.is_file():
            return ""
        got = sha256_of(self.final)
        whole = got.startswith(self.sha256) if self.sha256 else got == self.read_note().get("sha256")
        return got if whole else ""

    def run(self) -> str:
        """Fetch, check, publish; a hash that is wrong after resuming may be the old part's fault, so once again."""
        resumed = self.usable() > 0
        self.fetch()
        got = sha256_of(self.partial)
        if not got.startswith(self.sha256) and resumed:
            self.console.line("the resumed file has another hash than pinned; starting over", "warn")
            self.discard()
            self.fetch()
            got = sha256_of(self.partial)
        if not got.startswith(self.sha256):
            self.discard()
            raise DownloadError(
                f"{self.url}: its sha256 is {got}, expected {self.sha256}{'' if len(self.sha256) == 64 else '...'}",
                hint="the file was changed or the hash is of another one; if the file is right, correct #sha256=",
            )
        with cache_errors(self.final.parent):
            self.write_note({"url": self.url, "sha256": got})
            self.partial.replace(self.final)
        return got

    def fetch(self) -> None:
        """Ask until everything is there; attempts that bring a megabyte are free."""
        failed, highest = 0, self.usable()
        while True:
            try:
                return self.attempt()
            except InterruptedTransferError as error:
                if isinstance(error, StalePartError):
                    self.discard()
                size = self.size()
                failed = 0 if size >= highest + _PROGRESS else failed + 1
                highest = max(highest, size)
                if failed >= self.patience.attempts:
                    raise DownloadError(
                        f"{self.url}: gave up after {failed} attempts: {error}",
                        hint="run the same command again, it goes on where this one stopped; or download it "
                        "yourself, then --weights PATH",
                    ) from error
                wait = self.patience.wait * 2 ** max(failed - 1, 0)
                self.console.line(f"download: {error}; going on in {wait:g} s", "warn")
                time.sleep(wait)

    def attempt(self) -> None:
        """Ask once for what is missing and append it.

        Raises:
            InterruptedTransferError: not everything came; what did is kept if it can be used.
        """
        note = self.read_note()
        have = self.usable()
        if have and have == note.get("total"):
            return
        headers = {"User-Agent": f"effdeploy/{__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator := note.get("validator"):
                headers["If-Range"] = str(validator)
        with opened(self.url, headers, self.patience.timeout) as response:
            have, total = self.position(response, have, note)
            if not have:
                self.discard()  # before the note: it must never describe the bytes of another version
            with cache_errors(self.final.parent):
                validator = validator_of(response.headers) or (note.get("validator", "") if have else "")
                self.write_note({"url": self.url, "validator": validator, "total": total})
                self.require_space((total or 0) - have)
            self.copy(response, have, total)

    def position(self, response: http.client.HTTPResponse, have: int, note: dict[str, Any]) -> tuple[int, int | None]:
        """Return where the body begins and how long the whole file is; ``None`` when only its end tells.

        Raises:
            DownloadError: nothing would tell a whole file from a part of it.
            StalePartError: the server answers for another part, or for another file than before.
        """
        if response.status != 206:  # the whole file: the server knows no ranges, or the file is another one now
            have = 0
        total = None if response.length is None else have + response.length
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            total = int(match[2]) if match and match[2] != "*" else total
            validators = {validator_of(response.headers), note.get("validator", "")} - {""}
            same = note.get("total") in (None, total) and len(validators) < 2
            if match is None or int(match[1]) != have or not same:
                raise StalePartError("the server sent another part than asked for")
        if total is None and not response.chunked and not self.sha256:
            raise DownloadError(
                f"{self.url}: the server names no length and nothing pins the content, so a part of it would pass",
                hint=f"--weights '{self.url}#sha256=<digits>'",
            )
        return have, total

    def copy(self, response: http.client.HTTPResponse, have: int, total: int | None) -> None:
        """Append the body.

        Raises:
            InterruptedTransferError: it ended early.
        """
        folder = self.final.parent
        with cache_errors(folder):
            stream = self.partial.open("r+b" if have else "wb")
        with stream, byte_progress(self.console, total, self.name) as progress:
            with cache_errors(folder):
                stream.truncate(have)
                stream.seek(have)
            progress(have)
            while block := read(response, _BLOCK):
                with cache_errors(folder):
                    stream.write(block)
                have += len(block)
                progress(len(block))
            with cache_errors(folder):
                stream.flush()
                os.fsync(stream.fileno())
        if total is not None and have < total:
            raise InterruptedTransferError(f"the server stopped after {units.size(have)} of {units.size(total)}")

    def size(self) -> int:
        return self.partial.stat().st_size if self.partial.is_file() else 0

    def usable(self) -> int:
        """Return how many bytes are here that can be gone on from: a validator or a pin notices another file."""
        note, size = self.read_note(), self.size()
        total = note.get("total")
        safe = note.get("url") == self.url and bool(note.get("validator") or self.sha256)
        return size if safe and (not isinstance(total, int) or size <= total) else 0

    def discard(self) -> None:
        with cache_errors(self.final.parent):
            self.partial.unlink(missing_ok=True)

    def require_space(self, needed: int) -> None:
        """Raise what a full disk would, before an hour of downloading."""
        if needed > shutil.disk_usage(self.final.parent).free:
            raise OSError(errno.ENOSPC, f"{units.size(needed)} needed, {os.strerror(errno.ENOSPC)}")

    def read_note(self) -> dict[str, Any]:
        try:
            data = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or cut off: then nothing is known
            return {}
        return data if isinstance(data, dict) else {}

    def write_note(self, data: dict[str, Any]) -> None:
        temporary = self.note.with_name(self.note.name + ".tmp")
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(self.note)
