"""Which finished stages a run can take from earlier ones, and why not.

A stage is known by the hash of everything that it consumes: its part of the recipe, the content of the files that the
stages before it made, the weights, effdeploy's own sources, the versions of the libraries, and the machine where that
can change the result. A changed option therefore redoes only what follows from it: where a stage is redone and makes
the same file, the later ones are kept.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.artifacts import environment, sha256_of
from deploy.console import Console
from deploy.labels import read_labels
from deploy.models.sources import checkpoint_file, choose_text, parse_source
from deploy.recipe import Recipe, configs_folder, layer_of_data, resolve
from deploy.records import (
    Artifact,
    BenchRecord,
    Drift,
    EngineRecord,
    Environment,
    ModelRecord,
    ParityRecord,
    PassesRecord,
    Precision,
    PrecisionRecord,
    Stage,
    StageOrigin,
    Target,
    TraceRecord,
    from_json,
    to_json,
)
from deploy.store import Entry, Store, code_version, differences, key_of

KINDS: Mapping[Stage, Any] = {
    Stage.MODEL: ModelRecord,
    Stage.TRACE: TraceRecord,
    Stage.PASSES: PassesRecord,
    Stage.PRECISION: PrecisionRecord,
    Stage.ENGINE: tuple[EngineRecord, ...],
    Stage.PARITY: tuple[ParityRecord, Drift],
    Stage.LATENCY: BenchRecord | None,
}

_MODEL = ("system", "variant", "size", "classes", "options")
_INPUTS = (
    "system",
    "variant",
    "options",
    "size",
    "batch",
    "preprocess",
    "parity.images",
    "parity.max_images",
    "parity.seed",
)

# What each stage consumes of the recipe. A section stands for all of its keys; ``weights`` and ``pretrained`` come in
# by the hash of the file, ``target`` as it was resolved, ``parity.images`` and ``labels`` by their content.
CONSUMES: Mapping[Stage, tuple[str, ...]] = {
    Stage.MODEL: (*_MODEL, "preprocess", "labels"),
    Stage.TRACE: (*_MODEL, "preprocess", "labels", "batch", "trace"),
    Stage.PASSES: ("passes",),
    Stage.PRECISION: ("precision", "typing", "quantization"),
    Stage.ENGINE: ("engine", "precision", "system", "size", "batch", "bench.threads"),
    Stage.PARITY: (*_MODEL, *_INPUTS, "precision", "engine", "parity", "bench.threads"),
    Stage.LATENCY: (*_INPUTS, "precision", "engine", "bench"),
}
# The stages whose files each stage reads.
READS: Mapping[Stage, tuple[Stage, ...]] = {
    Stage.PASSES: (Stage.TRACE,),
    Stage.PRECISION: (Stage.PASSES,),
    Stage.ENGINE: (Stage.PRECISION,),
    Stage.PARITY: (Stage.TRACE, Stage.PASSES, Stage.PRECISION, Stage.ENGINE),
    Stage.LATENCY: (Stage.ENGINE,),
}
_RUNTIMES = (
    "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "polygraphy", "onnx-graphsurgeon",
)  # fmt: skip
_TRACERS = ("torch", "onnxscript", "onnx-ir", "safetensors")
# Libraries that cannot change what a stage makes; a new version of any other redoes it.
_INDIFFERENT: Mapping[Stage, tuple[str, ...]] = {
    Stage.MODEL: (*_RUNTIMES, "onnx", "onnxscript", "onnx-ir", "pillow"),
    Stage.TRACE: (*_RUNTIMES, "pillow"),
    Stage.PASSES: (*_TRACERS, "openvino", "tensorrt", "tensorrt-rtx"),
    Stage.PRECISION: (*_TRACERS, "openvino", "tensorrt", "tensorrt-rtx"),
    Stage.ENGINE: _TRACERS,
}
_ON_MACHINE = (Stage.PRECISION, Stage.ENGINE, Stage.PARITY, Stage.LATENCY)
_SHOWN, _WIDE = 3, 40


@dataclass(kw_only=True, slots=True)
class Reuse:
    """What a run takes from earlier runs and keeps for later ones.

    Attributes:
        recipe: What is asked for.
        target: What the graph is lowered for.
        folder: The run's folder; ``None`` to look only.
        start: Stages from here on are made again; they are kept all the same.
        records: Stage to record, of the stages that the run has by now.
        origins: Stage to where its record comes from.
        warned: Whether the run has said that the store cannot be written.
        here: The machine and the versions.
    """

    recipe: Recipe
    target: Target
    folder: Path | None
    start: Stage = Stage.REPORT
    store: Store = field(default_factory=Store)
    records: dict[Stage, Any] = field(default_factory=dict)
    origins: dict[Stage, StageOrigin] = field(default_factory=dict)
    warned: bool = False
    here: Environment = field(default_factory=lambda: environment())

    def take(self, stage: Stage) -> tuple[Any, StageOrigin, str]:
        """Find a stage's record and copy its files into the run's folder.

        Returns:
            The record, or ``None`` where the stage must be made; its origin, which tells the two apart and says why;
            and a warning where what was kept is damaged.
        """
        consumed = self.consumed(stage)
        key = key_of(stage.value, consumed)
        forced, damage = stage.order >= self.start.order, ""
        if not forced:
            entry, damage = self.store.take(stage.value, key, self.folder)
            if entry is not None:
                origin = StageOrigin(
                    key=key, reused=True, made=entry.made, seconds=entry.seconds, why="", consumed=consumed
                )
                return from_json(KINDS[stage], entry.record), origin, ""
        why = "asked for" if forced else damage or self._changed(stage, consumed)
        origin = StageOrigin(key=key, reused=False, made=now(), seconds=0.0, why=why, consumed=consumed)
        return None, origin, f"{stage.value}: {damage}; it was made again" if damage else ""

    def keep(self, stage: Stage, record: Any, origin: StageOrigin) -> str:
        """Keep a stage that was just made, unless it failed; returns a warning where that was not possible, once."""
        if is_failure(record):
            return ""
        earlier = {artifact.name for other in self.records.values() for artifact in artifacts_in(other)}
        files = tuple(artifact for artifact in artifacts_in(record) if artifact.name not in earlier)
        entry = Entry(
            stage=stage.value, key=origin.key, made=origin.made, seconds=origin.seconds, consumed=origin.consumed,
            files=files, record=to_json(record),
        )  # fmt: skip
        refused = self.store.put(entry, self.folder) if self.folder else ""
        warn, self.warned = bool(refused) and not self.warned, self.warned or bool(refused)
        return f"finished stages cannot be kept for the next run ({self.store.folder}: {refused})" if warn else ""

    def note(self, stage: Stage, record: Any, origin: StageOrigin) -> None:
        """Remember a stage of this run: later ones consume it."""
        self.records[stage], self.origins[stage] = record, origin

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the table of stages: name, reused or run, why."""
        return [
            (stage.value, "reused" if origin.reused else "run", made(stage, origin) if origin.reused else origin.why)
            for stage, origin in self.origins.items()
        ]

    def consumed(self, stage: Stage) -> dict[str, str]:
        """Return everything that a stage consumes, by name."""
        recipe = _flat(self.recipe.to_data())
        names = _needed(stage, self.recipe)
        found = {key: value for key, value in recipe.items() if _chosen(key, names)}
        if "parity.images" in found:
            found["parity.images"] = _photos(self.recipe)
        if "labels" in found:
            found["labels"] = _labels(self.recipe)
        if "quantization.calib" in found:
            found |= _calibration(self.recipe)
        for source in READS.get(stage, ()):
            for artifact in artifacts_in(self.records[source]):
                found[f"{source.value} file {artifact.name}"] = artifact.sha256
        if stage in (Stage.PARITY, Stage.LATENCY):
            engines: Sequence[EngineRecord] = self.records[Stage.ENGINE]
            found["engines"] = ", ".join(f"{e.device} ({'runs' if e.runnable else e.reason})" for e in engines)
        found |= self._weights(stage) | {"target": self.target.value, "effdeploy's sources": code_version()}
        return found | _surroundings(stage, self.here)

    def _weights(self, stage: Stage) -> dict[str, str]:
        if stage is Stage.MODEL:
            return {"weights": weights_identity(self.recipe)}
        if stage in (Stage.TRACE, Stage.PARITY) or (stage is Stage.LATENCY and self.recipe.bench.baselines):
            source = self.records[Stage.MODEL].weights
            return {"weights": source.sha256 or f"{source.kind} {source.seed}"}
        return {}

    def _changed(self, stage: Stage, consumed: Mapping[str, str]) -> str:
        """Say what is different from the stage of an earlier run that was most like it."""
        old = self.store.nearest(stage.value, consumed)
        if old is None:
            return "not made before"
        names = differences(old.consumed, consumed)
        names = [name for name in names if name in old.consumed and name in consumed] or names
        texts = [_difference(name, old.consumed.get(name, ""), consumed.get(name, "")) for name in names]
        more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        return "; ".join(texts[:_SHOWN]) + more


