"""From what a person typed to a resolved recipe, and from a recipe to what the rooms below are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import units
from deploy.backends import AUTO, BACKENDS
from deploy.backends.base import Feeds
from deploy.backends.gpu import first_gpu
from deploy.bench import BenchOptions
from deploy.errors import RecipeError, SizeError, UnknownNameError, did_you_mean
from deploy.models import SYSTEMS, find_system
from deploy.parity.inputs import InputPack, natural_image, pack
from deploy.precision.images import (
    CalibrationImages,
    chosen_images,
    generated_images,
    images_of_folder,
    readable,
)
from deploy.preprocess import find_images
from deploy.recipe import (
    Layer,
    Mistake,
    Recipe,
    configs_folder,
    layer_of_assignments,
    layer_of_options,
    read_yaml,
    resolve,
)
from deploy.records import Stage, Tolerance

if TYPE_CHECKING:
    from deploy.models.base import Flag, System

_GENERATED, _MOST_AT_ONCE = 16, 8  # images where no folder is named; images in a batch
_CALIBRATION_SEED, _JUDGING_SEED = 1000, 3000


def resolve_recipe(
    name_or_file: str, options: Mapping[str, tuple[str, Any]] | None = None, assignments: Sequence[str] = ()
) -> Recipe:
    """Merge everything that decides a run, lowest first: system default, YAML, command line, ``--set``.

    Args:
        name_or_file: A system's name, or a recipe file that names one.
        options: Recipe key to (flag, value), e.g. ``{"engine.backend": ("--backend", "tensorrt")}``.
        assignments: ``KEY=VALUE`` texts; an option of the system may be named without ``options.``.

    Raises:
        UnknownNameError: no such system or variant.
        RecipeError: lists every mistake.
    """
    layers = recipe_layers(name_or_file)
    system = find_system(str(layers[0].data["system"]))
    layers += [layer_of_options(options or {}), layer_of_assignments(_qualified(system, assignments))]
    variant = str(next(layer.data["variant"] for layer in reversed(layers) if "variant" in layer.data))
    for name in (variant, *(name for layer in layers for name in layer.variants)):
        if name not in system.variants:
            raise UnknownNameError(f"{system.name} has no variant {name!r}", hint=did_you_mean(name, system.variants))
    recipe = resolve(layers, partial(_mistakes, system))
    return recipe.model_copy(update={"options": {**system.options_for(_placed(recipe)), **recipe.options}})


def _placed(recipe: Recipe) -> Recipe:
    """Return the recipe with the device that ``auto`` comes to here, for systems whose form depends on it."""
    engine = recipe.engine
    if engine.backend != "onnxruntime" or engine.device != "auto" or first_gpu() is None:
        return recipe
    from deploy.backends.onnxruntime import takes_gpu  # imports the runtime, and few machines get here

    device = "cuda" if takes_gpu(engine.device) else "cpu"
    return recipe.model_copy(update={"engine": engine.model_copy(update={"device": device})})


def _qualified(system: System, assignments: Sequence[str]) -> list[str]:
    """Put ``options.`` before the system's own options; a key of the recipe keeps its meaning."""
    own = {name for variant in system.variants.values() for name in variant.options} - set(Recipe.model_fields)
    return [f"options.{text}" if text.partition("=")[0].strip() in own else text for text in assignments]


