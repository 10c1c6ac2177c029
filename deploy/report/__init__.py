"""Reports, drawn from run records alone: an old bundle renders again anywhere, without torch and without its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.artifacts import read_manifest, storage_errors
from deploy.errors import BundleError, UnknownNameError, did_you_mean
from deploy.records import RunRecord

if TYPE_CHECKING:
    from deploy.report.blocks import Page

FORMATS = ("html", "md")


def render(runs: Sequence[RunRecord], folder: Path, formats: Sequence[str] = FORMATS) -> tuple[Path, ...]:
    """Write ``report.html`` and ``report.md`` of one run, or ``comparison.*`` of several; return the files.

    Args:
        runs: The manifests, one or more; nothing else is read.
        folder: An existing folder; for one run usually its bundle.
        formats: Some of ``FORMATS``.

    Raises:
        BundleError: no run was given.
        UnknownNameError: no such format.
        StorageError: the folder cannot be written to.
    """
    if not runs:
        raise BundleError("got no bundle to report on, expected at least one", hint="effdeploy report engines/NAME")
    writers = _writers()
    for name in formats:
        if name not in writers:
            raise UnknownNameError(f"report format {name!r} is not known", hint=did_you_mean(name, writers))
    from deploy.report.comparison import comparison_page
    from deploy.report.page import run_page

    page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    stem = "report" if len(runs) == 1 else "comparison"
    return tuple(_write(folder / f"{stem}.{name}", writers[name](page)) for name in formats)


def render_bundles(bundles: Sequence[Path], out: Path | None = None) -> tuple[Path, ...]:
    """Render from manifests alone: one bundle into itself, several as a comparison into ``out`` (default: here).

    Raises:
        BundleError: one of them is no bundle.
    """
    folder = out or (bundles[0] if len(bundles) == 1 else Path())
    with storage_errors(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return render([read_manifest(bundle) for bundle in bundles], folder)


def _writers() -> Mapping[str, Callable[[Page], str]]:
    from deploy.report.html import to_html
    from deploy.report.markdown import to_markdown

    return {"html": to_html, "md": to_markdown}


def _write(path: Path, text: str) -> Path:
    with storage_errors(f"cannot write {path}"):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    return path
