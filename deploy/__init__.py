"""effdeploy: efficient vision models from a PyTorch checkpoint to an engine that is proven right and measured.

    import deploy

    run = deploy.export(system, precision="fp16")
    print(run.verdict)

Every name is imported when it is first used, so that ``import deploy`` costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.answers import BisectRecord as BisectRecord
    from deploy.answers import ConversionRecord as ConversionRecord
    from deploy.answers import EvalRecord as EvalRecord
    from deploy.answers import PackageRecord as PackageRecord
    from deploy.answers import PlanRecord as PlanRecord
    from deploy.answers import PredictionRecord as PredictionRecord
    from deploy.answers import ShowRecord as ShowRecord
    from deploy.answers import SystemRecord as SystemRecord
    from deploy.answers import TuneRecord as TuneRecord
    from deploy.api import benchmark as benchmark
    from deploy.api import bisect as bisect
    from deploy.api import build as build
    from deploy.api import convert as convert
    from deploy.api import diagnose as diagnose
    from deploy.api import diff as diff
    from deploy.api import evaluate as evaluate
    from deploy.api import export as export
    from deploy.api import inspect as inspect
    from deploy.api import lint as lint
    from deploy.api import package as package
    from deploy.api import plan as plan
    from deploy.api import predict as predict
    from deploy.api import render as render
    from deploy.api import show as show
    from deploy.api import systems as systems
    from deploy.api import tune as tune
    from deploy.api import verify as verify
    from deploy.comparing import BundleDiff as BundleDiff
    from deploy.console import Console as Console
    from deploy.console import Mode as Mode
    from deploy.contents import BundleReport as BundleReport
    from deploy.contents import CheckpointReport as CheckpointReport
    from deploy.contents import EngineReport as EngineReport
    from deploy.doctor import Diagnosis as Diagnosis
    from deploy.errors import EffdeployError as EffdeployError
    from deploy.graph.inspection import GraphReport as GraphReport
    from deploy.records import BenchRecord as BenchRecord
    from deploy.records import BuildRecord as BuildRecord
    from deploy.records import LintRecord as LintRecord
    from deploy.records import ParityRecord as ParityRecord
    from deploy.records import Precision as Precision
    from deploy.records import RunRecord as RunRecord
    from deploy.records import Stage as Stage
    from deploy.records import Target as Target

# ONNX Runtime 1.31 opens a telemetry client when it is imported, unless told not to before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

# Where each public name lives. No function has the name of a submodule: importing that would take its place.
_HOMES = {
    "deploy.answers": (
        "BisectRecord", "ConversionRecord", "EvalRecord", "PackageRecord", "PlanRecord", "PredictionRecord",
        "ShowRecord", "SystemRecord", "TuneRecord",
    ),
    "deploy.api": (
        "benchmark", "bisect", "build", "convert", "diagnose", "diff", "evaluate", "export", "inspect", "lint",
        "package", "plan", "predict", "render", "show", "systems", "tune", "verify",
    ),
    "deploy.comparing": ("BundleDiff",),
    "deploy.console": ("Console", "Mode"),
    "deploy.contents": ("BundleReport", "CheckpointReport", "EngineReport"),
    "deploy.doctor": ("Diagnosis",),
    "deploy.errors": ("EffdeployError",),
    "deploy.graph.inspection": ("GraphReport",),
    "deploy.records": (
        "BenchRecord", "BuildRecord", "LintRecord", "ParityRecord", "Precision", "RunRecord",
        "Stage", "Target",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
