"""The command line: thin commands, no logic. Nothing heavy is imported before a command runs."""

from deploy.cli import export  # isort: skip - `--help` lists commands in the order of these imports
from deploy.cli import build, bundles, catalogue  # isort: skip
from deploy.cli import convert, inspect, lint  # isort: skip
from deploy.cli import diff, eval  # isort: skip  # noqa: A004
from deploy.cli import bisect, show, tune  # isort: skip
from deploy.cli import package, run  # isort: skip
from deploy.cli import doctor  # isort: skip
from deploy.cli.app import app, main

__all__ = [
    "app", "bisect", "build", "bundles", "catalogue", "convert", "diff", "doctor", "eval", "export", "inspect", "lint",
    "main", "package", "run", "show", "tune",
]  # fmt: skip
