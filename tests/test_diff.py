"""``diff`` and its gates: what fires, what passes, what cannot be told, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from support import effdeploy

from deploy.artifacts import read_manifest, write_manifest
from deploy.comparing import LATENCY_READERS, READERS, diff_bundles
from deploy.console import Console, Mode
from deploy.errors import BenchmarkError, GateError, RecipeError
from deploy.gates import METRICS, Metric, check_gate, parse_gate
from deploy.records import BenchRecord, Drift, Ratio


@pytest.fixture
def variant_of(tiny_bundle, tmp_path):
    """Return a function that writes a copy of the bundle's manifest with changes; ``diff`` reads nothing else."""
    made = iter(range(100))

    def make(**changes):
        folder = tmp_path / f"copy{next(made)}"
        folder.mkdir()
        write_manifest(dataclasses.replace(read_manifest(tiny_bundle), **changes), folder)
        return folder

    return make


def timed(run, factor=1.0, spread=0.001, **changes):
    """The bench of a run, its engine slowed by a factor, with samples evenly spread around the median."""
    engine = run.bench.latencies[0]
    middle = engine.p50 * factor
    samples = tuple(middle * (1 + spread * (n - 50) / 50) for n in range(101))
    slower = dataclasses.replace(engine, p50=middle, samples=samples, throughput=1e3 / middle, **changes)
    return dataclasses.replace(run.bench, latencies=(slower, *run.bench.latencies[1:]))


def silent(a, b, **options):
    return diff_bundles(a, b, Console(Mode.SILENT), **options)


def test_the_metrics_are_the_documented_ones():
    kinds = {name: kind for readers in (READERS, LATENCY_READERS) for name, (_, kind, _) in readers.items()}
    assert kinds == METRICS


def test_the_document_lists_every_metric():
    text = (Path(__file__).parent.parent / "docs" / "diff.md").read_text(encoding="utf-8")
    block = text.partition("<!-- begin metrics -->")[2].partition("<!-- end metrics -->")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", block, re.MULTILINE))
    assert listed == {name: about for readers in (READERS, LATENCY_READERS) for name, (about, _, _) in readers.items()}


def test_a_bundle_does_not_differ_from_itself(tiny_bundle):
    diff = silent(
        tiny_bundle, tiny_bundle, fail_if=[f"{name}>0%" for name in ("size", "error", "ops", "drift", "macs")]
    )
    assert (diff.asked, diff.environment, diff.precision, diff.operators) == ((), (), (), ())
    assert {gate.state for gate in diff.gates} == {"passed"}


def test_everything_that_differs_is_shown(tiny_bundle, tmp_path):
    out = tmp_path / "half"
    options = ("--variant", "tiny", "--fp16", "--until", "parity", "--out", out)
    assert effdeploy("export", "riformer", *options).exit_code == 0
    result = effdeploy("diff", tiny_bundle, out)
    assert result.exit_code == 0, result.stderr
    for words in ("precision", "fp32", "fp16", "casts", "engine: logits", "not comparable: B: not run"):
        assert words in result.stdout
    assert "environment: the same" in result.stdout
    gated = effdeploy("diff", tiny_bundle, out, "--fail-if", "error>0%", "--fail-if", "size>100%")
    assert gated.exit_code == 21
    assert "gate error>0%: fired" in gated.stdout
    assert "gate size>100%: passed" in gated.stdout
    assert "GateError" in gated.stderr
    record = json.loads(effdeploy("diff", tiny_bundle, out, "--json").stdout.splitlines()[-1])["record"]
    assert {m["name"] for m in record["metrics"]} == set(METRICS)


@pytest.mark.parametrize("what", ["latency>5%", "latency>+0.0001ms", "latency>0.0001", "p99>1%"])
def test_latency_that_was_not_measured_is_an_error_and_not_a_pass(what, tiny_bundle, variant_of):
    with pytest.raises(BenchmarkError, match="cannot be judged") as caught:
        silent(tiny_bundle, variant_of(bench=None), fail_if=[what])
    assert "--measure" in caught.value.hint
    result = effdeploy("diff", tiny_bundle, variant_of(bench=None), "--fail-if", what)
    assert result.exit_code == 16


