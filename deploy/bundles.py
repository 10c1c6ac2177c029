"""What can be done with finished bundles besides reading them: verify and bench."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy import summary, units
from deploy.artifacts import artifacts_of, open_artifact, read_manifest
from deploy.backends import load_backend
from deploy.bench import BenchCandidate, measure
from deploy.candidates import (
    Plain,
    batch_candidates,
    bench_candidates,
    parity_candidates,
    plain_of,
    prove_decisions,
    prove_rounding,
    prove_selection,
)
from deploy.console import Console
from deploy.errors import BackendUnavailableError, BenchmarkError, BundleError, CheckpointError, ParityError
from deploy.models import find_system
from deploy.models.base import Loaded, load_model
from deploy.parity.batch import check_batches, with_batches
from deploy.parity.compare import check_parity
from deploy.parity.decisions import with_decisions
from deploy.parity.selection import with_selection
from deploy.recipe import Recipe, layer_of_data, layer_of_options, resolve
from deploy.records import Artifact, BenchRecord, EngineRecord, RunRecord
from deploy.resolve import bench_options, parity_inputs, sample_feeds, tolerances
from deploy.summary import ratios_of

LATENCY_COLUMNS = (
    "candidate", "batch", "threads", "p50", "95 % of p50", "p90", "p95", "p99", "CoV", "images/s", "speed-up over",
)  # fmt: skip


def verify_bundle(
    bundle: Path, console: Console, *, weights: Path | str | None = None, images: Path | None = None
) -> RunRecord:
    """Hold a bundle's files against its manifest, everything that runs here against PyTorch, and rows apart.

    The batch suite of ``deploy.parity.batch`` runs on every stage file and engine; an export checks what ships only.

    Returns:
        The bundle's record with the new parity; the bundle itself is not touched.

    Raises:
        BundleError: a file is missing or was changed, or there is no engine.
        CheckpointError: the weights are not those that the bundle was made from.
        ParityError: out of tolerance.
    """
    run = read_manifest(bundle)
    if not run.engines:
        raise BundleError(
            f"{bundle} has no engine: its run stopped after {run.until.value} as asked", hint="export without --until"
        )
    with console.step("files") as step:
        files = artifacts_of(run)
        for artifact in files:
            open_artifact(artifact, bundle)
        step.note(f"{len(files)} unchanged")
    recipe = _recipe_of(run, {"weights": _weights(run, weights), "parity.images": ("--images", images)})
    with console.step("model") as step:
        loaded = _reload(run, recipe, console)
        step.note(loaded.record.weights.statement)
    with console.step("parity") as step:
        candidates = parity_candidates(loaded, recipe, bundle, stage_files(run), run.engines)
        inputs = parity_inputs(loaded.system, recipe)
        calibrated, task = recipe.quantization.calib is not None, loaded.system.task
        parity = check_parity(loaded.run, candidates, inputs, tolerances(recipe), task=task, calibrated=calibrated)
        parity = prove_rounding(loaded, parity, candidates, inputs)
        failed = {comparison.stage for comparison in parity.comparisons if not comparison.passed}
        if decisions := prove_decisions(loaded, recipe, bundle, stage_files(run), inputs, failed):
            parity = with_decisions(parity, decisions)
        limits = tolerances(recipe)
        if found := prove_selection(loaded, recipe, bundle, stage_files(run), run.engines, inputs, limits):
            parity = with_selection(parity, found)
        step.note(parity.verdict)
    with console.step("batch") as step:
        files_and_engines = batch_candidates(candidates, every=True)
        batches = check_batches(files_and_engines, inputs, recipe.batch, tolerances(recipe), task=loaded.system.task)
        step.note(batches.verdict)
    parity = with_batches(parity, batches)
    # Nothing was timed here: the export's latencies are in the bundle's own report.
    verified = dataclasses.replace(run, parity=parity, ok=parity.ok, verdict=parity.verdict, bench=None)
    console.summary(verified, bundle)
    console.result(parity)
    if not parity.ok:
        raise ParityError(parity.verdict, hint="the figures are above; the bundle itself was not changed")
    return verified


def bench_bundles(
    bundles: Sequence[Path], console: Console, *, baselines: tuple[str, ...] = (), weights: Path | str | None = None,
    seconds: float | None = None, threads: int | None = None,
) -> BenchRecord:  # fmt: skip
    """Time the engines of bundles in one interleaved measurement; baselines are those of the first bundle.

    Raises:
        BenchmarkError: no engine of the bundles can run here.
    """
    found: list[BenchCandidate] = []
    recipes: list[Recipe] = []
    plain: Plain | None = None
    names = _names(bundles)
    with contextlib.ExitStack() as stack, console.step("latency") as step:
        for index, bundle in enumerate(bundles):
            run = read_manifest(bundle)
            options = {
                "weights": _weights(run, weights if index == 0 else None),
                "bench.baselines": ("--baseline", baselines if index == 0 else ()),
                "bench.seconds": ("--seconds", seconds),
                "bench.threads": ("--threads", threads or (recipes[0].bench.threads if recipes else None)),
            }
            recipe = _recipe_of(run, options)
            loaded = _reload(run, recipe, console) if recipe.bench.baselines else None
            feeds = sample_feeds(parity_inputs(find_system(recipe.system), recipe), recipe.batch.opt)
            beside = plain_of(recipe) if index == 0 and recipe.engine.backend == "onnxruntime" else None
            plain = plain or beside
            opened, _ = stack.enter_context(bench_candidates(recipe, bundle, run.engines, feeds, loaded, beside))
            found += [_renamed(candidate, names[index], len(bundles)) for candidate in opened]
            recipes.append(recipe)
        record = measure(found, bench_options(recipes[0]))
        record = plain.judged(record) if plain else record
        rounds = record.ratios[0].rounds if record.ratios else 0
        step.note(f"{len(found)} timed" + (f" against each other in {rounds} rounds" if rounds else ""))
    console.table("latency", LATENCY_COLUMNS, _latency_rows(record))
    console.line(record.method, "quiet")
    if record.noise:
        console.line(summary.noise_line(record.noise))
    for warning in record.warnings:
        console.warn(warning)
    console.result(record)
    return record


def reopened(bundle: Path, console: Console, weights: Path | str | None = None) -> tuple[RunRecord, Recipe, Loaded]:
    """Read a bundle's manifest and load the PyTorch reference that it was made from.

    Raises:
        BundleError: the folder is no bundle.
        CheckpointError: the weights are not those that the bundle was made from.
    """
    run = read_manifest(bundle)
    recipe = _recipe_of(run, {"weights": _weights(run, weights)})
    with console.step("model") as step:
        loaded = _reload(run, recipe, console)
        step.note(loaded.record.weights.statement)
    return run, recipe, loaded


def runnable_engine(run: RunRecord, bundle: Path) -> EngineRecord:
    """Return the first engine of a bundle that runs on this machine.

    Raises:
        BundleError: the bundle has none.
        BackendUnavailableError: it has, and none runs here.
    """
    if not run.engines:
        raise BundleError(f"{bundle} has no engine", hint="export without --until")
    for engine in run.engines:
        if engine.runnable:
            return engine
    raise BackendUnavailableError(
        f"no engine of {bundle} runs on this machine: {run.engines[0].reason}", hint="repeat it where one can run"
    )


def stage_files(run: RunRecord) -> Mapping[str, Artifact]:
    """Return stage name ("traced", "patched", "fp16") to its ONNX file."""
    named: dict[str, Any] = {"traced": run.trace, "patched": run.passes}
    if run.precision is not None:
        named[run.precision.precision.value] = run.precision
    stages: dict[str, Artifact] = {}
    for name, record in named.items():
        if record is not None and record.artifact not in stages.values():
            stages[name] = record.artifact
    return stages


def _recipe_of(run: RunRecord, options: Mapping[str, tuple[str, Any]]) -> Recipe:
    return resolve([layer_of_data(f"manifest of {run.name}", run.recipe), layer_of_options(options)])


def _reload(run: RunRecord, recipe: Recipe, console: Console) -> Loaded:
    """Load the PyTorch reference and make sure that it is the one that the bundle was made from."""
    target = run.passes.target if run.passes else recipe.target or load_backend(recipe.engine.backend).target
    loaded = load_model(find_system(recipe.system), recipe, target, console)
    got, want = loaded.record.weights, run.model.weights
    if not got.same_as(want):
        raise CheckpointError(
            f"{got.statement}: not what the bundle was made from ({want.statement})",
            hint="--weights with the original file",
        )
    return loaded


def _weights(run: RunRecord, given: Path | str | None) -> tuple[str, str | None]:
    """Return flag and source of a bundle's weights: what was given now, else the very file that the export took."""
    recorded = run.model.weights.source or None
    return "--weights", recorded if given is None else str(given)


