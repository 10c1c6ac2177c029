"""``effdeploy tune``: the search, what is measured, the recipe that comes out, and where it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from support import effdeploy

from deploy.answers import LayerLatency, TunedSchedule
from deploy.artifacts import read_manifest
from deploy.errors import BenchmarkError, RecipeError
from deploy.schedules import DriftModel, LayerModel, fit_layers, search, steps
from deploy.tuning import Goal, _with_front

START, DEPTH = 20, 3
COST = LayerModel(weights=((0.1, 0.05, 0.002, 0.05, 0.02),) * 2 + ((0.02, 0.01, 0.001, 0.0, 0.0),), outside=0.3)
DRIFT = DriftModel(points=({4: 0.2, 8: 0.5}, {4: 0.1, 8: 0.3}, {4: 0.05, 8: 0.1}))


def most(left):
    return (left - 1) // 2


def every_schedule():
    for schedule in itertools.product(range(10), repeat=DEPTH):
        if all(taken <= most(before) for before, taken in steps(START, schedule)):
            yield schedule


def test_the_search_finds_the_best_schedule_of_each_latency():
    """Against all schedules there are; a bucket of latency is the only slack."""
    everything = [(COST.total(START, s), DRIFT.total(s)) for s in every_schedule()]
    found = search(START, DEPTH, most, COST, DRIFT)
    slack = DEPTH * COST.total(START, (0,) * DEPTH) / 400
    for proposal in found:
        assert proposal.milliseconds == COST.total(START, proposal.schedule)
        quicker = [drift for milliseconds, drift in everything if milliseconds <= proposal.milliseconds - slack]
        assert proposal.drift <= min(quicker, default=1.0) + 1e-9
    fastest = min(milliseconds for milliseconds, _ in everything)
    assert min(p.milliseconds for p in found) <= fastest + slack


def test_the_predicted_front_falls():
    found = search(START, DEPTH, most, COST, DRIFT)
    assert len(found) > 5
    assert all(a.drift > b.drift for a, b in itertools.pairwise(found))
    assert found[-1].schedule == (0,) * DEPTH
    assert all(taken <= most(before) for p in found for before, taken in steps(START, p.schedule))


def test_the_latency_model_is_that_of_the_table():
    table = [
        LayerLatency(schedule="", layer=i, before=before, taken=taken, milliseconds=COST.layer(i, before, taken))
        for i in range(DEPTH)
        for before in (6, 9, 12, 16, 20)
        for taken in (0, 2, 3)
    ]
    fitted = fit_layers(table, 0.3)
    assert fitted.total(START, (4, 3, 2)) == pytest.approx(COST.total(START, (4, 3, 2)))
    with pytest.raises(BenchmarkError, match="names no layer"):
        fit_layers([], 0.3)


def tuned(name, speedup, drift):
    return TunedSchedule(
        name=name, schedule=(1,), left=1, milliseconds=1.0, speedup=speedup, p10=speedup, p90=speedup, drift=drift,
        top1=1.0, front=False, chosen=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("goal", "chosen"),
    [
        (Goal(speedup=1.4), "b"),
        (Goal(speedup=1.6), "c"),
        (Goal(speedup=2.5), None),
        (Goal(drift=0.25), "b"),
        (Goal(speedup=1.4, drift=0.1), None),
    ],
)
def test_the_front_and_the_choice(goal, chosen):
    found = _with_front([tuned("a", 1.0, 0.0), tuned("b", 1.5, 0.2), tuned("c", 2.0, 0.4), tuned("d", 1.4, 0.3)], goal)
    assert [s.name for s in found if s.front] == ["a", "b", "c"]
    assert next((s.name for s in found if s.chosen), None) == chosen


@pytest.mark.parametrize("wrong", [{}, {"speedup": 1.0}, {"speedup": float("nan")}, {"drift": 0.0}, {"drift": -1.0}])
def test_a_goal_that_cannot_be(wrong):
    with pytest.raises(RecipeError, match=r"--target-speedup|--max-drift"):
        Goal(**wrong)


WIDE = ("--set", "options.width=192", "--set", "options.heads=3")  # a layer costs more than choosing what to merge


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny network with many tokens, so that merging them must pay; measured here and now."""
    folder = tmp_path_factory.mktemp("tuned")
    result = effdeploy(
        "tune", "tome", "--variant", "tiny", "--size", "448", *WIDE, "--target-speedup", "1.05", "--seconds", "0.1",
        "--set", "bench.rounds=3", "--out", folder / "tuned.yaml", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1])["record"]


@pytest.mark.slow
def test_what_was_measured(run):
    _, record = run
    schedules = record["schedules"]
    assert schedules[0]["name"] == "r = 0"
    assert (schedules[0]["speedup"], schedules[0]["drift"]) == (1.0, 0.0)
    assert all(s["milliseconds"] > 0 and s["drift"] >= 0 for s in schedules)
    assert all(s["drift"] > 0 for s in schedules if any(s["schedule"][:-1]))
    assert all(s["left"] == 197 - sum(s["schedule"]) for s in schedules)
    assert len({tuple(s["schedule"]) for s in schedules}) == len(schedules)
    front = sorted((s for s in schedules if s["front"]), key=lambda s: s["speedup"])
    assert all(a["drift"] <= b["drift"] for a, b in itertools.pairwise(front))
    assert len(record["layers"]) == 4 * len(schedules)
    assert all(row["milliseconds"] > 0 for row in record["layers"])
    chosen = [s for s in schedules if s["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["speedup"] >= 1.05
    assert record["weights"].startswith("weights: random")


@pytest.mark.slow
def test_the_plot_is_there(run):
    _, record = run
    text = Path(record["plot"]).read_text()
    assert text.lstrip().startswith("<?xml")
    assert all(s["name"] in text for s in record["schedules"])


@pytest.mark.slow
def test_the_recipe_exports_the_chosen_schedule(run, tmp_path):
    folder, record = run
    result = effdeploy("export", folder / "tuned.yaml", "--until", "trace", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stdout + result.stderr
    manifest = read_manifest(tmp_path / "b")
    chosen = next(s for s in record["schedules"] if s["chosen"])
    assert manifest.recipe["options"]["schedule"] == chosen["schedule"]
    assert manifest.model.size == (448, 448)


@pytest.mark.slow
def test_what_cannot_be_reached_ends_with_its_own_code(tmp_path):
    out = tmp_path / "none.yaml"
    result = effdeploy(
        "tune", "tome", "--variant", "tiny", "--target-speedup", "500", "--seconds", "0.05", "--set",
        "bench.rounds=3", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 22
    assert "no schedule reaches a speed-up of 500x" in result.stderr or "no gain at batch 1" in result.stderr
    assert not out.exists()
    assert out.with_suffix(".svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tome", "--variant", "tiny"), 3, "got neither --target-speedup nor --max-drift"),
        (("tome", "--variant", "tiny", "--target-speedup", "0.5"), 3, "expected more than 1"),
        (("riformer", "--variant", "tiny", "--target-speedup", "2"), 4, "riformer has no schedule to tune"),
        (("tom", "--target-speedup", "2"), 4, "did you mean 'tome'"),
    ],
)
def test_bad_input(arguments, code, words):
    result = effdeploy("tune", *arguments)
    assert result.exit_code == code
    assert words in result.stderr
