"""``effdeploy eval --imagefolder``: what is counted, what is refused, and that a wrong engine is seen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import effdeploy

import deploy
from deploy.artifacts import read_manifest, write_manifest
from deploy.classifying import read_imagefolder, scored, wilson
from deploy.errors import ImageError, RecipeError
from deploy.models import find_system
from deploy.models.base import load_model, run_module
from deploy.preprocess import preprocess
from deploy.recipe import layer_of_data, resolve
from deploy.records import Target

CLASSES = 7


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier") / "b"
    done = effdeploy(
        "export", "riformer", "--variant", "tiny", "--size", 32, "--batch", 4, "--set", f"classes={CLASSES}",
        "--until", "engine", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture
def folder(tmp_path):
    for label in range(CLASSES):
        for number in range(2):
            picture(tmp_path / "photos" / f"class-{label}" / f"{number}.png", seed=10 * label + number)
    return tmp_path / "photos"


# -------------------------------------------------------------------------------------------------------------- scores


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I, method 3 (score, without continuity correction).
    for (hits, trials), (low, high) in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_scores_count_places_and_neither_ties_nor_nan_as_hits():
    logits = np.arange(28, dtype=np.float32).reshape(4, 7)  # class 6 first, class 0 last
    run = scored("x", logits, np.array([6, 2, 1, 0]))
    assert run.scores == {"top-1": 0.25, "top-5": 0.5}
    assert run.intervals["top-1"] == wilson(1, 4)
    assert scored("x", np.zeros((2, 7), np.float32), np.array([0, 3])).scores["top-1"] == 0
    assert scored("x", np.full((2, 7), np.nan, np.float32), np.array([0, 3])).scores == {"top-1": 0, "top-5": 0}
    assert scored("x", logits[:, :3], np.array([2, 2, 2, 0])).scores == {"top-1": 0.75}


def test_classes_are_numbered_by_name_or_by_value(tmp_path):
    for name in ("10", "9", "2"):
        picture(tmp_path / "numbers" / name / "a.png", 0)
        picture(tmp_path / "names" / f"n{name}" / "deeper" / "a.PNG", 0)
    assert read_imagefolder(tmp_path / "numbers").classes == ("2", "9", "10")
    assert read_imagefolder(tmp_path / "names").classes == ("n10", "n2", "n9")


def test_a_limit_spreads_over_the_classes(folder):
    assert read_imagefolder(folder, CLASSES).labels == tuple(range(CLASSES))


# ------------------------------------------------------------------------------------------------------------ commands


def test_both_runs_are_scored_and_agree(bundle, folder):
    done = effdeploy("eval", bundle, "--imagefolder", folder, "--json")
    assert done.exit_code == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    record = next(event["record"] for event in events if event["event"] == "result")
    assert record["images"] == 2 * CLASSES
    assert record["agreement"] == 1.0
    assert record["drops"] == {"top-1": 0.0, "top-5": 0.0}
    assert all(run["intervals"]["top-1"][0] <= run["scores"]["top-1"] for run in record["runs"])
    assert deploy.evaluate(bundle, imagefolder=folder).drops == record["drops"]


def test_an_engine_that_lost_its_accuracy_is_seen(bundle, tmp_path):
    """Negative control: images named after PyTorch's classes; an engine of other weights no longer finds them."""
    other = tmp_path / "b"
    shutil.copytree(bundle, other)
    made = effdeploy(
        "export", "riformer", "--variant", "tiny", "--size", 32, "--batch", 4, "--set", f"classes={CLASSES}",
        "--weights", "random:1", "--until", "engine", "--out", tmp_path / "wrong",
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    wrong = read_manifest(tmp_path / "wrong")
    shutil.copy(tmp_path / "wrong" / wrong.engines[0].artifact.name, other)
    write_manifest(replace(read_manifest(other), engines=wrong.engines), other)
    photos = named_by_pytorch(bundle, tmp_path / "photos")
    right, broken = (deploy.evaluate(b, imagefolder=photos) for b in (bundle, other))
    assert [run.scores["top-1"] for run in right.runs] == [1.0, 1.0]
    assert broken.runs[1].scores["top-1"] == 1.0
    assert broken.drops["top-1"] > 0.2
    assert broken.agreement is not None
    assert broken.agreement < 0.8
    gated = effdeploy("eval", other, "--imagefolder", photos, "--max-drop", 0.1)
    assert gated.exit_code == 21
    assert "of top-1 against PyTorch; --max-drop allows 0.1" in gated.stderr


def named_by_pytorch(bundle: Path, folder: Path) -> Path:
    """Put random pictures into the classes that PyTorch sees in them; a class without any gets one that is left out."""
    recipe = resolve([layer_of_data("manifest", read_manifest(bundle).recipe)])
    loaded = load_model(find_system("riformer"), recipe, Target.ONNXRUNTIME)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        (folder / str(label) / "broken.png").write_bytes(b"no image")
    for seed in range(24):
        path = folder / "new.png"
        Image.new("RGB", (40, 40), tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())).save(path)
        pixels = preprocess(path, recipe.size, recipe.preprocess.record())[None]
        label = int(run_module(loaded.reference, {"images": pixels}, loaded.outputs)["logits"].argmax())
        path.rename(folder / str(label) / f"{seed}.png")
    return folder


def test_images_that_cannot_be_read_are_named_and_counted(bundle, folder):
    (folder / "class-3" / "0.png").write_bytes(b"\x89PNG and no more")
    done = effdeploy("eval", bundle, "--imagefolder", folder)
    assert done.exit_code == 0, done.stderr
    assert "1 of 14 images cannot be read and were left out: class-3/0.png" in " ".join(done.stdout.split())
    assert deploy.evaluate(bundle, imagefolder=folder).unreadable == ("class-3/0.png",)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_another_number_of_classes_is_refused(bundle, folder):
    shutil.rmtree(folder / "class-6")
    done = effdeploy("eval", bundle, "--imagefolder", folder)
    assert done.exit_code == 18
    assert "has 6 classes (sub-folders), the network has 7" in done.stderr


def test_folders_that_are_none_are_refused(bundle, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="has no sub-folders"):
        deploy.evaluate(bundle, imagefolder=tmp_path / "empty")
    with pytest.raises(ImageError, match="No such file"):
        deploy.evaluate(bundle, imagefolder=tmp_path / "nowhere")
    (folder / "class-2" / "0.png").unlink()
    (folder / "class-2" / "1.png").unlink()
    with pytest.raises(ImageError, match=r"1 of 7 classes .* hold no image: class-2"):
        deploy.evaluate(bundle, imagefolder=folder)


def test_a_folder_of_damaged_images_is_refused(bundle, folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"none of the 14 images .* can be read"):
        deploy.evaluate(bundle, imagefolder=folder)


def test_one_kind_of_labels_is_expected(bundle, folder):
    with pytest.raises(RecipeError, match="expected one of them"):
        deploy.evaluate(bundle, imagefolder=folder, coco=folder)
    with pytest.raises(RecipeError, match="no labelled data"):
        deploy.evaluate(bundle)