def _names(bundles: Sequence[Path]) -> list[str]:
    """Name bundles by their folder, and by its parent too where that is not enough.

    Raises:
        BenchmarkError: one bundle twice.
    """
    paths = [bundle.resolve() for bundle in bundles]
    if len(set(paths)) < len(paths):
        raise BenchmarkError("a bundle was named twice", hint="name each bundle once")
    short = [path.name for path in paths]
    return [p.name if short.count(p.name) == 1 else f"{p.parent.name}/{p.name}" for p in paths]


def _renamed(candidate: BenchCandidate, name: str, bundles: int) -> BenchCandidate:
    return dataclasses.replace(candidate, name=candidate.name.replace("engine", name)) if bundles > 1 else candidate


def _latency_rows(record: BenchRecord) -> list[tuple[str, ...]]:
    return [
        (
            c.name, str(c.batch), str(c.threads), units.milliseconds(c.p50), units.interval(c.interval),
            *(units.milliseconds(t) for t in (c.p90, c.p95, c.p99)),
            units.percent(c.cov), units.number(c.throughput),
            "; ".join(f"{r.baseline} {units.ratio(r.median, r.p10, r.p90)}" for r in ratios_of(record, c)) or "-",
        )
        for c in record.latencies
    ]  # fmt: skip
