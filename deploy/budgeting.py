"""``effdeploy export --budget``: the fewest modules kept in higher precision that meet an accuracy budget.

Each module is measured alone in low precision: what the network then loses is its sensitivity. The most sensitive
stay high, as many as the budget needs, found by bisection; then each of them that is not needed after all goes low
again. The choice depends on errors alone, which repeat, and not on latencies, which do not: the same search gives the
same recipe. What was chosen is then written as an export writes it, measured once more, and timed against FP32 and 16
bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deploy import units
from deploy.answers import Apart, BudgetPoint, BudgetRecord, Sensitivity
from deploy.artifacts import storage_errors
from deploy.backends import load_backend
from deploy.backends.base import Runner
from deploy.bench import BenchCandidate, measure
from deploy.budgets import Budget as Budget
from deploy.budgets import advice, with_front
from deploy.candidates import build_options
from deploy.console import Console, Inside
from deploy.errors import BackendUnavailableError, BudgetError, EngineBuildError, PrecisionAuditError
from deploy.graph.io import save_model
from deploy.models import find_system
from deploy.models.base import specialised
from deploy.pipeline import run
from deploy.precision.modules import TOP, Module, leaves
from deploy.precision.qdq import quantised_products
from deploy.recipe import Recipe
from deploy.records import Precision, RunRecord, Stage
from deploy.resolve import bench_options, judged_images
from deploy.sensitivity import Laboratory, both_of, how_to_judge
from deploy.tuning_plot import draw_budget

COLUMNS = ("choice", "kept high", "error", "cosine", "same best class", "matched", "p50", "speed-up over FP32", "")
BESIDE = {"openvino": Precision.BF16}  # what 8 bits have to beat besides FP32; FP16 on every other backend
_SHOWN = 12
_TIMED = 6  # choices of modules that are built and timed


def recipe_within(recipe: Recipe, budget: Budget, out: Path, console: Console, *, reuse: bool = True) -> Recipe:
    """Search the modules to keep high, write the recipe and the front beside the bundle, and return the recipe.

    Args:
        recipe: In INT8 or FP8; errors are over its photos, else its calibration images, else generated ones.
        budget: What is asked.
        out: The bundle that will be exported: ``<out>-budget.yaml`` and ``<out>-budget.svg`` lie beside it.
        console: Where progress and tables go.
        reuse: False: make the graphs again.

    Raises:
        RecipeError: the precision is none that modules can be kept out of, or the budget is of what is not measured.
        BudgetError: no choice meets the budget; the message says what the best one reaches.
    """
    budget.refuse_precision(recipe.precision)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        with console.step("graphs") as step:
            whole = _written(recipe, Path(scratch) / "whole", console, reuse=reuse)
            laboratory = _laboratory(recipe, whole, Path(scratch))
            step.note(f"{recipe.precision.value}, {laboratory.images.source}")
        search = _Search(recipe=recipe, budget=budget, laboratory=laboratory, console=console, folder=Path(scratch))
        kept = search.search()
        if kept is not None:
            kept = search.prove(kept)
        with console.step("latency") as step:
            points = _points(search, search.choices(kept))
            step.note(f"{sum(p.speedup is not None for p in points)} timed")
        laboratory.warn_of_skipped(console)
        return _finish(search, points, kept, out, begin)


def _written(recipe: Recipe, folder: Path, console: Console, *, reuse: bool) -> RunRecord:
    """Take a recipe to its graphs in another folder, with nothing on the terminal but progress bars."""
    silent = recipe.model_copy(update={"bench": recipe.bench.model_copy(update={"baselines": ()})})
    return run(silent, folder, until=Stage.PRECISION, reuse=reuse, console=Inside(console))


def _laboratory(recipe: Recipe, whole: RunRecord, folder: Path) -> Laboratory:
    system, options = specialised(find_system(recipe.system), recipe), build_options(recipe)
    return Laboratory.of(
        whole, folder / "whole", folder, images=judged_images(system, recipe), task=system.task,
        how=lambda target: how_to_judge(recipe.precision, target, options),
    )  # fmt: skip


@dataclass(kw_only=True)
class _Search:
    """One search: what was measured so far."""

    recipe: Recipe
    budget: Budget
    laboratory: Laboratory
    console: Console
    folder: Path
    order: tuple[Sensitivity, ...] = ()
    tried: dict[frozenset[str], Apart] = field(default_factory=dict)  # modules kept high -> errors
    proof: Path | None = None

    def __post_init__(self) -> None:
        low = self.laboratory.splice.low
        products = quantised_products(low)
        self.modules = {m.path: m for m in leaves([n.name for n in low.graph.node if n.name in products])}
        self.nodes = self._nodes_of_modules()

    def search(self) -> tuple[str, ...] | None:
        """Return the modules to keep high, most sensitive first; ``None`` where no choice meets the budget."""
        with self.console.step("budget") as step:
            whole = self._with(())
            self.budget.refuse_unmeasured(whole)
            if self.budget.met_by(whole):
                step.note(f"met with nothing kept high: {self.budget.told(whole)}")
                return ()
            self.order = self._sensitivities()
            names = [s.module for s in self.order]
            found = self._fewest(names)
            found = None if found is None else self._without_the_unneeded(found)
            kept = "no choice meets it" if found is None else f"{len(found)} of {len(self.modules)} modules kept high"
            step.note(f"{kept}, {self.laboratory.runs} graphs run")
        return found

    def prove(self, kept: tuple[str, ...]) -> tuple[str, ...] | None:
        """Write the choice as an export writes it, and measure that; where it falls short, one more module stays."""
        names = [s.module for s in self.order]
        for _ in range(len(self.modules)):
            record = _written(kept_high(self.recipe, kept), self.folder / "chosen", self.console, reuse=True)
            self.proof = self.folder / "chosen" / both_of(record)[1].artifact.name
            self.tried[frozenset(kept)] = self.laboratory.of_file(self.proof)
            if self.budget.met_by(self.tried[frozenset(kept)]):
                return kept
            following = next((name for name in names if name not in kept), None)
            if following is None or len(kept) + 1 >= len(self.modules):
                return None
            kept = (*kept, following)
        return None

    def best(self) -> Apart:
        """Return the errors of the best choice that was measured."""
        return min(self.tried.values(), key=lambda a: (a.error, -a.cosine))

    def _sensitivities(self) -> tuple[Sensitivity, ...]:
        found = []
        with self.console.progress(len(self.modules), "modules in low precision alone") as advance:
            for path in self.modules:
                found.append(
                    Sensitivity(module=path, apart=self.laboratory.of_nodes(self.laboratory.together(self.nodes[path])))
                )
                advance(1)
        return tuple(sorted(found, key=lambda s: -s.apart.error))  # stable: the network's order decides ties

    def _fewest(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Bisect how many of the most sensitive modules must stay high; one at least goes low, or it is FP32."""
        fails, meets = 0, len(names) - 1
        if meets < 1 or not self.budget.met_by(self._with(names[:meets])):
            return None
        while meets - fails > 1:
            middle = (fails + meets) // 2
            if self.budget.met_by(self._with(names[:middle])):
                meets = middle
            else:
                fails = middle
        return tuple(names[:meets])

    def _without_the_unneeded(self, kept: tuple[str, ...]) -> tuple[str, ...]:
        """Let modules go low again, the least sensitive first, while the budget holds; the last one was just tried."""
        with self.console.progress(len(kept) - 1, "modules tried low again") as advance:
            for name in reversed(kept[:-1]):
                fewer = tuple(other for other in kept if other != name)
                if self.budget.met_by(self._with(fewer)):
                    kept = fewer
                advance(1)
        return kept

    def _with(self, kept: Sequence[str]) -> Apart:
        """Measure the network with these modules high."""
        key = frozenset(kept)
        if key not in self.tried:
            self.tried[key] = self.laboratory.of_nodes(self._low(key))
        return self.tried[key]

    def _low(self, kept: frozenset[str]) -> frozenset[str]:
        high = frozenset(name for path in kept for name in self.nodes[path])
        return self.laboratory.whole - self.laboratory.together(high)

    def _nodes_of_modules(self) -> dict[str, frozenset[str]]:
        """Take with a module's products what is rounded with them: the changed nodes of the same module."""
        changed = leaves([n for n in self.laboratory.splice.nodes if n in self.laboratory.whole])
        inside: dict[str, Module] = {m.path: m for m in changed}
        return {path: inside[path].nodes if path in inside else module.nodes for path, module in self.modules.items()}

    def choices(self, kept: tuple[str, ...] | None) -> dict[str, _Choice]:
        """Return what is shown and timed: FP32, nothing kept, what was chosen, and a few of the others; 16 bits."""
        label, chosen = self.recipe.precision.value, None if kept is None else frozenset(kept)
        fewest: dict[int, frozenset[str]] = {}
        for key, _ in sorted(self.tried.items(), key=lambda item: (len(item[0]), item[1].error, sorted(item[0]))):
            if key == chosen or (len(key) not in fewest and not (chosen and len(key) == len(chosen))):
                fewest[len(key)] = key
        shown = _spread(sorted(fewest), {0, *(() if chosen is None else (len(chosen),))})
        nothing = Apart(images=self.laboratory.images.count, error=0.0, cosine=1.0)
        found = {"fp32": _Choice(path=self.laboratory.high, precision=Precision.FP32, kept=None, apart=nothing)}
        for key in (fewest[count] for count in shown):
            path = self.proof if key == chosen else None
            if path is None:
                path = self.folder / f"{label}-{len(key)}.onnx"
                save_model(self.laboratory.splice.hybrid(self._low(key)), path)
            name = f"{label}, {len(key)} high" if key else label
            found[name] = _Choice(
                path=path, precision=self.recipe.precision, kept=len(key), apart=self.tried[key], chosen=key == chosen
            )
        return found | self._in_16_bits()

    def _in_16_bits(self) -> dict[str, _Choice]:
        found = {}
        precision = BESIDE.get(self.recipe.engine.backend, Precision.FP16)
        recipe = self.recipe.model_copy(update={"precision": precision})
        with contextlib.suppress(BackendUnavailableError):
            load_backend(recipe.engine.backend).check(build_options(recipe))
            record = _written(recipe, self.folder / precision.value, self.console, reuse=True)
            passes, typed = both_of(record)
            path = self.folder / precision.value / typed.artifact.name
            how = how_to_judge(precision, passes.target, build_options(recipe))
            beside = dataclasses.replace(self.laboratory, how=how)
            found[precision.value] = _Choice(path=path, precision=precision, kept=None, apart=beside.of_file(path))
            self.laboratory.runs = beside.runs
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """A file that may be shipped: what it loses, and how many modules it keeps high; ``None``: it is no 8-bit file."""

    path: Path
    precision: Precision
    kept: int | None
    apart: Apart
    chosen: bool = False


