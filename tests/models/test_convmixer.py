"""ConvMixer against the official implementations' outputs, and the one fold that it has."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from support import effdeploy, reference_case

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.errors import CheckpointError, RecipeError, SizeError
from deploy.graph.pipeline import run_passes
from deploy.models import find_system
from deploy.models.base import count_macs, empty_state, example_inputs, load_model, specialised
from deploy.models.convmixer import BORDERS, bordered, from_openmmlab, from_release, to_openmmlab
from deploy.models.weights import random_state
from deploy.records import Batch, Target, TensorSpec
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, bare_export, onnx_from_torch

SYSTEM = find_system("convmixer")
CIFAR = {
    "variant": "1024_20", "size": 32, "classes": 10,
    "options.dim": 256, "options.depth": 8, "options.kernel": 5, "options.patch": 2,
}  # fmt: skip
CASES = {
    "convmixer_256_8_k5_p2_cifar_official": (CIFAR, "authors' Sequential"),
    "convmixer_768_32_timm": ({"variant": "768_32"}, "timm"),
    "convmixer_768_32_k7_p7_official": ({"variant": "768_32_gelu"}, "authors' Sequential"),
    "convmixer_768_32_mmpretrain": ({"variant": "768_32_gelu"}, "OpenMMLab"),
}
LIMIT = 1e-4  # of the largest logit


def load(asked, target=Target.ONNXRUNTIME):
    return load_model(SYSTEM, resolve_recipe("convmixer", {key: ("", value) for key, value in asked.items()}), target)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "768" in name])  # the command line meets the other one
def test_pytorch_forms_and_the_graph_meet_the_official_logits(name, tmp_path):
    case, (asked, layout) = reference_case(name), CASES[name]
    loaded = load({**asked, "weights": str(case.save(tmp_path / "official.pth"))})
    assert loaded.record.weights.layout == layout
    scale = abs(case.logits).max()
    with torch.inference_mode():
        for module in (loaded.reference, loaded.deploy):
            assert abs(module(torch.from_numpy(case.images)).numpy() - case.logits).max() <= LIMIT * scale
    request = TraceRequest(inputs=loaded.inputs, outputs=("logits",), batch=Batch.parse(2), opset=20)
    traced = onnx_from_torch(loaded.deploy, request, tmp_path)
    graph = tmp_path / run_passes(tmp_path / traced.artifact.name, Target.ONNXRUNTIME, tmp_path).artifact.name
    with open_model(graph, BuildOptions(threads=1)) as runner:
        got = runner.infer({"images": case.images})["logits"]
    assert abs(got - case.logits).max() <= LIMIT * scale


def test_the_other_activation_is_another_function(tmp_path):
    name = "convmixer_256_8_k5_p2_cifar_official"
    case = reference_case(name)
    loaded = load({**CIFAR, "options.activation": "relu", "weights": str(case.save(tmp_path / "official.pth"))})
    got = loaded.run({"images": case.images})["logits"]
    assert abs(got - case.logits).max() > 0.1 * abs(case.logits).max()


def test_the_command_line_meets_the_official_logits(tmp_path):
    """A float16 export judges its float32 file, which is the engine of a float32 one, as well."""
    case = reference_case("convmixer_256_8_k5_p2_cifar_official")
    path, out = case.save(tmp_path / "official.pth", meta={"epoch": 1}), tmp_path / "bundle"
    options = [f"--set={key}={value}" for key, value in CIFAR.items() if key.startswith("options.")]
    result = effdeploy(
        "export", "convmixer", "--variant", "1024_20", "--weights", path, "--size", 32, "--set", "classes=10", *options,
        "--batch", 2, "--fp16", "--until", "parity", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(out)
    assert run.model.weights.layout == "authors' Sequential"
    limits = {run.passes.artifact: LIMIT, run.precision.artifact: run.parity.tolerances["fp16"].max_relative}
    for artifact, limit in limits.items():
        with open_model(out / artifact.name, BuildOptions(threads=1)) as runner:
            got = runner.infer({"images": case.images})["logits"]
        assert (got.argmax(1) == case.logits.argmax(1)).all()
        assert abs(got - case.logits).max() <= limit * abs(case.logits).max()
    assert all(c.top1 == 1.0 for c in run.parity.comparisons)


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_for_ampere_and_ada(precision, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "bundle"
    result = effdeploy(
        "export", "convmixer", "--variant", "tiny", f"--{precision}", "--backend", "tensorrt_rtx", "--sm", "80,89",
        "--until", "engine", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stdout + result.stderr
    engines = read_manifest(out).engines
    assert [engine.device for engine in engines] == ["sm80", "sm89"]
    assert all(engine.audit.ok for engine in engines)


# Parameters and multiply-adds of OpenMMLab's metafile (configs/convmixer/metafile.yml).
OFFICIAL = {"768_32": (21110248, 19623051264), "1024_20": (24383464, 5550112768), "1536_20": (51625960, 48713170944)}


@pytest.mark.parametrize("variant", OFFICIAL)
def test_parameters_and_macs_are_the_published_ones(variant):
    options = {**SYSTEM.variants[variant].options, "classes": 1000}
    state = empty_state(SYSTEM, options, (224, 224), "training")
    parameters, macs = OFFICIAL[variant]
    learned = [t for key, t in state.items() if "running" not in key and "num_batches" not in key]
    assert sum(t.numel() for t in learned) == parameters
    # Theirs adds norms and misses the depthwise convolutions: its counter does not know padding="same".
    dim, depth, kernel, patch = (options[name] for name in ("dim", "depth", "kernel", "patch"))
    depthwise = depth * dim * kernel**2 * (224 // patch) ** 2
    assert count_macs(SYSTEM, options, (224, 224)) - depthwise == pytest.approx(macs, rel=0.01)


def test_only_the_last_norm_folds_and_a_wrong_fold_shows():
    loaded = load({"variant": "tiny"})
    norms = [
        sum(isinstance(m, torch.nn.BatchNorm2d) for m in form.modules()) for form in (loaded.reference, loaded.deploy)
    ]
    assert norms == [5, 4]
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = loaded.reference(images), loaded.deploy(images)
        assert abs(got - expected).max() <= 1e-5 * abs(expected).max()
        loaded.deploy.head.weight *= 1.001  # negative control
        assert abs(loaded.deploy(images) - expected).max() > 1e-5 * abs(expected).max()


WIDE = {"variant": "tiny", "options.kernel": 9}  # on maps of 7 x 7, as 9 on the 16 x 16 of 1024_20 all border


def test_a_written_border_changes_nothing_and_a_narrow_one_shows():
    padding, written = (load({**WIDE, "options.border": form}) for form in BORDERS)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = padding.deploy(images), written.deploy(images)
        assert abs(got - expected).max() <= 1e-6 * abs(expected).max()
        for module in written.deploy.modules():
            if isinstance(module, torch.nn.Conv2d) and module.padding == (0, 4):  # negative control: shifted by one
                module.forward = lambda x: torch.nn.functional.pad(x, (3, 5, 0, 0))
        assert abs(written.deploy(images) - expected).max() > 1e-3 * abs(expected).max()


class BehindANorm(torch.nn.Module):
    """A depthwise convolution that reads a batch norm: at its border are zeros, not the norm's shift."""

    def __init__(self, norm, depthwise):
        super().__init__()
        self.norm, self.depthwise = norm, depthwise

    def forward(self, images):
        return self.depthwise(self.norm(images))


