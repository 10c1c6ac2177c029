"""``effdeploy package``: a bundle's engine as a model of an NVIDIA Triton model repository.

Layout and fields follow Triton's documentation of model repository and model configuration; the tests parse what is
written here with the protobuf schema of Triton's own client package.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.answers import PackageRecord
from deploy.artifacts import artifact_of, open_artifact, read_manifest, storage_errors
from deploy.console import Console
from deploy.errors import BackendUnavailableError, BundleError, RecipeError, SizeError, StorageError
from deploy.labels import read_labels
from deploy.records import Batch, EngineRecord, RunRecord, TensorSpec, TraceRecord

FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""Backend to the file name that Triton's backend of the same name looks for."""
CONFIG = "config.pbtxt"
LABELS = "labels.txt"
KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU", "auto": "KIND_AUTO"}
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32",
          "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL"}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Fields = Sequence[tuple[str, Any]]


class _Word(str):
    """An enumeration's value: written without quotes."""


def package_triton(
    bundle: Path,
    repository: Path,
    console: Console,
    *,
    name: str | None = None,
    labels: Path | None = None,
    device: str | None = None,
    instances: int = 1,
    queue_delay: int = 100,
) -> PackageRecord:
    """Write a bundle's engine into a Triton model repository, as the next version of its model.

    Args:
        bundle: A bundle's folder.
        repository: Where models lie; made if need be.
        console: Where progress goes.
        name: The model's; default: the bundle's.
        labels: A text file with a class name per line, served with the logits; left out: the bundle's own names.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; default: what the engine was built for.
        instances: Copies of the model that serve at the same time.
        queue_delay: Microseconds that the dynamic batcher waits for more requests.

    Raises:
        BundleError: not a bundle, one without an engine, or one that failed its parity.
        BackendUnavailableError: Triton has no backend for this engine.
        SizeError: the engine takes no single images, which Triton's batcher may send.
        StorageError: another model lies there under this name, or the disk refuses.
    """
    run = read_manifest(bundle)
    engine = _engine(run, bundle)
    model = name or run.name
    if not _NAME.fullmatch(model):
        raise RecipeError(f"model name: got {model!r}, expected letters, digits, _, - and .", hint="--name detector")
    if device not in (None, *KINDS):
        raise RecipeError(f"device: got {device!r}, expected one of {', '.join(KINDS)}", hint="--device auto")
    classes = read_labels(labels, _classes(run)) if labels else _own_names(run)
    text = config_text(
        run, engine, model, device=device, instances=instances, queue_delay=queue_delay, labelled=bool(classes)
    )
    if not (run.parity and run.parity.ok):
        console.warn(f"this engine was not compared with PyTorch: effdeploy verify {bundle}")
    folder = repository / model
    with console.step("package") as step:
        source = open_artifact(engine.artifact, bundle)
        _require_same(folder, text)
        version = _add_version(source, folder, FILES[engine.backend])
        with storage_errors(f"cannot write {folder}", "--triton"):
            if classes:
                (folder / LABELS).write_text("\n".join(classes) + "\n", encoding="utf-8")
            (folder / CONFIG).write_text(text, encoding="utf-8")
            (folder / "README.md").write_text(_readme(run, engine, model, version), encoding="utf-8")
        step.note(f"{model}, version {version}")
    written = sorted(p for p in (folder / CONFIG, folder / LABELS, folder / "README.md") if p.is_file())
    files = (folder / str(version) / FILES[engine.backend], *written)
    for path in files:
        console.line(f"wrote {path}")
    console.line(f"start it as {folder / 'README.md'} says")
    record = PackageRecord(
        model=model, version=version, backend=engine.backend, files=tuple(artifact_of(p, repository) for p in files)
    )
    console.result(record)
    return record


