"""The predicates that the rules name, by name. Each takes a view and its rule, and yields what it hits."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.linting.checks.base import Check as Check
from deploy.linting.checks.base import Hit as Hit
from deploy.linting.checks.generic import GENERIC
from deploy.linting.checks.numbers import NUMBERS
from deploy.linting.checks.patterns import PATTERNS
from deploy.linting.checks.structure import STRUCTURE

CHECKS: Mapping[str, Check] = {**GENERIC, **STRUCTURE, **NUMBERS, **PATTERNS}
