"""Records survive their JSON form, and nothing else is taken for one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from report import sample

from deploy.errors import BundleError, RecipeError
from deploy.records import Batch, Comparison, Latency, RunRecord, Stage, from_json, to_json

RUNS: dict[str, Callable[[], RunRecord]] = {
    "full": sample.full_run,
    "failed": sample.failed_run,
    "stopped": sample.stopped_run,
    "ahead of time": sample.ahead_of_time_run,
    "hostile": sample.hostile_run,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_back_equal(name: str) -> None:
    run = RUNS[name]()
    text = json.dumps(to_json(run), allow_nan=False, sort_keys=True)
    assert from_json(RunRecord, json.loads(text)) == run


def test_nan_and_infinity_come_back() -> None:
    run = sample.broken_numbers_run()
    back = from_json(RunRecord, json.loads(json.dumps(to_json(run), allow_nan=False)))
    assert back.parity is not None
    last = back.parity.comparisons[-1]
    assert math.isnan(last.max_relative)
    assert last.snr_db == -math.inf
    assert back.bench is not None
    assert back.bench.latencies[1].samples == ()
    assert math.isnan(back.bench.latencies[1].p50)


def change(path: str, value: Any) -> dict[str, Any]:
    """Return the full run's JSON with one place changed; ``...`` removes it."""
    data = copy.deepcopy(to_json(sample.full_run()))
    *keys, last = path.split(".")
    place: Any = data
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("surprise", 1, "unknown fields ['surprise']"),
        ("model.drift.fp16", 0.0, "unknown fields ['fp16']"),
        ("model", ..., "model"),
        ("model.macs", "many", "expected int"),
        ("model.macs", True, "expected int"),
        ("model.parameters", 1.5, "expected int"),
        ("model.size", [224], "expected 2 values"),
        ("model.size", "224", "expected a list"),
        ("model.system", 7, "expected str"),
        ("ok", 1, "expected bool"),
        ("until", "lunch", "lunch"),
        ("precision.precision", "fp4", "fp4"),
        ("engines", {}, "expected a list"),
        ("engines.0.audit", [], "expected an object"),
        ("trace.op_counts", [], "expected an object"),
        ("trace.op_counts.Conv", "29", "expected int"),
        ("trace.inputs.0.shape", [True, 3], "expected one of"),
        ("parity.comparisons.0.cosine", "nearly one", "could not convert"),
        ("parity.comparisons.0.cosine", None, "expected float"),
        ("bench.latencies.0.samples", [[1.0]], "expected float"),
    ],
)
def test_what_is_not_a_record_is_refused(path: str, value: Any, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        from_json(RunRecord, change(path, value))
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("data", [None, 3, "text", [], float("nan")])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(BundleError, match="expected an object"):
        from_json(RunRecord, data)


def test_older_records_without_counts_can_be_read() -> None:
    run = sample.full_run()
    assert run.parity is not None
    assert run.bench is not None
    comparison, latency = to_json(run.parity.comparisons[0]), to_json(run.bench.latencies[0])
    del comparison["top1_ties"], latency["calls"]
    assert from_json(Comparison, comparison).top1_ties == 0
    assert from_json(Latency, latency).calls == 0


def test_older_comparisons_without_precision_can_be_read() -> None:
    run = sample.full_run()
    assert run.parity is not None
    data = to_json(run.parity.comparisons[0])
    del data["precision"]
    assert from_json(Comparison, data).precision == ""


@pytest.mark.parametrize(
    ("text", "batch"),
    [("4", Batch(min=4, opt=4, max=4)), (2, Batch(min=2, opt=2, max=2)), ("1:8:32", Batch(min=1, opt=8, max=32))],
)
def test_batches(text: str | int, batch: Batch) -> None:
    assert Batch.parse(text) == batch
    assert str(batch) == str(text)
    assert batch.dynamic == (":" in str(text))


@pytest.mark.parametrize("text", ["", "0", "-1", "1:2", "8:4:2", "1:2:3:4", "one", "1.5", "1:8:", "٣"])
def test_batches_that_cannot_be(text: str) -> None:
    with pytest.raises(RecipeError, match="batch"):
        Batch.parse(text)


def test_stages_are_in_the_order_of_the_road() -> None:
    assert [s.value for s in Stage] == [
        "model",
        "trace",
        "passes",
        "precision",
        "engine",
        "parity",
        "latency",
        "report",
    ]
