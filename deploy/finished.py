"""The functions of ``deploy.api`` on what is finished: bundles, engines, checkpoints and ONNX files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.keywords import Names, PathLike, console_or_silence, listed, path_of, paths_of

if TYPE_CHECKING:
    from deploy.answers import PackageRecord, PredictionRecord
    from deploy.comparing import BundleDiff
    from deploy.console import Console
    from deploy.contents import BundleReport, CheckpointReport, EngineReport
    from deploy.graph.inspection import GraphReport
    from deploy.records import BenchRecord, LintRecord, RunRecord


def verify(
    bundle: PathLike, *, weights: PathLike | None = None, images: PathLike | None = None, console: Console | None = None
) -> RunRecord:
    """Check a bundle's files against its manifest, and its engine against PyTorch again.

    Args:
        bundle: Bundle folder.
        weights: As for ``export``; needed when the bundle was made from a file that lies elsewhere now.
        images: Folder of real photos, added to the deterministic inputs.
        console: Where progress goes; nowhere when left out.

    Returns:
        The bundle's record with the new parity; the bundle itself is not touched.

    Raises:
        BundleError: A file is missing or was changed, or there is no engine.
        CheckpointError: The weights are not those that the bundle was made from.
        ParityError: Outputs are out of tolerance.
    """
    from deploy.bundles import verify_bundle

    return verify_bundle(Path(bundle), console_or_silence(console), weights=weights, images=path_of(images))


def benchmark(
    bundles: PathLike | Sequence[PathLike],
    *,
    baseline: Names | None = None,
    weights: PathLike | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> BenchRecord:
    """Time the engines of bundles against each other, interleaved, and against baselines: ``effdeploy bench``.

    Args:
        bundles: One bundle folder or several.
        baseline: Any of ``"eager"``, ``"compile"``, ``"naive"``; a sequence, or one text with commas.
        weights: As for ``verify``, for the baselines.
        seconds: Measure at least this long per candidate.
        threads: CPU threads of every candidate while measuring.
        console: Where progress goes; nowhere when left out.

    Returns:
        Latencies in milliseconds and the ratios between candidates.

    Raises:
        BenchmarkError: No engine of the bundles can run here, or a bundle was named twice.
        BundleError: A folder is no bundle, or was changed.
    """
    from deploy.bundles import bench_bundles

    return bench_bundles(
        paths_of(bundles), console_or_silence(console), baselines=listed(baseline) or (), weights=weights,
        seconds=seconds, threads=threads,
    )  # fmt: skip


def render(
    bundles: PathLike | Sequence[PathLike], *, out: PathLike | None = None, console: Console | None = None
) -> tuple[Path, ...]:
    """Write report.html and report.md again, from manifests alone: ``effdeploy report``.

    Args:
        bundles: One bundle folder, or several for a comparison.
        out: Folder to write to; default: the bundle, or the current folder for several.
        console: Where progress goes; nowhere when left out.

    Returns:
        The files that were written.

    Raises:
        BundleError: A folder is no bundle.
        StorageError: The folder cannot be written to.
    """
    from deploy.answers import FilesRecord
    from deploy.report import render_bundles

    console = console_or_silence(console)
    files = render_bundles(paths_of(bundles), path_of(out))
    for path in files:
        console.line(f"wrote {path}")
    console.result(FilesRecord(files=tuple(str(path) for path in files)))
    return files


def inspect(
    path: PathLike,
    *,
    batch: int | None = None,
    axis: Mapping[str, int] | None = None,
    depth: int = 2,
    console: Console | None = None,
) -> GraphReport | CheckpointReport | EngineReport | BundleReport:
    """Say what an ONNX file, a checkpoint, an engine or a bundle holds.

    Args:
        path: ONNX file, checkpoint, engine of a bundle, or bundle folder; a text may name a checkpoint as ``weights``
            of ``export`` does.
        batch: Count multiply-adds for this batch; 1 when left out.
        axis: Sizes of other dynamic axes, e.g. ``{"height": 224}``.
        depth: Components of the module path that are told apart.
        console: Where the tables go; nowhere when left out.

    Returns:
        A report of the kind that fits what lies there.

    Raises:
        StorageError: Nothing is there, or it cannot be read.
        GraphPassError: The file is not a whole ONNX model.
        CheckpointError: The checkpoint cannot be read.
        BundleError: The folder is no bundle, or a file of it was changed.
        RecipeError: ``batch`` or ``axis`` name what is not dynamic.
    """
    from deploy.contents import inspect_path

    return inspect_path(path, console_or_silence(console), batch=batch, sizes=axis, depth=depth)


def lint(model: PathLike, *, for_: Names = (), strict: bool = False, console: Console | None = None) -> LintRecord:
    """Hold an ONNX file against what runtimes refuse: ``effdeploy lint``.

    Args:
        model: ONNX file; data beside it is read only where a rule needs its values.
        for_: Runtimes, with or without a version: ``"tensorrt==11.4"``, ``"onnxruntime"``; a sequence, or one text with
            commas. Default: all runtimes that the rules know.
        strict: Count warnings as errors.
        console: Where the table goes; nowhere when left out.

    Returns:
        The findings: none of them an error.

    Raises:
        LintError: The file breaks a rule; ``record`` of the error holds all findings.
        UnknownNameError: No such runtime.
        RecipeError: A version that the rules do not cover.
        GraphPassError: It is not a whole ONNX model.
        StorageError: The file cannot be read.
    """
    from deploy.linting.show import lint_model

    return lint_model(Path(model), listed(for_) or (), console_or_silence(console), strict=strict)


def diff(
    a: PathLike,
    b: PathLike,
    *,
    fail_if: str | Sequence[str] = (),
    strict: bool = False,
    measure: bool = False,
    seconds: float | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> BundleDiff:
    """Compare two bundles, with gates for CI.

    Args:
        a: The bundle before.
        b: The bundle after: gates ask how it differs from ``a``.
        fail_if: Gates: ``"latency>5%"`` (B against A), ``"ops>+10"`` (B - A), ``"error>0.01"`` (B); one or several.
        strict: Count a gate inside the noise as fired.
        measure: Time both engines now, interleaved, instead of comparing records.
        seconds: With ``measure``: at least this long per candidate.
        threads: With ``measure``: CPU threads of every candidate.
        console: Where the tables go; nowhere when left out.

    Returns:
        What was asked, versions, precision, operators, errors and metrics, as far as they differ.

    Raises:
        BundleError: A folder is no bundle.
        RecipeError: A gate that cannot be read.
        BenchmarkError: A gate on something that was not measured.
        GateError: A gate fired.
    """
    from deploy.bundles import bench_bundles
    from deploy.comparing import diff_bundles
    from deploy.gates import parse_gate

    console, gates = console_or_silence(console), [fail_if] if isinstance(fail_if, str) else fail_if
    for text in gates:
        parse_gate(text)  # before the measurement
    first, second = Path(a), Path(b)
    measured = bench_bundles([first, second], console, seconds=seconds, threads=threads) if measure else None
    return diff_bundles(first, second, console, fail_if=gates, strict=strict, measured=measured)


def package(
    bundle: PathLike,
    *,
    triton: PathLike,
    name: str | None = None,
    labels: PathLike | None = None,
    device: str | None = None,
    instances: int = 1,
    queue_delay: int = 100,
    console: Console | None = None,
) -> PackageRecord:
    """Write a bundle's engine into a Triton model repository, as the next version of its model.

    Args:
        bundle: Bundle folder.
        triton: The repository's folder; made if need be.
        name: The model's name; default: the bundle's.
        labels: Text file with a class name per line, served with the scores.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; default: what the engine was built for.
        instances: Copies of the model that serve at the same time.
        queue_delay: Microseconds that the dynamic batcher waits for more requests.
        console: Where progress goes; nowhere when left out.

    Returns:
        The model's name, its version, and the files that were written.

    Raises:
        BundleError: The folder is no bundle, has no engine, or failed its parity.
        BackendUnavailableError: Triton has no backend for the engine.
        SizeError: The engine does not take every batch from one up.
        StorageError: A model with another configuration has this name, or the disk refuses.
    """
    from deploy.packaging import package_triton

    return package_triton(
        Path(bundle), Path(triton), console_or_silence(console), name=name, labels=path_of(labels), device=device,
        instances=instances, queue_delay=queue_delay,
    )  # fmt: skip


def predict(
    bundle: PathLike,
    photo: PathLike,
    *,
    labels: PathLike | None = None,
    top: int = 5,
    threshold: float = 0.5,
    out: PathLike | None = None,
    console: Console | None = None,
) -> PredictionRecord:
    """Run a bundle's engine on a photo, from the bundle alone: ``effdeploy run``.

    Args:
        bundle: Bundle folder.
        photo: Image file; it goes through the recipe's preprocessing.
        labels: Text file with a class name per line.
        top: Classes to name, of a classifier.
        threshold: Lowest score of a detection, of a detector.
        out: PNG file to draw; nothing is drawn when left out.
        console: Where the table goes; nowhere when left out.

    Returns:
        The best classes with their probabilities, or the detections with boxes in the photo's pixels.

    Raises:
        BundleError: The folder is no bundle, was changed, or its engine gives neither classes nor detections.
        BackendUnavailableError: No engine of the bundle runs here.
        ImageError: The photo or the class names cannot be read.
        StorageError: The picture cannot be written.
    """
    from deploy.predicting import predict_photo

    return predict_photo(
        Path(bundle), Path(photo), console_or_silence(console), labels=path_of(labels), top=top, threshold=threshold,
        out=path_of(out),
    )  # fmt: skip
