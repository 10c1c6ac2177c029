"""``effdeploy build``: engines on the target machine, from a bundle or an ONNX file that was made elsewhere.

A bundle gives a new bundle: the ONNX files of every stage, checked by hash, with the engines that were built here. The
export is left as it is, because its parity and latency are about its own engines. An ONNX file gives an engine beside
it with a manifest of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from deploy import __version__
from deploy.artifacts import (
    RECIPE,
    artifact_of,
    artifacts_of,
    environment,
    open_artifact,
    publish,
    read_manifest,
    refuse_to_shorten,
    run_folder,
    storage_errors,
    write_json,
    write_manifest,
)
from deploy.backends import load_backend
from deploy.backends.audit import graph_types
from deploy.backends.base import Backend, BuildOptions
from deploy.backends.gpu import sm_here
from deploy.backends.trt_config import ranges_text
from deploy.candidates import build_options, engine_options
from deploy.console import Console
from deploy.errors import BackendUnavailableError, BundleError, PrecisionError, SizeError, StorageError
from deploy.known_bad import warn_of_traps
from deploy.linting.build import check_before_build, with_lint
from deploy.recipe import Recipe, layer_of_data, layer_of_options, resolve
from deploy.records import (
    SCHEMA_VERSION,
    Batch,
    BuildRecord,
    EngineRecord,
    Precision,
    RunRecord,
    Stage,
    TensorSpec,
    to_json,
)
from deploy.report import render
from deploy.report.equivalents import trtexec_build
from deploy.reuse import now

Options = Mapping[str, tuple[str, Any]]  # recipe key -> (flag, value), as ``deploy.recipe.layer_of_options`` reads it

IN_PLACE = ("onnxruntime", "openvino")  # backends whose engine is the ONNX file itself


def build(
    source: Path,
    console: Console,
    *,
    options: Options,
    batches: Sequence[str] = (),
    precision: Precision | None = None,
    out: Path | None = None,
) -> RunRecord | tuple[BuildRecord, ...]:
    """Build the engines of a bundle or of an ONNX file.

    Args:
        source: A bundle's folder, or a file.
        console: Where progress goes.
        options: Settings of the recipe's engine section.
        batches: Optimisation profiles, each a size or ``min:opt:max``; none: what the bundle was exported for.
        precision: What the graph must be typed to; ``None`` takes what it is.
        out: The new bundle's folder, or the folder for engine and manifest; left out: beside the source.

    Raises:
        BundleError: the source is neither, or a file of the bundle is missing or was changed.
        PrecisionError: the graph is of another precision than asked.
        SizeError: the graph cannot take the batch sizes.
        EffdeployError: the backend refuses, or the disk does.
    """
    ranges = tuple(Batch.parse(text) for text in batches)
    if source.is_dir():
        return build_bundle(source, console, options=options, ranges=ranges, precision=precision, out=out)
    if not source.is_file():
        raise BundleError(
            f"{source} is neither a bundle nor a file",
            hint="effdeploy build engines/NAME, or effdeploy build model.onnx",
        )
    return build_model(source, console, options=options, ranges=ranges, precision=precision, out=out)


def build_bundle(
    bundle: Path,
    console: Console,
    *,
    options: Options,
    ranges: tuple[Batch, ...] = (),
    precision: Precision | None = None,
    out: Path | None = None,
) -> RunRecord:
    """Build from a bundle's last typed ONNX file, into a new bundle that appears whole or not at all.

    Returns:
        The new bundle's record. Nothing in it was compared or timed yet: ``effdeploy verify`` and ``bench`` do that.
    """
    begin = time.perf_counter()
    run = read_manifest(bundle)
    if run.precision is None or run.trace is None or run.passes is None:
        raise BundleError(
            f"{bundle} has no typed ONNX file: its run stopped after {run.until.value}",
            hint="export again with --until precision or further",
        )
    _require_precision(precision, run.precision.precision, bundle.name)
    recipe = _recipe_for(run, options, ranges)
    backend = load_backend(recipe.engine.backend)
    request = build_options(recipe)
    _require_backend(backend, request)
    _require_batch(run.trace.inputs, request.ranges, run.trace.batch)
    final = out or _default_bundle(bundle, run, backend)
    if backend.target is not run.passes.target:
        console.warn(
            f"the graph was lowered for {run.passes.target.value}, {backend.name} wants {backend.target.value}: "
            f"effdeploy export ... --target {backend.target.value} gives the better graph"
        )
    with run_folder(final) as folder:
        refuse_to_shorten(final, Stage.ENGINE)
        with console.step("files") as step:
            files = artifacts_of(run, before=Stage.ENGINE)
            for artifact in files:
                source = open_artifact(artifact, bundle)
                with storage_errors(f"cannot copy {artifact.name}"):
                    shutil.copy2(source, folder / artifact.name)
            step.note(f"{len(files)} unchanged")
        model = folder / run.precision.artifact.name
        about = f"{recipe.system} {recipe.variant}"
        warn_of_traps(console, backend.name, model, model=about, sm=recipe.engine.sm or sm_here())
        engines = _engines(backend, model, folder, request, console, stop=recipe.engine.lint == "stop")
        record = _built_run(run, recipe, engines, final.name, bundle.name, time.perf_counter() - begin)
        with storage_errors(f"cannot write the bundle {final}"):
            (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        render([record], folder)
        write_manifest(record, folder)
        publish(folder, final)
    console.summary(record, final)
    _say_next(console, record.engines, run.trace.inputs, f"effdeploy verify {final}, then effdeploy bench {final}")
    console.result(record)
    return record


def build_model(
    model: Path,
    console: Console,
    *,
    options: Options,
    ranges: tuple[Batch, ...] = (),
    precision: Precision | None = None,
    out: Path | None = None,
) -> tuple[BuildRecord, ...]:
    """Build from an ONNX file, into ``<name>.sm<NN>.<plan|rtx>`` and its manifest, the same name with ``.json``.

    ONNX Runtime and OpenVINO have nothing to build: their engine is the ONNX file, and only the manifest is written.
    """
    inputs = model_inputs(model)
    found = model_precision(model)
    _require_precision(precision, found, model.name)
    recipe = _recipe_for_file(options, ranges, found)
    backend = load_backend(recipe.engine.backend)
    request = engine_options(recipe, inputs)
    _require_backend(backend, request)
    _require_batch(inputs, request.ranges)
    folder = out or model.parent
    in_place = backend.name in IN_PLACE
    warn_of_traps(console, backend.name, model, sm=recipe.engine.sm or sm_here())
    with run_folder(folder / f"{model.stem}.build") as scratch:  # never published: its files are, one by one
        place, stop = model.parent if in_place else scratch, recipe.engine.lint == "stop"
        engines = _engines(backend, model, place, request, console, stop=stop)
        records = [_publish_engine(e, scratch, folder, model, inputs, in_place=in_place) for e in engines]
    for record in records:
        console.line(f"{record.engine.artifact.name}: {record.engine.audit.statement}")
        if record.engine.reason:
            console.line(record.engine.reason, "warn")
        console.line(f"wrote {folder / _manifest_name(record.engine)}")
        console.result(record)
    _say_next(console, [r.engine for r in records], inputs, "compare it with the ONNX file before you use it")
    return tuple(records)


def model_inputs(model: Path) -> tuple[TensorSpec, ...]:
    """Read the inputs of an ONNX file; only axis 0 may be dynamic.

    Raises:
        BundleError: not an ONNX file.
        SizeError: an axis besides the batch has no fixed size.
    """
    try:
        graph = onnx.load(model, load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        inputs = tuple(_spec(value) for value in graph.input if value.name not in constants)
    except Exception as error:  # protobuf's decoder, and a file that holds other fields than a graph's
        raise BundleError(
            f"{model} cannot be read as ONNX: {error}", hint="effdeploy export writes ONNX files"
        ) from error
    if not inputs:
        raise BundleError(
            f"{model} cannot be read as ONNX: it has no inputs", hint="effdeploy export writes ONNX files"
        )
    free = [
        f"{spec.name} {list(spec.shape)}" for spec in inputs if any(isinstance(axis, str) for axis in spec.shape[1:])
    ]
    if free:
        raise SizeError(
            f"{model.name}: only axis 0, the batch, may be dynamic; got {', '.join(free)}",
            hint=f"polygraphy surgeon sanitize {model.name} --override-input-shapes NAME:[1,3,224,224] -o fixed.onnx",
        )
    return inputs


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape)


def model_precision(model: Path) -> Precision:
    """Say what an ONNX file is typed to: a low precision as soon as a matrix node has it.

    Raises:
        EngineBuildError: not an ONNX file, or its types contradict each other.
    """
    types = graph_types(model)
    found = set(types.matrix.values()) or set(types.counts)
    order = (Precision.INT8, Precision.FP8, Precision.FP16, Precision.BF16)  # beside 8 bits, the rest has 16
    low = [precision for precision in order if precision.value in found]
    return low[0] if low else Precision.FP32


def _recipe_for(run: RunRecord, options: Options, ranges: tuple[Batch, ...]) -> Recipe:
    """Take the bundle's recipe with the engine settings that were asked now."""
    before = layer_of_data(f"manifest of {run.name}", run.recipe)
    options = _with_backend(options, str(run.recipe.get("engine", {}).get("backend", "")))
    asked: dict[str, tuple[str, Any]] = {
        "engine.sm": ("--sm", ()),
        **{k: v for k, v in options.items() if v[1] is not None},
    }
    recipe = resolve([before, layer_of_options({**asked, **_batch_options(ranges)})])
    lowered = run.passes.target if run.passes else None
    if recipe.target is None and lowered is not load_backend(recipe.engine.backend).target:
        return resolve([before, layer_of_options({**asked, **_batch_options(ranges), "target": ("bundle", lowered)})])
    return recipe


