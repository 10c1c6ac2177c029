"""Top-1 of trained networks in every precision: scikit-learn's digits, the half that no network was trained on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import deploy

pytest.importorskip("sklearn", reason="needs scikit-learn (extra test)")

ROOT = Path(__file__).parents[1]
LIMITS = {"fp16": 0.001, "int8": 0.005}  # share of images by which top-1 may differ from PyTorch's


@pytest.fixture
def example(monkeypatch):
    """Import examples/digits/evaluate.py as its user runs it, from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples" / "digits")
    for name in ("data", "evaluate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("evaluate")
    for name in ("data", "evaluate"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_low_precision_keeps_the_accuracy_of_trained_networks(example, tmp_path):
    runs = {name: set_ for name, set_ in example.RUNS.items() if name != "tome, r=0"}  # merging is the harder one
    records = example.evaluate(tmp_path, runs=runs, precisions=tuple(LIMITS))
    asked = [(name, precision) for name in runs for precision in LIMITS]
    for record in records:
        print(example.line(record))
    for (name, precision), record in zip(asked, records, strict=True):
        engine, pytorch = (run.scores["top-1"] for run in record.runs)
        assert record.images == 898
        assert precision in record.runs[0].run
        assert pytorch > 0.95, name  # trained, not random
        assert abs(engine - pytorch) <= LIMITS[precision], example.line(record)
        assert record.agreement is not None
        assert record.agreement >= 1 - 2 * LIMITS[precision] - 1e-9


def test_int8_passes_parity_on_photos_of_the_kind_that_it_was_calibrated_on(example, tmp_path):
    """Of the three, ConvMixer fails by most on noise and generated images: cosine 0.929."""
    data = importlib.import_module("data")
    held = data.write_images(tmp_path / "held-out", held_out=True, by_class=False)
    known = data.write_images(tmp_path / "calibration", held_out=False, by_class=False)
    run = deploy.export(
        ROOT / "examples" / "digits" / "convmixer.yaml", precision="int8", calib=known, images=held, until="parity",
        batch="1:4:8", set_={"parity.max_images": 64}, out=tmp_path / "bundle",
    )  # fmt: skip
    assert run.ok
    assert run.parity is not None
    (engine,) = (c for c in run.parity.comparisons if c.stage == "engine")
    assert (engine.images, engine.top1) == (64, 1.0)
    assert engine.cosine > 0.995
    assert engine.per_input["noise"] > 2 * engine.per_input["photos"]


def test_the_halves_share_no_image_and_the_checkpoints_are_small(example):
    data = importlib.import_module("data")
    (held, labels), (known, _) = data.digits(held_out=True), data.digits(held_out=False)
    assert (len(held), len(known)) == (898, 899)
    assert not {image.tobytes() for image in held} & {image.tobytes() for image in known}
    assert set(labels.tolist()) == set(range(10))
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "data" / "digits").iterdir()) < 1_000_000
