"""``--backend auto``: what is chosen of the CPU's backends, why, and what is not."""

from __future__ import annotations

import json
import re

import pytest
from support import effdeploy

from deploy import fastest
from deploy.artifacts import read_manifest
from deploy.backends import load_backend, openvino
from deploy.backends.base import BuildOptions
from deploy.errors import BackendUnavailableError, UnknownNameError
from deploy.keywords import console_or_silence
from deploy.records import BenchRecord, Latency, Precision, Ratio, Stage
from deploy.resolve import resolve_recipe

QUICK = ("--seconds", "0.05", "--set", "bench.rounds=3", "--set", "bench.warmup_seconds=0.02")
TINY = ("riformer", "--variant", "tiny", "--size", "32", "--int8", "--backend", "auto", *QUICK)
HAS_OPENVINO = openvino.BACKEND.available() is None
both = pytest.mark.skipif(not HAS_OPENVINO, reason="needs the openvino package (extra openvino)")


@pytest.fixture(scope="module")
def _shared_cache(tmp_path_factory):
    """Tests of this module differ behind the precision stage."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(autouse=True)
def _one_cache(_shared_cache, cache, monkeypatch):
    monkeypatch.setenv("EFFDEPLOY_CACHE", str(_shared_cache))


def latency(name: str, p50: float) -> Latency:
    return Latency(
        name=name, batch=1, threads=1, device="cpu", samples=(p50,), mean=p50, p50=p50, p90=p50, p95=p50, p99=p50,
        cov=0.0, throughput=1 / p50, peak_memory=0, build_seconds=0.0,
    )  # fmt: skip


def timed(median: float, p10: float, p90: float) -> BenchRecord:
    ratio = Ratio(name="onnxruntime", baseline="openvino", batch=1, median=median, p10=p10, p90=p90, rounds=20)
    latencies = (latency("onnxruntime", 4.0), latency("openvino", 4.0 * median))
    return BenchRecord(latencies=latencies, ratios=(ratio,), warnings=(), method="", modules={}, seconds=0.0)


# -------------------------------------------------------------------------------------------------------- the choice


def test_the_fastest_by_the_ratios_of_the_rounds_is_chosen():
    best, reason = fastest._fastest(timed(0.5, 0.48, 0.52))
    assert best == "openvino"
    assert "openvino is the fastest of 2 backends within the tolerance: 2.00 ms at batch 1, 1 thread(s), " in reason
    assert reason.endswith("onnxruntime takes 4.00 ms (2.00 times as long)")
    best, reason = fastest._fastest(timed(1.25, 1.2, 1.3))
    assert best == "onnxruntime"
    assert reason.endswith("openvino takes 5.00 ms (1.25 times as long)")
    for median in (0.99, 1.02):  # the first stays, whoever is ahead this time
        best, reason = fastest._fastest(timed(median, 0.97, 1.05))
        assert best == "onnxruntime"
        assert "onnxruntime is no slower than any, within the noise, of 2 backends" in reason


@both
def test_both_are_measured_and_the_choice_is_in_every_record(tmp_path):
    done = effdeploy("export", *TINY, "--set", "parity.tolerances.int8.cosine=0.9", "--out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    run = read_manifest(tmp_path / "b")
    choice = run.choice
    assert choice is not None
    assert [(one.backend, one.ok, one.reason) for one in choice.tried] == [
        ("onnxruntime", True, ""), ("openvino", True, ""),
    ]  # fmt: skip
    times = {one.backend: one.milliseconds for one in choice.tried}
    assert all(time is not None and time > 0 for time in times.values())
    assert all(one.used is not None and one.used < 1 and "(limit 0.9)" in one.limit for one in choice.tried)
    assert run.engines[0].backend == run.recipe["engine"]["backend"] == choice.backend
    assert run.recipe["engine"]["device"] == "cpu"
    told = "(the fastest|no slower than any, within the noise,) of 2 backends within the tolerance"
    assert re.match(f"{choice.backend} is {told}", choice.reason)
    fast, slow = sorted(choice.tried, key=lambda tried: tried.backend != choice.backend)
    assert fast.milliseconds < slow.milliseconds or "within the noise" in choice.reason
    assert all(run.origins[stage].reused for stage in ("trace", "precision", "engine", "parity"))
    assert not run.origins["latency"].reused
    (loser,) = {"onnxruntime", "openvino"} - {choice.backend}
    for text in (done.stdout, (tmp_path / "b" / "report.md").read_text()):
        assert choice.reason in text
        assert f"{loser} " in text.replace(choice.reason, "")  # with its own figures


@both
def test_a_backend_whose_outputs_are_wrong_is_not_chosen(tmp_path, monkeypatch):
    infer = openvino.OpenVinoRunner.infer
    monkeypatch.setattr(
        openvino.OpenVinoRunner, "infer",
        lambda self, feeds: {name: value[:, ::-1].copy() for name, value in infer(self, feeds).items()},
    )  # fmt: skip
    done = effdeploy(
        "export", *TINY, "--set", "parity.tolerances.int8.cosine=0.9", "--from", "engine", "--out", tmp_path / "b"
    )
    assert done.exit_code == 0, done.output
    choice = read_manifest(tmp_path / "b").choice
    assert choice is not None
    assert choice.backend == "onnxruntime"
    assert "openvino: parity fails at 'engine'" in choice.reason
    wrong = choice.tried[1]
    assert (wrong.backend, wrong.ok, wrong.milliseconds) == ("openvino", False, None)
    assert wrong.used is not None
    assert wrong.used > 1


def test_where_one_is_installed_it_is_taken_and_the_other_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino.OpenVinoBackend, "available", lambda self: "openvino cannot be imported")
    done = effdeploy(
        "export", *TINY, "--set", "parity.tolerances.int8.cosine=0.9", "--until", "parity", "--out", tmp_path / "b"
    )
    assert done.exit_code == 0, done.output
    choice = read_manifest(tmp_path / "b").choice
    assert choice is not None
    assert choice.reason == (
        "onnxruntime is the only backend of this CPU that is within the tolerance; "
        "openvino: not installed: pip install 'effdeploy[openvino]'"
    )


@both
def test_where_none_is_within_the_tolerance_the_nearest_is_named(tmp_path):
    done = effdeploy("export", *TINY, "--set", "parity.tolerances.int8.cosine=0.9999999", "--out", tmp_path / "b")
    assert done.exit_code == 15, done.output
    assert "no backend of this CPU is within the tolerance of INT8; " in done.stderr
    assert "comes nearest, with cosine 0.9" in done.stderr
    assert "hint: --backend o" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not (HAS_OPENVINO and openvino.cannot_compute(Precision.BF16)), reason="this CPU computes BF16")
def test_where_none_can_run_the_reasons_are_told_before_any_work(tmp_path):
    done = effdeploy("export", "riformer", "--variant", "tiny", "--bf16", "--backend", "auto", "--out", tmp_path / "b")
    assert done.exit_code == 12
    assert "no backend of this CPU runs BF16: onnxruntime: ONNX Runtime's CPU provider has no BF16" in done.stderr
    assert "openvino: BF16 would not really run: this CPU has none of" in done.stderr


# ------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--device", "cuda"), 3, "compares the backends of the CPU (onnxruntime, openvino); got --device cuda"),
        (("--until", "trace"), 3, "measures engines, and --until trace builds none"),
        (("--budget", "cosine=0.9"), 3, "--budget searches on one backend; got --backend auto"),
        (("--sm", "80"), 3, "auto builds for no compute capability"),
        (("--budget", "cosine=0.9", "--dry-run"), 3, "--budget searches on one backend"),
        (
            ("--target", "tensorrt"),
            3,
            "compares the backends of the CPU (onnxruntime, openvino); got --target",
        ),
    ],
)
def test_what_it_cannot_decide_is_refused(arguments, code, words, tmp_path):
    done = effdeploy("export", *TINY, *arguments, "--out", tmp_path / "b")
    assert done.exit_code == code, done.stderr
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_it_may_not_take_is_refused_before_any_work(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("kept")
    done = effdeploy("export", *TINY, "--out", tmp_path / "b")
    assert done.exit_code == 19, done.output
    assert "is not a bundle" in done.stderr
    assert "trace" not in done.stdout


@pytest.mark.parametrize("refusing", ["onnxruntime", "openvino"])
def test_a_plan_is_that_of_a_backend_that_takes_the_request(refusing, monkeypatch):
    def check(self, options):
        raise BackendUnavailableError("not this", hint="")

    recipes = {name: resolve_recipe("riformer", {"engine.backend": ("", name)}) for name in fastest.CONTENDERS}
    for name in fastest.CONTENDERS:
        monkeypatch.setattr(type(load_backend(name)), "available", lambda self: None)
    monkeypatch.setattr(type(load_backend(refusing)), "check", check)
    (other,) = set(fastest.CONTENDERS) - {refusing}
    assert fastest.first_of(recipes, console_or_silence(None)).engine.backend == other
    monkeypatch.setattr(type(load_backend(other)), "check", check)
    with pytest.raises(BackendUnavailableError, match="onnxruntime: not this; openvino: not this"):
        fastest.first_of(recipes, console_or_silence(None))


def test_a_plan_says_what_would_be_measured(tmp_path):
    done = effdeploy("export", *TINY, "--dry-run", "--json", "--out", tmp_path / "b")
    assert done.exit_code == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (record,) = (event["record"] for event in events if event.get("type") == "PlanRecord")
    assert record["backend"] == "onnxruntime"
    assert any("--backend auto would take onnxruntime" in e["message"] for e in events if e["event"] == "warning")


def test_commands_that_do_not_choose_say_so():
    with pytest.raises(UnknownNameError, match="chosen by measurement, which only export does"):
        load_backend("auto")


def test_the_export_itself_makes_its_latency_again_where_anything_is():
    assert fastest.rest_of(None, reuse=True) is None
    assert fastest.rest_of(None, reuse=False) is Stage.LATENCY
    assert fastest.rest_of(Stage.TRACE, reuse=True) is Stage.LATENCY
    assert fastest.rest_of(Stage.REPORT, reuse=True) is Stage.REPORT


def test_bf16_on_the_cpu_is_refused_before_any_work():
    with pytest.raises(BackendUnavailableError, match="no BF16 kernels"):
        load_backend("onnxruntime").check(BuildOptions(precision=Precision.BF16, device="cpu"))