def preview(recipe: Recipe, target: Target, until: Stage, start: Stage) -> dict[Stage, StageOrigin]:
    """Return the stages that a run would take from earlier ones, as far as that is known before the first is made."""
    reuse = Reuse(recipe=recipe, target=target, folder=None, start=start)
    for stage in KINDS:
        record, origin, _ = reuse.take(stage)
        if stage.order > until.order or not origin.reused:
            break
        reuse.note(stage, record, origin)
    return reuse.origins


def made(stage: Stage, origin: StageOrigin) -> str:
    """Say when a stage was made; a latency is measured."""
    return f"{'measured' if stage is Stage.LATENCY else 'made'} {origin.made}"


def artifacts_in(record: Any) -> tuple[Artifact, ...]:
    """Return the files of a stage's record."""
    if isinstance(record, tuple):
        return tuple(artifact for item in record for artifact in artifacts_in(item))
    artifact = getattr(record, "artifact", None)
    return () if artifact is None else (artifact,)


def is_failure(record: Any) -> bool:
    """Whether a stage's record says that it failed (parity out of tolerance): the next run makes it again."""
    return isinstance(record, tuple) and any(isinstance(part, ParityRecord) and not part.ok for part in record)


def weights_identity(recipe: Recipe) -> str:
    """Say which weights a recipe names, without loading them: the hash of a file, or a seed.

    What lies on a server can change under its name, so only a full hash identifies it; without one the weights are
    loaded in every run.
    """
    text = choose_text(recipe.weights, recipe.pretrained, f"{recipe.system} {recipe.variant}")
    source = parse_source(text)
    if source.kind == "random":
        return f"random {source.seed}"
    if source.kind == "file" and (path := checkpoint_file(Path(source.location))).is_file():
        digest = sha256_of(path)
        if digest.startswith(source.sha256):  # else it must be loaded, to be refused
            return f"{path.name} {digest}"
    elif len(source.sha256) == 64 or re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return text
    return f"{text} ({secrets.token_hex(8)})"


