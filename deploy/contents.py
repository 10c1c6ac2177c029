"""``effdeploy inspect``: what an ONNX file, a checkpoint, an engine or a bundle holds."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deploy import summary, units
from deploy.artifacts import MANIFEST, open_artifact, read_manifest
from deploy.bundles import stage_files
from deploy.console import Console
from deploy.errors import BundleError, CheckpointError, RecipeError, StorageError
from deploy.graph.inspection import GraphReport, inspect_graph
from deploy.models import SYSTEMS, find_system
from deploy.models.base import System, empty_state
from deploy.models.checkpoint import Checkpoint, State, fit_checkpoint, read_checkpoint
from deploy.models.sources import local_file
from deploy.records import BuildRecord, EngineRecord, RunRecord, TensorSpec, from_json, record
from deploy.resolve import resolve_recipe

CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
ENGINES = (".plan", ".rtx", ".engine", ".trt")
GFLOPS = "papers print multiply-adds as GFLOPs; counted as two operations each: {} GFLOPs"
_MODULES_SHOWN, _TENSORS_SHOWN, _OPS_SHOWN, _VALUE_SHOWN = 12, 40, 40, 240


@record
class CheckpointReport:
    """A checkpoint after unwrapping. ``fits`` names the systems that load it; ``nearest`` the best that does not."""

    name: str
    size: int
    sha256: str
    wrapping: str
    tensors: tuple[TensorSpec, ...]
    parameters: int
    fits: tuple[str, ...]
    nearest: str


@record
class EngineReport:
    """A built engine, from its bundle's manifest; the file itself cannot be read without its runtime."""

    bundle: str
    engine: EngineRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@record
class BundleReport:
    """A bundle: its run in short, every stage file, every engine."""

    name: str
    status: str
    verdict: str
    stages: Mapping[str, GraphReport]
    engines: tuple[EngineReport, ...]


def inspect_path(
    place: Path | str,
    console: Console,
    *,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    depth: int = 2,
) -> GraphReport | CheckpointReport | EngineReport | BundleReport:
    """Say what a file or bundle holds, on the console and as a record.

    Args:
        place: ONNX file, checkpoint, engine of a bundle, or bundle folder; a text may name a checkpoint as
            ``--weights`` does.
        console: Where it is written.
        batch: Size of dynamic first axes, for multiply-adds; 1 when left out.
        sizes: Sizes of other dynamic axes by name.
        depth: Components of the module path that are told apart.

    Raises:
        StorageError: nothing there, or it cannot be read.
        GraphPassError: not a whole ONNX model.
        CheckpointError: a checkpoint that cannot be read.
        BundleError: a folder that is no bundle, a changed file, or an engine without a manifest.
        RecipeError: ``batch`` or ``sizes`` name what is not dynamic.
        DownloadError: the checkpoint cannot be fetched, or is not the one that was pinned.
    """
    path = Path(place) if Path(place).is_dir() else local_file(place, console)
    if not path.exists():
        raise StorageError(f"{path} does not exist", hint="effdeploy inspect FILE, or a bundle folder under engines/")
    suffix = path.suffix.lower()
    report: GraphReport | CheckpointReport | EngineReport | BundleReport
    if suffix in (*CHECKPOINTS, *ENGINES) and (batch is not None or sizes):
        raise RecipeError(f"--batch and --axis count the work of ONNX graphs; got {path.name}", hint="leave them out")
    if path.is_dir():
        report = inspect_bundle(path, batch=batch, sizes=sizes, depth=depth)
        _show_bundle(report, console)
    elif suffix in CHECKPOINTS:
        report = inspect_checkpoint(path)
        _show_checkpoint(report, console)
    elif suffix in ENGINES:
        report = inspect_engine(path)
        _show_engine(report, console)
    else:
        report = inspect_graph(path, batch=batch, sizes=sizes, depth=depth)
        _show_graph(report, console)
    console.result(report)
    return report


def inspect_bundle(
    bundle: Path, *, batch: int | None = None, sizes: Mapping[str, int] | None = None, depth: int = 2
) -> BundleReport:
    """Inspect every stage of a bundle after checking each file's hash."""
    run = read_manifest(bundle)
    stages = {
        stage: inspect_graph(open_artifact(artifact, bundle), batch=batch, sizes=sizes, depth=depth)
        for stage, artifact in stage_files(run).items()
    }
    engines = tuple(_engine_report(run, engine) for engine in run.engines)
    return BundleReport(name=run.name, status=summary.status(run), verdict=run.verdict, stages=stages, engines=engines)


