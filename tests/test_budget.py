"""``effdeploy export --budget``: what is asked, the modules that are kept, the recipe, and where it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import effdeploy

from deploy.answers import Apart, BudgetPoint, BudgetRecord
from deploy.artifacts import read_manifest
from deploy.budgets import Budget, advice, with_front
from deploy.errors import RecipeError
from deploy.records import from_json
from deploy.sensitivity import compared

# ---------------------------------------------------------------------------------------------------- what is asked


def test_a_budget_is_read():
    assert Budget.parse("cosine=0.999") == Budget(cosine=0.999)
    assert Budget.parse(" top1 = 0.1 , matched=0.99") == Budget(top1=0.1, matched=0.99)
    assert str(Budget.parse("cosine=0.9990,top1=0.1")) == "cosine=0.999,top1=0.1"


@pytest.mark.parametrize(
    "text", ["", "cosine", "cosine=", "cosine=1.1", "cosine=nan", "top1=-1", "top2=1", "cosine=0.9,cosine=0.8", "0.9"]
)
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="expected cosine=0 to 1, top1=0 to 100"):
        Budget.parse(text)


def test_a_budget_holds_every_limit():
    apart = Apart(images=1000, error=0.01, cosine=0.9995, top1=0.999, matched=0.98)
    assert Budget.parse("cosine=0.999,top1=0.1").met_by(apart)
    assert not Budget.parse("cosine=0.9996").met_by(apart)
    assert not Budget.parse("top1=0.05").met_by(apart)
    assert not Budget.parse("cosine=0.999,matched=0.99").met_by(apart)
    assert not Budget.parse("cosine=0").met_by(replace(apart, cosine=float("nan")))


def test_detections_are_matched_in_both_directions():
    boxes = np.array([[[0, 0, 9, 9], [20, 20, 40, 40], [50, 0, 60, 9]]] * 2, np.float32)
    scores = np.array([[0.9, 0.8, 0.1]] * 2, np.float32)
    reference = {"labels": np.array([[1, 2, 3]] * 2), "boxes": boxes, "scores": scores}
    assert compared("detection", (64, 64), [reference], [reference]).matched == 1.0
    moved = boxes.copy()
    moved[0, 1] += 15  # one of four is elsewhere: lost here, added there
    found = compared("detection", (64, 64), [reference], [{**reference, "boxes": moved}])
    assert found.matched == pytest.approx(0.75)
    assert not Budget.parse("matched=0.99").met_by(found)
    broken = {**reference, "scores": scores * np.nan}
    assert compared("detection", (64, 64), [reference], [broken]).matched == 0.0


def point(name, speedup, error, **more):
    apart = Apart(images=1, error=error, cosine=1 - error)
    return BudgetPoint(
        name=name, kept=0, apart=apart, meets=True, speedup=speedup, milliseconds=1 / (speedup or 1), **more
    )


def test_the_front_is_what_no_other_beats():
    points = [point("fp32", 1.0, 0.0), point("int8", 2.0, 0.3), point("int8, 1 high", 1.8, 0.1), point("a", 1.7, 0.2)]
    assert [p.name for p in with_front(points) if p.front] == ["fp32", "int8", "int8, 1 high"]
    untimed = [replace(p, speedup=None, kept=k) for p, k in zip(points, (4, 0, 1, 2), strict=True)]
    assert [p.name for p in with_front(untimed) if p.front] == ["fp32", "int8", "int8, 1 high"]


def test_a_slower_int8_is_told_and_a_faster_one_is_not():
    slow = [point("fp32", 1.0, 0.0), point("fp16", 0.9, 0.0), point("int8, 2 high", 0.7, 0.1, p10=0.6, chosen=True)]
    assert "int8, 2 high is slower than fp32 here (int8, 2 high takes 1.43 ms and fp32 1.00 ms)" in advice(slow, "int8")
    assert "--fp32 is better on this machine" in advice(slow, "int8")
    faster = [replace(p, speedup=2.0, p10=1.8) if p.chosen else p for p in slow]
    assert advice(faster, "int8") == ""
    noisy = [replace(p, speedup=1.1, p10=0.95) if p.chosen else p for p in slow]
    assert "is not faster beyond the noise than fp32 here" in advice(noisy, "int8")
    assert advice([replace(p, speedup=None) for p in slow], "int8") == ""
    inexact = [replace(p, meets=False) if p.name == "fp32" else p for p in slow]
    assert "--fp16 is better" in advice(inexact, "int8")


# ------------------------------------------------------------------------------------------------------- the search

NETWORK = ("tome", "--variant", "tiny", "--set", "options.r=0", "--set", "options.depth=2", "--size", 64)
QUICK = ("--seconds", "0.05", "--set", "bench.rounds=3", "--set", "bench.warmup_seconds=0.05")


def searched(out: Path, budget: str, code: int = 0) -> tuple[BudgetRecord, str]:
    result = effdeploy(
        "export", *NETWORK, "--int8", "--budget", budget, "--until", "precision", "--out", out, *QUICK, "--json"
    )
    assert result.exit_code == code, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    found = [e["record"] for e in events if e["event"] == "result" and e["type"] == "BudgetRecord"]
    return from_json(BudgetRecord, found[0]), result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Searches that share a cache, as those of one user do: each measures only what no earlier one did."""
    return tmp_path_factory.mktemp("budget")


@pytest.fixture(scope="module")
def graphs(impossible):
    """The finished stages of these searches, without what they measured."""
    stages = Path(os.environ["EFFDEPLOY_CACHE"]) / "stages"
    return [path for path in stages.iterdir() if not path.name.startswith("sensitivity-")]


