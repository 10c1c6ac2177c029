"""The sections that let a reader repeat a run: files, environment, recipe, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from deploy import summary, units
from deploy.records import RunRecord, Stage, TraceRecord, to_json
from deploy.report.blocks import WARN, Block, Cell, Code, Details, Facts, Section, Table, Text, cells
from deploy.report.equivalents import pixel_range, tensorrt_commands

# What of a recipe has an option of its own; the precision is an option by itself.
_OPTIONS = (
    ("variant", "--variant"),
    ("size", "--size"),
    ("batch", "--batch"),
    ("precision", "--"),
    ("weights", "--weights"),
    ("target", "--target"),
    ("engine.backend", "--backend"),
    ("engine.sm", "--sm"),
    ("quantization.calib", "--calib"),
    ("parity.images", "--images"),
    ("bench.baselines", "--baseline"),
    ("bench.threads", "--threads"),
    ("labels", "--labels"),
)


def files(run: RunRecord) -> Section:
    """List every file of the bundle with its size and hash."""
    found = summary.files(run)
    if not found:
        return Section(slug="files", title="Files", blocks=(Text(text=summary.why_missing(run, "trace"), tone=WARN),))
    rows = tuple(
        cells(Cell(text=name, code=True), units.size(size), Cell(text=sha256, code=True))
        for name, size, sha256 in found
    )
    table = Table(
        title="Files of the bundle", columns=("file", "size", "sha256"), rows=rows, numeric=frozenset({"size"})
    )
    return Section(slug="files", title="Files", blocks=(table, _seconds(run), *_origins(run)))


def _origins(run: RunRecord) -> tuple[Block, ...]:
    """Say which stages this run made and which it took from earlier ones that had consumed the same."""
    if not run.origins:
        return ()
    rows = tuple(
        cells(
            stage.value,
            "reused" if origin.reused else "run",
            origin.made,
            origin.why or "consumes the same as the earlier run",
            Cell(text=origin.key[:12], code=True),
        )
        for stage in Stage
        if (origin := run.origins.get(stage.value))
    )
    columns = ("stage", "this run", "made", "why", "key")
    return (Table(title="Where each stage comes from", columns=columns, rows=rows),)


def _seconds(run: RunRecord) -> Block:
    order = {stage: i for i, stage in enumerate(summary.ROAD)}
    taken = sorted(run.stage_seconds.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    rows = tuple((stage, Cell(text=units.seconds(value))) for stage, value in taken)
    return Details(summary="Time per stage of the export", blocks=(Facts(rows=rows),))


def environment(run: RunRecord) -> Section:
    """Name the machine and the versions."""
    e, w, p = run.environment, run.model.weights, run.model.preprocess
    machine = (("cpu", e.cpu), ("cores", str(e.cores)), ("gpu", e.gpu), ("platform", e.platform), ("python", e.python))
    weights = (
        (("kind", w.kind), ("from", w.source), ("layout", w.layout), ("sha256", w.sha256))
        if w.sha256
        else (("kind", w.kind),)
    )
    fit = "stretched" if p.fit == "stretch" else f"crop {p.crop:g}"
    where = "in the graph except " if p.embed else ""
    image = (
        f"{where}{fit}, {p.interpolation}, mean {', '.join(f'{v:g}' for v in p.mean)}, "
        f"std {', '.join(f'{v:g}' for v in p.std)}"
    )
    rows = [
        *machine,
        ("effdeploy", run.effdeploy),
        *sorted(e.packages.items()),
        *((f"weights {name}", value) for name, value in weights if value),
        ("preprocessing", image),
        ("paper", run.model.paper),
    ]
    facts = Facts(rows=tuple((name, Cell(text=value)) for name, value in rows))
    return Section(slug="environment", title="Environment", blocks=(facts,))


def recipe(run: RunRecord) -> Section:
    """Give the resolved recipe; JSON is YAML, so it can be saved and used again."""
    text = json.dumps(to_json(run.recipe), indent=2, sort_keys=True, ensure_ascii=False)
    block = Details(summary="Resolved recipe (JSON is YAML)", blocks=(Code(text=text, language="json"),))
    return Section(slug="recipe", title="Recipe", blocks=(block,))


def reproduce(run: RunRecord) -> Section:
    """Give the command lines that make and check the same files."""
    until = [] if run.until is Stage.REPORT else ["--until", run.until.value]
    whole = shlex.join(["effdeploy", "export", "recipe.yaml", *until])
    blocks: list[Block] = [
        Text(text="The same run, in the bundle's folder: recipe.yaml holds every setting."),
        Code(text=whole),
        Text(text="By options, from anywhere; what else differs from the shipped recipe is in recipe.yaml only:"),
        Code(text=export_command(run)),
    ]
    if polygraphy := polygraphy_commands(run):
        words = "Without effdeploy, in the bundle's folder: typed file against traced file on the same seeded inputs."
        blocks += [Text(text=words), Code(text=polygraphy)]
    if tensorrt := tensorrt_commands(run):
        words = "The TensorRT engines with NVIDIA's tools: build, time, compare; trtexec is not in TensorRT's wheels."
        blocks += [Text(text=words), Code(text=tensorrt)]
    return Section(slug="reproduce", title="Reproduce", blocks=tuple(blocks))


def export_command(run: RunRecord) -> str:
    """Return the ``effdeploy export`` line for the main options; what else was set is in ``recipe.yaml`` only."""
    words = ["effdeploy", "export", run.model.system]
    for keys, option in _OPTIONS:
        value = _lookup(run.recipe, keys)
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if value is not None and text:
            words += [f"--{text}"] if option == "--" else [option, text]
    if run.model.preprocess.embed:
        words.append("--embed-preprocess")
    if run.until is not Stage.REPORT:
        words += ["--until", run.until.value]
    return shlex.join(words)


def _lookup(recipe: Mapping[str, Any], keys: str) -> Any:
    value: Any = recipe
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def polygraphy_commands(run: RunRecord) -> str:
    """Return two ``polygraphy run`` lines that hold the typed file against the traced one on ONNX Runtime."""
    if run.trace is None or run.precision is None:
        return ""
    seeded = ["--onnxrt", "--seed", "0", *_input_shapes(run.trace), *pixel_range(run.trace.inputs)]
    first = ["polygraphy", "run", run.trace.artifact.name, *seeded, "--save-outputs", "traced.json"]
    second = ["polygraphy", "run", run.precision.artifact.name, *seeded, "--load-outputs", "traced.json"]
    tolerance = run.parity.tolerances.get(run.precision.precision.value) if run.parity else None
    if tolerance and tolerance.cosine is not None:
        second += ["--compare", "cosine_similarity", "--cosine-similarity-threshold", repr(tolerance.cosine)]
    return f"{shlex.join(first)}\n{shlex.join(second)}"


def _input_shapes(trace: TraceRecord) -> list[str]:
    fixed = []
    for spec in trace.inputs:
        if any(isinstance(axis, str) for axis in spec.shape):
            shape = ",".join(str(trace.batch.opt if isinstance(a, str) else a) for a in spec.shape)
            fixed.append(f"{spec.name}:[{shape}]")
    return ["--input-shapes", *fixed] if fixed else []
