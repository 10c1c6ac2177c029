"""Versions that are known to build and be wrong, slow or unable: a table as data, with public threads.

The table is ``deploy/data/known_bad.yaml``. An entry warns, it proves nothing about this machine: parity does.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from deploy.errors import BundleError
from deploy.records import from_json, record

TABLE = Path(__file__).parent / "data" / "known_bad.yaml"
EFFECTS = ("wrong", "fails", "slow")


@record
class KnownBad:
    """One trap. ``versions`` is the range that is warned about, ``seen`` what the threads name.

    ``sm`` lists compute capabilities (89 for 8.9) that it was seen on; empty means several or none named.
    """

    id: str
    package: str
    versions: str
    seen: tuple[str, ...]
    operators: tuple[str, ...]
    models: tuple[str, ...]
    sm: tuple[int, ...]
    effect: str
    symptom: str
    threads: tuple[str, ...]
    workaround: str


@functools.cache
def known_bad() -> tuple[KnownBad, ...]:
    """Return the table.

    Raises:
        BundleError: the installed table is damaged.
    """
    return read_table(TABLE)


def read_table(path: Path) -> tuple[KnownBad, ...]:
    """Read a table and hold it against the form of an entry.

    Raises:
        BundleError: unreadable, or an entry has other fields, types or effects.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = tuple(from_json(KnownBad, item) for item in data)
        for entry in entries:
            SpecifierSet(entry.versions)
            if entry.effect not in EFFECTS:
                raise ValueError(f"{entry.id}: effect {entry.effect!r}, expected one of {', '.join(EFFECTS)}")
    except (OSError, ValueError, TypeError, yaml.YAMLError, BundleError) as error:
        raise BundleError(
            f"{path.name} cannot be read: {error}", hint="pip install --force-reinstall effdeploy"
        ) from error
    return entries


def matching(
    packages: Mapping[str, str], *, sm: int | None = None, operators: Collection[str] | None = None
) -> tuple[KnownBad, ...]:
    """Return the traps that these versions can meet.

    Args:
        packages: Distribution to installed version.
        sm: Compute capability of the GPU; entries of other capabilities are left out. ``None``: unknown.
        operators: ONNX operators of the graph; entries that need others are left out. ``None``: any graph.
    """
    return tuple(
        entry
        for entry in known_bad()
        if _covers(entry.versions, packages.get(entry.package))
        and (sm is None or not entry.sm or sm in entry.sm)
        and (operators is None or not entry.operators or set(entry.operators) <= set(operators))
    )


def _covers(versions: str, version: str | None) -> bool:
    if version is None:
        return False
    try:
        return SpecifierSet(versions).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
