"""Lint before a build: errors stop it, warnings go into the engine's record and onto the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from deploy.backends.gpu import first_gpu
from deploy.console import Console
from deploy.linting.run import lint_error, lint_file
from deploy.linting.show import warn_of_findings
from deploy.linting.table import ERROR, goal_of_backend
from deploy.records import EngineRecord, LintRecord


def check_before_build(
    path: Path, backend: str, device: str, console: Console, *, stop: bool = True
) -> LintRecord | None:
    """Hold a file against the rules of the backend that is about to build it.

    In a version beyond the table, errors count as warnings: nobody knows whether they still hold.

    Args:
        path: The ONNX file that the backend is given.
        backend: Its name.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; rules about CPU kernels count where the CPU runs it
            here, those about GPUs unless ``"cpu"`` was said: what ``"auto"`` comes to here need not hold elsewhere.
        console: Where warnings go.
        stop: False: errors are told as warnings are, and the backend has the last word (``engine.lint: warn``).

    Returns:
        What was found; ``None`` for a backend that the table knows nothing of.

    Raises:
        LintError: the backend is known to refuse the file.
    """
    goal, covered = goal_of_backend(backend)
    if goal is None:
        return None
    cpu = device == "cpu" or (device == "auto" and first_gpu() is None)
    record = lint_file(path, (goal,), cpu=cpu, gpu=device != "cpu")
    if covered and stop and record.count(ERROR):
        raise lint_error(record)
    warn_of_findings(record, console)
    return record


def with_lint(engines: Sequence[EngineRecord], record: LintRecord | None) -> tuple[EngineRecord, ...]:
    """Put what lint found into the records of the engines that were built from the file."""
    return tuple(dataclasses.replace(engine, lint=record) for engine in engines)
