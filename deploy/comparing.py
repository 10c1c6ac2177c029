"""``effdeploy diff``: two bundles against each other, and gates for CI on what changed.

Everything is read from the manifests; the files themselves may be gone. Latencies of two runs are compared only when
machine, device, threads and batch agree; an interleaved measurement (``--measure``) compares them whatever the records
say, and with less noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import summary, units
from deploy.artifacts import read_manifest
from deploy.console import Console
from deploy.errors import GateError
from deploy.gates import Gate, Metric, check_gate, parse_gate
from deploy.records import BenchRecord, Latency, Ratio, RunRecord, record
from deploy.summary import last_stage

# Median of n normal values: standard error 1.2533 sigma / sqrt(n); p10 to p90 is 2.5631 sigma; 95 % is 1.96 errors.
_MEDIAN_95 = 1.96 * 1.2533 / 2.5631


@record
class Change:
    """Something that is not the same in both bundles; empty where one has none."""

    key: str
    a: str
    b: str


@record
class BundleDiff:
    """Two bundles against each other. ``operators`` counts nodes by stage: ``"patched: MatMul"``."""

    a: str
    b: str
    asked: tuple[Change, ...]
    environment: tuple[Change, ...]
    precision: tuple[Change, ...]
    operators: tuple[Change, ...]
    parity: tuple[Change, ...]
    metrics: tuple[Metric, ...]
    gates: tuple[Gate, ...]


def diff_bundles(
    a: Path,
    b: Path,
    console: Console,
    *,
    fail_if: Sequence[str] = (),
    strict: bool = False,
    measured: BenchRecord | None = None,
) -> BundleDiff:
    """Compare two bundles and judge the gates.

    Args:
        a: The bundle before.
        b: The bundle after: gates ask how it differs from ``a``.
        console: Where it is written.
        fail_if: Expressions such as ``latency>5%``; see ``deploy.gates``.
        strict: Whether a gate inside the noise counts as fired.
        measured: Both engines timed against each other just now, in the order ``a``, ``b``.

    Raises:
        BundleError: no bundle there.
        RecipeError: an expression that cannot be read; says which metrics there are.
        BenchmarkError: a gate on something that was not measured or cannot be compared.
        GateError: a gate fired.
    """
    wanted = [parse_gate(text) for text in fail_if]
    before, after = read_manifest(a), read_manifest(b)
    metrics = {m.name: m for m in _metrics(before, after, measured)}
    diff = BundleDiff(
        a=str(a),
        b=str(b),
        asked=tuple(_changes(_asked(before), _asked(after))),
        environment=tuple(_changes(_environment(before), _environment(after))),
        precision=tuple(_changes(_precision(before), _precision(after))),
        operators=tuple(_changes(_operators(before), _operators(after))),
        parity=tuple(_both(_errors(before), _errors(after))),
        metrics=tuple(metrics.values()),
        gates=tuple(check_gate(expression, metrics[expression.metric]) for expression in wanted),
    )
    _show(diff, console)
    console.result(diff)
    _judge(diff.gates, strict)
    return diff


def _judge(gates: Sequence[Gate], strict: bool) -> None:
    failing = [g for g in gates if g.state == "fired" or (strict and g.state == "undecided")]
    if failing:
        raise GateError(
            "; ".join(f"{g.expression}: {g.statement}" for g in failing),
            hint="look at the differences above; the bundles were not changed",
        )


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Change]:
    return (change for change in _both(a, b) if change.a != change.b)


def _both(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Change]:
    return (Change(key=key, a=a.get(key, ""), b=b.get(key, "")) for key in {**a, **b})


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys; everything else as JSON writes it."""
    if not isinstance(value, Mapping):
        return {prefix: value if isinstance(value, str) else json.dumps(value)}
    return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}


def _asked(run: RunRecord) -> dict[str, str]:
    found = _flat(run.recipe)
    found.update({"form": run.model.form, "loaded": run.model.weights.statement, "stopped after": run.until.value})
    return found


def _environment(run: RunRecord) -> dict[str, str]:
    e = run.environment
    machine = {"python": e.python, "platform": e.platform, "cpu": e.cpu, "cores": str(e.cores), "gpu": e.gpu}
    backends = {f"backend {x.backend} on {x.device}": x.backend_version for x in run.engines}
    return {"effdeploy": run.effdeploy, **machine, **e.packages, **backends}


