"""What ``inspect`` says of files, held against torch's own counter and against files built for the purpose."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from support import effdeploy
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.artifacts import read_manifest
from deploy.catalogue import COLUMNS
from deploy.graph.inspection import NO_MODULE, inspect_graph, module_path
from deploy.graph.macs import RULES, macs_of
from deploy.models import find_system
from deploy.models.base import load_model
from deploy.records import Target
from deploy.resolve import resolve_recipe

TINY = {"variant": ("--variant", "tiny")}


class Mixed(nn.Module):
    """Every counted kind of layer but Einsum and Attention, whose ONNX nodes torch does not export as such."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter)  # the exporter shares equal initialisers, for example biases of zeros

    def forward(self, x):
        x = self.up(self.depthwise(self.conv(x).relu()))
        x = self.mix(x.flatten(2).transpose(1, 2))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Return the model's file with a dynamic batch, and a function from batch to torch's own count."""
    path = tmp_path_factory.mktemp("onnx") / "mixed.onnx"
    model = Mixed().eval()
    axes = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.onnx.export(model, (torch.randn(2, 3, 16, 12),), dynamo=True, dynamic_shapes=(axes,), verbose=False)
    program.save(path)

    def counted(batch):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.randn(batch, 3, 16, 12))
        return counter.get_total_flops() // 2

    return path, counted, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_multiply_adds_are_those_of_torch(mixed, batch):
    path, counted, _ = mixed
    report = inspect_graph(path, batch=batch)
    assert report.uncounted == ()
    assert list(report.assumed.values()) == [batch or 1]
    assert report.macs == counted(batch or 1)
    assert report.macs != counted((batch or 1) + 1)  # negative control


def test_parameters_and_modules_add_up(mixed):
    report = inspect_graph(mixed[0])
    assert sum(m.macs for m in report.modules) == report.macs
    assert sum(m.parameters for m in report.modules) == report.parameters
    assert mixed[2] <= report.parameters < mixed[2] + 20  # constants such as a scale may join them


def graph(nodes, inputs, outputs, **initialisers):
    made = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in outputs.items()],
        [onnx.numpy_helper.from_array(v, n) for n, v in initialisers.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 23)])


def save(model, path):
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (3, 5, 6)]),
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 6)]),
        ("ij,jk", [(3, 4), (4, 5)]),
    ],
)
def test_einsum_is_counted_as_its_contractions(equation, shapes, tmp_path):
    """Held against torch, which turns an einsum into batched products, and against the shape of its result."""
    names = [f"x{i}" for i in range(len(shapes))]
    result = np.einsum(equation, *(np.ones(s) for s in shapes)).shape
    node = onnx.helper.make_node("Einsum", names, ["y"], name="m/Einsum", equation=equation)
    path = save(graph([node], dict(zip(names, shapes, strict=True)), {"y": result}), tmp_path / "e.onnx")
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *(torch.ones(s) for s in shapes))
    assert inspect_graph(path).macs == counter.get_total_flops() // 2 > 0


@pytest.mark.parametrize("four", [True, False])
def test_attention_is_counted_as_both_products(four, tmp_path):
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    shapes = [t.shape if four else (2, t.shape[2], 24) for t in (query, key, value)]
    heads = {} if four else {"q_num_heads": 3, "kv_num_heads": 3}
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], name="m/Attention", **heads)
    model = graph([node], dict(zip("qkv", shapes, strict=True)), {"y": (2, 3, 5, 8) if four else (2, 5, 24)})
    with FlopCounterMode(display=False) as counter:
        (query @ key.transpose(-1, -2)).softmax(-1) @ value
    assert inspect_graph(save(model, tmp_path / "a.onnx")).macs == counter.get_total_flops() // 2


def test_every_rule_is_counted_by_hand():
    """One line an operator: shapes in, shapes out, multiply-adds."""
    cases = {
        "Conv": ([(1, 4, 8, 8), (6, 2, 3, 3)], [(1, 6, 8, 8)], 6 * 64 * 2 * 9),
        "ConvInteger": ([(1, 4, 8, 8), (6, 4, 1, 1)], [(1, 6, 8, 8)], 6 * 64 * 4),
        "DeformConv": ([(1, 4, 8, 8), (6, 4, 3, 3), (1, 18, 8, 8)], [(1, 6, 8, 8)], 6 * 64 * 36),
        "FusedConv": ([(1, 4, 8, 8), (6, 4, 3, 3)], [(1, 6, 8, 8)], 6 * 64 * 36),
        "QLinearConv": ([(1, 4, 8, 8), (), (), (6, 4, 1, 1)], [(1, 6, 8, 8)], 6 * 64 * 4),
        "ConvTranspose": ([(1, 4, 8, 8), (4, 6, 2, 2)], [(1, 6, 16, 16)], 4 * 64 * 24),
        "MatMul": ([(2, 3, 4), (4, 5)], [(2, 3, 5)], 2 * 3 * 4 * 5),
        "MatMulInteger": ([(3, 4), (4, 5)], [(3, 5)], 60),
        "QLinearMatMul": ([(3, 4), (), (), (4, 5)], [(3, 5)], 60),
        "FusedMatMul": ([(3, 4), (4, 5)], [(3, 5)], 60),
        "Gemm": ([(3, 4), (4, 5)], [(3, 5)], 60),
        "FusedGemm": ([(3, 4), (4, 5)], [(3, 5)], 60),
        "Attention": ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6)], [(1, 2, 3, 6)], 2 * 3 * 5 * 10),
    }
    assert set(cases) == set(RULES) - {"Einsum"}
    for operator, (inputs, outputs, macs) in cases.items():
        node = onnx.helper.make_node(operator, [f"i{n}" for n in range(len(inputs))], ["o"])
        assert macs_of(node, inputs, outputs) == macs, operator
    transposed = onnx.helper.make_node("Gemm", ["a", "b"], ["o"], transA=1)
    assert macs_of(transposed, [(4, 3), (4, 5)], [(3, 5)]) == 60


def test_what_cannot_be_counted_is_said(tmp_path):
    nodes = [
        onnx.helper.make_node("Mystery", ["x"], ["m"], name="a/Mystery", domain="some.plugin"),
        onnx.helper.make_node("MatMul", ["m", "m"], ["y"], name="a/MatMul"),
    ]
    model = graph(nodes, {"x": (4, 4)}, {"y": None})
    model.opset_import.append(onnx.helper.make_opsetid("some.plugin", 1))
    report = inspect_graph(save(model, tmp_path / "p.onnx"))
    assert report.macs == 0
    assert report.uncounted == ("1 x MatMul: shapes unknown", "1 x Mystery: its inside is not counted")
    result = effdeploy("inspect", tmp_path / "p.onnx")
    assert result.exit_code == 0
    assert "not counted: 1 x MatMul" in result.stderr


def test_dynamic_axes_take_the_sizes_that_are_given(tmp_path):
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="stem/Conv", pads=[1, 1, 1, 1])
    model = graph([node], {"x": ("n", 3, "h", "w")}, {"y": None}, w=np.ones((4, 3, 3, 3), np.float32))
    path = save(model, tmp_path / "c.onnx")
    assert inspect_graph(path).macs == 4 * 27
    report = inspect_graph(path, batch=2, sizes={"h": 5, "w": 7})
    assert (report.macs, report.assumed) == (2 * 35 * 4 * 27, {"n": 2, "h": 5, "w": 7})
    result = effdeploy("inspect", path, "--batch", "2", "--axis", "h=5", "--axis", "w=7")
    assert "n = 2, h = 5, w = 7" in result.stdout
    wrong = effdeploy("inspect", path, "--axis", "hight=5")
    assert wrong.exit_code == 3
    assert "no dynamic axis hight" in wrong.stderr
    assert effdeploy("inspect", path, "--axis", "h=0").exit_code == 2
    fixed = save(graph([node], {"x": (1, 3, 8, 8)}, {"y": None}, w=np.ones((4, 3, 3, 3), np.float32)), tmp_path / "f")
    assert effdeploy("inspect", fixed, "--batch", "2").exit_code == 3


def test_external_data_is_counted_and_missed(tmp_path):
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="head/MatMul")
    model = graph([node], {"x": (2, 64)}, {"y": (2, 32)}, w=np.ones((64, 32), np.float32))
    path = tmp_path / "big.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="big.data", size_threshold=0)
    report = inspect_graph(path)
    assert (report.external_files, report.parameters, report.macs) == (("big.data",), 2048, 4096)
    assert report.size == path.stat().st_size + 8192
    (tmp_path / "big.data").write_bytes(b"x" * 100)
    cut = effdeploy("inspect", path)
    assert (cut.exit_code, "ends at byte 8192" in cut.stderr) == (10, True)
    (tmp_path / "big.data").unlink()
    gone = effdeploy("inspect", path)
    assert (gone.exit_code, "'big.data' is missing" in gone.stderr) == (10, True)
    loaded = onnx.load(path, load_external_data=False)
    loaded.graph.initializer[0].external_data[0].value = "../../etc/passwd"
    path.write_bytes(loaded.SerializeToString())
    outside = effdeploy("inspect", path)
    assert (outside.exit_code, "outside its folder" in outside.stderr) == (10, True)


@pytest.mark.parametrize("content", [b"", b"hello, I am no model", b"\x08\x07" * 9, bytes(range(256)) * 20])
def test_what_is_not_onnx_is_refused_with_what_can_be_read(content, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    result = effdeploy("inspect", path)
    assert result.exit_code == 10
    assert "inspect reads ONNX files, checkpoints" in result.stderr


def test_every_truncation_is_an_error_of_ours_or_a_smaller_model(tiny_bundle, tmp_path):
    data = (tiny_bundle / "20-patched.onnx").read_bytes()
    for share in np.linspace(0.01, 0.99, 12):
        path = tmp_path / "cut.onnx"
        path.write_bytes(data[: int(share * len(data))])
        assert effdeploy("inspect", path).exit_code in (0, 10)


def test_a_bundle_shows_every_stage_and_its_engine(tiny_bundle):
    result = effdeploy("inspect", tiny_bundle, "--depth", "3")
    assert result.exit_code == 0, result.stderr
    run = read_manifest(tiny_bundle)
    for words in ("traced", "patched", "onnxruntime", "20-patched.onnx", "stages.0", "multiply-adds", run.verdict):
        assert words in result.stdout
    lines = [json.loads(line) for line in effdeploy("inspect", tiny_bundle, "--json").stdout.splitlines()]
    record = lines[-1]["record"]
    loaded = load_model(find_system("riformer"), resolve_recipe("riformer", TINY), Target.ONNXRUNTIME)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        loaded.deploy(torch.randn(1, 3, *run.model.size))
    assert {stage["macs"] for stage in record["stages"].values()} == {counter.get_total_flops() // 2}
    assert record["engines"][0]["engine"]["artifact"]["sha256"] == run.engines[0].artifact.sha256


def test_a_changed_stage_is_noticed(tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    with (copy / "20-patched.onnx").open("ab") as stream:
        stream.write(b"\0")
    assert effdeploy("inspect", copy).exit_code == 17


def test_engines_are_read_from_the_manifest_beside_them(tiny_bundle, tmp_path):
    loose = tmp_path / "engine-sm89.plan"
    loose.write_bytes(b"plan")
    result = effdeploy("inspect", loose)
    assert (result.exit_code, "no manifest.json beside it" in result.stderr) == (17, True)
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    foreign = shutil.copy(loose, copy)
    result = effdeploy("inspect", foreign)
    assert (result.exit_code, "does not know engine-sm89.plan" in result.stderr) == (17, True)


@pytest.mark.rtx
def test_a_built_engine_is_described(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install -e '.[tensorrt-rtx]'")
    out = tmp_path / "b"
    rtx = ("--backend", "tensorrt_rtx", "--sm", "89", "--fp16", "--until", "engine", "--out", out)
    assert effdeploy("export", "riformer", "--variant", "tiny", *rtx).exit_code == 0
    result = effdeploy("inspect", next(out.glob("*.rtx")))
    assert result.exit_code == 0, result.stderr
    for words in ("tensorrt_rtx", "sm89", "asked fp16", "images", "logits"):
        assert words in result.stdout


def test_a_checkpoint_is_matched_with_systems(tmp_path):
    state = load_model(
        find_system("riformer"), resolve_recipe("riformer", TINY), Target.ONNXRUNTIME
    ).reference.state_dict()
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state, "epoch": 3}, path)
    result = effdeploy("inspect", path)
    assert result.exit_code == 0, result.stderr
    assert "from state_dict" in result.stdout
    assert "fits riformer tiny" in result.stdout
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pth")
    half = effdeploy("inspect", tmp_path / "half.pth")
    assert "float16" in half.stdout
    assert "float32" not in half.stdout
    assert "fits riformer tiny" in half.stdout
    head = next(k for k in state if k.startswith("head") and k.endswith("bias"))
    torch.save({**state, head: torch.zeros(7)}, tmp_path / "near.pth")
    near = effdeploy("inspect", tmp_path / "near.pth")
    assert f"nearest: riformer tiny: {len(state) - 1} of its {len(state)} tensors" in near.stderr
    odd = {f"odd.{k}": v for k, v in state.items()}
    torch.save(odd, tmp_path / "odd.pth")
    other = effdeploy("inspect", tmp_path / "odd.pth")
    assert other.exit_code == 0
    assert "fits no system" in other.stderr
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:100])
    assert effdeploy("inspect", tmp_path / "cut.pth").exit_code == 6
    assert effdeploy("inspect", path, "--batch", "2").exit_code == 3


def test_nothing_there_and_no_bundle(tmp_path):
    assert effdeploy("inspect", tmp_path / "none.onnx").exit_code == 19
    result = effdeploy("inspect", tmp_path)
    assert (result.exit_code, "not a bundle" in result.stderr) == (17, True)


def test_list_and_inspect_count_in_one_unit(tiny_bundle):
    """Multiply-adds everywhere; the doubled figure stands only where it is explained."""
    assert "multiply-adds (G)" in COLUMNS
    assert "GFLOPs" not in COLUMNS
    assert "counted as two operations each" in effdeploy("inspect", tiny_bundle).stdout


def test_module_paths_of_both_exporters():
    assert module_path("stages.2.mlp.fc1/Conv_1", 2) == "stages.2"
    assert module_path("/layer1/layer1.0/conv1/Conv", 2) == "layer1/layer1.0"
    assert module_path("Conv_7", 2) == NO_MODULE
