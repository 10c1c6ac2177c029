"""Reports in headless Chromium: every chart is drawn and readable on a phone, at a desk, in the dark and on paper."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import DESKTOP, LOOK, PHONE, WHY, Page, browser, chromium, faults, seen

from deploy.records import Latency, RunRecord
from deploy.report import render
from report import sample

pytestmark = pytest.mark.skipif(chromium() is None, reason=WHY)
VIEWS = {
    "phone": {"size": PHONE}, "phone, dark": {"size": PHONE, "dark": True}, "desk": {"size": DESKTOP},
    "desk, dark": {"size": DESKTOP, "dark": True}, "paper": {"size": (794, 1123), "media": "print"},
}  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render([sample.full_run()], tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("view", VIEWS)
def test_every_chart_is_seen(view, page, report):
    found = seen(page, report, VIEWS[view])
    assert found["charts"] >= 5
    assert faults(found) == {}
    assert found["sideways"] <= 0


@pytest.mark.parametrize("view", VIEWS)
def test_the_comparison_is_seen_with_its_front(view, page, tmp_path):
    found = seen(page, render(several(), tmp_path)[0], VIEWS[view])
    assert found["charts"] >= 2
    assert faults(found) == {}
    assert found["sideways"] <= 0
    assert page.evaluate('document.querySelectorAll("circle.spot-front").length') == 2
    assert page.evaluate('document.querySelectorAll("circle.spot").length') == 1


def several() -> list[RunRecord]:
    """Three runs: the second is faster and further off, the third is slower than the first and as far off."""
    runs = []
    for name, factor, error in (("fp32", 1.0, 1e-6), ("fp16", 0.6, 2e-3), ("slow", 1.4, 1e-6)):
        run = sample.full_run(name=name)
        assert run.bench is not None
        assert run.parity is not None
        first, *others = run.bench.latencies
        timed: tuple[Latency, ...] = (dataclasses.replace(first, p50=factor * first.p50), *others)
        judged = tuple(dataclasses.replace(c, max_relative=error) for c in run.parity.comparisons)
        runs.append(dataclasses.replace(
            run, bench=dataclasses.replace(run.bench, latencies=timed),
            parity=dataclasses.replace(run.parity, comparisons=judged),
        ))  # fmt: skip
    return runs


def test_it_is_dark_in_the_dark_and_light_on_paper(page, report):
    colours = {}
    for view in ("desk", "desk, dark", "paper"):
        page.open(report, **VIEWS[view])
        text = page.evaluate("getComputedStyle(document.body).backgroundColor")
        colours[view] = sum(int(part) for part in re.findall(r"\d+", text)[:3])
    assert colours["desk"] > 600
    assert colours["desk, dark"] < 150
    assert colours["paper"] == 3 * 255


def test_it_prints_with_everything_that_is_folded_away(page, report):
    page.open(report, DESKTOP)
    assert page.pdf().startswith(b"%PDF")
    page.open(report, (794, 1123), media="print")
    heights = page.evaluate('[...document.querySelectorAll("details dl")].map((e) => e.getBoundingClientRect().height)')
    assert heights
    assert min(heights) > 0
    assert page.evaluate('getComputedStyle(document.querySelector("nav")).display') == "none"


SPOILT = {
    "problems": ('<main>', '<main><img src="https://example.org/a.png">'),
    "empty": ('class="chart"', 'class="chart" style="width:0;height:0"'),
    "overlapping": ('text-anchor="end"', 'x="0%" text-anchor="start"'),
    "invisible": ("svg text { font-size: 13px; fill: var(--ink)", "svg text { font-size: 13px; fill: var(--card)"),
    "outside": ('class="bar" x="0"', 'class="bar" x="90%"'),
    "sideways": ("<h2>Latency</h2>", '<h2 style="width:2000px">Latency</h2>'),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_each_fault_would_be_seen(fault, page, report, tmp_path):
    """The controls of the tests above: the same page with one thing wrong."""
    old, new = SPOILT[fault]
    text = report.read_text(encoding="utf-8")
    if fault == "overlapping":  # an attribute that is given twice keeps its first value
        text = text.replace('x="100%"', 'x="0%"')
    assert old in text
    path = tmp_path / "spoilt.html"
    path.write_text(text.replace(old, new), encoding="utf-8")
    page.open(path, PHONE)
    found = page.evaluate(LOOK)
    assert page.problems if fault == "problems" else found[fault]