def config_text(
    run: RunRecord, engine: EngineRecord, model: str, *, device: str | None = None, instances: int = 1,
    queue_delay: int = 100, labelled: bool = False,
) -> str:  # fmt: skip
    """Return a model's ``config.pbtxt``: protobuf text of Triton's ``ModelConfig``.

    Raises:
        SizeError: the engine takes no single images.
    """
    trace = _trace(run)
    batch = trace.batch
    largest = batch.max if batch.dynamic else 0  # 0: shapes are whole, Triton never adds an axis
    if batch.dynamic and batch.min > 1:
        raise SizeError(
            f"the engine takes batches of {batch.min} to {batch.max}, Triton's batcher sends any from 1 to {batch.max}",
            hint=f"export with --batch 1:{batch.opt}:{batch.max}",
        )
    kind = KINDS[device or ("cuda" if _on_gpu(engine) else "cpu")]
    outputs = [_tensor(spec, largest) for spec in trace.outputs]
    if labelled:
        outputs[0] = [*outputs[0], ("label_filename", LABELS)]
    profiles = [str(index) for index in range(len(run.recipe.get("engine", {}).get("profiles") or ()))]
    group = [("count", instances), ("kind", _Word(kind))]
    fields: list[tuple[str, Any]] = [
        ("name", model),
        ("backend", engine.backend),
        ("default_model_filename", FILES[engine.backend]),
        ("max_batch_size", largest),
        ("input", [_tensor(spec, largest) for spec in trace.inputs]),
        ("output", outputs),
        ("instance_group", [[*group, ("profile", profiles)] if profiles else group]),
    ]
    if largest > 1:
        batcher = [("preferred_batch_size", [batch.opt]), ("max_queue_delay_microseconds", queue_delay)]
        fields.append(("dynamic_batching", batcher))
    if (threads := engine.options.get("threads", "")).isdigit():
        fields.append(("parameters", [[("key", "intra_op_thread_count"), ("value", [("string_value", threads)])]]))
    fields.append(("model_warmup", [_warmup(trace.inputs, size, largest) for size in _sizes(batch)]))
    return "\n".join(_lines(fields)) + "\n"


def _engine(run: RunRecord, bundle: Path) -> EngineRecord:
    """Return the engine that Triton can serve."""
    if not run.engines:
        raise BundleError(f"{bundle} has no engine: its run stopped after {run.until.value}", hint="export it further")
    if run.parity is not None and not run.parity.ok:
        raise BundleError(f"{bundle} is not fit to serve: {run.parity.verdict}", hint="effdeploy verify BUNDLE")
    served = [engine for engine in run.engines if engine.backend in FILES]
    if not served:
        raise BackendUnavailableError(
            f"Triton has no backend for an engine of {run.engines[0].backend}",
            hint=f"effdeploy build {bundle} --backend tensorrt, on the server's kind of GPU; or --backend onnxruntime",
        )
    return served[0]


def _trace(run: RunRecord) -> TraceRecord:
    if run.trace is None:
        raise BundleError(f"{run.name}: its manifest has an engine and no trace", hint="export again")
    return run.trace


def _on_gpu(engine: EngineRecord) -> bool:
    return engine.backend == "tensorrt" or engine.device.startswith("cuda")


def _classes(run: RunRecord) -> int:
    """Return the number of classes that the first output has a score for.

    Raises:
        BundleError: it has none, as that of a detector with its post-processor.
    """
    classes, scores = run.recipe.get("classes"), _trace(run).outputs[0]
    if scores.shape[-1] != classes:
        raise BundleError(
            f"the output {scores.name} {list(scores.shape)} has no score for each of {classes} classes",
            hint="leave --labels out",
        )
    return int(classes)


def _own_names(run: RunRecord) -> tuple[str, ...]:
    """Return the names that the bundle was exported with, where its first output has a score for each."""
    names = run.model.names
    return names if names and _trace(run).outputs[0].shape[-1] == len(names) else ()


def _tensor(spec: TensorSpec, largest: int) -> Fields:
    dims = [int(size) if not isinstance(size, str) else -1 for size in (spec.shape[1:] if largest else spec.shape)]
    return [("name", spec.name), ("data_type", _Word(_TYPES[spec.dtype])), ("dims", dims)]


