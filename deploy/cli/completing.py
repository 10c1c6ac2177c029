"""What the shell completes behind an option or argument. Nothing heavy is imported: a key press has to be quick."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import typer  # typer reads the annotations here when it is asked to complete

from deploy.records import Precision, Stage, Target

MANIFEST = "manifest.json"
BASELINES = ("eager", "compile", "naive")
DEVICES = ("auto", "cpu", "cuda")


def systems(incomplete: str) -> list[str]:
    """Complete the name of a system."""
    from deploy.models import SYSTEMS

    return _starting(SYSTEMS, incomplete)


def systems_and_recipes(incomplete: str) -> list[str]:
    """Complete the name of a system, or the path of a recipe file."""
    return systems(incomplete) + [path for path in _paths(incomplete) if path.endswith((".yaml", ".yml", "/"))]


def variants(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a variant: of the system that was typed, or of all."""
    from deploy.models import SYSTEMS

    typed = str(ctx.params.get("system") or "")
    names = (typed,) if typed in SYSTEMS else SYSTEMS
    return _starting(sorted({variant for name in names for variant in _variants_of(name)}), incomplete)


def stages(incomplete: str) -> list[str]:
    """Complete a stage of the road."""
    return _starting((stage.value for stage in Stage), incomplete)


def targets(incomplete: str) -> list[str]:
    """Complete a target."""
    return _starting((target.value for target in Target), incomplete)


def devices(incomplete: str) -> list[str]:
    """Complete a device."""
    return _starting(DEVICES, incomplete)


def backends(incomplete: str) -> list[str]:
    """Complete a backend."""
    return _starting(("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"), incomplete)


def export_backends(incomplete: str) -> list[str]:
    """Complete a backend, or how it is chosen."""
    return [*backends(incomplete), *_starting(("auto",), incomplete)]


def goals(incomplete: str) -> list[str]:
    """Complete what a file can be linted for."""
    return _starting(("tensorrt==11.4", "tensorrt==10.16", "tensorrt_rtx", "onnxruntime"), incomplete)


def baselines(incomplete: str) -> list[str]:
    """Complete the last of baselines with commas between them."""
    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in _starting(BASELINES, last) if name not in done.split(",")]


def assignments(incomplete: str) -> list[str]:
    """Complete a recipe key, and the values of those that have names."""
    values = {
        "precision": [precision.value for precision in Precision],
        "target": targets(""),
        "engine.backend": export_backends(""),
        "engine.device": devices(""),
    }
    key, equals, start = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _starting(values.get(key, ()), start)]
    from deploy.recipe import dotted_keys

    return _starting((f"{name}=" for name in dotted_keys()), incomplete)


def bundles(incomplete: str) -> list[str]:
    """Complete a bundle folder: those below the folder that was typed, else those in ``engines/``."""
    typed = [path for path in _paths(incomplete) if path.endswith("/")]
    return typed if incomplete else [path for path in _paths("engines/") if Path(path, MANIFEST).is_file()] or typed


def bundles_and_models(incomplete: str) -> list[str]:
    """Complete a bundle folder, or an ONNX file."""
    found = [*bundles(incomplete), *(path for path in _paths(incomplete) if path.endswith(".onnx"))]
    return list(dict.fromkeys(found))


def files(incomplete: str) -> list[str]:
    """Complete a bundle folder, or any file."""
    return list(dict.fromkeys([*bundles(incomplete), *_paths(incomplete)]))


def _variants_of(system: str) -> Iterator[str]:
    """Read the names under ``variants:`` in the shipped recipe."""
    import yaml

    from deploy.recipe import configs_folder

    data = yaml.safe_load((configs_folder() / f"{system}.yaml").read_text(encoding="utf-8"))
    yield from (str(name) for name in data.get("variants") or ())  # YAML reads 18 as a number


def _paths(incomplete: str) -> list[str]:
    """List what lies where ``incomplete`` points; folders end with a slash."""
    folder, _, start = incomplete.rpartition("/")
    root = Path(folder or ("/" if incomplete.startswith("/") else "."))
    try:
        found = sorted(root.iterdir())
    except OSError:
        return []
    head = incomplete[: len(incomplete) - len(start)]
    shown = [path for path in found if path.name.startswith(start) and (start or not path.name.startswith("."))]
    return [f"{head}{path.name}{'/' if path.is_dir() else ''}" for path in shown]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