def test_on_onnx_runtime_a_written_border_is_zero_behind_a_norm_with_a_shift(tmp_path):
    """The trap: folded into the convolution, the norm's shift would stand in the border as well."""
    draw = torch.Generator().manual_seed(0)
    norm, plain = torch.nn.BatchNorm2d(8).eval(), torch.nn.Conv2d(8, 8, 9, padding=4, groups=8)
    norm.load_state_dict(random_state(norm.state_dict(), 0))
    with torch.no_grad():
        norm.bias += 1
    inputs = torch.randn(2, 8, 16, 16, generator=draw)
    graph = BehindANorm(norm, bordered(plain)).eval().requires_grad_(False)
    spec = TensorSpec(name="images", dtype="float32", shape=("batch", 8, 16, 16))
    request = TraceRequest(inputs=(spec,), outputs=("logits",), batch=Batch.parse(2), opset=20)
    traced = onnx_from_torch(graph, request, tmp_path)
    path = tmp_path / run_passes(tmp_path / traced.artifact.name, Target.ONNXRUNTIME, tmp_path).artifact.name
    with open_model(path, BuildOptions(threads=1)) as runner, torch.no_grad():
        got = torch.from_numpy(runner.infer({"images": inputs.numpy()})["logits"])
        expected = plain(norm(inputs))
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * gain
        bias = plain.bias + plain.weight.sum((1, 2, 3)) * shift
        weight = plain.weight * gain[:, None, None, None]
        folded = torch.nn.functional.conv2d(inputs, weight, bias, padding=4, groups=8)
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()
    inner = (..., slice(4, 12), slice(4, 12))  # where the kernel sees no border
    assert abs(folded - expected)[inner].max() <= 1e-5 * abs(expected).max()
    assert abs(folded - expected).max() > 0.1 * abs(expected).max()  # negative control


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"variant": "1024_20"}, "written"),
        ({"variant": "1024_20", "size": 448}, None),  # on 32 x 32
        ({"variant": "1536_20"}, None),
        ({"variant": "768_32"}, None),
        ({"variant": "1024_20", "precision": "int8"}, None),
        ({"variant": "1024_20", "precision": "fp16"}, None),
        ({"variant": "1024_20", "engine.backend": "openvino"}, None),
        ({"variant": "1024_20", "engine.backend": "tensorrt"}, None),
        ({"variant": "1024_20", "options.border": "padding"}, "padding"),
    ],
)
def test_borders_are_written_where_that_was_faster(asked, form):
    assert resolve_recipe("convmixer", {key: ("", value) for key, value in asked.items()}).options.get("border") == form


