"""Versions that are known to build and be wrong, slow or unable: a table as data, with public threads.

The table is ``deploy/data/known_bad.yaml``. An entry warns, it proves nothing about this machine: parity does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from deploy.console import Console
from deploy.errors import BundleError
from deploy.records import from_json, record

TABLE = Path(__file__).parent / "data" / "known_bad.yaml"
PACKAGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tensorrt": {"tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")},
    "tensorrt_rtx": {"tensorrt-rtx": ("tensorrt-rtx",)},
    "onnxruntime": {"onnxruntime": ("onnxruntime",), "onnxruntime-gpu": ("onnxruntime-gpu",)},
    "openvino": {"openvino": ("openvino",)},
}
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


def traps_of_build(
    backend: str, *, operators: Collection[str], model: str = "", sm: Collection[int] = ()
) -> tuple[KnownBad, ...]:
    """Return the traps that building one graph with one backend can meet.

    Entries that are about any graph are for ``effdeploy doctor``: effdeploy's own checks cover them in every build.

    Args:
        backend: Its name; only entries on its package count.
        operators: ONNX operators of the graph.
        model: System and variant, e.g. ``"rtdetr r18vd"``; empty where nobody knows.
        sm: Compute capabilities that are built for; none: unknown.
    """
    found = (trap for one in sm or (None,) for trap in matching(_installed(backend), sm=one, operators=operators))
    return tuple(dict.fromkeys(t for t in found if t.operators or any(_is_model(name, model) for name in t.models)))


def warn_of_traps(console: Console, backend: str, graph: Path, *, model: str = "", sm: Collection[int] = ()) -> None:
    """Say before a build what is known to go wrong with this backend's version and this ONNX file, and what to do."""
    import onnx

    operators = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    for trap in traps_of_build(backend, operators=operators, model=model, sm=sm):
        console.warn(
            f"known trap of {trap.package} {trap.versions} ({trap.effect}): {trap.symptom} {trap.workaround} "
            f"See {trap.threads[0]}"
        )


def _installed(backend: str) -> dict[str, str]:
    """Return the table's name for a backend's package to the installed version; it is installed under several names."""
    found: dict[str, str] = {}
    for table, names in PACKAGES.get(backend, {}).items():
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(table, importlib.metadata.version(name))
    return found


def _is_model(named: str, model: str) -> bool:
    """Whether a table's name ("RT-DETR") is that of a system ("rtdetr r18vd")."""
    plain = re.sub(r"[^a-z0-9]", "", named.lower())
    return bool(plain) and re.sub(r"[^a-z0-9]", "", model.lower()).startswith(plain)


def _covers(versions: str, version: str | None) -> bool:
    if version is None:
        return False
    try:
        return SpecifierSet(versions).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