@pytest.mark.parametrize(
    ("factor", "spread", "state"),
    [(1.2, 0.001, "fired"), (1.0, 0.001, "passed"), (0.8, 0.001, "passed"), (1.06, 0.1, "undecided"),
     (1.0, 0.1, "undecided"), (1.5, 0.1, "fired"), (0.7, 0.1, "passed")],
)  # fmt: skip
def test_a_latency_gate_knows_the_noise(factor, spread, state, tiny_bundle, variant_of):
    run = read_manifest(tiny_bundle)
    a, b = variant_of(bench=timed(run, 1.0, spread)), variant_of(bench=timed(run, factor, spread))
    arguments = ("diff", a, b, "--fail-if", "latency>5%")
    result = effdeploy(*arguments)
    assert f"gate latency>5%: {state}" in result.stdout
    assert result.exit_code == (21 if state == "fired" else 0)
    assert effdeploy(*arguments, "--strict").exit_code == (0 if state == "passed" else 21)


@pytest.mark.parametrize("other", ["cpu", "threads", "batch"])
def test_latencies_of_unlike_runs_are_not_compared(other, tiny_bundle, variant_of):
    run = read_manifest(tiny_bundle)
    if other == "cpu":
        b = variant_of(environment=dataclasses.replace(run.environment, cpu="Another CPU"))
    else:
        b = variant_of(bench=timed(run, **{other: 7}))
    diff = silent(tiny_bundle, b, fail_if=[])
    latency = {m.name: m for m in diff.metrics}["latency"]
    assert latency.change is None
    assert other in latency.obstacle
    with pytest.raises(BenchmarkError, match="cannot be judged"):
        silent(tiny_bundle, b, fail_if=["latency>500%"])
    assert silent(tiny_bundle, b, fail_if=["latency>1e9"]).gates[0].state == "passed"


def test_an_interleaved_measurement_replaces_the_records(tiny_bundle, variant_of):
    run = read_manifest(tiny_bundle)
    engine = run.bench.latencies[0]
    pair = (dataclasses.replace(engine, name="a"), dataclasses.replace(engine, name="b", p50=engine.p50 * 1.1))

    def measured(median, width):
        ratio = Ratio(name="a", baseline="b", batch=1, median=median, p10=median - width, p90=median + width, rounds=20)
        return BenchRecord(latencies=pair, ratios=(ratio,), warnings=(), method="", modules={}, seconds=1.0)

    b = variant_of(bench=None)
    assert silent(tiny_bundle, b, measured=measured(1.01, 0.02), fail_if=["latency>5%"]).gates[0].state == "passed"
    assert silent(tiny_bundle, b, measured=measured(1.05, 0.02), fail_if=["latency>5%"]).gates[0].state == "undecided"
    with pytest.raises(GateError, match="latency"):
        silent(tiny_bundle, b, measured=measured(1.1, 0.02), fail_if=["latency>5%"])
    with pytest.raises(GateError, match="throughput"):
        silent(tiny_bundle, b, measured=measured(1.1, 0.02), fail_if=["throughput<-5%"])


@pytest.fixture
def quick(tiny_bundle, tmp_path):
    """Two copies of the bundle that ask for five rounds."""
    run = read_manifest(tiny_bundle)
    bench = {**run.recipe["bench"], "rounds": 5, "warmup_seconds": 0.05}
    copies = [shutil.copytree(tiny_bundle, tmp_path / name) for name in ("a", "b")]
    for copy in copies:
        write_manifest(dataclasses.replace(run, recipe={**run.recipe, "bench": bench}), copy)
    return copies


def test_measure_times_both_now(quick):
    tiny_bundle, copy = quick
    result = effdeploy("diff", tiny_bundle, copy, "--measure", "--seconds", "0.3", "--fail-if", "latency>300%")
    assert result.exit_code == 0, result.stderr
    assert "gate latency>300%: passed" in result.stdout
    assert effdeploy("diff", tiny_bundle, copy, "--seconds", "1").exit_code == 2
    assert "threads, this process has" not in result.stderr


