"""``effdeploy tune``: which schedule a machine should run, measured: latency by layer, drift, and the front of both."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from deploy import units
from deploy.answers import LayerLatency, TunedSchedule, TuneRecord
from deploy.artifacts import storage_errors
from deploy.backends import load_backend
from deploy.backends.base import Feeds
from deploy.bench import BenchOptions, measure
from deploy.candidates import bench_candidates
from deploy.console import Console, Mode
from deploy.errors import RecipeError, TuningError, UnknownNameError
from deploy.models.base import Loaded, resolve_options, run_module
from deploy.models.tuning import Tuning
from deploy.parity.metrics import TASKS, pool
from deploy.recipe import Recipe
from deploy.records import BenchRecord, EngineRecord, Stage
from deploy.resolve import bench_options
from deploy.schedules import DriftModel, LayerModel, Proposal, Schedule, fit_layers, search, steps
from deploy.stages import Work
from deploy.tuning_plot import draw_front

IMAGES = 8  # whose drift is measured
TURNS = 2  # what the first proposals showed corrects the models for the second
SPEEDUPS = (0.8, 1.0, 1.1)  # of the asked one: the predicted schedules that are built and timed
COLUMNS = ("schedule", "taken by layer", "left", "p50", "speed-up", "drift", "same best class", "front")


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What is asked: at least ``speedup`` over no schedule, at most ``drift``; one of them at least.

    Raises:
        RecipeError: neither, or a number that cannot be.
    """

    speedup: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if self.speedup is None and self.drift is None:
            raise RecipeError(
                "got neither --target-speedup nor --max-drift, expected one of them", hint="--target-speedup 1.5"
            )
        if self.speedup is not None and not 1 < self.speedup < 1000:
            raise RecipeError(
                f"--target-speedup: got {self.speedup:g}, expected more than 1", hint="--target-speedup 1.5"
            )
        if self.drift is not None and not 0 < self.drift < float("inf"):
            raise RecipeError(f"--max-drift: got {self.drift:g}, expected more than 0", hint="--max-drift 0.05")

    def met(self, speedup: float, drift: float) -> bool:
        """Whether a measured schedule does what is asked."""
        return (self.speedup is None or speedup >= self.speedup) and (self.drift is None or drift <= self.drift)

    def best(self, found: Sequence[TunedSchedule]) -> TunedSchedule | None:
        """Choose: the least drift at the asked speed; with no speed asked, the fastest within the drift."""
        fit = [s for s in found if s.p10 > 1 and self.met(s.speedup, s.drift)]
        if not fit:
            return None
        return min(fit, key=lambda s: s.drift) if self.speedup is not None else max(fit, key=lambda s: s.speedup)

    def __str__(self) -> str:
        asked = [f"a speed-up of {self.speedup:g}x"] if self.speedup is not None else []
        return " with ".join(asked + ([f"a drift of at most {self.drift:g}"] if self.drift is not None else []))


def tune_recipe(recipe: Recipe, goal: Goal, out: Path, console: Console) -> TuneRecord:
    """Search schedules for this machine, build and time the few best, and write the chosen one as a recipe.

    Args:
        recipe: System, weights, size, batch, backend; the drift is over its photos, or drawn images without any.
        goal: What is asked.
        out: The recipe file; the plot lies beside it as SVG.
        console: Where progress goes.

    Raises:
        UnknownNameError: the system has nothing to tune.
        TuningError: no schedule does what is asked; the table and the plot say what was found.
    """
    begin = time.perf_counter()
    backend = load_backend(recipe.engine.backend)
    # Where pixels are normalised changes no schedule, and takes the same time in each.
    floats = recipe.model_copy(update={"preprocess": recipe.preprocess.model_copy(update={"embed": False})})
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(
            recipe=floats, backend=backend, target=recipe.target or backend.target, folder=Path(scratch),
            until=Stage.LATENCY, console=console,
        )  # fmt: skip
        if work.system.tuning is None:
            raise UnknownNameError(
                f"{recipe.system} has no schedule to tune", hint="its report compares what was measured"
            )
        with console.step("model") as step:
            tuner = _Tuner(work=work, tuning=work.system.tuning, goal=goal, console=console)
            step.note(work.loaded.record.weights.statement)
        found = tuner.tune()
    return _finish(recipe, tuner, found, out, console, begin)