def _mistakes(system: System, merged: Mapping[str, Any]) -> Iterator[Mistake]:
    """Find what only systems and backends know: unknown backends and options, sizes that the stride does not divide."""
    backend = merged.get("engine", {}).get("backend") if isinstance(merged.get("engine"), Mapping) else None
    if isinstance(backend, str) and backend not in (*BACKENDS, AUTO):
        text = f"unknown backend {backend!r}; {did_you_mean(backend, BACKENDS)}"
        yield Mistake(keys=("engine", "backend"), text=text, kind=UnknownNameError)
    from deploy.models.base import check_size  # here, because it brings PyTorch, which a remembered recipe can spare

    with contextlib.suppress(ValueError):  # a size that is none was found by its type
        try:
            check_size(system, units.size_of(merged.get("size")))
        except SizeError as error:
            text = f"{error.message.removeprefix('size: ')}; {error.hint}"
            yield Mistake(keys=("size",), text=text, kind=SizeError)
    options, variant = merged.get("options"), merged.get("variant")
    known = system.variants[str(variant)].options if variant in system.variants else {}
    for name in sorted(set(options) - set(known)) if known and isinstance(options, Mapping) else ():
        text = f"{system.name} has no such option; {did_you_mean(str(name), known)}"
        yield Mistake(keys=("options", str(name)), text=text)


def flags_of(name_or_file: str) -> tuple[Flag, ...]:
    """Return the command-line flags of a system's own.

    Args:
        name_or_file: A system's name, or a recipe file that names one.

    Raises:
        UnknownNameError: no such system.
        RecipeError: the file cannot be read.
    """
    return find_system(str(recipe_layers(name_or_file)[0].data["system"])).flags


def stages_between(first: str | None, last: str | None) -> tuple[Stage, Stage]:
    """Read ``--from`` and ``--until``.

    Raises:
        UnknownNameError: no such stage.
        RecipeError: the first comes after the last.
    """
    names = [stage.value for stage in Stage]
    for flag, name in (("--from", first), ("--until", last)):
        if name is not None and name not in names:
            raise UnknownNameError(f"{flag}: no stage {name!r}", hint=did_you_mean(name, names))
    start, until = Stage(first or Stage.MODEL), Stage(last or Stage.REPORT)
    if until.order < start.order:
        raise RecipeError(f"--from {start.value} comes after --until {until.value}", hint="swap them")
    return start, until


def default_name(recipe: Recipe) -> str:
    """Name a bundle after what decides it: system, variant, its options, size, batch, precision, backend."""
    size = str(recipe.size[0]) if recipe.size[0] == recipe.size[1] else f"{recipe.size[0]}x{recipe.size[1]}"
    batch = "" if str(recipe.batch) == "1" else "b" + str(recipe.batch).replace(":", "-")
    lowered = f"for-{recipe.target.value}" if recipe.target else ""
    options = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", f"{k}{v}").strip("-") for k, v in recipe.options.items())
    what = (recipe.system, recipe.variant, options, size, batch)
    pixels = "uint8" if recipe.preprocess.embed else ""
    parts = (*what, pixels, recipe.precision.value, recipe.engine.backend, lowered)
    return "-".join(part for part in parts if part)


def recipe_layers(name_or_file: str) -> list[Layer]:
    """Return the layers below the command line: system defaults, the shipped YAML, and a recipe file of the user's."""
    own = [read_yaml(Path(name_or_file))] if name_or_file.endswith((".yaml", ".yml")) else []
    name = _system_of(own[0]) if own else name_or_file
    system = find_system(name)
    shipped = read_yaml(configs_folder() / f"{name}.yaml")
    return [Layer(name="system default", data=system.recipe), shipped, *own]


def _system_of(layer: Layer) -> str:
    if "system" not in layer.data:
        raise RecipeError(
            f"{layer.name} names no system", hint=f"add a line `system: NAME`; known: {', '.join(SYSTEMS)}"
        )
    return str(layer.data["system"])


def tolerances(recipe: Recipe) -> dict[str, Tolerance]:
    """Return the recipe's tolerances as records, by precision."""
    return {precision.value: section.record() for precision, section in recipe.parity.tolerances.items()}


def bench_options(recipe: Recipe) -> BenchOptions:
    """Return how long the recipe wants to measure."""
    section = recipe.bench
    return BenchOptions(
        warmup_seconds=section.warmup_seconds,
        min_seconds=section.seconds,
        min_rounds=section.rounds,
        max_seconds=max(30.0, 3 * section.seconds),
    )


