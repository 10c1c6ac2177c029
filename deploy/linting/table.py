"""The table of rules, ``deploy/data/lint_rules.yaml``, and the goals that a file can be linted for."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from deploy.errors import BundleError, RecipeError, UnknownNameError, did_you_mean
from deploy.known_bad import PACKAGES, KnownBad, known_bad
from deploy.records import from_json, record

TABLE = Path(__file__).parents[1] / "data" / "lint_rules.yaml"
ERROR, WARNING = "error", "warning"


@record
class Runtime:
    """What the table knows of a runtime: the versions that it covers, and those that are shown when none is asked."""

    covered: str
    shown: tuple[str, ...]


@record
class Rule:
    """One rule. ``errors`` and ``warnings`` say for which versions (PEP 440) of which runtime it counts as what.

    Attributes:
        id: Its name, for ``--json`` and for people.
        check: The predicate, a name of ``deploy.linting.checks.CHECKS``.
        operators: Operators of the default domain that it looks at; empty: the predicate chooses.
        given: What the predicate is given: places, limits, values.
        opsets: Opsets (PEP 440, of the default domain) that it is about; empty: all.
        what: What is wrong; ``{found}`` stands for what was found.
        fix: What to do.
        source: Where it is written.
        device: "cpu" where a rule is about a runtime's CPU kernels only, "gpu" where it is about GPUs only.
        known_bad: Entry of ``deploy/data/known_bad.yaml`` that gives versions, words and source.
    """

    id: str
    check: str
    operators: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    opsets: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    what: str = ""
    fix: str = ""
    source: str = ""
    device: str = ""
    known_bad: str = ""

    def severity(self, goal: Goal) -> str:
        """Return "error", "warning", or nothing where the rule is not about this goal."""
        for severity, versions in ((ERROR, self.errors), (WARNING, self.warnings)):
            covered = versions.get(goal.runtime)
            if covered is not None and SpecifierSet(covered).contains(goal.version, prereleases=True):
                return severity
        return ""


@record
class Goal:
    """A runtime in a version: what a file is meant for."""

    runtime: str
    version: str

    def __str__(self) -> str:
        return f"{self.runtime}=={self.version}"


@record
class Table:
    """All rules, and the runtimes that they are about."""

    runtimes: Mapping[str, Runtime]
    rules: tuple[Rule, ...]


@functools.cache
def table() -> Table:
    """Return the installed table.

    Raises:
        BundleError: it is damaged.
    """
    return read_table(TABLE)


def read_table(path: Path) -> Table:
    """Read a table and hold it against the form of a rule.

    Raises:
        BundleError: unreadable; a field, version range or runtime that cannot be; two rules of one name.
    """
    from deploy.linting.checks import CHECKS

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        traps = {entry.id: entry for entry in known_bad()}
        runtimes = {name: from_json(Runtime, item) for name, item in data["runtimes"].items()}
        rules = tuple(_with_trap(from_json(Rule, item), traps) for item in data["rules"])
        for rule in rules:
            _require_form(rule, runtimes, CHECKS)
        if len({rule.id for rule in rules}) != len(rules):
            raise ValueError("two rules have one id")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, BundleError) as error:
        raise BundleError(
            f"{path.name} cannot be read: {error}", hint="pip install --force-reinstall effdeploy"
        ) from error
    return Table(runtimes=runtimes, rules=rules)


def parse_goals(texts: Sequence[str]) -> tuple[Goal, ...]:
    """Read ``tensorrt==11.4`` or ``tensorrt`` (every version that the table shows); nothing: all runtimes.

    Raises:
        UnknownNameError: no such runtime.
        RecipeError: no version, or one that the rules do not cover.
    """
    names = texts or tuple(table().runtimes)
    return tuple(dict.fromkeys(goal for text in names for goal in _parse_goal(text)))


def goal_of_backend(backend: str) -> tuple[Goal | None, bool]:
    """Return what a backend of this machine is to the table, and whether the rules cover its version.

    A version beyond the table is held against the nearest that it covers; ``None``: the table knows no such runtime.
    """
    runtime = table().runtimes.get(backend)
    if runtime is None:
        return None, False
    version = _installed(backend) or runtime.shown[-1]
    if SpecifierSet(runtime.covered).contains(version, prereleases=True):
        return Goal(runtime=backend, version=version), True
    newer = Version(version) > Version(runtime.shown[-1])
    return Goal(runtime=backend, version=runtime.shown[-1 if newer else 0]), False


def _parse_goal(text: str) -> tuple[Goal, ...]:
    name, equals, version = (part.strip() for part in text.partition("=="))
    name, runtimes = name.replace("-", "_").lower(), table().runtimes
    if name not in runtimes and any(sign in name for sign in "=<>~!@"):
        raise RecipeError(f"--for: got {text!r}, expected a runtime or RUNTIME==VERSION", hint="--for tensorrt==11.4")
    if name not in runtimes:
        raise UnknownNameError(f"--for: no runtime {name!r}", hint=did_you_mean(name, runtimes))
    runtime = runtimes[name]
    if not equals:
        return tuple(Goal(runtime=name, version=shown) for shown in runtime.shown)
    hint = f"--for {name}=={runtime.shown[-1]}"
    try:
        Version(version)
    except InvalidVersion as error:
        raise RecipeError(f"--for: got {text!r}, expected a version such as {runtime.shown[-1]}", hint=hint) from error
    if not SpecifierSet(runtime.covered).contains(version, prereleases=True):
        raise RecipeError(
            f"--for: got {name} {version}, the rules cover {name} {runtime.covered}",
            hint=f"{hint}, or --for {name} for all that are shown",
        )
    return (Goal(runtime=name, version=version),)


def _installed(backend: str) -> str:
    for name in (name for names in PACKAGES.get(backend, {}).values() for name in names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _with_trap(rule: Rule, traps: Mapping[str, KnownBad]) -> Rule:
    """Fill a rule about a known-bad version from that table."""
    if not rule.known_bad:
        return rule
    if (trap := traps.get(rule.known_bad)) is None:
        raise ValueError(f"{rule.id}: known_bad has no entry {rule.known_bad!r}")
    return Rule(
        id=rule.id, check=rule.check, operators=rule.operators or trap.operators, given=rule.given, opsets=rule.opsets,
        warnings={trap.package: trap.versions}, what=trap.symptom, fix=trap.workaround, source=trap.threads[0],
        known_bad=trap.id,
    )  # fmt: skip


def _require_form(rule: Rule, runtimes: Mapping[str, Runtime], checks: Mapping[str, Any]) -> None:
    if rule.check not in checks:
        raise ValueError(f"{rule.id}: no check {rule.check!r}, {did_you_mean(rule.check, checks)}")
    if not (rule.what and rule.fix and rule.source and (rule.errors or rule.warnings)):
        raise ValueError(f"{rule.id}: what, fix, source and at least one of errors and warnings are needed")
    for runtime, versions in (*rule.errors.items(), *rule.warnings.items()):
        if runtime not in runtimes:
            raise ValueError(f"{rule.id}: no runtime {runtime!r}")
        try:
            SpecifierSet(versions)
        except InvalidSpecifier as error:
            raise ValueError(f"{rule.id}: {error}") from error
    SpecifierSet(rule.opsets)