@dataclass(kw_only=True)
class _Tuner:
    """One search: what was measured so far."""

    work: Work
    tuning: Tuning
    goal: Goal
    console: Console
    layers: list[LayerLatency] = field(default_factory=list)
    found: list[TunedSchedule] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    plain_engine: tuple[Recipe, Path, tuple[EngineRecord, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.options = resolve_options(self.work.system, self.work.recipe)
        self.start, self.depth = self.tuning.start(self.options, self.work.recipe.size)
        seeds = self.tuning.seeds(self.options, self.work.recipe.size)
        self.seeds = {name: s for name, s in seeds.items() if name == next(n for n in seeds if seeds[n] == s)}
        self.images = self.work.sample(IMAGES)
        self.plain = self._outputs(next(iter(self.seeds.values())))

    def tune(self) -> list[TunedSchedule]:
        """Measure the seeds, propose, and measure the proposals."""
        with self.console.step("seeds") as step:
            for name, schedule in self.seeds.items():
                self._measure(name, schedule)
            step.note(f"{len(self.found)} schedules timed, {len(self.layers)} layers")
        with self.console.step("drift by layer") as step:
            drift = self._drift_model()
            step.note(f"{sum(len(p) for p in drift.points)} of one layer each, {self.image_count} images")
        for turn in range(TURNS):
            with self.console.step(f"search {turn + 1}") as step:
                cost = fit_layers(self.layers, float(np.median(self.outside)))
                proposals = search(self.start, self.depth, partial(self.tuning.most, self.options), cost, drift)
                chosen = self._choose(proposals, cost)
                step.note(f"{len(proposals)} on the predicted front, {len(chosen)} to be timed")
            with self.console.step(f"proposals {turn + 1}") as step:
                for proposal in chosen:
                    self._measure(f"proposal {len(self.found) - len(self.seeds) + 1}", proposal.schedule)
                    measured = units.milliseconds(self.found[-1].milliseconds)
                    step.note(f"predicted {units.milliseconds(proposal.milliseconds)}, measured {measured}")
        return _with_front(self.found, self.goal)

    @property
    def image_count(self) -> int:
        """Images whose drift is measured."""
        return len(next(iter(self.images.values())))

    def drift_of(self, schedule: Schedule) -> tuple[float, float | None]:
        """Return the relative L2 distance of the outputs from those of no schedule, and the share of best classes."""
        rows = TASKS[self.work.system.task](self.plain, self._outputs(schedule))
        pooled = [pool(rows[name]) for name in rows]
        return max(p.relative_l2 for p in pooled), pooled[0].top1

    def _outputs(self, schedule: Schedule) -> Feeds:
        loaded = self.work.loaded
        outputs = run_module(self.tuning.reschedule(loaded.reference, schedule), self.images, loaded.outputs)
        return {name: outputs[name] for name in loaded.system.outputs}

    def _drift_model(self) -> DriftModel:
        """Measure each layer alone at two counts; the others take nothing."""
        most = self.tuning.most(self.options, self.start)
        points = []
        for index in range(self.depth):
            alone = {}
            for count in sorted({max(1, round(most * share)) for share in (0.15, 0.4)}):
                schedule = tuple(count if i == index else 0 for i in range(self.depth))
                alone[count] = self.drift_of(schedule)[0]
            points.append(alone)
        return DriftModel(points=tuple(points))

    def _choose(self, proposals: Sequence[Proposal], cost: LayerModel) -> list[Proposal]:
        """Take proposals at the asked speed and around it, and the fastest within the asked drift; none twice."""
        plain = cost.total(self.start, (0,) * self.depth)
        chosen: list[Proposal] = []
        for share in SPEEDUPS if self.goal.speedup else ():
            limit = plain / max(1.05, (self.goal.speedup or 1) * share)
            fit = [p for p in proposals if p.milliseconds <= limit]
            chosen += [min(fit, key=lambda p: p.drift)] if fit else []
        if self.goal.drift is not None:
            for share in (1.0, 0.7):
                fit = [p for p in proposals if p.drift <= share * self.goal.drift]
                chosen += [min(fit, key=lambda p: p.milliseconds)] if fit else []
        chosen = chosen or list(proposals[:1])
        known = {s.schedule for s in self.found}
        return [p for p in {p.schedule: p for p in chosen}.values() if p.schedule not in known]

    def _measure(self, name: str, schedule: Schedule) -> None:
        """Build a schedule, time it in turns with none, and read its layers from the profile."""
        with self._engine(schedule) as (record, profile):
            latency = record.latencies[0]
        self._note_layers(name, schedule, profile, latency.p50)
        drift, top1 = self.drift_of(schedule)
        ratio = record.ratios[0] if record.ratios else None
        self.found.append(
            TunedSchedule(
                name=name,
                schedule=schedule,
                left=self.start - sum(schedule),
                milliseconds=latency.p50,
                speedup=ratio.median if ratio else 1.0,
                p10=ratio.p10 if ratio else 1.0,
                p90=ratio.p90 if ratio else 1.0,
                drift=drift,
                top1=top1,
                front=False,
                chosen=False,
            )
        )

    @contextlib.contextmanager
    def _engine(self, schedule: Schedule) -> Iterator[tuple[BenchRecord, Mapping[str, float]]]:
        """Build a schedule's engine and time it; against the first schedule's, which stays built."""
        folder = self.work.folder / ("none" if not any(schedule) else "some")
        folder.mkdir(exist_ok=True)
        recipe = scheduled(self.work.recipe, self.tuning, schedule)
        work = dataclasses.replace(self.work, recipe=recipe, folder=folder, console=Console(Mode.SILENT))
        work.__dict__["loaded"] = self._loaded(schedule)
        typed = work.type(work.patch(work.trace()))
        engines = work.build(typed)
        feeds = self.work.sample(recipe.batch.opt)
        with contextlib.ExitStack() as stack:
            mine, profile = stack.enter_context(bench_candidates(recipe, folder, engines, feeds))
            timed = [dataclasses.replace(mine[0], name="schedule")]
            if any(schedule):
                plain, where, built = self.plain_engine
                others, _ = stack.enter_context(bench_candidates(plain, where, built, feeds))
                timed.append(dataclasses.replace(others[0], name="none"))
            else:
                self.plain_engine = (recipe, folder, engines)
            yield measure(timed, self._bench_options()), profile

    def _bench_options(self) -> BenchOptions:
        return bench_options(self.work.recipe)

    def _loaded(self, schedule: Schedule) -> Loaded:
        """Return the loaded model with another schedule; the weights are shared."""
        loaded = self.work.loaded
        reference = self.tuning.reschedule(loaded.reference, schedule)
        deploy = loaded.system.to_deploy(reference, loaded.target).eval()
        return dataclasses.replace(loaded, reference=reference, deploy=deploy)

    def _note_layers(self, name: str, schedule: Schedule, profile: Mapping[str, float], p50: float) -> None:
        """Read what each layer took from a profile, scaled to the latency without the profiler."""
        total = sum(profile.values())
        if not total:
            return
        pattern, spent = re.compile(self.tuning.layer), np.zeros(self.depth)
        for node, microseconds in profile.items():
            if match := pattern.match(node):
                spent[int(match[1])] += microseconds
        scaled = spent / total * p50
        self.outside.append(p50 - float(scaled.sum()))
        self.layers += [
            LayerLatency(schedule=name, layer=index, before=before, taken=taken, milliseconds=float(scaled[index]))
            for index, (before, taken) in enumerate(steps(self.start, schedule))
        ]


def scheduled(recipe: Recipe, tuning: Tuning, schedule: Schedule) -> Recipe:
    """Return the recipe with a schedule in its options."""
    return recipe.model_copy(update={"options": {**recipe.options, tuning.option: list(schedule)}})


def _with_front(found: Sequence[TunedSchedule], goal: Goal) -> list[TunedSchedule]:
    """Mark the schedules that no other beats in both speed and drift, and the chosen one."""
    chosen = goal.best(found)
    return [
        dataclasses.replace(
            s,
            front=not any(
                (o.speedup >= s.speedup and o.drift <= s.drift) and (o.speedup > s.speedup or o.drift < s.drift)
                for o in found
            ),
            chosen=s is chosen,
        )
        for s in found
    ]


def _finish(
    recipe: Recipe, tuner: _Tuner, found: Sequence[TunedSchedule], out: Path, console: Console, begin: float
) -> TuneRecord:
    """Write recipe and plot, and say what was found."""
    gain = any(s.p10 > 1 for s in found)
    chosen = next((s for s in found if s.chosen), None)
    verdict = _verdict(tuner, found, chosen, gain)
    plot = out.with_suffix(".svg")
    record = TuneRecord(
        system=recipe.system, variant=recipe.variant, what=tuner.tuning.what, batch=recipe.batch.opt,
        images=tuner.image_count, weights=tuner.work.loaded.record.weights.statement,
        target_speedup=tuner.goal.speedup, max_drift=tuner.goal.drift, schedules=tuple(found),
        layers=tuple(tuner.layers), gain=gain, verdict=verdict, recipe=str(out) if chosen else "", plot=str(plot),
        seconds=time.perf_counter() - begin,
    )  # fmt: skip
    with storage_errors(f"cannot write {out}"):
        draw_front(record, plot)
        if chosen:
            head = f"# effdeploy tune: {verdict}\n# {record.weights}\n"
            out.write_text(head + scheduled(recipe, tuner.tuning, chosen.schedule).to_yaml(), encoding="utf-8")
    console.table("layers", ("elements in", "layers", "p50 of a layer"), list(_layer_rows(record.layers)))
    console.table("schedules", COLUMNS, [_row(s) for s in found])
    console.line(verdict)
    for path in (record.recipe, record.plot):
        if path:
            console.line(f"wrote {path}")
    console.result(record)
    if chosen is None:
        fastest = max(found, key=lambda s: s.speedup)
        within = f"--target-speedup {max(1.01, 0.97 * fastest.speedup):.2f}, or " if gain else ""
        raise TuningError(verdict, hint=f"{within}a larger batch or image: --batch {2 * recipe.batch.opt}")
    return record


def _verdict(tuner: _Tuner, found: Sequence[TunedSchedule], chosen: TunedSchedule | None, gain: bool) -> str:
    batch = tuner.work.recipe.batch.opt
    fastest = max((s for s in found if any(s.schedule)), key=lambda s: s.speedup)
    if not gain:
        return (
            f"no gain at batch {batch} on this machine: of {len(found) - 1} schedules the fastest has "
            f"{units.ratio(fastest.speedup, fastest.p10, fastest.p90)} the speed of none"
        )
    if chosen is None:
        return (
            f"no schedule reaches {tuner.goal} at batch {batch}: the fastest that was timed has {fastest.speedup:.2f}x "
            f"with a drift of {units.number(fastest.drift)}"
        )
    return (
        f"{chosen.name} is {chosen.speedup:.2f}x as fast as none at batch {batch} ({chosen.p10:.2f} to "
        f"{chosen.p90:.2f}), with a drift of {units.number(chosen.drift)} over {tuner.image_count} images"
    )


def _layer_rows(layers: Sequence[LayerLatency]) -> Iterator[tuple[str, ...]]:
    """Sum the table of latencies up, most elements first."""
    for before in sorted({row.before for row in layers}, reverse=True):
        times = [row.milliseconds for row in layers if row.before == before]
        yield str(before), str(len(times)), units.milliseconds(float(np.median(times)))


def _row(s: TunedSchedule) -> tuple[str, ...]:
    return (
        s.name, ",".join(map(str, s.schedule)), str(s.left), units.milliseconds(s.milliseconds),
        units.ratio(s.speedup, s.p10, s.p90), units.number(s.drift),
        "-" if s.top1 is None else units.percent(s.top1), "chosen" if s.chosen else "yes" if s.front else "",
    )  # fmt: skip