@pytest.fixture(scope="module")
def impossible(folder):
    return searched(folder / "impossible", "cosine=1", code=24)


@pytest.fixture(scope="module")
def search(folder, impossible):
    """Ask for a third of what all modules in INT8 lose."""
    whole = next(p.apart for p in impossible[0].points if p.name == "int8")
    wanted = 1 - (1 - whole.cosine) / 3
    return wanted, searched(folder / "b", f"cosine={wanted:.8f}")[0]


@pytest.fixture(scope="module")
def repeated(folder, search):
    """The same search again, and an export by the recipe that it wrote."""
    again, _ = searched(folder / "again", f"cosine={search[0]:.8f}")
    exported = effdeploy("export", again.recipe, "--until", "precision", "--out", folder / "by-recipe")
    return again, exported


def test_the_fewest_modules_are_kept(search, folder):
    wanted, record = search
    assert 0 < len(record.kept) < record.modules
    chosen = next(p for p in record.points if p.chosen)
    assert (chosen.kept, chosen.meets) == (len(record.kept), True)
    assert chosen.apart.cosine >= wanted
    errors = [s.apart.error for s in record.order]
    assert errors == sorted(errors, reverse=True)
    assert {s.module for s in record.order} >= set(record.kept)
    assert len(record.order) == record.modules
    fewer = [p for p in record.points if p.name.startswith("int8") and p.kept < len(record.kept)]
    assert fewer
    assert not any(p.meets for p in fewer)
    assert {"fp32", "fp16", "int8"} <= {p.name for p in record.points}
    assert all(p.speedup is not None and p.speedup > 0 for p in record.points)
    assert any(p.front for p in record.points)
    assert "(chosen)" in Path(record.plot).read_text()
    manifest = read_manifest(folder / "b")
    assert len(manifest.recipe["quantization"]["keep_high"]) == len(record.kept)
    kept = [k for k in manifest.precision.quantization.kept if k.reason.startswith("asked")]
    assert sorted(e.rpartition("/")[0] for k in kept for e in k.examples) == sorted(record.kept)


def test_the_same_search_gives_the_same_recipe_and_runs_nothing(search, repeated, folder):
    _, first = search
    again, exported = repeated
    assert (again.kept, again.order, again.runs) == (first.kept, first.order, 0)
    assert first.runs > 0
    assert Path(again.recipe).read_text() == Path(first.recipe).read_text()
    assert exported.exit_code == 0, exported.stderr
    by_recipe = read_manifest(folder / "by-recipe").precision.artifact
    assert by_recipe == read_manifest(folder / "b").precision.artifact


KILLED_IN = 6  # the sixth measurement; five are kept


def test_a_search_that_is_killed_goes_on_where_it_was(server, graphs, search, cache, tmp_path):
    for path in graphs:
        shutil.copytree(path, cache / "stages" / path.name)
    wanted, whole = search
    budget = ("--int8", "--budget", f"cosine={wanted:.8f}", "--until", "precision")
    killed = server.ask(
        {
            "arguments": [str(a) for a in ("export", *NETWORK, *budget, "--out", tmp_path / "b", *QUICK)],
            "cache": str(cache), "output": str(tmp_path / "log"), "stop_measuring": KILLED_IN,
        }
    )  # fmt: skip
    assert killed["code"] == -signal.SIGKILL, killed["output"]
    kept = {path: path.stat().st_mtime_ns for path in (cache / "stages").glob("sensitivity-*/*")}
    assert len({path.parent for path in kept}) == KILLED_IN - 1
    again, _ = searched(tmp_path / "b", f"cosine={wanted:.8f}")
    measured = list((cache / "stages").glob("sensitivity-*"))
    assert again.runs == len(measured) - (KILLED_IN - 1)  # none of them is measured twice
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # Another process, from the start: the same errors, the same choice, the same recipe.
    assert (again.kept, again.order) == (whole.kept, whole.order)
    assert Path(again.recipe).read_text() == Path(whole.recipe).read_text()


def test_what_cannot_be_met_says_what_the_best_reaches(impossible, search, folder):
    record, stderr = impossible
    best = max(p.apart.cosine for p in record.points if p.name.startswith("int8"))
    assert f"no choice of modules in INT8 meets cosine=1: the best reachable is cosine {best:.5f}"[:-2] in stderr
    assert "hint: --budget cosine=0.9" in stderr
    assert (record.recipe, record.kept) == ("", ())
    assert [path.name for path in folder.glob("impossible*")] == ["impossible-budget.svg"]
    assert search[1].runs < record.modules  # sensitivities were taken from this search, as after an interruption


def test_a_budget_that_all_of_int8_meets_searches_nothing(folder, impossible):
    record, _ = searched(folder / "loose", "cosine=0.5,top1=100")
    assert (record.kept, record.order) == ((), ())
    assert "INT8 with nothing kept high meets cosine=0.5,top1=100: cosine 0." in record.verdict


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--int8", "--budget", "cosine=2"), 3, "expected cosine=0 to 1"),
        (("--fp16", "--budget", "cosine=0.9"), 3, "got precision fp16, expected int8 or fp8"),
        (("--int8", "--budget", "matched=0.9"), 3, "found no detection above 0.5"),
        (("--fp16", "--budget", "cosine=0.9", "--dry-run"), 3, "got precision fp16, expected int8 or fp8"),
    ],
)
def test_bad_input(arguments, code, words, tmp_path):
    result = effdeploy("export", "riformer", "--variant", "tiny", *arguments, "--out", tmp_path / "b")
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []
