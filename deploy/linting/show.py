"""What lint found, for people: a table with a column for each goal, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.console import Console
from deploy.linting.run import lint_error, lint_file, places
from deploy.linting.table import ERROR, WARNING, parse_goals
from deploy.records import LintRecord

_WARNED = 5  # findings that a build names on the terminal; the report has them all


def lint_model(path: Path, goals: Sequence[str], console: Console, *, strict: bool = False) -> LintRecord:
    """Lint a file and show what was found: ``effdeploy lint``.

    Raises:
        LintError: it breaks a rule that counts as an error, or with ``strict`` any.
        EffdeployError: the goals or the file cannot be read.
    """
    wanted = parse_goals(goals)
    record = lint_file(path, wanted)
    show_lint(record, console)
    console.result(record)
    if record.count(ERROR) or (strict and record.findings):
        raise lint_error(record, strict=strict)
    return record


def show_lint(record: LintRecord, console: Console) -> None:
    """Write the findings, errors first, and how it went for each goal."""
    if record.findings:
        columns = (*record.goals, "rule", "where", "what")
        rows = [
            (*(f.severities.get(goal, "-") for goal in record.goals), f.rule, places(f), f.what)
            for f in record.findings
        ]
        console.table(f"lint of {record.model}", columns, rows)
        for rule, finding in {f.rule: f for f in record.findings}.items():
            console.line(f"{rule}: {finding.fix}; {finding.source}")
    for note in record.notes:
        console.warn(note)
    console.line(f"{record.model}: opset {record.opset}, {record.nodes} nodes, {record.rules} rules", "quiet")
    for goal in record.goals:
        errors, warnings = record.count(ERROR, goal), record.count(WARNING, goal)
        tone = "bad" if errors else "warn" if warnings else "good"
        console.line(f"{goal}: {verdict(errors, warnings)}", tone)


def verdict(errors: int, warnings: int) -> str:
    """Say in words how many errors and warnings there are."""
    if not errors and not warnings:
        return "clean"
    counts = ((errors, "error"), (warnings, "warning"))
    return ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count)


def warn_of_findings(record: LintRecord, console: Console) -> None:
    """Name what a build goes on in spite of; known-bad versions are warned of by the build itself."""
    found = [f for f in record.findings if not f.known_bad]
    for finding in found[:_WARNED]:
        console.warn(f"lint: {places(finding)}: {finding.what} [{finding.rule}]")
    if len(found) > _WARNED:
        console.warn(f"lint: {len(found) - _WARNED} more findings; the report lists them")
