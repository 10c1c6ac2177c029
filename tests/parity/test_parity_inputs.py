from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deploy.errors import ParityError
from deploy.parity.inputs import natural, pack
from deploy.records import Batch, Preprocess, TensorSpec

IMAGES = (TensorSpec(name="images", dtype="float32", shape=("batch", 3, 32, 48)),)
SIZE = (32, 48)
SPEC = Preprocess()


def images(made) -> np.ndarray:
    return np.concatenate([c.feeds["images"][: len(c.groups)] for c in made.chunks])


def pixels(made) -> np.ndarray:
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (SPEC.mean, SPEC.std))
    return images(made) * std + mean


def test_the_groups_and_their_sizes():
    made = pack(IMAGES, SIZE, SPEC, batch=Batch())
    assert made.counts == {"noise": 2, "natural": 3, "extremes": 3}
    assert all(c.feeds["images"].dtype == np.float32 and c.feeds["images"].shape == (1, 3, *SIZE) for c in made.chunks)


def test_the_same_seed_gives_the_same_images_whatever_the_batch():
    one = images(pack(IMAGES, SIZE, SPEC, batch=Batch()))
    for batch in (Batch(min=3, opt=3, max=3), Batch(min=1, opt=5, max=8)):
        np.testing.assert_array_equal(images(pack(IMAGES, SIZE, SPEC, batch=batch)), one)
    assert np.abs(images(pack(IMAGES, SIZE, SPEC, batch=Batch(), seed=1)) - one).max() > 1


def test_values_are_pinned_across_machines():
    rows = images(pack(IMAGES, SIZE, SPEC, batch=Batch()))
    np.testing.assert_allclose(rows[0, 0, 0, :3], [1.117622, -1.387125, -0.426572], atol=1e-6)
    np.testing.assert_allclose(rows[2].mean(axis=(1, 2)), [-0.15602, -0.28065, -0.03579], atol=1e-4)


def test_all_images_differ():
    rows = images(pack(IMAGES, SIZE, SPEC, batch=Batch()))
    assert min(np.abs(a - b).max() for i, a in enumerate(rows) for b in rows[:i]) > 0.5


def test_a_fixed_batch_is_filled_with_repeats_that_do_not_count():
    made = pack(IMAGES, SIZE, SPEC, batch=Batch(min=5, opt=5, max=5))
    assert [len(c.groups) for c in made.chunks] == [5, 3]
    last = made.chunks[1].feeds["images"]
    assert last.shape[0] == 5
    np.testing.assert_array_equal(last[3:], last[:2])


def test_a_dynamic_batch_runs_in_more_than_one_size():
    made = pack(IMAGES, SIZE, SPEC, batch=Batch(min=1, opt=16, max=32))
    assert [len(c.feeds["images"]) for c in made.chunks] == [1, 7]
    made = pack(IMAGES, SIZE, SPEC, batch=Batch(min=3, opt=4, max=8))
    assert [len(c.feeds["images"]) for c in made.chunks] == [3, 4, 3]
    assert [len(c.groups) for c in made.chunks] == [3, 4, 1]


def test_natural_images_have_the_statistics_of_photos():
    image = natural((128, 128), np.random.default_rng(0))
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 0.08
    colours = np.corrcoef(image.reshape(-1, 3).T)
    assert colours[np.triu_indices(3, 1)].min() > 0.5
    power = np.abs(np.fft.fft2(image.mean(axis=-1))) ** 2
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(128)] * 2))
    bands = [power[(radius >= low) & (radius < 2 * low)].mean() for low in (0.02, 0.04, 0.08, 0.16)]
    slopes = np.diff(np.log2(bands))
    assert (slopes < -1).all()  # white noise has 0, photos about -2
    assert -3.5 < slopes.mean() < -1.5


def test_extremes_reach_the_ends_of_the_range():
    extremes = pixels(pack(IMAGES, SIZE, SPEC, batch=Batch()))[5:]
    np.testing.assert_allclose(extremes.min(axis=(1, 2, 3)), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(extremes.max(axis=(1, 2, 3)), 1, atol=1e-6)


def test_photos_go_through_the_preprocessing(tmp_path):
    Image.new("RGB", (80, 60), (255, 0, 0)).save(tmp_path / "red.png")
    made = pack(IMAGES, SIZE, SPEC, batch=Batch(), photos=[tmp_path / "red.png"])
    assert made.counts["photos"] == 1
    np.testing.assert_allclose(pixels(made)[-1][:, 0, 0], [1, 0, 0], atol=1e-6)


def test_other_inputs_need_a_maker_and_keep_the_graph_order():
    sizes = TensorSpec(name="orig_target_sizes", dtype="int64", shape=("batch", 2))
    with pytest.raises(ParityError, match="no parity inputs for orig_target_sizes"):
        pack((*IMAGES, sizes), SIZE, SPEC, batch=Batch())
    made = pack(
        (sizes, *IMAGES),
        SIZE,
        SPEC,
        batch=Batch(min=4, opt=4, max=4),
        extra={"orig_target_sizes": lambda batch: np.full((len(batch), 2), 640, np.int64), "unused": np.asarray},
    )
    assert list(made.chunks[0].feeds) == ["orig_target_sizes", "images"]
    assert made.chunks[0].feeds["orig_target_sizes"].shape == (4, 2)
