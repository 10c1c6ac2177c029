"""The Hugging Face Hub, through huggingface_hub: its cache, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, its tokens.

The one place that knows the library: what it raises is translated here.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.console import Console
from deploy.errors import DownloadError, EffdeployError, RecipeError, StorageError
from deploy.models.cache import byte_progress
from deploy.models.sources import choose_file

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def fetch_from_hub(repo: str, file: str, revision: str, console: Console) -> tuple[Path, str, str]:
    """Return a file of a repository in the library's cache, its name, and the commit that it is of.

    Args:
        repo: ``OWNER/REPO``.
        file: File inside it; empty to take the one that holds weights.
        revision: Branch, tag or commit; empty for the default branch.
        console: Where progress goes.

    Raises:
        DownloadError: no such repository, revision or file; gated; offline and not cached; the Hub fails.
        CheckpointError: no file is named, and not exactly one holds weights.
        RecipeError: a name that no repository can have.
        StorageError: the library's cache cannot be written.
    """
    import huggingface_hub as hub

    with _translated(repo, file, revision):
        name = file or choose_file(f"hf://{repo}", _files(repo, revision))
        with _progress(console, name) as options:
            path = Path(hub.hf_hub_download(repo, name, revision=revision or None, **options))
    parts = path.parts
    return path, name, parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]


def is_cached(repo: str, file: str, revision: str) -> bool:
    """Whether a file of a commit is in the library's cache; a branch or a name that is left out needs the Hub."""
    import huggingface_hub as hub

    known = bool(file) and _COMMIT.fullmatch(revision) is not None
    return known and isinstance(hub.try_to_load_from_cache(repo, file, revision=revision), str)


def _files(repo: str, revision: str) -> list[str]:
    """List a repository's files; without a connection, those that are in the cache."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        found = hub.HfApi().model_info(repo, revision=revision or None).siblings or []
        return [sibling.rfilename for sibling in found]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except _failures():
        if cached := _cached_files(repo, revision or "main"):
            return cached
        raise


def _cached_files(repo: str, revision: str) -> list[str]:
    import huggingface_hub as hub

    with contextlib.suppress(hub.CacheNotFound):
        for found in hub.scan_cache_dir().repos:
            for cached in found.revisions if (found.repo_type, found.repo_id) == ("model", repo) else ():
                if revision == cached.commit_hash or revision in cached.refs:
                    return [f.file_path.relative_to(cached.snapshot_path).as_posix() for f in cached.files]
    return []


def _failures() -> tuple[type[Exception], ...]:
    """Return what the library lets through: its own errors, and those of its transport (requests, later httpx)."""
    from huggingface_hub import errors

    return (OSError, *(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)))


@contextlib.contextmanager
def _translated(repo: str, file: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except EffdeployError:
        raise
    except errors.HFValidationError as error:
        raise RecipeError(f"hf://{repo}: {_first_line(error)}", hint="--weights hf://OWNER/REPO") from error
    except _failures() as error:
        raise _translate(error, repo, file, revision) from error


def _translate(error: Exception, repo: str, file: str, revision: str) -> EffdeployError:
    """Say what a failure of the library means and what to do; kinds before their bases."""
    from huggingface_hub import constants, errors

    where = f"hf://{repo}"
    page = f"{constants.ENDPOINT}/{repo}"
    at = revision or "main"
    login = "hf auth login, or set HF_TOKEN"
    match error:
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
            what = file or "its weights"
            message = f"{where}: {offline}, and {what} of {at} is not in the cache"
            return DownloadError(message, hint="run once with a connection, or --weights PATH")
        case errors.GatedRepoError():
            message = f"{where} is gated: its authors ask you to agree to their terms"
            return DownloadError(message, hint=f"agree on {page}, then {login}")
        case errors.RepositoryNotFoundError():
            return DownloadError(f"{where}: no such repository, or a private one", hint=f"see {page}; private: {login}")
        case errors.RevisionNotFoundError():
            return DownloadError(f"{where} has no branch, tag or commit {revision!r}", hint=f"see {page}/tree/main")
        case errors.EntryNotFoundError():
            return DownloadError(f"{where} has no file {file!r} at {at}", hint=f"see {page}/tree/{at}")
        case OSError() if error.errno in _DISK:
            message = f"cannot write {where} to the Hub's cache: {error.strerror}"
            return StorageError(message, hint="free some space, or set HF_HOME to another folder")
        case _:
            message = f"{where}: {_first_line(error)} ({type(error).__name__})"
            return DownloadError(message, hint="run the same command again later, or --weights PATH")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


@contextlib.contextmanager
def _progress(console: Console, name: str) -> Iterator[dict[str, Any]]:
    """Lead the library's progress to the console, where its version lets others draw it."""
    import huggingface_hub as hub
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    if "tqdm_class" not in inspect.signature(hub.hf_hub_download).parameters:
        yield {}
        return
    with contextlib.ExitStack() as stack:

        class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
            """Draws nothing itself."""

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **{**options, "disable": True})
                self.add = stack.enter_context(byte_progress(console, self.total, name))
                self.add(int(options.get("initial") or 0))

            def update(self, n: float | None = 1) -> bool | None:
                self.add(int(n or 0))
                return None

        yield {"tqdm_class": Bar}
