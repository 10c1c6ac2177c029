"""``effdeploy bisect``: where the error of a reduced-precision bundle comes from, by stage and by module.

Three questions, on the bundle's own files. By stage: how far is each file from the traced one? By boundary: both graphs
run side by side, and activations are compared where they leave a module. By switching: each module alone from the low
file, and each alone from the high one, coarse modules first, then the worst of them from the inside.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy import units
from deploy.answers import Apart, BisectRecord, ModuleError, StageError
from deploy.artifacts import open_artifact, read_manifest, storage_errors
from deploy.bundles import stage_files
from deploy.candidates import build_options
from deploy.console import Console
from deploy.errors import BundleError, RecipeError
from deploy.models import find_system
from deploy.models.base import specialised
from deploy.precision.boundaries import boundary_errors
from deploy.precision.modules import Module, children, splits
from deploy.recipe import Recipe, layer_of_data, layer_of_options, resolve
from deploy.records import BoundaryError, Precision, RunRecord, Target
from deploy.resolve import judged_images
from deploy.sensitivity import How, Laboratory, both_of, how_to_judge
from deploy.tuning_plot import draw_bisection

WORST = 2  # modules that are looked into in each round
_SHOWN = 12
_STAGES = ("stage", "error", "cosine", "same best class")
_MODULES = ("module", "nodes", "it alone low", "cosine", "all low but it", "cosine ")
_BOUNDARIES = ("module", "error in", "error out", "")


def bisect_bundle(
    bundle: Path, console: Console, *, images: Path | None = None, backend: str | None = None, out: Path | None = None
) -> BisectRecord:
    """Find the stages and modules that the error of a bundle comes from.

    Args:
        bundle: A bundle in FP16, BF16, INT8 or FP8, or one that failed parity.
        console: Where progress and tables go.
        images: Folder of photos; default: those of the bundle's recipe, else generated ones.
        backend: What runs the graphs; default: ONNX Runtime's CPU provider, 16-bit tensors rounded one by one.
        out: The plot, SVG; default: ``<bundle>-bisect.svg`` in the current folder.

    Raises:
        BundleError: the folder is no bundle, was changed, or is in FP32.
        PrecisionError: the nodes of its files cannot be told apart by their names.
        BackendUnavailableError: the backend cannot run these graphs here.
    """
    begin = time.perf_counter()
    run, recipe = _opened(bundle, images)
    with tempfile.TemporaryDirectory() as scratch:
        with console.step("files") as step:
            laboratory = _laboratory(run, recipe, bundle, Path(scratch), backend)
            step.note(f"{len(laboratory.whole)} of {len(laboratory.splice.nodes)} nodes differ")
            step.note(laboratory.images.source)
        search = _Search(laboratory=laboratory, precision=recipe.precision, console=console)
        with console.step("stages") as step:
            stages = _stages(run, bundle, laboratory)
            step.note(_told(search.whole))
        with console.step("boundaries") as step:
            boundaries = search.boundaries()
            jump = next((b.module for b in boundaries if b.jump), "")
            step.note(f"jumps at {jump}" if jump else "no jump")
        with console.step("modules") as step:
            modules = search.modules(jump)
            step.note(f"{len(modules)} switched, {laboratory.runs} graphs run")
    laboratory.warn_of_skipped(console)
    worst = _worst(modules)
    plot = out or Path(f"{bundle.resolve().name}-bisect.svg")
    record = BisectRecord(
        bundle=run.name, precision=recipe.precision.value, backend=laboratory.how.backend,
        images=laboratory.images.source, whole=search.whole, stages=stages, boundaries=boundaries, modules=modules,
        jump=jump, worst=worst.module if worst else "", verdict=_verdict(search.whole, worst, jump, recipe.precision),
        plot=str(plot), runs=laboratory.runs, seconds=time.perf_counter() - begin,
    )  # fmt: skip
    with storage_errors(f"cannot write {plot}"):
        draw_bisection(record, plot)
    show(record, console)
    return record


def _opened(bundle: Path, images: Path | None) -> tuple[RunRecord, Recipe]:
    run = read_manifest(bundle)
    options = {"parity.images": ("--images", images)}
    recipe = resolve([layer_of_data(f"manifest of {run.name}", run.recipe), layer_of_options(options)])
    both_of(run)
    if recipe.precision is Precision.FP32:
        raise BundleError(
            f"{bundle} is in FP32: there is no lower precision whose error could be looked for",
            hint="effdeploy export ... --verify-each finds the graph pass that changes outputs",
        )
    if recipe.parity.images is not None and images is None and not recipe.parity.images.is_dir():
        recipe = recipe.model_copy(update={"parity": recipe.parity.model_copy(update={"images": None})})
    return run, recipe


def _laboratory(run: RunRecord, recipe: Recipe, bundle: Path, scratch: Path, backend: str | None) -> Laboratory:
    system = specialised(find_system(recipe.system), recipe)
    without = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"calib": None})})
    found = Laboratory.of(
        run, bundle, scratch, images=judged_images(system, without), task=system.task,
        how=lambda target: _how(recipe, target, backend),
    )  # fmt: skip
    if not found.whole:
        raise BundleError(
            f"the files {found.high.name} and {found.low.name} of {bundle} do not differ", hint="export again"
        )
    return found


def _how(recipe: Recipe, target: Target, backend: str | None) -> How:
    options = build_options(recipe)
    judged = how_to_judge(recipe.precision, target, options)
    if backend is None or backend == judged.backend:
        return judged
    from deploy.backends import load_backend

    if load_backend(backend).target is not target:
        raise RecipeError(
            f"--backend {backend}: the bundle's graph was lowered for {target.value}", hint="leave --backend out"
        )
    if target is Target.ONNXRUNTIME and not recipe.precision.quantised:
        raise RecipeError(
            f"--backend {backend} computes a whole network in one precision, and cannot switch modules in "
            f"{recipe.precision.value.upper()}",
            hint="leave --backend out: ONNX Runtime rounds each 16-bit tensor",
        )
    return How(backend=backend, options=dataclasses.replace(options, mixed=True), rounded=False)


@dataclass(kw_only=True)
class _Search:
    """What was found in one bundle so far."""

    laboratory: Laboratory
    precision: Precision
    console: Console
    found: list[ModuleError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.whole = self.laboratory.of_nodes(self.laboratory.whole)
        changed = self.laboratory.whole
        self.order = [name for name in self.laboratory.splice.nodes if name in changed]

    def boundaries(self) -> tuple[BoundaryError, ...]:
        """Compare activations of both graphs where they leave a module, in the order of the network."""
        laboratory = self.laboratory
        return boundary_errors(laboratory.splice, self.precision, laboratory.open, laboratory.feeds)

    def modules(self, jump: str) -> tuple[ModuleError, ...]:
        """Switch coarse modules, then look into the worst of them, and into what holds the jump."""
        waiting = self._switch(children(self.order))
        while inside := self._chosen(waiting, jump):
            for module in inside:
                waiting.remove(module)
                names = [name for name in self.order if name in module.nodes]
                waiting += self._switch(children(names, module.path))
        return tuple(self.found)

    def _chosen(self, waiting: Sequence[Module], jump: str) -> list[Module]:
        """Of the modules that have others inside, take the worst, and what the jump lies in."""
        errors = {error.module: error.alone.error for error in self.found}
        worst = sorted(waiting, key=lambda m: -errors[m.name])[:WORST]
        return [m for m in waiting if splits(m) and (m in worst or f"{jump}.".startswith(f"{m.path}."))]

    def _switch(self, modules: Sequence[Module]) -> list[Module]:
        with self.console.progress(2 * len(modules), "modules switched alone") as advance:
            for module in modules:
                nodes = self.laboratory.together(module.nodes)
                alone = self.laboratory.of_nodes(nodes)
                advance(1)
                without = self.laboratory.of_nodes(self.laboratory.whole - nodes)
                advance(1)
                self.found.append(
                    ModuleError(
                        module=module.name, depth=module.depth, nodes=len(module.nodes), alone=alone, without=without
                    )
                )
        return list(modules)


def _stages(run: RunRecord, bundle: Path, laboratory: Laboratory) -> tuple[StageError, ...]:
    """Compare each file with the traced one."""
    files = {stage: open_artifact(artifact, bundle) for stage, artifact in stage_files(run).items()}
    traced = files.get("traced", laboratory.high)
    against = dataclasses.replace(laboratory, high=traced, low=laboratory.low, runs=0)
    found = [StageError(stage=stage, apart=against.of_file(path)) for stage, path in files.items() if path != traced]
    laboratory.runs += against.runs
    return tuple(found)


def _worst(modules: Sequence[ModuleError]) -> ModuleError | None:
    """Return the smallest module with the largest error: the last one on the way from the worst to the inside."""
    chosen: ModuleError | None = None
    for depth in sorted({m.depth for m in modules}):
        below = [m for m in modules if m.depth == depth and (chosen is None or _inside(m.module, chosen.module))]
        chosen = max(below, key=lambda m: m.alone.error, default=chosen)
    return chosen


def _inside(module: str, other: str) -> bool:
    return module.startswith((f"{other}.", f"{other} "))


def _verdict(whole: Apart, worst: ModuleError | None, jump: str, precision: Precision) -> str:
    named = precision.value.upper()
    if worst is None:
        return f"{named} is {_told(whole)} away from FP32; no module can be switched"
    left = "" if math.isinf(whole.error) else f" of {units.number(whole.error)}"
    alone = f"{worst.module} alone makes an error of {units.number(worst.alone.error)}{left}"
    rest = f"with it high {units.number(worst.without.error)} is left"
    first = (
        f"the first module whose error jumps is {jump}" if jump else "no module's error jumps: it grows step by step"
    )
    return f"{alone}, {rest}; {first}"


def _told(apart: Apart) -> str:
    return f"error {units.number(apart.error)}, cosine {units.cosine(apart.cosine)}"


def show(record: BisectRecord, console: Console) -> None:
    """Write the tables and the verdict, and give the record to programs."""
    console.table("stages", _STAGES, [(s.stage, *_cells(s.apart), _share(s.apart.top1)) for s in record.stages])
    rows = [b for b in record.boundaries if b.after > 0]
    steep = sorted(rows, key=lambda b: -(b.after / max(b.before, 1e-12)))[:_SHOWN]
    chosen = [b for b in rows if b.jump or b in steep]
    console.table(
        "activations",
        _BOUNDARIES,
        [(b.module, units.number(b.before), units.number(b.after), "jump" if b.jump else "") for b in chosen[:_SHOWN]],
    )
    worst = sorted(record.modules, key=lambda m: -m.alone.error)
    console.table(
        "modules",
        _MODULES,
        [(m.module, str(m.nodes), *_cells(m.alone), *_cells(m.without)) for m in worst[: 2 * _SHOWN]],
    )
    console.line(record.verdict)
    console.line(f"wrote {record.plot}")
    console.result(record)


def _cells(apart: Apart) -> tuple[str, str]:
    return units.number(apart.error), units.cosine(apart.cosine)


def _share(value: float | None) -> str:
    return "-" if value is None else units.percent(value)