def resolve_once(name_or_file: str, options: Mapping[str, tuple[str, Any]], assignments: Sequence[str]) -> Recipe:
    """Do what ``resolve_recipe`` does, and remember it: the systems' defaults can only be read with PyTorch loaded.

    Raises:
        EffdeployError: as ``resolve_recipe``; mistakes are never remembered.
    """
    store = Store()
    consumed = {name: repr(given[1]) for name, given in options.items()} | {
        "system": name_or_file, "--set": repr(list(assignments)), "effdeploy's sources": code_version(),
        **{path.name: sha256_of(path) for path in sorted(configs_folder().glob("*.yaml"))},
    }  # fmt: skip
    if Path(name_or_file).is_file():
        consumed["file"] = sha256_of(Path(name_or_file))
    key = key_of("recipe", consumed)
    entry, _ = store.take("recipe", key)
    if entry is not None:
        return resolve([layer_of_data("remembered recipe", entry.record)])
    from deploy.resolve import resolve_recipe

    recipe = resolve_recipe(name_or_file, options, assignments)
    fresh = Entry(
        stage="recipe", key=key, made=now(), seconds=0.0, consumed=consumed, files=(), record=recipe.to_data()
    )
    store.put(fresh, store.folder)
    return recipe


def show(reuse: Reuse, console: Console) -> None:
    """Write the table of stages where anything was reused, and what was redone in spite of being there."""
    if any(origin.reused for origin in reuse.origins.values()):
        console.table("stages", ("stage", "this run", "why"), reuse.rows())


def now() -> str:
    """Return the time in ISO 8601, UTC; ``SOURCE_DATE_EPOCH`` stands in for the clock."""
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return datetime.datetime.fromtimestamp(moment, tz=datetime.timezone.utc).isoformat()


def _needed(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """Add the inputs where this recipe makes the stage use them."""
    runs_graphs = {Stage.PASSES: recipe.passes.verify_each, Stage.PRECISION: recipe.precision is not Precision.FP32}
    model = _MODEL if stage is Stage.LATENCY and recipe.bench.baselines else ()
    return (*CONSUMES[stage], *(_INPUTS if runs_graphs.get(stage) else ()), *model)


def _chosen(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


def _photos(recipe: Recipe) -> str:
    """Identify the photos by their content, wherever they lie."""
    if recipe.parity.images is None:
        return "none" if recipe.quantization.calib is None else _calibration(recipe)["quantization.calib"]
    from deploy.preprocess import find_images

    digest = hashlib.sha256()
    for path in find_images(recipe.parity.images, recipe.parity.max_images):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _labels(recipe: Recipe) -> str:
    """Identify the classes' names by themselves.

    Raises:
        ImageError: their file cannot be read, or has another number of them.
    """
    if recipe.labels is None:
        return "none"
    names = read_labels(recipe.labels, recipe.classes)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _calibration(recipe: Recipe) -> dict[str, str]:
    """Identify the calibration images by their content, and what of the CPU decides the bits of weights."""
    if not recipe.precision.quantised:
        return {"quantization.calib": "not read"}
    from deploy.precision.cpu import dot_product
    from deploy.precision.images import chosen_images

    section, digest = recipe.quantization, hashlib.sha256()
    for path in chosen_images(section.calib, section.max_images) if section.calib else ():
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    images = digest.hexdigest() if section.calib else "generated"
    return {"quantization.calib": images, "8-bit dot product": dot_product() or "none"}


def _surroundings(stage: Stage, here: Environment) -> dict[str, str]:
    """Return the versions and the part of the machine that can change what a stage makes."""
    left_out = _INDIFFERENT.get(stage, ())
    found = {name: version for name, version in here.packages.items() if name not in left_out}
    found["python"] = here.python
    if stage in _ON_MACHINE:
        found |= {"platform": here.platform, "cpu": here.cpu, "cores": str(here.cores), "gpu": here.gpu}
        found["cpu features"] = ", ".join(here.cpu_features)
        found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return found


def _difference(name: str, old: str, new: str) -> str:
    opaque = any(len(text) > _WIDE for text in (old, new)) or not (old and new)
    return f"{name} changed" if opaque else f"{name} changed: {old} -> {new}"