def parity_inputs(system: System, recipe: Recipe) -> InputPack:
    """Make the deterministic pack, and add the recipe's photos.

    INT8 and FP8 whose ranges were measured on photos are judged on photos of that kind, if need be on the same ones.
    """
    from deploy.models.base import specialised  # as in _mistakes

    system, section = specialised(system, recipe), recipe.quantization
    photos = find_images(recipe.parity.images, recipe.parity.max_images) if recipe.parity.images else []
    if not photos and recipe.precision.quantised and section.calib is not None and section.calib.is_dir():
        few = chosen_images(section.calib, recipe.parity.max_images)
        photos = readable(few, recipe.size, recipe.preprocess.record())
    return pack(
        system.inputs,
        recipe.size,
        recipe.preprocess.record(),
        batch=recipe.batch,
        seed=recipe.parity.seed,
        photos=photos,
        extra=system.feeds,
    )


def calibration_images(system: System, recipe: Recipe) -> CalibrationImages:
    """Return the recipe's calibration images, or generated ones with natural statistics where it names no folder.

    The generated ones are not those that parity compares on.

    Raises:
        ImageError: the folder is missing, unreadable, or holds no image.
    """
    section = recipe.quantization
    if section.calib is not None:
        return _of_folder(system, recipe, section.calib, section.max_images)
    return _generated(system, recipe, _CALIBRATION_SEED)


def judged_images(system: System, recipe: Recipe) -> CalibrationImages:
    """Return what precisions are judged on: the recipe's photos, else its calibration images, else generated ones.

    The generated ones are neither those of the calibration nor those of parity.

    Raises:
        ImageError: the folder is missing, unreadable, or holds no image.
    """
    folder = recipe.parity.images or recipe.quantization.calib
    if folder is not None:
        found = _of_folder(system, recipe, folder, recipe.parity.max_images)
        flag = "--images" if recipe.parity.images else "--calib, on which the ranges were measured"
        return dataclasses.replace(found, source=f"{len(found.names)} images of {flag}")
    return dataclasses.replace(_generated(system, recipe, _JUDGING_SEED), warnings=())


def _of_folder(system: System, recipe: Recipe, folder: Path, limit: int) -> CalibrationImages:
    from deploy.models.base import specialised  # as in _mistakes

    system = specialised(system, recipe)
    return images_of_folder(
        folder, recipe.size, recipe.preprocess.record(), limit=limit, batch=_images_at_once(recipe),
        inputs=system.inputs, makers=system.feeds,
    )  # fmt: skip


def _generated(system: System, recipe: Recipe, seed: int) -> CalibrationImages:
    from deploy.models.base import specialised  # as in _mistakes

    spec, system = recipe.preprocess.record(), specialised(system, recipe)
    return generated_images(
        lambda index: natural_image(recipe.size, spec, seed + index), _GENERATED,
        identity=f"natural {seed} {recipe.size} {spec}", batch=_images_at_once(recipe), inputs=system.inputs,
        makers=system.feeds,
    )  # fmt: skip


def _images_at_once(recipe: Recipe) -> int:
    return max(recipe.batch.min, min(recipe.batch.opt, _MOST_AT_ONCE))


def sample_feeds(inputs: InputPack, count: int) -> Feeds:
    """Cut or repeat the pack's photos, then its natural images, to ``count`` rows.

    Photos first: ranges that were measured on photos clip the others.
    """
    chosen: dict[str, list[Any]] = {}
    for wanted in ("photos", "natural"):
        for chunk in inputs.chunks:
            for row in (row for row, group in enumerate(chunk.groups) if group == wanted):
                for name, array in chunk.feeds.items():
                    chosen.setdefault(name, []).append(array[row])
    return {name: np.stack([rows[i % len(rows)] for i in range(count)]) for name, rows in chosen.items()}
