"""The batch suite on real ONNX Runtime sessions: clean graphs pass, each way of leaking is caught by its check."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.backends.base import BuildOptions, Feeds
from deploy.backends.onnxruntime import open_model
from deploy.errors import ParityError, UnknownNameError
from deploy.parity import batch as module
from deploy.parity.batch import check_batches, derangement, limit_of, rows_of, sizes_of, with_batches
from deploy.parity.compare import Candidate, check_parity
from deploy.parity.inputs import pack
from deploy.parity.metrics import TASKS, compare_classification
from deploy.records import Batch, BatchRecord, Precision, Preprocess, TensorSpec, Tolerance, from_json, to_json

IMAGES = TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8))
SIZES = TensorSpec(name="sizes", dtype="int64", shape=("batch", 2))
TOLERANCES = {"fp32": Tolerance(max_relative=1e-4), "fp16": Tolerance(max_relative=1e-2)}
DYNAMIC = Batch(min=1, opt=2, max=4)
node = helper.make_node
WEIGHTS = np.random.default_rng(0).standard_normal((192, 12)).astype(np.float32)
CONSTANTS = {
    "w": WEIGHTS, "zero": np.array(0, np.int64), "one": np.array(1, np.int64), "one_": np.array([1], np.int64),
    "zero_": np.array([0], np.int64), "four": np.array(4, np.int64), "two": np.array([2], np.int64),
    "ones": np.ones(12, np.float32), "zeros": np.zeros(12, np.float32), "pairs": np.array([-1, 384], np.int64),
    "rows": np.array([-1, 192], np.int64),
}  # fmt: skip
COUNT = [node("Shape", ["h"], ["s"]), node("Gather", ["s", "zero"], ["n"])]
# What each graph does between the features h [N,12] and the logits y.
LEAKS = {
    "clean": [node("Relu", ["h"], ["y"])],
    "mean over the batch": [node("ReduceMean", ["h", "zero_"], ["m"]), node("Sub", ["h", "m"], ["y"])],
    "norm over the batch axis": [
        node("Transpose", ["h"], ["t"], perm=[1, 0]),
        node("Unsqueeze", ["t", "zero_"], ["u"]),
        node("InstanceNormalization", ["u", "ones", "zeros"], ["i"]),
        node("Squeeze", ["i", "zero_"], ["q"]),
        node("Transpose", ["q"], ["y"], perm=[1, 0]),
    ],
    "row 0 is special": [
        *COUNT,
        node("Range", ["zero", "n", "one"], ["r"]),
        node("Equal", ["r", "zero"], ["e"]),
        node("Cast", ["e"], ["f"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["f", "one_"], ["g"]),
        node("Add", ["h", "g"], ["y"]),
    ],
    "wrong at the largest batch": [
        *COUNT,
        node("Equal", ["n", "four"], ["e"]),
        node("Cast", ["e"], ["f"], to=TensorProto.FLOAT),
        node("Add", ["h", "f"], ["y"]),
    ],
    "mask by multiplication": [
        node("Transpose", ["h"], ["t"], perm=[1, 0]),
        node("MatMul", ["h", "t"], ["p"]),
        node("EyeLike", ["p"], ["e"], dtype=TensorProto.FLOAT),
        node("MatMul", ["e", "h"], ["y"]),
    ],
    "one scale for the whole batch": [
        node("DynamicQuantizeLinear", ["h"], ["d", "c", "z"]),
        node("DequantizeLinear", ["d", "c", "z"], ["y"]),
    ],
    "even batches only": [
        node("Flatten", ["images"], ["a"]),
        node("Reshape", ["a", "pairs"], ["b"]),
        node("Reshape", ["b", "rows"], ["k"]),
        node("MatMul", ["k", "w"], ["y"]),
    ],
}


def save(path: Path, nodes, inputs, outputs) -> Path:
    body = [node("Flatten", ["images"], ["x"]), node("MatMul", ["x", "w"], ["h"]), *nodes]
    infos = [helper.make_tensor_value_info(*each) for each in (*inputs, *outputs)]
    graph = helper.make_graph(
        body, "rows", infos[: len(inputs)], infos[len(inputs) :],
        [numpy_helper.from_array(v, k) for k, v in CONSTANTS.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def leaking(path: Path, kind: str, batch: int | str = "batch") -> Path:
    images, y = ("images", TensorProto.FLOAT, [batch, 3, 8, 8]), ("y", TensorProto.FLOAT, [batch, 12])
    return save(path / "rows.onnx", LEAKS[kind], [images], [y])


def inputs(batch: Batch = DYNAMIC, *more: TensorSpec):
    makers = {"sizes": lambda images: (images[:, 0, :2, 0] * 100).astype(np.int64)}
    return pack((IMAGES, *more), (8, 8), Preprocess(), batch=batch, extra=makers)


def candidate(path: Path, precision: Precision = Precision.FP32) -> Candidate:
    options = BuildOptions(device="cpu", threads=1)
    return Candidate(stage="engine", precision=precision, open=partial(open_model, path, options))


def check(path: Path, batch: Batch = DYNAMIC, *more: TensorSpec) -> BatchRecord:
    return check_batches([candidate(path)], inputs(batch, *more), batch, TOLERANCES)


def failing(record: BatchRecord) -> set[str]:
    return {c.check for c in record.checks if not c.ok}


def test_rows_that_leave_each_other_alone_pass(tmp_path):
    record = check(leaking(tmp_path, "clean"))
    assert record.ok, record.verdict
    assert record.sizes == (1, 2, 3, 4)
    assert record.verdict.startswith("rows are independent over ")
    kinds = {(c.batch, c.check, c.detail) for c in record.checks}
    noise = {"row 0 is extreme values", "row 3 is NaN", "row 2 is infinity"}
    assert {detail for size, name, detail in kinds if (size, name) == (4, "neighbour")} == noise
    assert {name for size, name, _ in kinds if size == 1} == {"repeated"}
    assert {name for size, name, _ in kinds if size == 3} == {*module.CHECKS} - {"runs"}
    assert from_json(BatchRecord, to_json(record)) == record


@pytest.mark.parametrize(
    ("kind", "caught"),
    [
        ("mean over the batch", {"alone", "neighbour"}),
        ("norm over the batch axis", {"alone", "neighbour"}),
        ("row 0 is special", {"alone", "permuted", "duplicated"}),
        ("wrong at the largest batch", {"alone"}),
        ("mask by multiplication", {"neighbour"}),
        ("one scale for the whole batch", {"alone", "neighbour"}),
        ("even batches only", {"runs"}),
    ],
)
def test_each_leak_is_caught_by_its_check(tmp_path, kind, caught):
    record = check(leaking(tmp_path, kind))
    assert not record.ok
    assert failing(record) == caught
    assert record.verdict.startswith("batch check ")
    assert "'engine'" in record.verdict
    assert from_json(BatchRecord, to_json(record)) == record


def test_a_graph_that_breaks_at_the_largest_batch_is_caught_there_and_nowhere_else(tmp_path):
    record = check(leaking(tmp_path, "wrong at the largest batch"))
    assert {c.batch for c in record.checks if not c.ok} == {4}


def test_nan_and_infinity_pass_through_a_mask_of_zeros_and_extreme_values_do_not(tmp_path):
    record = check(leaking(tmp_path, "mask by multiplication"))
    found = {c.detail.split(" is ")[1] for c in record.checks if not c.ok}
    assert found == {"NaN", "infinity"}
    first = next(c for c in record.checks if not c.ok)
    assert f"where {first.detail}: row {first.row} of output 'y' is off by infinite (limit 0)" in record.verdict


def test_a_size_that_cannot_run_is_told_with_the_runtimes_words(tmp_path):
    record = check(leaking(tmp_path, "even batches only"))
    assert record.verdict.startswith(
        "batch check fails at 'engine': does not run at batch 1: ONNX Runtime could not run"
    )


@pytest.mark.parametrize(("kind", "caught"), [("clean", set()), ("row 0 is special", {"alone", "permuted"})])
def test_a_fixed_batch_is_filled_up_with_repeats(tmp_path, kind, caught):
    record = check(leaking(tmp_path, kind, batch=3), Batch(min=3, opt=3, max=3))
    assert {c.batch for c in record.checks} == {3}
    assert failing(record) >= caught
    assert record.ok == (not caught)


def test_batch_one_has_no_neighbours_and_says_so(tmp_path):
    record = check(leaking(tmp_path, "clean", batch=1), Batch())
    assert [c.check for c in record.checks] == ["repeated"]
    assert record.notes == ("batch 1 has no neighbours: only repeated calls were checked",)


TWO_INPUTS = [
    node("Slice", ["h", "zero_", "two", "one_"], ["b"]),
    node("Cast", ["sizes"], ["f"], to=TensorProto.FLOAT),
    node("Mul", ["b", "f"], ["boxes"]),
    node("ArgMax", ["h"], ["labels"], axis=1),
]
FIRST_SIZE = [
    *TWO_INPUTS[:1],
    node("Gather", ["sizes", "zero_"], ["first"], axis=0),
    node("Cast", ["first"], ["f"], to=TensorProto.FLOAT),
    *TWO_INPUTS[2:],
]
COUNTED = [
    *COUNT,
    *TWO_INPUTS[:3],
    node("ArgMax", ["h"], ["best"], axis=1),
    node("Add", ["best", "n"], ["labels"]),
]


@pytest.mark.parametrize(
    ("nodes", "output", "caught"),
    [
        (TWO_INPUTS, "", set()),
        (FIRST_SIZE, "boxes", {"alone", "permuted", "duplicated", "neighbour"}),
        (COUNTED, "labels", {"alone"}),
    ],
    ids=["clean", "size-of-row-0", "labels-count-rows"],
)
def test_several_inputs_and_integer_outputs(tmp_path, nodes, output, caught):
    path = save(
        tmp_path / "two.onnx",
        nodes,
        [("images", TensorProto.FLOAT, ["n", 3, 8, 8]), ("sizes", TensorProto.INT64, ["n", 2])],
        [("boxes", TensorProto.FLOAT, ["n", 2]), ("labels", TensorProto.INT64, ["n", 1])],
    )
    record = check(path, DYNAMIC, SIZES)
    assert failing(record) <= caught
    assert record.ok == (not caught)
    assert "alone" in failing(record) or not caught
    assert {c.output for c in record.checks if not c.ok} == ({output} if output else set())


class Fake:
    """A runner with a will of its own, for what no ONNX graph can do."""

    name, device = "fake", "cpu"

    def __init__(self, infer) -> None:
        self.infer = infer

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...


def clean(feeds: Feeds) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore"):
        return {"y": np.stack([row.ravel() @ WEIGHTS for row in feeds["images"]])}


def fake_check(infer, batch: Batch = DYNAMIC, precision: Precision = Precision.FP32, **more) -> BatchRecord:
    runner = Candidate(stage="engine", precision=precision, open=lambda: Fake(infer))
    return check_batches([runner], inputs(batch), batch, TOLERANCES, **more)


@pytest.mark.parametrize("batch", [DYNAMIC, Batch()])
def test_an_engine_that_remembers_the_last_call_is_caught(batch):
    last = {"sum": np.float32(0)}

    def infer(feeds: Feeds) -> dict[str, np.ndarray]:
        before, last["sum"] = last["sum"], np.nansum(np.clip(feeds["images"], -9, 9))
        return {"y": clean(feeds)["y"] + before}

    assert "repeated" in failing(fake_check(infer, batch))


def test_rounding_between_batch_sizes_is_no_leak_and_more_than_rounding_is():
    def grown(share: float):
        return lambda feeds: {"y": clean(feeds)["y"] * np.float32(1 + share * len(feeds["images"]))}

    assert fake_check(grown(5e-6)).ok
    assert failing(fake_check(grown(2e-5))) == {"alone"}
    assert fake_check(grown(5e-4), precision=Precision.FP16).ok


def test_a_neighbour_may_not_move_a_single_bit_where_runs_repeat():
    """Rounding would hide this; the same kernels at the same place must not differ at all."""

    def infer(feeds: Feeds) -> dict[str, np.ndarray]:
        leak = 1 + 2e-6 * np.isnan(feeds["images"]).any()
        return {"y": clean(feeds)["y"] * np.float32(leak)}

    record = fake_check(infer)
    assert failing(record) == {"neighbour"}
    assert all(c.error < 1e-5 and c.limit == 0 for c in record.checks if not c.ok)


def test_a_runtime_that_does_not_repeat_itself_is_held_to_rounding():
    calls = itertools.count()

    def infer(feeds: Feeds) -> dict[str, np.ndarray]:
        return {"y": clean(feeds)["y"] * np.float32(1 + 1e-6 * (next(calls) % 3))}

    record = fake_check(infer)
    assert record.ok, record.verdict
    assert {c.limit for c in record.checks if c.check == "neighbour" and c.batch > 1} <= {0.0, 2.5e-5}
    assert 2.5e-5 in {c.limit for c in record.checks if c.check == "neighbour"}


def test_an_output_without_the_batch_axis_is_an_error():
    with pytest.raises(
        ParityError, match=r"output 'y' of 'engine' has shape \[12\] at batch 1, expected \[1, \.\.\.\]"
    ):
        fake_check(lambda feeds: {"y": clean(feeds)["y"].mean(axis=0)})


def test_outputs_that_need_matching_are_matched_by_their_task(monkeypatch):
    """Detections in another order are the same detections; a moved one is not."""

    def matched(expected, got):
        return compare_classification(*({n: np.sort(v, axis=1) for n, v in each.items()} for each in (expected, got)))

    def reordered(feeds: Feeds, shift: float = 0.0) -> dict[str, np.ndarray]:
        y = clean(feeds)["y"]
        return {"y": np.stack([np.roll(row, len(y)) for row in y]) + np.float32(shift * len(y))}

    monkeypatch.setitem(TASKS, "matched", matched)
    assert fake_check(reordered, task="matched").ok
    assert failing(fake_check(reordered)) == {"alone"}
    assert failing(fake_check(partial(reordered, shift=0.1), task="matched")) == {"alone"}
    with pytest.raises(UnknownNameError, match="unknown task 'mached'"):
        fake_check(clean, task="mached")


def test_nothing_to_check_is_an_error():
    with pytest.raises(ParityError, match="nothing runs here"):
        check_batches([], inputs(), DYNAMIC, TOLERANCES)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [("1", (1,)), ("4", (4,)), ("1:1:2", (1, 2)), ("1:2:4", (1, 2, 3, 4)), ("1:8:32", (1, 8, 21, 32)),
     ("1:8:8", (1, 5, 8)), ("2:2:3", (2, 3))],
)  # fmt: skip
def test_sizes_are_min_opt_max_and_one_between(batch, sizes):
    assert sizes_of(Batch.parse(batch)) == sizes


def test_limits_follow_the_recipe_and_without_one_the_precision():
    assert limit_of(Precision.FP16, TOLERANCES) == 0.25 * 1e-2
    assert limit_of(Precision.FP16, {"fp16": Tolerance(cosine=0.99)}) == 8 * 2**-11
    assert limit_of(Precision.FP32, {}) < limit_of(Precision.FP16, {}) < limit_of(Precision.BF16, {})


@pytest.mark.parametrize("size", range(2, 12))
def test_a_derangement_leaves_no_row_in_its_place(size):
    assert sorted(derangement(size)) == list(range(size))
    assert all(row != place for place, row in enumerate(derangement(size)))
    assert derangement(size) == derangement(size)


def test_rows_differ_and_are_ordinary_images():
    rows = rows_of(inputs(), 12)["images"]
    assert rows.shape == (12, 3, 8, 8)
    assert len({row.tobytes() for row in rows}) == 12


def test_a_failed_suite_is_the_verdict_of_parity(tmp_path):
    path = leaking(tmp_path, "mask by multiplication")
    parity = check_parity(clean, [candidate(path)], inputs(), TOLERANCES)
    assert parity.ok, "parity alone is blind to this leak"
    joined = with_batches(parity, check(path))
    assert not joined.ok
    assert joined.verdict.startswith("batch check fails at 'engine': neighbour at batch 2")
    assert with_batches(parity, check(leaking(tmp_path, "clean"))).verdict == parity.verdict


def test_every_graph_is_valid(tmp_path):
    for kind in LEAKS:
        onnx.checker.check_model(onnx.load(leaking(tmp_path, kind)))