def test_tensorrts_graph_pads_by_itself():
    for target, expected in ((Target.ONNXRUNTIME, 2), (Target.TENSORRT, 0)):
        deploy = load({**WIDE, "options.border": "written"}, target).deploy
        assert sum(getattr(module, "padding", None) == (0, 4) for module in deploy.modules()) == expected


def work_of(graph, folder):
    """Count the nodes that ONNX Runtime really runs, by operator and the shapes of their weights."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a saved graph is for this machine only
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = onnx.load(folder / "optimised.onnx", load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in found.initializer}
    return Counter((node.op_type, *(shapes[name] for name in node.input if name in shapes)) for node in found.node)


def test_onnx_runtime_runs_the_official_graph_without_its_last_norm(tmp_path):
    """With borders by padding, nothing else differs from what users export today: less work, by one norm."""
    loaded = load({"variant": "tiny"})
    request = TraceRequest(inputs=loaded.inputs, outputs=("logits",), batch=Batch.parse(1), opset=20)
    traced = onnx_from_torch(loaded.deploy, request, tmp_path)
    ours = run_passes(tmp_path / traced.artifact.name, Target.ONNXRUNTIME, tmp_path).artifact.name
    official = bare_export(loaded.reference, example_inputs(loaded.inputs, 1), tmp_path / "bare.onnx", ("images",))
    shipped, theirs = work_of(tmp_path / ours, tmp_path), work_of(official, tmp_path)
    assert shipped - theirs == Counter()
    assert sum((theirs - shipped).values()) == 1
    assert next(iter(theirs - shipped))[:2] == ("Conv", (16, 1, 1, 1))  # a norm, in the blocked layout


def test_keys_of_every_layout():
    pairs = {
        "0.weight": "stem.0.weight", "2.running_var": "stem.2.running_var", "3.0.fn.0.bias": "blocks.0.0.fn.0.bias",
        "12.3.weight": "blocks.9.3.weight", "4.1.weight": "blocks.1.1.weight", "25.bias": "head.bias",
    }  # fmt: skip
    assert {key: from_release(key) for key in pairs} == pairs
    ours = ["stem.0.weight", "blocks.3.0.fn.2.bias", "head.weight"]
    theirs = ["backbone.stem.0.weight", "backbone.stages.3.0.fn.2.bias", "head.fc.weight"]
    assert [to_openmmlab(key) for key in ours] == theirs
    assert [from_openmmlab(key) for key in theirs] == ours


def test_a_missing_key_is_refused(tmp_path):
    case = reference_case("convmixer_256_8_k5_p2_cifar_official")
    del case.state["5.3.weight"]
    with pytest.raises(CheckpointError, match=r"missing.*\n.*blocks\.2\.3\.weight"):
        load({**CIFAR, "weights": str(case.save(tmp_path / "short.pth"))})


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ({"options.activation": "gleu"}, RecipeError, "gelu or relu"),
        ({"options.kernel": 4}, RecipeError, "odd number"),
        ({"options.border": "copied"}, RecipeError, "options.border.*padding or written"),
        ({"size": 100}, SizeError, "multiples of 32"),
    ],
)
def test_what_cannot_be_is_refused(asked, error, text):
    with pytest.raises(error, match=text):
        load({"variant": "tiny", **asked})


@pytest.mark.parametrize(("precision", "written"), [("fp32", True), ("fp16", False)])
def test_the_report_names_the_borders_that_are_exported(precision, written):
    recipe = resolve_recipe("convmixer", {"precision": ("", precision)})
    forms = specialised(SYSTEM, recipe).forms
    assert ("wide borders written out" in forms[Target.ONNXRUNTIME].name) is written
    assert ("1.09 times as fast" in forms[Target.ONNXRUNTIME].reason) is written
    assert "borders written" not in forms[Target.TENSORRT].name