def _recipe_for_file(options: Options, ranges: tuple[Batch, ...], precision: Precision) -> Recipe:
    """Validate the engine settings as a recipe does; what describes a model is not used, a file is its own model."""
    options = _with_backend(options)
    about = layer_of_data("model file", {"system": "file", "variant": "file", "size": 1, "precision": precision.value})
    return resolve([about, layer_of_options({**options, **_batch_options(ranges)})])


def _with_backend(options: Options, before: str = "") -> Options:
    """Name the backend where none was asked for: the bundle's own if it builds engines, else TensorRT."""
    if options.get("engine.backend", ("", None))[1] is not None:
        return options
    own = before if before and before != "onnxruntime" else "tensorrt"
    return {**options, "engine.backend": ("--backend", own)}


def _batch_options(ranges: tuple[Batch, ...]) -> dict[str, tuple[str, Any]]:
    """Turn profiles into settings: the recipe's batch spans them all, tuned like the widest."""
    if not ranges:
        return {}
    widest = max(ranges, key=lambda batch: batch.max - batch.min)
    span = Batch(min=min(b.min for b in ranges), opt=widest.opt, max=max(b.max for b in ranges))
    profiles = [str(batch) for batch in ranges] if len(ranges) > 1 else []
    return {"batch": ("--batch", str(span)), "engine.profiles": ("--batch", profiles)}


