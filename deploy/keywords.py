"""What the functions of ``deploy.api`` take, as Python has it or as it is typed, for the rooms below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from deploy.console import Console
    from deploy.recipe import Recipe
    from deploy.records import Stage

PathLike = str | Path
Names = str | Sequence[str]
Size = int | str | tuple[int, int]
Assignments = Mapping[str, Any] | Sequence[str]
E = TypeVar("E", bound=Enum)


def recipe_of(
    system: PathLike, *, variant: str | None, weights: PathLike | None, size: Size | None, batch: int | str | None,
    precision: str | None, backend: str | None, target: str | None, sm: str | Sequence[int] | None,
    device: str | None, images: PathLike | None, calib: PathLike | None, calib_method: str | None,
    baseline: Names | None, seconds: float | None, threads: int | None, set_: Assignments, verify_each: bool,
    embed_preprocess: bool = False, labels: PathLike | None = None,
) -> Recipe:  # fmt: skip
    """Resolve a recipe from keywords; a mistake is named by the command line's option."""
    from deploy.reuse import resolve_once

    options = {
        "variant": ("--variant", variant),
        "weights": ("--weights", None if weights is None else str(weights)),
        "size": ("--size", size),
        "batch": ("--batch", batch),
        "precision": (f"--{precision}", precision),
        "target": ("--target", target),
        "engine.backend": ("--backend", backend),
        "engine.sm": ("--sm", listed(sm)),
        "engine.device": ("--device", device),
        "parity.images": ("--images", images),
        "quantization.calib": ("--calib", calib),
        "quantization.method": ("--calib-method", calib_method),
        "bench.baselines": ("--baseline", listed(baseline)),
        "bench.seconds": ("--seconds", seconds),
        "bench.threads": ("--threads", threads),
        "passes.verify_each": ("--verify-each", verify_each or None),
        "preprocess.embed": ("--embed-preprocess", embed_preprocess or None),
        "labels": ("--labels", None if labels is None else str(labels)),
    }
    return resolve_once(str(system), options, assignments_of(set_))


def road_of(
    recipe: Recipe, from_: str | None, until: str | None, out: PathLike | None
) -> tuple[Stage | None, Stage, Path]:
    """Return the stage to make again from, the last stage, and the bundle folder."""
    from deploy.resolve import default_name, stages_between

    first, last = stages_between(from_, until)
    return first if from_ else None, last, Path(out) if out else Path("engines") / default_name(recipe)


def one_of(kind: type[E], name: str | None, what: str) -> E | None:
    """Read a value of an enumeration.

    Raises:
        UnknownNameError: it has no such value.
    """
    from deploy.errors import UnknownNameError, did_you_mean

    values = {member.value: member for member in kind}
    if name is not None and name not in values:
        raise UnknownNameError(f"{what}: no {name!r}", hint=did_you_mean(name, values))
    return None if name is None else values[name]


def console_or_silence(console: Console | None) -> Console:
    """Return the console, or one that writes nothing."""
    from deploy.console import Console, Mode

    return console or Console(Mode.SILENT)


def assignments_of(given: Assignments) -> Sequence[str]:
    """Write a mapping as ``KEY=VALUE`` texts; JSON is YAML."""
    import json

    return [f"{key}={json.dumps(value)}" for key, value in given.items()] if isinstance(given, Mapping) else given


def listed(value: Any) -> tuple[Any, ...] | None:
    """Read ``"a,b"`` or a sequence; ``None`` and nothing stay ``None``."""
    return tuple(value.split(",") if isinstance(value, str) else value) if value else None


def path_of(value: PathLike | None) -> Path | None:
    """Return a path; ``None`` stays ``None``."""
    return None if value is None else Path(value)


def paths_of(value: PathLike | Sequence[PathLike]) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(value)] if isinstance(value, (str, Path)) else [Path(path) for path in value]