def _spread(counts: Sequence[int], always: set[int]) -> list[int]:
    """Take at most ``_TIMED`` of some counts, evenly, and always some of them."""
    others = [c for c in counts if c not in always]
    room = max(0, _TIMED - len(always))
    taken = others if len(others) <= room else [others[i * len(others) // room] for i in range(room)]
    return sorted((always & set(counts)) | set(taken))


def _points(search: _Search, choices: Mapping[str, _Choice]) -> tuple[BudgetPoint, ...]:
    """Time the choices in turns, FP32 first; what cannot run here is shown only where nothing can."""
    ratios = _ratios(search, choices)
    points = [
        BudgetPoint(
            name=name, kept=choice.kept or 0, apart=choice.apart, meets=search.budget.met_by(choice.apart),
            chosen=choice.chosen, **ratios.get(name, {}),
        )
        for name, choice in choices.items()
        if not ratios or name in ratios or choice.chosen
    ]  # fmt: skip
    return with_front(points)


def _ratios(search: _Search, choices: Mapping[str, _Choice]) -> dict[str, dict[str, Any]]:
    """Measure milliseconds and the speed over FP32 of what the backend runs here; nothing where it runs nothing."""
    recipe, feeds = search.recipe, search.laboratory.feeds[0]
    with contextlib.ExitStack() as stack:
        runners = {}
        for name, choice in choices.items():
            with contextlib.suppress(BackendUnavailableError, EngineBuildError, PrecisionAuditError):
                asked = recipe.model_copy(update={"precision": choice.precision})
                runners[name] = stack.enter_context(_opened(choice.path, asked))
        if "fp32" not in runners or all(choices[name].kept is None for name in runners):
            return {}
        candidates = [
            BenchCandidate(
                name=name, call=partial(runner.infer, feeds), batch=len(next(iter(feeds.values()))),
                threads=recipe.bench.threads, device=runner.device,
            )
            for name, runner in runners.items()
        ]  # fmt: skip
        record = measure(candidates, bench_options(recipe))
    found: dict[str, dict[str, Any]] = {c.name: {"milliseconds": c.p50} for c in record.latencies}
    found["fp32"] |= {"speedup": 1.0, "p10": 1.0, "p90": 1.0}
    for ratio in record.ratios:  # how many times faster FP32 is: the inverse is asked
        found[ratio.baseline] |= {"speedup": 1 / ratio.median, "p10": 1 / ratio.p90, "p90": 1 / ratio.p10}
    return found


def _opened(path: Path, recipe: Recipe) -> Runner:
    """Build a file on the recipe's backend and open it.

    Raises:
        BackendUnavailableError: it cannot be built or run here.
        PrecisionAuditError: the engine is not what the file says.
    """
    backend, options = load_backend(recipe.engine.backend), build_options(recipe)
    if reason := backend.available():
        raise BackendUnavailableError(reason)
    engine = backend.build(path, path.parent, options)[0]
    if not engine.runnable:
        raise BackendUnavailableError(engine.reason)
    return backend.open(engine, path.parent, options)


def kept_high(recipe: Recipe, modules: Sequence[str]) -> Recipe:
    """Return the recipe with modules kept out of INT8 and FP8, besides those that it keeps out already."""
    patterns = tuple(f"^{re.escape(path)}/" if path != TOP else "^[^/]*$" for path in modules)
    section = recipe.quantization.model_copy(update={"keep_high": (*recipe.quantization.keep_high, *patterns)})
    return recipe.model_copy(update={"quantization": section})


def _finish(
    search: _Search, points: tuple[BudgetPoint, ...], kept: tuple[str, ...] | None, out: Path, begin: float
) -> Recipe:
    """Write recipe and plot, show the tables, and say what was found."""
    recipe, console = search.recipe, search.console
    path, plot = (out.with_name(f"{out.name}-budget{suffix}") for suffix in (".yaml", ".svg"))
    record = BudgetRecord(
        system=recipe.system, variant=recipe.variant, precision=recipe.precision.value, budget=str(search.budget),
        images=search.laboratory.images.source, modules=len(search.modules), kept=kept or (), order=search.order,
        points=points, advice=advice(points, recipe.precision.value), verdict=_verdict(search, kept),
        recipe="" if kept is None else str(path),
        plot=str(plot), runs=search.laboratory.runs, seconds=time.perf_counter() - begin,
    )  # fmt: skip
    within = kept_high(recipe, kept or ())
    with storage_errors(f"cannot write {path}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_budget(record, plot)
        if kept is not None:
            path.write_text(f"# effdeploy export --budget {search.budget}: {record.verdict}\n" + within.to_yaml())
    show(record, console)
    if kept is None:
        raise BudgetError(
            record.verdict,
            hint=f"--budget {search.budget.reachable(search.best())}, or --fp16, or calibrate on photos: --calib DIR",
        )
    return within


def show(record: BudgetRecord, console: Console) -> None:
    """Write the tables and the verdict, and give the record to programs."""
    if record.order:
        rows = [(s.module, units.number(s.apart.error), units.cosine(s.apart.cosine)) for s in record.order[:_SHOWN]]
        console.table("sensitivity", ("module", "error when it alone is low", "cosine"), rows)
    console.table("choices", COLUMNS, [_row(p) for p in record.points])
    console.line(record.verdict)
    if record.advice:
        console.warn(record.advice)
    for path in (record.recipe, record.plot):
        if path:
            console.line(f"wrote {path}")
    console.result(record)


def _row(p: BudgetPoint) -> tuple[str, ...]:
    timed = p.speedup is not None and p.p10 is not None and p.p90 is not None
    return (
        p.name, str(p.kept) if p.name.startswith(("int8", "fp8")) else "-", units.number(p.apart.error),
        units.cosine(p.apart.cosine), "-" if p.apart.top1 is None else units.percent(p.apart.top1),
        "-" if p.apart.matched is None else units.percent(p.apart.matched), units.milliseconds(p.milliseconds),
        units.ratio(p.speedup or 0, p.p10 or 0, p.p90 or 0) if timed else "not timed here",
        "chosen" if p.chosen else "front" if p.front else "",
    )  # fmt: skip


def _verdict(search: _Search, kept: tuple[str, ...] | None) -> str:
    count, named = len(search.modules), search.recipe.precision.value.upper()
    if kept is None:
        return (
            f"no choice of modules in {named} meets {search.budget}: the best reachable is "
            f"{search.budget.told(search.best())}, of {len(search.tried)} choices among {count} modules"
        )
    measured = search.tried[frozenset(kept)]
    what = f"{len(kept)} of {count} modules" if kept else "nothing"
    return f"{named} with {what} kept high meets {search.budget}: {search.budget.told(measured)}"
