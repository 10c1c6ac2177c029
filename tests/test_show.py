"""``effdeploy show``: the picture, what it says, and where it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support import effdeploy

import deploy
from deploy.models import merging


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "gradient.png"
    across = np.linspace(0, 255, 96)[None, :, None] * np.ones((80, 1, 3))
    Image.fromarray(across.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines") / "groups"
    result = effdeploy(
        "export", "tome", "--variant", "tiny", "--set", "options.groups=true", "--embed-preprocess",
        "--until", "engine", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    return out


def test_the_picture_shows_both_runs(bundle, photo, tmp_path):
    out = tmp_path / "shown.png"
    result = effdeploy("show", bundle, photo, "--out", out, "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    record = json.loads(result.stdout.splitlines()[-1])["record"]
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert np.asarray(picture.convert("RGB")).std() > 10
    assert {panel["run"] for panel in record["panels"]} == {"onnxruntime, fp32", "PyTorch, fp32"}
    assert [p["title"] for p in record["panels"] if p["run"] == "PyTorch, fp32"] == [
        f"after block {n}: {left} of 50 tokens, 100% alike" for n, left in ((1, 44), (2, 38), (3, 32), (4, 26))
    ]
    assert all(panel["agreement"] == 1 for panel in record["panels"])
    assert deploy.show(bundle, photo, out=tmp_path / "again.png").panels[0].title == record["panels"][0]["title"]
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


def test_patches_that_went_elsewhere_are_marked():
    picture = np.zeros((64, 64, 3), np.uint8)
    groups = np.arange(50)[None, None].repeat(4, 1)
    other = groups.copy()
    other[0, :, 3] = 2
    size = {"patch": 32}
    same, apart = (
        merging.panels(size, picture, {"groups": groups[:, :, :5]}, {"groups": o[:, :, :5]}) for o in (groups, other)
    )
    assert same[0].agreement == 1
    assert apart[0].agreement == pytest.approx(0.8)
    assert not (same[0].picture == (220, 30, 30)).all(-1).any()
    red = (apart[0].picture == (220, 30, 30)).all(-1)
    assert red[:, :31].any() != red[:, 33:].any() or red.any()


def test_merged_patches_have_one_colour():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32] = 200
    drawn = merging.draw_groups(picture, np.array([0, 1, 0, 3]), np.ones(4, bool), 32)
    assert (drawn[16, 16] == 100).all()
    assert (drawn[48, 16] == 100).all()
    assert (drawn[16, 48] == 200).all()
    assert (drawn[48, 48] == 0).all()
    assert (drawn[16, 32] == 255).all()


@pytest.mark.parametrize("text", ["not an image", ""])
def test_a_file_that_is_no_photo(bundle, tmp_path, text):
    bad = tmp_path / "bad.png"
    bad.write_text(text)
    result = effdeploy("show", bundle, bad)
    assert result.exit_code == 18
    assert "cannot be read as an image" in result.stderr


def test_an_engine_without_the_output_says_how_to_get_it(bundle, photo, tmp_path):
    out = tmp_path / "plain"
    assert effdeploy("export", "tome", "--variant", "tiny", "--until", "engine", "--out", out).exit_code == 0
    result = effdeploy("show", out, photo)
    assert result.exit_code == 17
    assert "does not give groups" in result.stderr
    assert "--set options.groups=true" in result.stderr


def test_a_system_with_nothing_to_draw(tiny_bundle, photo):
    result = effdeploy("show", tiny_bundle, photo)
    assert result.exit_code == 4
    assert "riformer has nothing to draw" in result.stderr


def test_no_bundle_and_no_folder(photo, bundle, tmp_path):
    assert effdeploy("show", tmp_path, photo).exit_code == 17
    assert effdeploy("show", bundle, photo, "--out", tmp_path / "none" / "x.png").exit_code == 19
