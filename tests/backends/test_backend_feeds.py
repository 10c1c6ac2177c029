from __future__ import annotations

import numpy as np
import pytest

from deploy.backends.feeds import check_feeds, example_feeds
from deploy.errors import SizeError
from deploy.records import Batch, TensorSpec

INPUTS = (
    TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),
    TensorSpec(name="sizes", dtype="int64", shape=("batch", 2)),
)


def feeds(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    good = {"images": np.zeros((2, 3, 8, 8), np.float32), "sizes": np.zeros((2, 2), np.int64)}
    return {name: value for name, value in (good | changes).items() if value is not None}


@pytest.mark.parametrize("batch", [None, Batch.parse("1:2:4"), Batch.parse("2")])
def test_feeds_that_fit_pass(batch):
    check_feeds(INPUTS, feeds(), batch)


@pytest.mark.parametrize(
    ("changes", "batch", "words"),
    [
        ({"sizes": None}, None, "input 'sizes': missing"),
        ({"pixels": np.zeros(1)}, None, "'pixels': not an input of this engine, expected ['images', 'sizes']"),
        ({"images": np.zeros((2, 3, 8, 8))}, None, "got dtype float64, expected float32"),
        ({"images": np.zeros((2, 3, 8, 9), np.float32)}, None, "got shape [2, 3, 8, 9], expected ['batch', 3, 8, 8]"),
        ({"images": np.zeros((3, 8, 8), np.float32)}, None, "got shape [3, 8, 8]"),
        ({}, Batch.parse("4:4:8"), "with 4 to 8 for names"),
        ({}, Batch.parse("1"), "got shape [2, 3, 8, 8]"),
    ],
)
def test_feeds_that_do_not_fit_say_got_and_expected(changes, batch, words):
    with pytest.raises(SizeError) as caught:
        check_feeds(INPUTS, feeds(**changes), batch)
    assert words in caught.value.message


def test_every_mistake_is_listed_at_once():
    with pytest.raises(SizeError) as caught:
        check_feeds(INPUTS, {"images": np.zeros(1), "other": np.zeros(1)})
    assert len(caught.value.message.split("; ")) == 4


def test_example_feeds_fit():
    made = example_feeds(INPUTS, Batch.parse("2:3:4"))
    assert made["images"].shape[0] == 2
    check_feeds(INPUTS, made)
