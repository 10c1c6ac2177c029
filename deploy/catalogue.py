"""What there is to export: systems, variants and their figures, computed from the models themselves."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.answers import CatalogueRecord, SystemRecord, VariantRecord
from deploy.console import Console
from deploy.models import SYSTEMS, find_system
from deploy.models.base import System, count_macs, empty_state
from deploy.recipe import configs_folder, read_yaml
from deploy.resolve import resolve_recipe

COLUMNS = ("variant", "parameters (M)", "multiply-adds (G)", "input", "")


def catalogue() -> tuple[SystemRecord, ...]:
    """Return a record per system. Multiply-adds are counted per image, as the papers' FLOPs are."""
    return tuple(_system(find_system(name)) for name in SYSTEMS)


def show(systems: Sequence[SystemRecord], console: Console) -> None:
    """Write a table per system."""
    for system in systems:
        console.table(f"{system.name}: {system.paper}", COLUMNS, [_row(variant) for variant in system.variants])
    console.result(CatalogueRecord(systems=tuple(systems)))


def _system(system: System) -> SystemRecord:
    shipped = read_yaml(configs_folder() / f"{system.name}.yaml").variants
    variants = tuple(_variant(system, name) for name in shipped)
    return SystemRecord(name=system.name, task=system.task, paper=system.paper, variants=variants)


def _variant(system: System, name: str) -> VariantRecord:
    recipe = resolve_recipe(system.name, {"variant": ("--variant", name)})
    options = {**system.variants[name].options, "classes": recipe.classes}
    state = empty_state(system, options, recipe.size, system.weight_maps[0].layout)
    return VariantRecord(
        name=name,
        parameters=sum(tensor.numel() for tensor in state.values()),
        macs=count_macs(system, options, recipe.size),
        size=recipe.size,
        summary=system.variants[name].summary,
    )


def _row(variant: VariantRecord) -> tuple[str, ...]:
    millions, giga = variant.parameters / 1e6, variant.macs / 1e9
    return variant.name, f"{millions:.1f}", f"{giga:.2f}", f"3x{variant.size[0]}x{variant.size[1]}", variant.summary
