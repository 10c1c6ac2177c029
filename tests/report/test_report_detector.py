"""The report of a trained RT-DETR that takes pixels, in headless Chromium: all charts, and the photo with boxes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, WHY, browser, chromium, faults, seen
from support import effdeploy
from toy import RECIPE, WEIGHTS
from toy.shapes import write_coco

from deploy.artifacts import read_manifest
from deploy.report import render

VIEWS = ({"size": PHONE}, {"size": DESKTOP, "dark": True}, {"size": (794, 1123), "media": "print"})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    photos = write_coco(folder / "shapes", 4) / "images"
    done = effdeploy(
        "export", RECIPE, "--weights", WEIGHTS, "--images", photos, "--set", "parity.max_images=2", "--seconds", 0.05,
        "--set", "bench.rounds=6", "--set", "convolutions=direct", "--fp16", "--embed-preprocess",
        "--out", folder / "b",
    )  # fmt: skip
    assert done.exit_code == 0, done.stdout + done.stderr
    return folder / "b"


def test_the_photo_is_in_the_manifest_and_the_report_needs_nothing_else(bundle, tmp_path):
    run = read_manifest(bundle)
    (drawn,) = run.parity.pictures
    assert "detections above 0.5, all matched" in drawn.sentence
    assert len(drawn.data) < 300_000
    assert render([run], tmp_path)[0].read_bytes() == (bundle / "report.html").read_bytes()
    assert drawn.sentence.split(";")[0] in (bundle / "report.md").read_text()


def test_errors_by_module_lead_through_the_network_and_jump_at_the_selection_alone(bundle):
    """Behind it the rows may be other queries, here of photos in which the same ones are found."""
    rows = read_manifest(bundle).parity.modules
    assert rows[0].module.startswith("backbone")
    assert rows[-1].module == "(network)"  # makes the boxes
    assert {row.module for row in rows if row.jump} <= {"decoder.selection"}
    assert all(0 <= row.after < 1e-2 for row in rows if row.module.startswith("backbone"))


def test_show_and_eval_give_it_pixels(bundle, tmp_path):
    shapes = bundle.parent / "shapes"
    done = effdeploy("show", bundle, shapes / "images" / "00001.png", "--out", tmp_path / "seen.png", "--json")
    assert done.exit_code == 0, done.stderr
    panels = json.loads(done.stdout.splitlines()[-1])["record"]["panels"]
    assert "above 0.5, all matched" in panels[0]["title"]
    done = effdeploy("eval", bundle, "--coco", shapes, "--json")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["record"]
    engine, pytorch = (run["scores"]["AP50"] for run in record["runs"])
    assert engine == pytest.approx(pytorch, abs=0.02)
    assert pytorch > 0.8


@pytest.mark.skipif(chromium() is None, reason=WHY)
def test_all_charts_and_the_photo_are_seen_and_nothing_is_wrong_on_the_console(bundle, tmp_path):
    text = (bundle / "report.html").read_text(encoding="utf-8")
    (tmp_path / "broken.html").write_text(text.replace(";base64,", ";base64,spoiltit"))
    with browser() as page:
        for view in VIEWS:
            found = seen(page, bundle / "report.html", view)
            assert found["charts"] >= 5
            assert (found["pictures"], found["images"]) == (1, 1)
            assert faults(found) == {}
            assert found["sideways"] <= 0
            box = page.evaluate("(({width, height}) => [width, height])(document.images[0].getBoundingClientRect())")
            assert min(box) > 200
            assert box[0] <= view["size"][0]
        assert seen(page, tmp_path / "broken.html", {"size": PHONE})["images"] == 0  # a photo that is none is noticed
