"""What there is to export: systems, variants and their figures.

The figures are computed from the models themselves, which takes half a minute and PyTorch, and shipped as data:
``python -m deploy.catalogue`` writes them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deploy.answers import CatalogueRecord, SystemRecord, VariantRecord
from deploy.artifacts import write_json
from deploy.console import Console
from deploy.errors import BundleError
from deploy.jsonable import from_json, to_json
from deploy.models import SYSTEMS

DATA = Path(__file__).parent / "data" / "catalogue.json"
COLUMNS = ("variant", "parameters (M)", "multiply-adds (G)", "input", "")


def catalogue() -> tuple[SystemRecord, ...]:
    """Return a record per system. Multiply-adds are counted per image, as the papers' FLOPs are.

    A system that is not in the shipped data, because it was just added, is counted now.

    Raises:
        BundleError: the installed data is damaged.
    """
    shipped = {system.name: system for system in read_catalogue(DATA)}
    return tuple(shipped[name] if name in shipped else count_system(name) for name in SYSTEMS)


def read_catalogue(path: Path) -> tuple[SystemRecord, ...]:
    """Read the shipped figures.

    Raises:
        BundleError: the file is missing or has another form.
    """
    try:
        return from_json(CatalogueRecord, json.loads(path.read_text(encoding="utf-8"))).systems
    except (OSError, ValueError, BundleError) as error:
        raise BundleError(
            f"{path.name} cannot be read: {error}", hint="pip install --force-reinstall effdeploy"
        ) from error


def show(systems: Sequence[SystemRecord], console: Console) -> None:
    """Write a table per system."""
    for system in systems:
        console.table(f"{system.name}: {system.paper}", COLUMNS, [_row(variant) for variant in system.variants])
    console.result(CatalogueRecord(systems=tuple(systems)))


def count_system(name: str, only: str | None = None) -> SystemRecord:
    """Count parameters and multiply-adds of the variants that a system's recipe ships, or of one; imports PyTorch."""
    from deploy.models import find_system
    from deploy.recipe import configs_folder, read_yaml

    system = find_system(name)
    shipped = read_yaml(configs_folder() / f"{name}.yaml").variants
    variants = tuple(_count_variant(name, variant) for variant in shipped if only in (None, variant))
    return SystemRecord(name=name, task=system.task, paper=system.paper, variants=variants)


def _count_variant(name: str, variant: str) -> VariantRecord:
    from deploy.models import find_system
    from deploy.models.base import count_macs, empty_state, resolve_options, specialised
    from deploy.resolve import resolve_recipe

    recipe = resolve_recipe(name, {"variant": ("--variant", variant)})
    system = specialised(find_system(name), recipe)
    options = resolve_options(system, recipe)
    state = empty_state(system, options, recipe.size, system.weight_maps[0].layout)
    return VariantRecord(
        name=variant,
        parameters=sum(tensor.numel() for tensor in state.values()),
        macs=count_macs(system, options, recipe.size),
        size=recipe.size,
        summary=system.variants[variant].summary,
    )


def _row(variant: VariantRecord) -> tuple[str, ...]:
    millions, giga = variant.parameters / 1e6, variant.macs / 1e9
    return variant.name, f"{millions:.1f}", f"{giga:.2f}", f"3x{variant.size[0]}x{variant.size[1]}", variant.summary


if __name__ == "__main__":
    write_json(DATA, to_json(CatalogueRecord(systems=tuple(count_system(name) for name in SYSTEMS))))
