"""``effdeploy export --backend auto``: the fastest backend of this CPU that meets the tolerances, by measurement.

Each backend that is installed takes its recipe to an engine and through parity, as an export that names it does; those
within the tolerances are timed in turns. The export that follows, on the fastest, takes from the store what was made
here, so that little is done twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy import units
from deploy.artifacts import failed_name, read_manifest
from deploy.backends import AUTO, load_backend
from deploy.bench import BenchCandidate, measure
from deploy.candidates import ENGINE, build_options
from deploy.console import Console, Inside
from deploy.errors import (
    BackendUnavailableError,
    EffdeployError,
    EngineBuildError,
    LintError,
    ParityError,
    PrecisionAuditError,
    RecipeError,
)
from deploy.models import find_system
from deploy.parity.metrics import NOT_JUDGED, usage
from deploy.pipeline import run
from deploy.recipe import Recipe
from deploy.records import (
    BackendChoice,
    BackendTried,
    BenchRecord,
    EngineRecord,
    ParityRecord,
    RunRecord,
    Stage,
    Target,
)
from deploy.resolve import bench_options, parity_inputs, sample_feeds

CONTENDERS: Mapping[str, str] = {"onnxruntime": "onnxruntime", "openvino": "'effdeploy[openvino]'"}
"""The backends that run on a CPU, and what ``pip install`` takes for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A contender: its recipe, what came of it, and its engine where that is within the tolerances.

    ``error`` is what kept it from being compared.
    """

    recipe: Recipe
    tried: BackendTried
    folder: Path
    engine: EngineRecord | None = None
    error: EffdeployError | None = None

    @property
    def name(self) -> str:
        return self.recipe.engine.backend


def contenders(
    asked: Callable[..., Recipe], recipe: Recipe, until: Stage, budget: str | None = None
) -> dict[str, Recipe]:
    """Resolve what is asked for each backend of the CPU: each has its own form of the graph.

    Args:
        asked: Gives the recipe for ``backend`` and ``device``.
        recipe: What it gives for ``auto``.
        until: Last stage of the run.
        budget: Of ``--budget``.

    Raises:
        RecipeError: a GPU or its graph is asked for, a run that builds no engine, or a search that has one backend.
    """
    if recipe.target is Target.TENSORRT:
        raise RecipeError(
            f"--backend {AUTO} compares the backends of the CPU ({', '.join(CONTENDERS)}); got --target tensorrt",
            hint="leave --target out, or name the backend",
        )
    if recipe.engine.device == "cuda":
        raise RecipeError(
            f"--backend {AUTO} compares the backends of the CPU ({', '.join(CONTENDERS)}); got --device cuda",
            hint="--backend onnxruntime --device cuda, or --backend tensorrt",
        )
    if until.order < Stage.ENGINE.order:
        raise RecipeError(
            f"--backend {AUTO} measures engines, and --until {until.value} builds none",
            hint=f"--backend {next(iter(CONTENDERS))}, or a later stage",
        )
    if budget is not None:
        raise RecipeError(
            f"--budget searches on one backend; got --backend {AUTO}",
            hint=f"--backend {' or '.join(CONTENDERS)}; an export with --backend {AUTO} says which is faster here",
        )
    return {name: asked(backend=name, device="cpu") for name in CONTENDERS}


def first_of(recipes: Mapping[str, Recipe], console: Console) -> Recipe:
    """Return the first contender that takes its recipe here, for a plan, and say that others would be measured.

    Raises:
        BackendUnavailableError: none does.
    """
    reasons = {name: _refusal(recipe) for name, recipe in recipes.items()}
    installed = [name for name, reason in reasons.items() if not reason]
    if not installed:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendUnavailableError(f"no backend of the CPU takes this: {told}", hint="effdeploy doctor; --fp32")
    console.warn(
        f"--backend {AUTO} would take {' and '.join(installed)} as far as parity, and time those within the tolerance; "
        f"the plan is that of {installed[0]}"
    )
    return recipes[installed[0]]


def _refusal(recipe: Recipe) -> str:
    """Say why a backend cannot take a recipe on this machine, as far as that shows before any work."""
    name = recipe.engine.backend
    if missing := _missing(name):
        return missing
    try:
        load_backend(name).check(build_options(recipe))
    except BackendUnavailableError as error:
        return error.message
    return ""


def _missing(name: str) -> str:
    return f"not installed: pip install {CONTENDERS[name]}" if load_backend(name).available() else ""


def rest_of(start: Stage | None, reuse: bool) -> Stage | None:
    """Return from where the export itself makes stages again: what is before the latency was just made here."""
    if reuse and start is None:
        return None
    return max(start or Stage.MODEL, Stage.LATENCY, key=lambda stage: stage.order)


def choose_backend(
    recipes: Mapping[str, Recipe], console: Console, *, start: Stage | None = None, reuse: bool = True
) -> BackendChoice:
    """Take each contender through parity, and time those within the tolerances.

    Args:
        recipes: As ``contenders`` gives them.
        console: Where progress goes.
        start, reuse: As for ``deploy.pipeline.run``.

    Raises:
        ParityError: none is within the tolerances; the message says which came nearest.
        BackendUnavailableError: none can run this on the CPU at hand.
        EffdeployError: what any export of the recipe would raise.
    """
    with tempfile.TemporaryDirectory() as scratch:
        entries = [_entered(recipe, Path(scratch) / name, console, start, reuse) for name, recipe in recipes.items()]
        if not any(entry.engine for entry in entries):
            raise _nothing(entries)
        with console.step("choice") as step:
            choice = _choice(entries)
            step.note(choice.backend)
    console.line(choice.reason)
    return choice


def _entered(recipe: Recipe, folder: Path, console: Console, start: Stage | None, reuse: bool) -> _Entry:
    """Take one backend as far as parity; what it cannot do is its result, not an error."""
    name = recipe.engine.backend
    version, record, failed = "", None, None
    with console.step(name) as step:
        reason = _missing(name)
        if not reason:
            try:
                record = _run(recipe, folder, console, start, reuse)
                reason = "" if record.ok else record.verdict
                version = next((engine.backend_version for engine in record.engines), "")
            except (BackendUnavailableError, EngineBuildError, LintError, PrecisionAuditError) as error:
                reason, failed = error.message, error
        used, limit = _nearest(record.parity) if record and record.parity else (None, "")
        tried = BackendTried(backend=name, version=version, ok=not reason, reason=reason, used=used, limit=limit)
        step.note(reason or f"within the tolerance: {limit}")
    engine = record.engines[0] if record and not reason else None
    return _Entry(recipe=recipe, tried=tried, folder=folder, engine=engine, error=failed)


def _run(recipe: Recipe, folder: Path, console: Console, start: Stage | None, reuse: bool) -> RunRecord:
    """Run until parity; a verdict out of tolerance is a record as well."""
    try:
        return run(recipe, folder, until=Stage.PARITY, start=start, reuse=reuse, console=Inside(console))
    except ParityError:
        if not failed_name(folder).is_dir():  # nothing was compared: PyTorch itself gave NaN
            raise
        return read_manifest(failed_name(folder))


def _nearest(parity: ParityRecord) -> tuple[float | None, str]:
    """Return how much of its tightest limit the engine uses up (1 is the limit itself), and which.

    ``None`` where no limit is on single outputs: a detector in a reduced precision is judged by its detections.
    """
    shares = [usage(c, parity.tolerances[c.precision]) for c in parity.comparisons if c.stage.startswith(ENGINE)]
    used, limit = max(shares, key=lambda share: share[0], default=(0.0, NOT_JUDGED))
    return (None, parity.verdict) if limit == NOT_JUDGED else (used, limit)


def _choice(entries: Sequence[_Entry]) -> BackendChoice:
    """Take the only one within the tolerances, or the fastest of them, and say why."""
    within = [entry for entry in entries if entry.engine]
    told = [f"{entry.name}: {entry.tried.reason}" for entry in entries if not entry.engine]
    tried = [entry.tried for entry in entries]
    if len(within) == 1:
        reason = f"{within[0].name} is the only backend of this CPU that is within the tolerance"
        return BackendChoice(backend=within[0].name, reason="; ".join([reason, *told]), tried=tuple(tried))
    timed = _timed(within)
    backend, reason = _fastest(timed)
    latencies = {latency.name: latency for latency in timed.latencies}
    for place, one in enumerate(tried):
        if latency := latencies.get(one.backend):
            tried[place] = dataclasses.replace(one, milliseconds=latency.p50, interval=latency.interval)
    return BackendChoice(backend=backend, reason="; ".join([reason, *told]), tried=tuple(tried))


def _timed(within: Sequence[_Entry]) -> BenchRecord:
    """Time engines in turns on the same images, the first against the others."""
    recipe = within[0].recipe
    feeds = sample_feeds(parity_inputs(find_system(recipe.system), recipe), recipe.batch.opt)
    with contextlib.ExitStack() as stack:
        candidates = []
        for entry, engine in ((entry, entry.engine) for entry in within if entry.engine):
            options = build_options(entry.recipe)
            runner = stack.enter_context(load_backend(entry.name).open(engine, entry.folder, options))
            candidates.append(
                BenchCandidate(
                    name=entry.name, call=partial(runner.infer, feeds), batch=recipe.batch.opt,
                    threads=options.threads, device=runner.device, sha256=engine.artifact.sha256,
                )
            )  # fmt: skip
        return measure(candidates, bench_options(recipe))


def _fastest(timed: BenchRecord) -> tuple[str, str]:
    """Choose by the ratios of the rounds, which hold on a shared machine; return the backend and the reason.

    Within the noise the first one is taken, so that the same export comes to the same backend.
    """
    latencies = {latency.name: latency for latency in timed.latencies}
    times = {timed.latencies[0].name: 1.0} | {ratio.baseline: ratio.median for ratio in timed.ratios}
    fastest = min(times, key=times.__getitem__)
    first = next(iter(times))
    close = any(ratio.p10 <= 1 <= ratio.p90 for ratio in timed.ratios if fastest in (ratio.name, ratio.baseline))
    best = first if close else fastest
    others = ", ".join(
        f"{name} takes {units.milliseconds(latencies[name].p50)} ({time / times[best]:.2f} times as long)"
        for name, time in times.items()
        if name != best
    )
    at = f"batch {latencies[best].batch}, {latencies[best].threads} thread(s)"
    verdict = "no slower than any, within the noise," if close else "the fastest"
    return best, (
        f"{best} is {verdict} of {len(times)} backends within the tolerance: "
        f"{units.milliseconds(latencies[best].p50)} at {at}, {others}"
    )


def _nothing(entries: Sequence[_Entry]) -> EffdeployError:
    """Say which backend came nearest to the tolerance, or why none can run: the error itself where one was tried."""
    compared = [entry for entry in entries if entry.tried.limit]
    causes = [entry.error for entry in entries if entry.error]
    if len(causes) == 1 and not compared:
        return causes[0]
    told = "; ".join(f"{entry.name}: {entry.tried.reason}" for entry in entries)
    precision = entries[0].recipe.precision.value.upper()
    if not compared:
        return BackendUnavailableError(
            f"no backend of this CPU runs {precision}: {told}", hint="effdeploy doctor says what this CPU can"
        )
    nearest = min(compared, key=lambda entry: entry.tried.used or 0.0)
    return ParityError(
        f"no backend of this CPU is within the tolerance of {precision}; {nearest.name} comes nearest, with "
        f"{nearest.tried.limit} ({told})",
        hint=f"--backend {nearest.name} leaves the evidence in a folder, and effdeploy bisect names the module",
    )
