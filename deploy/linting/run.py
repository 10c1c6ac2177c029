"""Hold an ONNX file against the rules: for people and programs, and before every build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
from packaging.specifiers import SpecifierSet

from deploy.errors import EffdeployError, LintError
from deploy.linting.checks import CHECKS, Hit
from deploy.linting.table import ERROR, Goal, Rule, table
from deploy.linting.view import View
from deploy.records import Finding, LintRecord

_NAMED = 8  # nodes that a finding names
# What a predicate may meet in a damaged file; the rule is then reported as not checked.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, OSError, RuntimeError)


def lint_file(path: Path, goals: Sequence[Goal], *, cpu: bool = True, gpu: bool = True) -> LintRecord:
    """Hold a file against every rule that is about one of the goals.

    Args:
        path: An ONNX file; data beside it is read only where a rule needs its values.
        goals: Runtimes and versions.
        cpu: Whether rules about CPU kernels count.
        gpu: Whether rules about GPUs count.

    Raises:
        StorageError: the file cannot be read.
        GraphPassError: it is not a whole ONNX model.
    """
    view = View.of(path)
    findings: list[Finding] = []
    notes: list[str] = []
    applied = 0
    for rule in table().rules:
        severities = {str(goal): severity for goal in goals if (severity := rule.severity(goal))}
        if not severities or not {"cpu": cpu, "gpu": gpu}.get(rule.device, True):
            continue
        applied += 1
        if rule.opsets and not SpecifierSet(rule.opsets).contains(str(view.opsets.get("", 0))):
            continue
        try:
            hits = tuple(CHECKS[rule.check](view, rule))
        except EffdeployError:
            raise
        except _UNREADABLE as error:
            notes.append(f"{rule.id} could not be checked: {type(error).__name__}: {str(error)[:120]}")
            continue
        findings += _findings(rule, hits, severities)
    findings.sort(key=lambda f: ERROR not in f.severities.values())
    return LintRecord(
        model=path.name, opset=view.opsets.get("", 0), nodes=len(view.sites), goals=tuple(map(str, goals)),
        rules=applied, findings=tuple(findings), notes=(*notes, *_unread(view)),
    )  # fmt: skip


def lint_error(record: LintRecord, *, strict: bool = False) -> LintError:
    """Say what is wrong with a file in one error: the first findings, by node."""
    worst = [f for f in record.findings if strict or ERROR in f.severities.values()]
    first, more = worst[:3], len(worst) - 3
    said = "; ".join(f"{places(f)}: {f.what} [{f.rule}]" for f in first)
    error = LintError(
        f"{record.model} breaks {len(worst)} rules: {said}{f'; and {more} more' if more > 0 else ''}",
        hint=first[0].fix,
    )
    error.record = record
    return error


def places(finding: Finding, most: int = 3) -> str:
    """Name the operator and the nodes of a finding."""
    named = ", ".join(finding.nodes[:most])
    more = f" and {finding.count - most} more" if finding.count > most else ""
    return f"{finding.operator} {named}{more}"


def _findings(rule: Rule, hits: Iterable[Hit], severities: Mapping[str, str]) -> list[Finding]:
    """Make one finding of all hits of a rule on one operator; it says of the first what was found."""
    groups: dict[str, list[Hit]] = {}
    for hit in hits:
        groups.setdefault(hit.operator, []).append(hit)
    return [
        Finding(
            rule=rule.id,
            operator=_text(operator),
            nodes=tuple(_text(hit.name) for hit in group[:_NAMED]),
            count=len(group),
            severities=severities,
            what=rule.what.replace("{found}", _text(group[0].found)),
            fix=rule.fix,
            source=rule.source,
            known_bad=bool(rule.known_bad),
        )
        for operator, group in groups.items()
    ]


def _text(name: str | bytes) -> str:
    """Read a name; protobuf gives bytes where a damaged file has no valid text."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def _unread(view: View) -> tuple[str, ...]:
    """Say how many weights could not be looked at, because their data is not there."""
    missing = [t.name for t in view.initializers.values() if t.external_data and not _has_data(view, t)]
    return (f"the values of {len(missing)} weights were not checked: their data is not there",) if missing else ()


def _has_data(view: View, tensor: onnx.TensorProto) -> bool:
    target = view.data_file(tensor)
    return target is not None and target.is_file()