def _require_precision(asked: Precision | None, found: Precision, name: str) -> None:
    if asked is not None and asked is not found:
        raise PrecisionError(
            f"--{asked.value}: {name} is typed {found.value.upper()}, and a build takes the types of the graph; "
            "TensorRT 11 has no flag for another precision",
            hint=f"effdeploy export ... --{asked.value}, then build that bundle; or leave --{asked.value} out",
        )


def _require_backend(backend: Backend, options: BuildOptions) -> None:
    if reason := backend.available():
        raise BackendUnavailableError(
            f"backend {backend.name}: {reason}", hint="effdeploy build ... --backend tensorrt_rtx"
        )
    backend.check(options)


def _require_batch(inputs: Sequence[TensorSpec], ranges: tuple[Batch, ...], traced: Batch | None = None) -> None:
    """Hold the asked batch sizes against the graph: a fixed one takes its own size only."""
    fixed = [spec for spec in inputs if spec.shape and not isinstance(spec.shape[0], str)]
    wrong = [s for s in fixed if len(ranges) > 1 or any((b.min, b.max) != (s.shape[0], s.shape[0]) for b in ranges)]
    if wrong and traced != ranges[0]:
        raise SizeError(
            f"asked for batch {ranges_text(ranges)}, but the graph is fixed: {wrong[0].name} {list(wrong[0].shape)}",
            hint="export with --batch min:opt:max, or give --batch the graph's own size",
        )


