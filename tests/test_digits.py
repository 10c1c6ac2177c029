"""The trained networks' data: scikit-learn's digits, the half that no network was trained on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn (extra test)")

ROOT = Path(__file__).parents[1]


def test_the_halves_share_no_image_and_the_checkpoints_are_small(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "digits")
    monkeypatch.delitem(sys.modules, "data", raising=False)
    data = importlib.import_module("data")
    (held, labels), (known, _) = data.digits(held_out=True), data.digits(held_out=False)
    sys.modules.pop("data")
    assert (len(held), len(known)) == (898, 899)
    assert not {image.tobytes() for image in held} & {image.tobytes() for image in known}
    assert set(labels.tolist()) == set(range(10))
    found = {path.stem: path.stat().st_size for path in (ROOT / "tests" / "data" / "digits").iterdir()}
    assert found.keys() == {path.stem for path in (ROOT / "examples" / "digits").glob("*.yaml")}
    assert sum(found.values()) < 1_000_000
