"""The Python API: a function for every command, with the command's options as keywords.

``import deploy`` gives all of them (``deploy.export``, ``deploy.verify``, ...). They return the frozen records of
``deploy.records``, raise the errors of ``deploy.errors``, and write nothing to the terminal unless they are given a
console: ``deploy.verify(bundle, console=deploy.Console())``.

A keyword is the option's name with underscores; where that is a word of Python, an underscore follows (``from_``,
``set_``). Heavy libraries are imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.choosing import bisect as bisect
from deploy.choosing import show as show
from deploy.choosing import tune as tune
from deploy.finished import benchmark as benchmark
from deploy.finished import diff as diff
from deploy.finished import inspect as inspect
from deploy.finished import lint as lint
from deploy.finished import package as package
from deploy.finished import predict as predict
from deploy.finished import render as render
from deploy.finished import verify as verify
from deploy.keywords import (
    Assignments,
    Names,
    PathLike,
    Size,
    assignments_of,
    console_or_silence,
    listed,
    one_of,
    path_of,
    recipe_of,
    road_of,
)
from deploy.scoring import evaluate as evaluate

if TYPE_CHECKING:
    from deploy.answers import ConversionRecord, PlanRecord, SystemRecord
    from deploy.console import Console
    from deploy.doctor import Diagnosis
    from deploy.records import BuildRecord, RunRecord


def export(
    system: PathLike,
    *,
    variant: str | None = None,
    weights: PathLike | None = None,
    size: Size | None = None,
    batch: int | str | None = None,
    precision: str | None = None,
    backend: str | None = None,
    target: str | None = None,
    sm: str | Sequence[int] | None = None,
    device: str | None = None,
    out: PathLike | None = None,
    images: PathLike | None = None,
    calib: PathLike | None = None,
    calib_method: str | None = None,
    budget: str | None = None,
    baseline: Names | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    set_: Assignments = (),
    until: str | None = None,
    from_: str | None = None,
    reuse: bool = True,
    verify_each: bool = False,
    embed_preprocess: bool = False,
    labels: PathLike | None = None,
    console: Console | None = None,
) -> RunRecord:
    """Take a model from its checkpoint to a bundle: engine, parity, latency, report.

    Args:
        system: A system (see ``systems``) or a recipe file (``*.yaml``).
        variant: Which size of it, e.g. ``"s12"``.
        weights: A file, ``"hf://OWNER/REPO[/FILE][@REVISION]"``, ``"https://...#sha256=..."``, ``"random[:SEED]"``, or
            ``"pretrained"``: what the recipe names (``--pretrained``).
        size: ``224``, ``"384x512"`` or ``(384, 512)``: height, then width.
        batch: ``4``, or ``"1:8:32"``: smallest, tuned for, largest.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"fp8"``; the command line has a flag for each.
        backend: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt_rtx"``, ``"tensorrt"``, or ``"auto"``: the fastest of
            the CPU's that is within the tolerances, by measurement.
        target: Lower the graph for ``"onnxruntime"`` or ``"tensorrt"``.
        sm: Ahead-of-time targets, e.g. ``(80, 89)`` or ``"80,89"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        out: Bundle folder; default ``engines/<name>``.
        images: Folder of real photos, added to the deterministic inputs.
        calib: Folder of images that INT8 and FP8 measure ranges on.
        calib_method: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"entropy"``.
        budget: ``"cosine=0.999"``, ``"top1=0.1"`` (points) or ``"matched=0.99"``: INT8 and FP8 keep the fewest modules
            in higher precision that meet it; the recipe of the choice lies beside ``out``.
        baseline: Any of ``"eager"``, ``"compile"``, ``"naive"``; a sequence, or one text with commas.
        seconds: Measure at least this long per candidate.
        threads: CPU threads of every candidate while measuring.
        set_: Any recipe key: ``{"bench.rounds": 50}``, or ``["bench.rounds=50"]``.
        until: Stop after this stage.
        from_: Make this stage and the later ones again, even where an earlier run made the same.
        reuse: False: make every stage again.
        verify_each: Compare outputs around every graph pass.
        embed_preprocess: The graph takes uint8 images [N, height, width, 3] and normalises them itself.
        labels: Text file with a class name per line; they travel with the model.
        console: Where progress goes; nowhere when left out.

    Returns:
        The run: the bundle's ``manifest.json``.

    Raises:
        RecipeError: An option or the recipe file is wrong; lists every mistake.
        UnknownNameError: No such system, variant, backend or stage.
        ParityError: Outputs are out of tolerance; the bundle beside ``out`` holds the evidence.
        BudgetError: No choice of modules meets the budget.
        EffdeployError: Any other stage failed; nothing is left behind.
    """
    from deploy.backends import AUTO
    from deploy.pipeline import run

    asked = partial(
        recipe_of, system, variant=variant, weights=weights, size=size, batch=batch, precision=precision,
        target=target, sm=sm, images=images, calib=calib, calib_method=calib_method, baseline=baseline,
        seconds=seconds, threads=threads, set_=set_, verify_each=verify_each, embed_preprocess=embed_preprocess,
        labels=labels,
    )  # fmt: skip
    recipe, choice = asked(backend=backend, device=device), None
    first, last, folder = road_of(recipe, from_, until, out)
    console = console_or_silence(console)
    automatic = recipe.engine.backend == AUTO
    console.steps = 0 if budget or automatic else last.order + 1
    if automatic:
        from deploy.artifacts import require_place
        from deploy.fastest import choose_backend, contenders, rest_of

        recipes = contenders(asked, recipe, last, budget)
        require_place(folder, last)
        choice = choose_backend(recipes, console, start=first, reuse=reuse)
        recipe, first, reuse = recipes[choice.backend], rest_of(first, reuse), True
    if budget is not None:
        from deploy.budgeting import Budget, recipe_within

        recipe = recipe_within(recipe, Budget.parse(budget), folder, console, reuse=reuse)
    return run(recipe, folder, until=last, start=first, reuse=reuse, choice=choice, console=console)


def plan(
    system: PathLike,
    *,
    variant: str | None = None,
    weights: PathLike | None = None,
    size: Size | None = None,
    batch: int | str | None = None,
    precision: str | None = None,
    backend: str | None = None,
    target: str | None = None,
    sm: str | Sequence[int] | None = None,
    device: str | None = None,
    out: PathLike | None = None,
    images: PathLike | None = None,
    calib: PathLike | None = None,
    calib_method: str | None = None,
    budget: str | None = None,
    baseline: Names | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    set_: Assignments = (),
    until: str | None = None,
    from_: str | None = None,
    reuse: bool = True,
    verify_each: bool = False,
    embed_preprocess: bool = False,
    labels: PathLike | None = None,
    console: Console | None = None,
) -> PlanRecord:
    """Check everything that an export checks before its work, and say what it would do: ``effdeploy export --dry-run``.

    Args:
        system, variant, weights, size, batch, precision, backend, target, sm, device, out, images, calib,
        calib_method, budget, baseline, seconds, threads, set_, until, from_, reuse, verify_each, embed_preprocess,
        labels, console: As for ``export``.

    Returns:
        Stages, files with estimated sizes, seconds where earlier runs on this machine measured them, space.

    Raises:
        EffdeployError: Whatever the export itself would raise for this input before its first stage.
    """
    from deploy.backends import AUTO
    from deploy.budgets import Budget
    from deploy.planning import plan_export, show

    asked = partial(
        recipe_of, system, variant=variant, weights=weights, size=size, batch=batch, precision=precision,
        target=target, sm=sm, images=images, calib=calib, calib_method=calib_method, baseline=baseline,
        seconds=seconds, threads=threads, set_=set_, verify_each=verify_each, embed_preprocess=embed_preprocess,
        labels=labels,
    )  # fmt: skip
    recipe = asked(backend=backend, device=device)
    first, last, folder = road_of(recipe, from_, until, out)
    console = console_or_silence(console)
    if recipe.engine.backend == AUTO:
        from deploy.fastest import contenders, first_of

        recipe = first_of(contenders(asked, recipe, last, budget), console)
    if budget is not None:
        Budget.parse(budget).refuse_precision(recipe.precision)
    planned = plan_export(recipe, folder, until=last, start=first, reuse=reuse, console=console)
    show(planned, console)
    return planned


def convert(
    checkpoint: PathLike,
    out: PathLike,
    *,
    system: PathLike,
    variant: str | None = None,
    to: str | None = None,
    set_: Assignments = (),
    force: bool = False,
    console: Console | None = None,
) -> ConversionRecord:
    """Write a checkpoint as a plain one in another layout, read it back, and compare the outputs.

    Args:
        checkpoint: A file in any layout and wrapping that loads; a text may name it as ``weights`` of ``export`` does.
        out: The file to write: ``.safetensors``, ``.pth`` or ``.pt``; float32.
        system: A system (see ``systems``) or a recipe file (``*.yaml``).
        variant: Which size of it, e.g. ``"s12"``.
        to: Layout to write; the checkpoint's own when left out. A wrong name is answered with the layouts there are.
        set_: Any recipe key: ``{"classes": 10}``, or ``["classes=10"]``.
        force: Replace ``out`` if it exists.
        console: Where progress goes; nowhere when left out.

    Returns:
        Both layouts, the file's hash and size, and how far the outputs are apart.

    Raises:
        UnknownNameError: No such system, variant or layout.
        CheckpointError: The checkpoint does not fit, or cannot be taken to that layout.
        StorageError: ``out`` exists, or cannot be written.
    """
    from deploy.models import find_system
    from deploy.models.conversion import convert_checkpoint
    from deploy.models.sources import local_file
    from deploy.resolve import resolve_recipe

    recipe = resolve_recipe(str(system), {"variant": ("--variant", variant)}, assignments_of(set_))
    console = console_or_silence(console)
    with console.step("convert") as step:
        source = local_file(checkpoint, console)
        record = convert_checkpoint(find_system(recipe.system), recipe, source, Path(out), to=to, force=force)
        step.note(f"{record.tensors} tensors, {record.source_layout} -> {record.layout}")
    console.line(f"outputs     max relative difference {record.max_relative:.2g}, after reading the file back")
    console.line(f"wrote       {out}")
    console.result(record)
    return record


def build(
    source: PathLike,
    *,
    backend: str | None = None,
    batch: int | str | Sequence[int | str] | None = None,
    sm: str | Sequence[int] | None = None,
    level: int | None = None,
    workspace: int | str | None = None,
    tf32: bool | None = None,
    timing_cache: bool | None = None,
    version_compatible: bool | None = None,
    hardware: str | None = None,
    refit: bool | None = None,
    strip: bool | None = None,
    lint: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    out: PathLike | None = None,
    console: Console | None = None,
) -> RunRecord | tuple[BuildRecord, ...]:
    """Build engines on this machine from a bundle or an ONNX file that was made elsewhere.

    Args:
        source: A bundle's folder, or an ONNX file.
        backend: ``"tensorrt"``, ``"tensorrt_rtx"`` or ``"onnxruntime"``; left out: the bundle's own if it builds
            engines, else ``"tensorrt"``.
        batch: ``4`` or ``"1:8:32"``; a sequence of them gives several optimisation profiles.
        sm: Ahead-of-time targets of tensorrt_rtx, e.g. ``(80, 89)`` or ``"80,89"``.
        level: Builder optimisation level, 0 to 5.
        workspace: Limit of the builder's scratch memory, in bytes or e.g. ``"4GiB"``.
        tf32: Whether FP32 products may use TF32.
        timing_cache: Keep TensorRT's timings for later builds.
        version_compatible: An engine for later minor versions too.
        hardware: ``"none"``, ``"ampere_plus"`` or ``"same_compute_capability"``.
        refit: Let the engine's weights be replaced.
        strip: Leave the weights out of the engine.
        lint: ``"warn"``: build in spite of lint errors; default ``"stop"``.
        precision: Refuse a graph that is not ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"fp8"``.
        device: Of onnxruntime: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of the engine.
        out: New bundle, or folder for the engine; default: beside the source.
        console: Where progress goes; nowhere when left out.

    Returns:
        The new bundle's run; for an ONNX file a record per engine.

    Raises:
        BundleError: The source is neither, or a file of the bundle was changed.
        PrecisionError: The graph is of another precision than asked.
        SizeError: The graph cannot take the batch sizes.
        BackendUnavailableError: The backend cannot build here.
        EngineBuildError: Parser or builder refused the graph.
    """
    from deploy.building import build as build_engines
    from deploy.records import Precision

    options = {
        "engine.backend": ("--backend", backend),
        "engine.sm": ("--sm", listed(sm)),
        "engine.level": ("--level", level),
        "engine.workspace": ("--workspace", workspace),
        "engine.tf32": ("--tf32", tf32),
        "engine.timing_cache": ("--timing-cache", timing_cache),
        "engine.version_compatible": ("--version-compatible", version_compatible),
        "engine.hardware": ("--hardware", hardware),
        "engine.refit": ("--refit", refit),
        "engine.strip": ("--strip", strip),
        "engine.lint": ("--lint", lint),
        "engine.device": ("--device", device),
        "bench.threads": ("--threads", threads),
    }
    batches = () if batch is None else (batch,) if isinstance(batch, (int, str)) else tuple(batch)
    return build_engines(
        Path(source), console_or_silence(console), options=options, batches=tuple(str(text) for text in batches),
        precision=one_of(Precision, precision, "precision"), out=path_of(out),
    )  # fmt: skip


def diagnose(*, console: Console | None = None) -> Diagnosis:
    """Check installation, backends, CPU, GPU and known-bad versions: ``effdeploy doctor``.

    Args:
        console: Where the table goes; nowhere when left out.

    Returns:
        Every check with its state, what was found, and what to do.

    Raises:
        BackendUnavailableError: Export cannot run here.
    """
    from deploy.doctor import examine, report

    found = examine(Path("engines"))
    report(found, console_or_silence(console))
    return found


def systems(*, console: Console | None = None) -> tuple[SystemRecord, ...]:
    """Show the systems, their variants, parameters, multiply-adds and inputs: ``effdeploy list``.

    Args:
        console: Where the tables go; nowhere when left out.

    Returns:
        A record per system, with one per variant; the figures come with the package (``python -m deploy.catalogue``).

    Raises:
        BundleError: The installed figures are damaged.
    """
    from deploy.catalogue import catalogue, show

    found = catalogue()
    show(found, console_or_silence(console))
    return found