def _sizes(batch: Batch) -> list[int]:
    return sorted({batch.min, batch.opt, batch.max}) if batch.dynamic else [0]


def _warmup(inputs: Iterable[TensorSpec], size: int, largest: int) -> Fields:
    """One request of each size: engines choose kernels and fill caches when they meet a shape first."""
    given = []
    for spec in inputs:
        (_, kind, dims) = _tensor(spec, largest)
        content = "random_data" if spec.dtype.startswith("float") else "zero_data"
        given.append([("key", spec.name), ("value", [kind, dims, (content, True)])])
    name = f"batch {size}" if size else "whole batch"
    return [("name", name), ("batch_size", size), ("inputs", given)]


def _lines(fields: Fields, indent: str = "") -> Iterable[str]:
    """Write protobuf text: repeated messages as a block each, repeated numbers and words in brackets."""
    for key, value in fields:
        blocks = value if isinstance(value, list) and value and isinstance(value[0], list) else None
        if blocks is None and isinstance(value, list) and value and isinstance(value[0], tuple):
            blocks = [value]
        if blocks is None:
            yield f"{indent}{key}: {_scalar(value)}"
            continue
        for block in blocks:
            yield f"{indent}{key} {{"
            yield from _lines(block, indent + "  ")
            yield f"{indent}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, _Word):
        return str(value)
    return json.dumps(value)  # text in quotes, true and false, numbers


def _require_same(folder: Path, text: str) -> None:
    """Refuse to add a version to a model whose configuration is another one.

    Raises:
        StorageError: so; both configurations are left as they are.
    """
    path = folder / CONFIG
    if not folder.exists() or not path.is_file():
        return
    with storage_errors(f"cannot read {path}", "--triton"):
        before = path.read_text(encoding="utf-8")
    changed = [
        line for line in difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]  # fmt: skip
    if changed:
        raise StorageError(
            f"{path} is of a model with another configuration: {'; '.join(changed[:6])}",
            hint=f"--name another-name, or remove {path} if this one is to replace it",
        )


def _add_version(source: Path, folder: Path, file: str) -> int:
    """Put the engine into the next version's folder, which appears whole: a running server may be watching."""
    with storage_errors(f"cannot write {folder}", "--triton"):
        folder.mkdir(parents=True, exist_ok=True)
        version = 1 + max((int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), default=0)
        scratch = Path(tempfile.mkdtemp(prefix=".version-", dir=folder))
        try:
            shutil.copy2(source, scratch / file)
            scratch.chmod(0o755)  # mkdtemp makes it private
            scratch.rename(folder / str(version))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return version


def _readme(run: RunRecord, engine: EngineRecord, model: str, version: int) -> str:
    """Say how to start the server and what to send."""
    trace = _trace(run)
    gpus = "--gpus all " if _on_gpu(engine) else ""
    own = f" The engine needs TensorRT {engine.backend_version}: take the image of Triton that has it."
    rows = [f"| {kind} | {spec.name} | {spec.dtype} | {list(spec.shape)} |"
            for kind, specs in (("in", trace.inputs), ("out", trace.outputs)) for spec in specs]  # fmt: skip
    preprocess: Mapping[str, Any] = run.recipe.get("preprocess", {})
    made = "RGB, uint8 [height, width, 3], fitted" if run.model.preprocess.embed else "RGB, float32, made"
    return f"""# {model}

Version {version} is {run.name}, {engine.backend} {engine.backend_version}, sha256 {engine.artifact.sha256[:12]}.
{run.verdict}. {run.model.weights.statement}.

    docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -v "$PWD:/models" \\
        nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository=/models

Run it in the folder that holds `{model}/`.{own if engine.backend == "tensorrt" else ""} Ready when this answers 200:

    curl -s -o /dev/null -w '%{{http_code}}\\n' localhost:8000/v2/models/{model}/ready

| | tensor | type | shape |
|---|---|---|---|
{chr(10).join(rows)}

Images are {made} as the recipe says: {json.dumps(preprocess)}.
"""