def inspect_engine(path: Path) -> EngineReport:
    """Find an engine in the manifest beside it, and check that it is that very file.

    The manifest is the bundle's, or the engine's own where it was built from an ONNX file (``effdeploy build``).

    Raises:
        BundleError: no manifest, one that does not name the file, or another file than it names.
    """
    if (own := _build_record(path)) is not None:
        open_artifact(own.engine.artifact, path.parent)
        return EngineReport(bundle=own.model.name, engine=own.engine, inputs=own.inputs, outputs=())
    if not (path.parent / MANIFEST).is_file():
        raise BundleError(
            f"{path} has no {MANIFEST} beside it: what an engine was built from and for is not in the engine",
            hint="inspect the bundle that it came from, or its ONNX file; effdeploy build writes a manifest beside it",
        )
    run = read_manifest(path.parent)
    engine = next((e for e in run.engines if e.artifact.name == path.name), None)
    if engine is None:
        names = ", ".join(e.artifact.name for e in run.engines) or "none"
        raise BundleError(f"the manifest does not know {path.name}; its engines: {names}", hint="do not use this file")
    open_artifact(engine.artifact, path.parent)
    return _engine_report(run, engine)


def _build_record(path: Path) -> BuildRecord | None:
    """Read the manifest that ``effdeploy build`` writes beside an engine of an ONNX file; ``None`` where there is none.

    Raises:
        BundleError: it cannot be read, or is of another engine.
    """
    for manifest in sorted(path.parent.glob(f"{path.name}.*.json")):
        try:
            record: BuildRecord = from_json(BuildRecord, json.loads(manifest.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{manifest} cannot be read: {error}", hint="effdeploy build writes it again") from error
        if record.engine.artifact.name != path.name:
            raise BundleError(f"{manifest} is of {record.engine.artifact.name}", hint="do not use this file")
        return record
    return None


def _engine_report(run: RunRecord, engine: EngineRecord) -> EngineReport:
    trace = run.trace
    return EngineReport(
        bundle=run.name,
        engine=engine,
        inputs=trace.inputs if trace else (),
        outputs=trace.outputs if trace else (),
    )


def inspect_checkpoint(path: Path) -> CheckpointReport:
    """Read a checkpoint and find the systems and variants that it fits."""
    checkpoint = read_checkpoint(path)
    fits, nearest = fitting(checkpoint)
    tensors = tuple(
        TensorSpec(name=name, dtype=checkpoint.dtypes[name], shape=tuple(tensor.shape))
        for name, tensor in checkpoint.tensors.items()
    )
    return CheckpointReport(
        name=path.name,
        size=path.stat().st_size,
        sha256=checkpoint.sha256,
        wrapping=checkpoint.wrapping.removeprefix(", "),
        tensors=tensors,
        parameters=sum(t.numel() for t in checkpoint.tensors.values() if t.is_floating_point()),
        fits=fits,
        nearest=nearest,
    )


def fitting(checkpoint: Checkpoint) -> tuple[tuple[str, ...], str]:
    """Name the systems, variants and layouts that load a checkpoint; and where none does, the nearest one."""
    fits, best, nearest = [], 0, ""
    for name in SYSTEMS:
        system = find_system(name)
        for variant in system.variants:
            template = partial(_template, name, variant)
            same, expected = _agreement(system, checkpoint.tensors, template)
            if same == expected:  # fit_checkpoint looks for near names in what does not fit, which takes seconds
                with contextlib.suppress(CheckpointError):
                    fitted = fit_checkpoint(checkpoint, system.weight_maps, template, str)
                    fits.append(f"{name} {variant}, {fitted.name} layout")
            if same > best:
                best, nearest = same, f"{name} {variant}: {same} of its {expected} tensors"
    return tuple(fits), "" if fits else nearest


@functools.cache
def _template(name: str, variant: str, layout: str) -> Mapping[str, Any]:
    """Return the expected state dict of a layout without memory."""
    system = find_system(name)
    recipe = resolve_recipe(name, {"variant": ("--variant", variant)})
    options = {**system.variants[variant].options, "classes": recipe.classes}
    return empty_state(system, options, recipe.size, layout)


def _agreement(system: System, tensors: State, template: Callable[[str], Mapping[str, Any]]) -> tuple[int, int]:
    """Return how many tensors of the best layout have their name and shape, and how many it has."""
    found = []
    for weight_map in system.weight_maps:
        expected = template(weight_map.layout)
        renamed = {weight_map.rename(key): tensor.shape for key, tensor in tensors.items()}
        found.append((sum(renamed.get(key) == tensor.shape for key, tensor in expected.items()), len(expected)))
    return max(found, default=(0, 0))


def _show_graph(report: GraphReport, console: Console, title: str = "") -> None:
    console.line(title or f"{report.name}: ONNX, {units.size(report.size)}", "strong")
    if report.external_files:
        console.line(f"weights outside the file: {', '.join(report.external_files)}")
    opsets = ", ".join(f"{domain} {version}" for domain, version in report.opsets.items())
    console.line(f"opset {opsets}; IR {report.ir_version}; written by {report.producer or 'an unnamed tool'}")
    rows = [("input", s.name, s.dtype, _shape(s.shape)) for s in report.inputs]
    rows += [("output", s.name, s.dtype, _shape(s.shape)) for s in report.outputs]
    console.table("interface", ("", "name", "type", "shape"), rows)
    if report.metadata:
        console.table("metadata", ("key", "value"), [(k, _shortened(v)) for k, v in report.metadata.items()])
    ops = Counter(report.ops).most_common()
    rest = sum(count for _, count in ops[_OPS_SHOWN:])
    shown = [(op, units.count(count)) for op, count in ops[:_OPS_SHOWN]]
    console.table(
        f"{units.count(sum(report.ops.values()))} nodes",
        ("operator", "nodes"),
        shown + ([("others", units.count(rest))] if rest else []),
    )
    console.line(f"weights      {_types(report.weight_types, 'values')}")
    console.line(f"activations  {_types(report.activation_types, 'tensors')}")
    console.line(f"parameters   {units.count(report.parameters)}")
    _show_macs(report, console)


def _show_macs(report: GraphReport, console: Console) -> None:
    where = ", ".join(f"{axis} = {size}" for axis, size in report.assumed.items())
    doubled = units.number(2 * report.macs / 1e9)
    console.line(f"multiply-adds {_counted(report.macs)}{f' at {where}' if where else ''} ({GFLOPS.format(doubled)})")
    for sentence in report.uncounted:
        console.warn(f"not counted: {sentence}")
    rows = [
        (m.path, units.count(m.parameters), _counted(m.macs), _share(m.macs, report.macs), units.count(m.nodes))
        for m in report.modules[:_MODULES_SHOWN]
    ]
    more = len(report.modules) - len(rows)
    title = f"biggest modules at depth {report.depth}" + (f" ({more} more)" if more else "")
    console.table(title, ("module", "parameters", "multiply-adds", "share", "nodes"), rows)


def _show_checkpoint(report: CheckpointReport, console: Console) -> None:
    console.line(f"{report.name}: checkpoint, {units.size(report.size)}, sha256 {report.sha256[:12]}", "strong")
    console.line(
        f"{units.count(len(report.tensors))} tensors, {units.count(report.parameters)} parameters"
        + (f", {report.wrapping}" if report.wrapping else "")
    )
    rows = [(t.name, t.dtype, _shape(t.shape)) for t in report.tensors[:_TENSORS_SHOWN]]
    more = len(report.tensors) - len(rows)
    console.table(
        "tensors" + (f" (the first {len(rows)}; --json has all)" if more else ""), ("key", "type", "shape"), rows
    )
    for fit in report.fits:
        console.line(f"fits {fit}", "good")
    if not report.fits:
        console.warn(f"fits no system of effdeploy; nearest: {report.nearest or 'none has a tensor in common'}")


def _show_engine(report: EngineReport, console: Console) -> None:
    engine = report.engine
    console.line(f"{engine.artifact.name}: {engine.backend} {engine.backend_version} for {engine.device}", "strong")
    console.line(f"of bundle {report.bundle}, {units.size(engine.artifact.size)}, sha256 {engine.artifact.sha256[:12]}")
    console.line(f"asked {engine.audit.asked.value}: {engine.audit.statement}", "" if engine.audit.ok else "bad")
    rows = [("input", s.name, s.dtype, _shape(s.shape)) for s in report.inputs]
    rows += [("output", s.name, s.dtype, _shape(s.shape)) for s in report.outputs]
    console.table("interface", ("", "name", "type", "shape"), rows)
    kernels = [(kind, units.count(count)) for kind, count in Counter(engine.audit.kernels).most_common()]
    kernels += [(f"fused {kind}", units.count(count)) for kind, count in engine.audit.fused.items()]
    console.table(f"kernels, from the {engine.audit.evidence}", ("kernels", "count"), kernels)
    console.table("build options", ("option", "value"), list(engine.options.items()))


def _show_bundle(report: BundleReport, console: Console) -> None:
    console.line(f"{report.name}: {report.status}: {report.verdict}", "strong")
    rows = [
        (
            stage, graph.name, units.size(graph.size), units.count(sum(graph.ops.values())),
            units.count(graph.parameters), _counted(graph.macs), _types(graph.weight_types, "values"),
        )
        for stage, graph in report.stages.items()
    ]  # fmt: skip
    columns = ("stage", "file", "size", "nodes", "parameters", "multiply-adds", "weights")
    console.table("stages", columns, rows)
    if report.stages:
        last, graph = list(report.stages.items())[-1]
        _show_graph(graph, console, f"{last}: {graph.name}")
    for engine in report.engines:
        console.line()
        _show_engine(engine, console)


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(axis) for axis in shape) + "]"


def _shortened(text: str) -> str:
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]}... ({len(text)} characters; --json has all)"


def _types(counts: Mapping[str, int], what: str) -> str:
    total = sum(counts.values())
    parts = [f"{dtype} {units.count(count)} ({_share(count, total)})" for dtype, count in counts.items()]
    return f"{', '.join(parts)} {what}" if parts else "none"


def _counted(macs: int) -> str:
    return f"{units.number(macs / 1e9)} G" if macs >= 1e9 else f"{units.number(macs / 1e6)} M"


def _share(part: int, whole: int) -> str:
    return units.percent(part / whole) if whole else "-"
