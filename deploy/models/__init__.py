"""The systems: one file each, one name here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deploy.errors import UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from deploy.models.base import System

SYSTEMS = ("riformer", "tome", "convmixer", "alternet", "castling", "rtdetr", "sparseformer")


def find_system(name: str) -> System:
    """Import a system by name.

    Raises:
        UnknownNameError: no such system.
    """
    if name not in SYSTEMS:
        raise UnknownNameError(f"system {name!r} is not known", hint=did_you_mean(name, SYSTEMS))
    system: System = importlib.import_module(f"deploy.models.{name}").SYSTEM
    return system