def _precision(run: RunRecord) -> dict[str, str]:
    found = {"asked": summary.precision_asked(run)}
    if run.precision:
        counts = ", ".join(f"{dtype} {count}" for dtype, count in sorted(run.precision.dtype_counts.items()))
        found["graph"] = f"{counts}; {run.precision.casts} casts"
    found.update({name: statement for name, statement, _ in summary.precision_ran(run)})
    return found


def _operators(run: RunRecord) -> dict[str, str]:
    stages = {"traced": run.trace, "patched": run.passes}
    found = {}
    for name, stage in stages.items():
        if stage is not None:
            found[f"{name}: all"] = str(sum(stage.op_counts.values()))
            found.update({f"{name}: {op}": str(count) for op, count in sorted(stage.op_counts.items())})
    return found


def _errors(run: RunRecord) -> dict[str, str]:
    if run.parity is None:
        return {}
    return {
        f"{c.stage}: {c.output}": units.number(c.max_relative) + ("" if c.passed else " FAIL")
        for c in run.parity.comparisons
    }


def _metrics(a: RunRecord, b: RunRecord, measured: BenchRecord | None) -> Iterator[Metric]:
    for name, (meaning, kind, read) in READERS.items():
        yield Metric(name=name, meaning=meaning, kind=kind, a=read(a), b=read(b))
    yield from _measured_latency(measured) if measured else _recorded_latency(a, b)


def _recorded_latency(a: RunRecord, b: RunRecord) -> Iterator[Metric]:
    """Compare latencies of two runs; call-to-call spread stands for what differs from run to run."""
    before, after = _latency(a), _latency(b)
    obstacle = _obstacle(a, b, before, after)
    noise = math.hypot(*(_spread(latency) for latency in (before, after) if latency))
    for name, (meaning, kind, read) in LATENCY_READERS.items():
        yield Metric(
            name=name,
            meaning=meaning,
            kind=kind,
            a=read(before) if before else None,
            b=read(after) if after else None,
            noise=0.0 if name == "memory" else noise,
            obstacle=obstacle,
        )


def _measured_latency(measured: BenchRecord) -> Iterator[Metric]:
    """Compare latencies of one interleaved measurement, with the 95 % interval of the median ratio as noise."""
    ratio = measured.ratios[0] if measured.ratios else None
    found = {latency.name: latency for latency in measured.latencies}
    before, after = (found[ratio.name], found[ratio.baseline]) if ratio else (None, None)
    obstacle = "" if ratio else "the engines take other batches or run on other devices"
    noise = {"p99": math.hypot(_spread(before), _spread(after))} if before and after else {}
    if ratio:
        half = _half_interval(ratio)
        noise |= {"latency": half, "throughput": half / ratio.median**2}
    for name, (meaning, kind, read) in LATENCY_READERS.items():
        yield Metric(
            name=name,
            meaning=meaning,
            kind=kind,
            a=read(before) if before else None,
            b=read(after) if after else None,
            noise=noise.get(name, 0.0),
            ratio=_change_of(name, ratio),
            obstacle=obstacle,
        )


def _change_of(name: str, ratio: Ratio | None) -> float | None:
    """Return B / A of a metric that follows from the ratio of the call times."""
    if ratio is None or name not in ("latency", "throughput"):
        return None
    return ratio.median if name == "latency" else 1 / ratio.median


def _half_interval(ratio: Ratio) -> float:
    """Return half of the 95 % interval of the median; with too few rounds for one, that of normal values."""
    if ratio.interval is not None:
        return (ratio.interval[1] - ratio.interval[0]) / 2
    return _MEDIAN_95 * (ratio.p90 - ratio.p10) / math.sqrt(max(ratio.rounds, 1))


def _latency(run: RunRecord) -> Latency | None:
    """Return the first engine's latency; engines are timed before the baselines."""
    return run.bench.latencies[0] if run.bench and run.bench.latencies else None


def _spread(latency: Latency) -> float:
    """Return half the range from p10 to p90 of single calls, as a share of the median."""
    low, high = np.percentile(latency.samples, (10, 90)) if latency.samples else (latency.p50, latency.p90)
    return float(high - low) / 2 / latency.p50


