"""What there is to export: systems, variants and their figures, computed from the models themselves."""

from __future__ import annotations

from deploy.models import SYSTEMS, find_system
from deploy.models.base import System, count_macs, empty_state
from deploy.recipe import configs_folder, read_yaml
from deploy.resolve import resolve_recipe

COLUMNS = ("variant", "parameters (M)", "GFLOPs", "input", "")
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def catalogue() -> list[Table]:
    """Return a title, columns and rows per system. GFLOPs are multiply-adds per image, as the papers count them."""
    return [_table(find_system(name)) for name in SYSTEMS]


def _table(system: System) -> Table:
    shipped = read_yaml(configs_folder() / f"{system.name}.yaml").variants
    rows = [_row(system, variant) for variant in shipped]
    return f"{system.name}: {system.paper}", COLUMNS, rows


def _row(system: System, variant: str) -> tuple[str, ...]:
    recipe = resolve_recipe(system.name, {"variant": ("--variant", variant)})
    options = {**system.variants[variant].options, "classes": recipe.classes}
    state = empty_state(system, options, recipe.size, system.weight_maps[0].layout)
    parameters = sum(tensor.numel() for tensor in state.values()) / 1e6
    macs = count_macs(system, options, recipe.size) / 1e9
    size = f"3x{recipe.size[0]}x{recipe.size[1]}"
    return variant, f"{parameters:.1f}", f"{macs:.2f}", size, system.variants[variant].summary
