"""The report of a trained RT-DETR, made by an export, in headless Chromium: all charts, and the photo with boxes."""

from __future__ import annotations

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
        "--set", "bench.rounds=6", "--set", "convolutions=direct", "--out", folder / "b",
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


@pytest.mark.skipif(chromium() is None, reason=WHY)
def test_all_charts_and_the_photo_are_seen_and_nothing_is_wrong_on_the_console(bundle, tmp_path):
    text = (bundle / "report.html").read_text(encoding="utf-8")
    (tmp_path / "broken.html").write_text(text.replace("data:image/jpeg;base64,", "data:image/jpeg;base64,broken"))
    with browser() as page:
        for view in VIEWS:
            found = seen(page, bundle / "report.html", view)
            assert found["charts"] >= 4
            assert (found["pictures"], found["images"]) == (1, 1)
            assert faults(found) == {}
            assert found["sideways"] <= 0
            box = page.evaluate("(({width, height}) => [width, height])(document.images[0].getBoundingClientRect())")
            assert min(box) > 200
            assert box[0] <= view["size"][0]
        assert seen(page, tmp_path / "broken.html", {"size": PHONE})["images"] == 0  # a photo that is none is noticed