def test_more_threads_than_cores_is_said(quick):
    cores = read_manifest(quick[0]).environment.cores
    result = effdeploy("diff", *quick, "--measure", "--seconds", "0.05", "--threads", cores + 1)
    assert result.exit_code == 0, result.stderr
    assert f"was set to {cores + 1} threads, this process has {cores} cores" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latncy>5%", "no metric 'latncy'"),
        ("latency", "expected METRIC"),
        ("latency=5", "expected METRIC"),
        ("latency>", "expected METRIC"),
        ("latency>5%; size>1", "expected METRIC"),
        ("size>5parsec", "no unit 'parsec'"),
        ("ops>5ms", "no unit 'ms'"),
        ("__import__('os')>1", "expected METRIC"),
        ("latency>nan", "expected METRIC"),
    ],
)
def test_bad_expressions_are_refused_with_the_metrics(text, words, tiny_bundle):
    result = effdeploy("diff", tiny_bundle, tiny_bundle, "--fail-if", text)
    assert result.exit_code == 3
    assert words in result.stderr
    assert "latency, p99, throughput" in result.stderr


@pytest.mark.parametrize(
    ("text", "state"),
    [("size>0.5kB", "fired"), ("size>1.1 kB", "passed"), ("size>=+100", "fired"), ("size>+100B", "passed"),
     ("size>10%", "fired"), ("size>12%", "passed"), ("size<-1%", "passed"), ("size<=1000", "fired"),
     ("size<0.9kB", "passed")],
)  # fmt: skip
def test_units_signs_and_shares(text, state):
    """From 900 to 1000 bytes."""
    metric = Metric(name="size", meaning="", kind="bytes", a=900.0, b=1000.0)
    assert check_gate(parse_gate(text), metric).state == state


@pytest.mark.parametrize("text", ["error>5%", "error<1", "error>=+1"])
def test_nan_fires_every_gate(text):
    metric = Metric(name="error", meaning="", kind="number", a=1e-6, b=math.nan)
    assert check_gate(parse_gate(text), metric).state == "fired"


def test_from_zero_every_rise_is_infinite():
    expression = parse_gate("casts>1000%")
    assert check_gate(expression, Metric(name="casts", meaning="", kind="count", a=0.0, b=1.0)).state == "fired"
    assert check_gate(expression, Metric(name="casts", meaning="", kind="count", a=0.0, b=0.0)).state == "passed"


def test_drift_and_operators_are_seen(tiny_bundle, variant_of):
    run = read_manifest(tiny_bundle)
    worse = Drift(fp32_max_abs=1.0, fp32_relative=1.0, fp64_max_abs=0.0, fp64_relative=0.0)
    more = dataclasses.replace(run.passes, op_counts={**run.passes.op_counts, "Mystery": 3})
    b = variant_of(model=dataclasses.replace(run.model, drift=worse), passes=more)
    diff = silent(tiny_bundle, b)
    assert ("patched: Mystery", "", "3") in [(c.key, c.a, c.b) for c in diff.operators]
    for gate in ("drift>10%", "ops>+2", "ops>0%"):
        with pytest.raises(GateError):
            silent(tiny_bundle, b, fail_if=[gate])
    assert silent(tiny_bundle, b, fail_if=["ops>+3"]).gates[0].state == "passed"


def test_gates_are_read_before_bundles():
    with pytest.raises(RecipeError):
        silent("nowhere", "nowhere", fail_if=["nonsense"])


@pytest.mark.parametrize(("b", "text"), [(99_999.0, "0.0 %"), (100_001.0, "0.0 %"), (99_000.0, "-1.0 %"),
                                         (100_100.0, "+0.1 %")])  # fmt: skip
def test_a_change_that_rounds_to_nothing_has_no_sign(b, text):
    assert Metric(name="ops", meaning="", kind="count", a=100_000.0, b=b).change_text() == text