def _obstacle(a: RunRecord, b: RunRecord, before: Latency | None, after: Latency | None) -> str:
    """Say why two recorded latencies cannot be compared, or return an empty string."""
    if before is None or after is None:
        missing = [(name, run) for name, run, found in (("A", a, before), ("B", b, after)) if found is None]
        return "; ".join(f"{name}: {summary.why_missing(run, 'latency')}" for name, run in missing)
    here, there = a.environment, b.environment
    pairs: tuple[tuple[str, str | int, str | int], ...] = (
        ("cpu", here.cpu, there.cpu),
        ("platform", here.platform, there.platform),
        ("gpu", here.gpu, there.gpu),
        ("cores", here.cores, there.cores),
        ("device", before.device, after.device),
        ("threads", before.threads, after.threads),
        ("batch", before.batch, after.batch),
    )
    return ", ".join(f"{name} {x} and {y}" for name, x, y in pairs if x != y)


def _error(run: RunRecord) -> float | None:
    worst = summary.worst(last_stage(run))
    return worst.max_relative if worst else None


def _cosine(run: RunRecord) -> float | None:
    return min((c.cosine for c in last_stage(run)), default=None)


def _top1(run: RunRecord) -> float | None:
    return min((c.top1 for c in last_stage(run) if c.top1 is not None), default=None)


def _drift(run: RunRecord) -> float | None:
    return run.model.drift.fp32_relative if run.model.drift else None


def _ops(run: RunRecord) -> float | None:
    return float(sum(run.passes.op_counts.values())) if run.passes else None


def _casts(run: RunRecord) -> float | None:
    return float(run.precision.casts) if run.precision else None


def _engine_bytes(run: RunRecord) -> float | None:
    files = {e.artifact.name: e.artifact.size for e in run.engines}
    return float(sum(files.values())) if files else None


def _kernels(run: RunRecord) -> float | None:
    return float(sum(sum(e.audit.kernels.values()) for e in run.engines)) if run.engines else None


Reader = tuple[str, str, Callable[[RunRecord], float | None]]
READERS: Mapping[str, Reader] = {
    "size": ("engine files", "bytes", _engine_bytes),
    "error": ("largest relative error of the last compared stage", "number", _error),
    "cosine": ("smallest cosine of the last compared stage", "cosine", _cosine),
    "top1": ("smallest top-1 agreement of the last compared stage", "share", _top1),
    "drift": ("deploy form against training form, float32, relative", "number", _drift),
    "ops": ("nodes of the patched graph", "count", _ops),
    "casts": ("casts between float types", "count", _casts),
    "kernels": ("kernels of the engines", "count", _kernels),
    "parameters": ("parameters of the deploy form", "count", lambda r: float(r.model.deploy_parameters)),
    "macs": ("multiply-adds an image", "count", lambda r: float(r.model.macs)),
}
LATENCY_READERS: Mapping[str, tuple[str, str, Callable[[Latency], float | None]]] = {
    "latency": ("median time of a call", "ms", lambda x: x.p50),
    "p99": ("99th percentile of a call", "ms", lambda x: x.p99),
    "throughput": ("images a second", "number", lambda x: x.throughput),
    "memory": ("memory of opening and the first call", "bytes", lambda x: float(x.peak_memory) or None),
}


def _show(diff: BundleDiff, console: Console) -> None:
    console.line(f"A  {diff.a}", "strong")
    console.line(f"B  {diff.b}", "strong")
    parts = (
        ("asked", diff.asked), ("environment", diff.environment), ("precision", diff.precision),
        ("operators", diff.operators),
    )  # fmt: skip
    for title, changes in parts:
        if changes:
            console.table(title, ("", "A", "B"), [(c.key, c.a or "-", c.b or "-") for c in changes])
        else:
            console.line(f"{title}: the same")
    if diff.parity:
        rows = [(c.key, c.a or "-", c.b or "-") for c in diff.parity]
        console.table("parity: largest relative error", ("stage: output", "A", "B"), rows)
    rows_ = [(m.name, m.text(m.a), m.text(m.b), m.change_text(), m.remark()) for m in diff.metrics]
    console.table("metrics", ("metric", "A", "B", "change", ""), rows_)
    for gate in diff.gates:
        tone = {"fired": "bad", "passed": "good"}.get(gate.state, "warn")
        console.line(f"gate {gate.expression}: {gate.state}: {gate.statement}", tone)
