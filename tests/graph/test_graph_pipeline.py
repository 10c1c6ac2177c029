"""The lists of passes, the guards around them, and broken passes that the guards must catch by name."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graph_cases import assert_same, build, draw

from deploy.artifacts import PATCHED, sha256_of
from deploy.errors import GraphPassError
from deploy.graph.base import GraphPass, PassResult
from deploy.graph.io import load_model, op_counts, save_model
from deploy.graph.passes import FUSE_GELU, PASSES
from deploy.graph.pipeline import PIPELINE, Step, run_passes
from deploy.records import PassesRecord, Target, from_json, to_json

every_target = pytest.mark.parametrize("target", Target, ids=lambda t: t.value)


def network() -> onnx.ModelProto:
    """A graph with something for every pass; its transposes hide a BatchNormalization until the second round."""
    text = """g (float[N,4,4,4] images) => (float[N,4,16] logits, float[N,4,4,4] features) {
        a = Conv(images, w)  b = Transpose<perm = [0, 2, 3, 1]>(a)  c = Transpose<perm = [0, 3, 1, 2]>(b)
        d = BatchNormalization(c, one4, zero4, mean, variance)
        e = Div(d, root)  f = Erf(e)  g1 = Add(f, one)  h = Mul(d, g1)  i = Mul(h, half)
        j = Reshape(i, split)  k = InstanceNormalization(j, one2, zero2)  l = Shape(i)  m = Reshape(k, l)
        features = Add(m, i)
        o = Reshape(features, cube)  p = Reshape(o, flat)
        q = ReduceMean(p, last)  r = Sub(p, q)  s = Mul(r, r)  t = ReduceMean(s, last)  u = Add(t, eps)  v = Sqrt(u)
        z = Div(r, v)  aa = Cast<to = 11>(z)  bb = Cast<to = 1>(aa)
        cc = Neg(one16)  dd = Mul(bb, cc)  ee = Unsqueeze(dd, last)  ff = Cast<to = 1>(ee)  gg = Squeeze(ff, last)
        logits = Add(gg, one16b)
    }"""
    arrays = {
        "w": draw(4, 4, 3, 3, seed=3)[:, :, :1, :1],
        "mean": draw(4),
        "variance": draw(4) ** 2 + 0.5,
        "one4": np.ones(4, np.float32),
        "zero4": np.zeros(4, np.float32),
        "one2": np.ones(2, np.float32),
        "zero2": np.zeros(2, np.float32),
        "one16": draw(16),
        "one16b": draw(16),
        "root": 2.0**0.5,
        "one": 1.0,
        "half": 0.5,
        "eps": 1e-5,
        "split": [0, 2, -1],
        "cube": [-1, 4, 16, 1],
        "flat": [-1, 4, 16],
        "last": [-1],
    }
    return build(text, opset=21, **arrays)


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    path = tmp_path / "10-traced.onnx"
    save_model(network(), path)
    return path


FEEDS = {"images": draw(2, 4, 4, 4)}


@every_target
def test_a_target_gets_its_form_and_the_outputs_stay(traced: Path, tmp_path: Path, target: Target) -> None:
    record = run_passes(traced, target, tmp_path)
    after = load_model(tmp_path / PATCHED)
    counts = op_counts(after)
    assert dict(record.op_counts) == counts
    assert dict(record.op_counts_before) == op_counts(network())
    assert [p.name for p in record.passes] == [step.pass_.name for step in PIPELINE[target]]
    assert ("GroupNormalization" in counts) == (target is Target.TENSORRT)
    assert ("InstanceNormalization" in counts) == (target is Target.ONNXRUNTIME)
    assert {"LayerNormalization", "Gelu", "Conv"} <= counts.keys()
    assert not {"BatchNormalization", "Erf", "Transpose", "Cast", "Neg", "Sqrt"} & counts.keys()
    assert record.passes[0].nodes_before == sum(record.op_counts_before.values())
    assert from_json(PassesRecord, to_json(record)) == record
    for batch in (1, 3):
        assert_same(network(), after, atol=2e-6, batch=batch)


@every_target
def test_the_list_is_idempotent_and_deterministic(traced: Path, tmp_path: Path, target: Target) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first = run_passes(traced, target, folders[0])
    assert run_passes(traced, target, folders[1]).artifact == first.artifact
    again = run_passes(folders[0] / PATCHED, target, folders[2])
    assert [p.name for p in again.passes if p.sites] == []
    assert again.artifact == first.artifact


@every_target
def test_verify_each_measures_every_pass_and_writes_the_same_file(traced: Path, tmp_path: Path, target: Target) -> None:
    plain = run_passes(traced, target, tmp_path)
    checked = run_passes(traced, target, tmp_path, verify=FEEDS)
    assert checked.artifact == plain.artifact
    assert all(p.max_abs_change is None for p in plain.passes)
    changes = {p.name: p.max_abs_change for p in checked.passes}
    assert all(change is not None and change < 1e-5 for change in changes.values())
    assert changes["fuse_layer_norm"]  # it did compare: rounding differs there
    assert changes["share_initializers"] == 0.0


def test_two_rounds_find_what_one_pass_opens_for_an_earlier_one(traced: Path, tmp_path: Path) -> None:
    record = run_passes(traced, Target.TENSORRT, tmp_path)
    norm = next(p for p in record.passes if p.name == "fuse_batch_norm")
    assert norm.sites == 1
    assert norm.declined == ()


def test_declined_sites_are_in_the_record(tmp_path: Path) -> None:
    model = build(
        "g (float[2] x) => (float[2] y) { a = Relu(x)  b = Cast<to = 10>(a)  c = Cast<to = 1>(b)  y = Neg(c) }"
    )
    save_model(model, tmp_path / "10-traced.onnx")
    record = run_passes(tmp_path / "10-traced.onnx", Target.ONNXRUNTIME, tmp_path)
    declined = {p.name: p.declined for p in record.passes if p.declined}
    reason = "block/Cast_1: the chain float32 -> float16 -> float32 loses values in the middle"
    assert declined == {"remove_casts": (reason,)}


def test_a_graph_with_control_flow_is_written_as_it_came(tmp_path: Path) -> None:
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["x", "w"], ["z"])], "b", [], [onnx.helper.make_tensor_value_info("z", 1, [2])]
    )
    model = build("g (float[2] x, bool flag) => (float[2] y) { y = Mul(x, w) }", w=draw(2))
    model.graph.node[0].CopyFrom(
        onnx.helper.make_node("If", ["flag"], ["y"], name="block/If", then_branch=branch, else_branch=branch)
    )
    save_model(model, tmp_path / "10-traced.onnx")
    record = run_passes(tmp_path / "10-traced.onnx", Target.TENSORRT, tmp_path)
    assert (tmp_path / PATCHED).read_bytes() == (tmp_path / "10-traced.onnx").read_bytes()
    assert {p.declined for p in record.passes} == {("If 'block/If' holds a subgraph; the whole graph is left alone",)}
    assert {p.nodes_after for p in record.passes} == {1}


# --- broken passes: each guard is seen to fail


def broken(name: str, apply: Callable[[gs.Graph], int]) -> tuple[Step, ...]:
    """A list in which an honest pass runs before and after the broken one."""

    def run_once(graph: gs.Graph, done: list[bool] = []) -> PassResult:  # noqa: B006 - one list for each broken pass
        if done:
            return PassResult(sites=0)
        done.append(True)
        return PassResult(sites=apply(graph))

    bad = dataclasses.replace(FUSE_GELU, name=name, apply=run_once)
    return (Step(PASSES[0], "honest"), Step(bad, "broken"), Step(PASSES[-1], "honest"))


def rename_output(graph: gs.Graph) -> int:
    graph.outputs[0].name = "other"
    return 1


def change_input_shape(graph: gs.Graph) -> int:
    graph.inputs[0].shape = [1, 4, 4, 4]
    return 1


def reverse_nodes(graph: gs.Graph) -> int:
    graph.nodes.reverse()
    return 1


def make_twice(graph: gs.Graph) -> int:
    node = graph.nodes[1]
    graph.nodes.append(gs.Node("Abs", name="copy", inputs=[graph.inputs[0]], outputs=list(node.outputs)))
    return 1


def orphan_an_output(graph: gs.Graph) -> int:
    graph.nodes = [n for n in graph.nodes if graph.outputs[0] not in n.outputs]
    return 1


def raise_something(graph: gs.Graph) -> int:
    raise IndexError("list index out of range")


def unknown_operator(graph: gs.Graph) -> int:
    graph.nodes[0].op = "Convolve"
    return 1


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (rename_output, "pass broken changed the inputs or outputs"),
        (change_input_shape, "pass broken changed the inputs or outputs"),
        (reverse_nodes, r"pass broken: .* reads '.*' before it is made"),
        (make_twice, r"pass broken: '.*' is made twice, the second time by copy \(Abs\)"),
        (orphan_an_output, "pass broken: nothing makes the output 'logits' any more"),
        (raise_something, "pass broken failed on this graph: IndexError: list index out of range"),
        (unknown_operator, "the rewritten graph is not valid ONNX: .*Convolve"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_broken_pass_is_caught_and_nothing_is_written(
    traced: Path, tmp_path: Path, apply: Callable[[gs.Graph], int], message: str
) -> None:
    with pytest.raises(GraphPassError, match=message):
        run_passes(traced, Target.TENSORRT, tmp_path, steps=broken("broken", apply))
    assert [p.name for p in tmp_path.iterdir()] == ["10-traced.onnx"]


def scale_weights(graph: gs.Graph) -> int:
    conv = next(n for n in graph.nodes if n.op == "Conv")
    conv.inputs[1].values = conv.inputs[1].values * np.float32(1.001)
    return 1


def drop_gelu(graph: gs.Graph) -> int:
    erf = next(n for n in graph.nodes if n.op == "Erf")
    erf.op = "Tanh"
    return 0  # and it lies about it


def divide_by_zero(graph: gs.Graph) -> int:
    scaled = (
        (n, i) for n in graph.nodes if n.op == "Mul" for i, t in enumerate(n.inputs) if isinstance(t, gs.Constant)
    )
    node, index = next(scaled)
    node.inputs[index] = gs.Constant("nan", np.full(node.inputs[index].shape, np.nan, np.float32))
    return 1


def outdated_operator(graph: gs.Graph) -> int:
    node = next(n for n in graph.nodes if n.op == "BatchNormalization")
    node.attrs["training_mode"] = 1
    return 1


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (scale_weights, "pass broken moved output '.*' by"),
        (drop_gelu, "pass broken moved output '.*' by"),
        (divide_by_zero, "pass broken moved output 'logits' by nan"),
        (outdated_operator, "ONNX Runtime cannot run the graph after pass broken"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_verify_each_names_the_pass_that_changed_the_numbers(
    traced: Path, tmp_path: Path, apply: Callable[[gs.Graph], int], message: str
) -> None:
    with pytest.raises(GraphPassError, match=message):
        run_passes(traced, Target.TENSORRT, tmp_path, verify=FEEDS, steps=broken("broken", apply))


def test_rounding_below_the_limit_is_no_error_and_is_recorded(traced: Path, tmp_path: Path) -> None:
    def nudge(graph: gs.Graph) -> int:
        conv = next(n for n in graph.nodes if n.op == "Conv")
        conv.inputs[1].values = conv.inputs[1].values * np.float32(1 + 1e-6)
        return 1

    record = run_passes(traced, Target.TENSORRT, tmp_path, verify=FEEDS, steps=broken("nudge", nudge))
    change = next(p.max_abs_change for p in record.passes if p.name == "nudge")
    assert change is not None
    assert 0 < change < 1e-4


def test_wrong_feeds_are_reported_before_any_pass_is_blamed(traced: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphPassError, match="ONNX Runtime cannot run the graph before any pass"):
        run_passes(traced, Target.TENSORRT, tmp_path, verify={"pictures": FEEDS["images"]})


def test_a_pass_that_never_ends_is_named(traced: Path, tmp_path: Path) -> None:
    endless = GraphPass(
        name="endless", apply=lambda _: PassResult(sites=1), requires=".", ensures=".", example=FUSE_GELU.example
    )
    with pytest.raises(GraphPassError, match="these passes still find sites: endless"):
        run_passes(traced, Target.TENSORRT, tmp_path, steps=(Step(endless, "broken"),))


def test_the_file_that_was_read_is_not_changed(traced: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(traced.read_bytes()).hexdigest()
    run_passes(traced, Target.TENSORRT, tmp_path)
    assert hashlib.sha256(traced.read_bytes()).hexdigest() == before


def test_the_passes_cost_little_more_than_reading_checking_and_writing_the_file(tmp_path: Path) -> None:
    """216 nodes and 48 MB of weights, InstanceNormalization form: what RIFormer-S12's trace is at opset 20."""
    path = tmp_path / "10-traced.onnx"
    save_model(sized_like_riformer(), path)

    def bare() -> None:
        model = load_model(path)
        onnx.checker.check_model(model.SerializeToString(), full_check=True)
        save_model(model, tmp_path / "copy.onnx")
        sha256_of(tmp_path / "copy.onnx")

    def seconds(action: Callable[[], object]) -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    rounds = [(seconds(bare), seconds(lambda: run_passes(path, Target.ONNXRUNTIME, tmp_path))) for _ in range(4)]
    assert min(passes for _, passes in rounds) < 2 * min(plain for plain, _ in rounds)


def sized_like_riformer() -> onnx.ModelProto:
    lines, arrays, last = [], {"split": [0, 1, -1], "one": [1.0], "zero": [0.0], "back": [0, 660, 4, 4]}, "x"
    for k in range(27):
        arrays |= {f"g{k}": draw(660, 1, 1, seed=k), f"b{k}": draw(660, 1, 1, seed=99 - k)}
        arrays[f"w{k}"] = np.full((660, 660, 1, 1), k, np.float32)
        lines.append(
            f"a{k} = Reshape({last}, split)  n{k} = InstanceNormalization(a{k}, one, zero)  r{k} = Reshape(n{k}, back)"
            f"  m{k} = Mul(r{k}, g{k})  s{k} = Add(m{k}, b{k})  c{k} = Conv(s{k}, w{k})  h{k} = Gelu(c{k})"
            f"  x{k} = Add({last}, h{k})"
        )
        last = f"x{k}"
    return build(
        f"g (float[N,660,4,4] x) => (float[N,660,4,4] y) {{ {' '.join(lines)}  y = Neg({last}) }}", 20, **arrays
    )