def _default_bundle(bundle: Path, run: RunRecord, backend: Backend) -> Path:
    """Name the new bundle after the old one and the backend."""
    path = bundle.resolve()
    before = str(run.recipe.get("engine", {}).get("backend", ""))
    name = f"{path.name.removesuffix('-' + before)}-{backend.name}"
    beside = path if bundle.name in ("", "..") else bundle
    return beside.with_name(name if name != path.name else f"{name}-built")


def _engines(
    backend: Backend, model: Path, folder: Path, options: BuildOptions, console: Console, *, stop: bool
) -> tuple[EngineRecord, ...]:
    from deploy.graph.plugins import for_builder  # loads onnx_graphsurgeon

    with console.step("engine") as step, console.phases() as progress:
        model = for_builder(model, folder, backend.name)
        lint = check_before_build(model, backend.name, options.device, console, stop=stop)
        engines = with_lint(backend.build(model, folder, dataclasses.replace(options, progress=progress)), lint)
        step.note(", ".join(f"{e.artifact.name} for {e.device}" for e in engines))
    return engines


def _built_run(
    run: RunRecord, recipe: Recipe, engines: tuple[EngineRecord, ...], name: str, source: str, seconds: float
) -> RunRecord:
    return dataclasses.replace(
        run,
        effdeploy=__version__,
        name=name,
        created=now(),
        until=Stage.ENGINE,
        ok=True,
        verdict=f"built from the ONNX files of {source}; not compared with PyTorch yet",
        recipe=recipe.to_data(),
        environment=environment(),
        engines=engines,
        parity=None,
        bench=None,
        origins={stage: origin for stage, origin in run.origins.items() if Stage(stage).order < Stage.ENGINE.order},
        stage_seconds={Stage.ENGINE.value: sum(engine.seconds for engine in engines), "total": seconds},
    )


def _publish_engine(
    engine: EngineRecord, scratch: Path, folder: Path, model: Path, inputs: tuple[TensorSpec, ...], *, in_place: bool
) -> BuildRecord:
    """Give an engine its place and name beside the model: first the manifest, so no engine is without one."""
    built = engine if in_place else _renamed(engine, model)
    record = BuildRecord(
        schema_version=SCHEMA_VERSION,
        effdeploy=__version__,
        created=now(),
        model=artifact_of(model, model.parent),
        inputs=inputs,
        engine=built,
        environment=environment(),
    )
    target, manifest = folder / built.artifact.name, folder / _manifest_name(built)
    if not in_place and target.exists() and not manifest.exists():
        raise StorageError(
            f"{target} exists and has no {manifest.name}, so it was not built here; it was left alone",
            hint="choose another folder with --out, or remove it yourself",
        )
    write_json(manifest, to_json(record))
    if not in_place:
        with storage_errors(f"cannot write {target}"):
            (scratch / engine.artifact.name).replace(target)
    return record


def _renamed(engine: EngineRecord, model: Path) -> EngineRecord:
    name = engine.artifact.name.replace("engine-", f"{model.stem}.", 1)
    return dataclasses.replace(engine, artifact=dataclasses.replace(engine.artifact, name=name))


def _manifest_name(engine: EngineRecord) -> str:
    return f"{engine.artifact.name}.{engine.backend}.json"


def _say_next(console: Console, engines: Sequence[EngineRecord], inputs: Sequence[TensorSpec], words: str) -> None:
    for engine in engines:
        if command := trtexec_build(engine, inputs):
            console.line(f"the same with NVIDIA's tool: {command}", "quiet")
    console.line(f"next: {words}", "strong")
