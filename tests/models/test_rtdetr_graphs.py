"""RT-DETR's exported graphs on ONNX Runtime, from checkpoint files through the command line: the official outputs.

Rows are aligned by the positions that a validation copy of the graph gives: what shipped is what is judged.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from faults import copied, with_attribute
from onnx import numpy_helper
from onnx.utils import Extractor
from reference import rtdetr_fill
from reference.rtdetr_cases import about, arrays, case_of
from support import effdeploy
from test_rtdetr import CASES, NARROW, converted, gate, load, save, words

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.graph.io import load_model, save_model
from deploy.models.selecting import SelectingModel
from deploy.parity.validation import exposed, names_of

OPTIONS = BuildOptions(threads=1)
IMAGES = np.random.default_rng(0).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32)
SIZES = np.array([[500, 375]])


def exported(weights, out, *options):
    result = effdeploy("export", "rtdetr", "--weights", weights, *options, "--until", "engine", "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    return load_model(out / read_manifest(out).engines[0].artifact.name)


def run(graph, feeds, folder):
    save_model(graph, folder / "validation.onnx")
    with open_model(folder / "validation.onnx", OPTIONS) as runner:
        return runner.infer(feeds)


def selected(loaded, images):
    """Return PyTorch's own run with its selection."""
    return SelectingModel(loaded, loaded.system.selection).select({"images": images, "orig_target_sizes": SIZES})


def gate_of(case, graph, names, folder):
    """Run a validation copy of a graph and put it through gate A."""
    feeds = {"images": case.images, "orig_target_sizes": SIZES}
    got = run(exposed(graph, [names.index, names.logits, names.boxes]), feeds, folder)
    return gate(case, *(got[name][0] for name in (names.index, names.logits, names.boxes)))


def shipped_from(weights, variant, size, folder):
    """Export a checkpoint, and return the graph, its names for what the gate reads, and both forms in PyTorch."""
    graph = exported(weights, folder / "bundle", "--variant", variant, "--size", size)
    loaded = load(variant, size, weights)
    images = np.zeros((1, 3, *loaded.record.size), np.float32)
    feeds = {"images": images, "orig_target_sizes": SIZES}
    model = SelectingModel(loaded, loaded.system.selection)
    names = names_of(graph, model, feeds, selected(loaded, images), lambda path: open_model(path, OPTIONS))
    return graph, names, loaded


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Give r18's graph of a size: exported once, from the release's checkpoint."""
    made = {}

    def of(size):
        if size not in made:
            folder = tmp_path_factory.mktemp(size)
            weights = save("rtdetr_r18vd_640x640", folder / "official.pth")
            made[size] = shipped_from(weights, "r18vd", size, folder)
        return made[size]

    return of


def with_weights(graph, ours, theirs):
    """Give a graph another checkpoint's numbers: the constants that hold the one form's take the other's.

    An export takes half a minute, and all checkpoints of one architecture and size give the same graph.
    """
    layouts = {
        "as it is": lambda a: a,
        "of a MatMul": lambda a: a.T if a.ndim == 2 else None,
        "of a filtered convolution": lambda a: a.reshape(-1, 9).T if a.shape[2:] == (3, 3) else None,
    }
    found = {}
    others = dict(theirs.state_dict(keep_vars=True)) | dict(theirs.named_buffers())
    for name, tensor in (dict(ours.state_dict(keep_vars=True)) | dict(ours.named_buffers())).items():
        for layout in layouts.values():
            mine, other = (layout(t.detach().numpy()) for t in (tensor, others[name]))
            if mine is not None:
                key = mine.shape, mine.tobytes()
                assert key not in found or np.array_equal(found[key], other), f"{name} cannot be told from another"
                found[key] = other
    copy = copied(graph)
    for constant in copy.graph.initializer:
        array = numpy_helper.to_array(constant)
        other = found.get((array.shape, array.tobytes()))
        assert other is not None or array.size <= 4 or array.dtype != np.float32, f"{constant.name} is nobody's"
        if other is not None:
            constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(other), constant.name))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "r50" not in name])
def test_every_checkpoint_gives_a_graph_that_meets_the_official_outputs(name, shipped, tmp_path):
    case, (variant, layout) = case_of(name), CASES[name]
    path = converted(tmp_path) if layout.endswith("converted") else save(name, tmp_path / "official.pth")
    loaded = load(variant, case.size, path)
    assert loaded.record.weights.layout == layout
    own = selected(loaded, case.images)
    within, errors = gate(case, own.index[0], own.logits[0], own.boxes[0])
    assert within, errors
    graph, names, exported_from = shipped(case.size)
    graph = with_weights(graph, exported_from.deploy, loaded.deploy)
    within, errors = gate_of(case, graph, names, tmp_path)
    assert within, errors
    if name == "rtdetr_r18vd_480x640":
        # Negative controls: another padding, and the other GELU, which the small trained detector hardly feels (2e-5).
        for operator, spoilt in (("GridSample", {"padding_mode": "border"}), ("Gelu", {"approximate": "tanh"})):
            within, errors = gate_of(case, with_attribute(graph, operator, **spoilt), names, tmp_path)
            assert not within, errors


@pytest.mark.slow
def test_the_graph_of_r50_meets_the_official_outputs(tmp_path):
    case = case_of("rtdetr_r50vd_640x640")
    weights = save(case.name, tmp_path / "official.pth")
    graph, names, loaded = shipped_from(weights, "r50vd", case.size, tmp_path)
    own = selected(loaded, case.images)
    for within, errors in (
        gate(case, own.index[0], own.logits[0], own.boxes[0]),
        gate_of(case, graph, names, tmp_path),
    ):
        assert within, errors


@pytest.mark.slow
def test_the_post_processor_in_the_graph_gives_the_official_detections(shipped, tmp_path):
    """The shipped graph from the logits and boxes on; sizes of zero, which it takes, give boxes of zero."""
    numbers = arrays("rtdetr_r18vd_post")
    graph, names, _ = shipped("640x640")
    given, results = [names.logits, names.boxes, "orig_target_sizes"], ["labels", "boxes", "scores"]
    part = Extractor(onnx.shape_inference.infer_shapes(graph)).extract_model(given, results)
    raw = {names.logits: numbers["pred_logits"], names.boxes: numbers["pred_boxes"]}
    got = run(part, {**raw, "orig_target_sizes": SIZES}, tmp_path)
    assert (got["labels"] == numbers["labels"]).all()
    assert abs(got["boxes"] - numbers["boxes"]).max() <= 1e-3
    assert abs(got["scores"] - numbers["scores"]).max() <= 1e-6
    swapped = run(part, {**raw, "orig_target_sizes": SIZES[:, ::-1].copy()}, tmp_path)  # negative control
    assert abs(swapped["boxes"] - numbers["boxes"]).max() > 10
    nothing = run(part, {**raw, "orig_target_sizes": np.zeros((1, 2), np.int64)}, tmp_path)
    assert not nothing["boxes"].any()
    assert (nothing["labels"] == got["labels"]).all()
    assert (nothing["scores"] == got["scores"]).all()


@pytest.mark.slow
def test_the_graph_of_the_hybrid_encoder_meets_the_official_maps(tmp_path):
    described, numbers = about("rtdetr_r18vd_hybrid_encoder"), arrays("rtdetr_r18vd_hybrid_encoder")
    path = save("rtdetr_r18vd_640x640", tmp_path / "official.pth")
    graph = exported(path, tmp_path / "bundle", "--variant", "r18vd", "--part", "encoder")
    shapes = zip(described["input_shape"], described["input_keys"], strict=True)
    maps = [rtdetr_fill.features(shape, key) for shape, key in shapes]
    outputs = run(graph, dict(zip(("s3", "s4", "s5"), maps, strict=True)), tmp_path)
    for level, name in enumerate(("p3", "p4", "p5")):
        want = numbers[f"val{level}"]
        assert abs(outputs[name].flatten()[numbers[f"idx{level}"]] - want).max() <= 1e-4 * abs(want).max()


# What a family has that the others lack; the rest is as small as it goes.
FAMILIES = {
    "r34": {"width": 16, "depths": [1, 2, 3, 1], "csp_depth": 1},
    "r18_dsp": {"width": 16, "depths": [1, 1, 1, 1], "csp_depth": 1, "decoder_layers": 1},
    "hgnetv2_l": {"stem": [8, 16], "widths": [8, 16, 24, 32], "outs": [32, 64, 96, 128], "csp_depth": 1,
                  "decoder_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_graphs_of_the_other_families_pass_gate_a(name, tmp_path):
    options = words({**NARROW, **FAMILIES[name]})
    result = effdeploy(
        "export", "rtdetr", "--variant", name, "--size", "64x96", *options, "--until", "parity", "--out", tmp_path / "b"
    )
    assert result.exit_code == 0, result.stdout + result.stderr
    run = read_manifest(tmp_path / "b")
    (check,) = run.parity.selection
    assert (check.gate, check.stage, check.ok) == ("A", "engine", True)
    operators = {node.op_type for node in load_model(tmp_path / "b" / run.engines[0].artifact.name).graph.node}
    assert ("GridSample" in operators) is (name != "r18_dsp")


def test_options_of_the_detections_reach_the_graph(tmp_path):
    """The best ``top_k``, of which those below the threshold are blank; sizes of zero give boxes of zero."""
    sizes = torch.tensor([[640, 480]])
    with torch.inference_mode():
        labels, boxes, scores = load("tiny", "64x96").deploy(torch.from_numpy(IMAGES), sizes)
    between = float(scores[0, 2:4].mean())
    assert scores[0, 2] > between > scores[0, 3]
    options = ("--variant", "tiny", "--size", "64x96", "--set", "top_k=5", "--set", f"score_threshold={between}")
    graph = exported("random", tmp_path / "bundle", *options)
    got = run(graph, {"images": IMAGES, "orig_target_sizes": sizes.numpy()}, tmp_path)
    assert got["labels"].tolist() == [[*labels[0, :3].tolist(), -1, -1]]
    assert abs(got["boxes"][0, :3] - boxes[0, :3].numpy()).max() <= 1e-2  # of 640 pixels
    assert abs(got["scores"][0, :3] - scores[0, :3].numpy()).max() <= 1e-5
    assert not got["boxes"][0, 3:].any()
    assert not got["scores"][0, 3:].any()
    nothing = run(graph, {"images": IMAGES, "orig_target_sizes": np.zeros((1, 2), np.int64)}, tmp_path)
    assert not nothing["boxes"].any()
    assert nothing["labels"].tolist() == got["labels"].tolist()


def hub_model():
    """Build transformers' own detector, small, with random weights and statistics that are not the initial ones."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 32, 64], encoder_ffn_dim=48,
        encoder_attention_heads=4, hidden_expansion=0.5, d_model=32, num_queries=6, decoder_layers=2,
        decoder_ffn_dim=48, decoder_attention_heads=4, decoder_in_channels=[32, 32, 32], decoder_n_points=2,
        num_labels=5,
    )  # fmt: skip
    model = RTDetrForObjectDetection(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_var", "norm.weight", "normalization.weight")):
                value.uniform_(0.5, 1.5, generator=draw)
            elif value.is_floating_point() and value.ndim > 1:
                spread = 4 if "class_embed" in name else 1
                value.normal_(0, spread * value[0].numel() ** -0.5, generator=draw)
            elif value.is_floating_point():
                value.normal_(0, 0.2, generator=draw)
        # Classes that no query prefers, so that labels depend on the query and not on the bias.
        logits = model(pixel_values=torch.from_numpy(IMAGES)).logits
        model.model.decoder.class_embed[-1].bias -= logits.mean((0, 1))
    return model


def test_a_detector_of_transformers_gives_the_same_detections(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (extra test)")
    from transformers import RTDetrImageProcessor

    model = hub_model()
    model.save_pretrained(tmp_path / "hub")
    assert {found.name for found in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors"}
    given = words({"csp_depth": 3, "points": [2, 2, 2], "top_k": 6, "queries": 6})
    graph = exported(
        tmp_path / "hub", tmp_path / "bundle", "--variant", "tiny", "--size", "64x96", "--set", "classes=5", *given
    )
    got = run(graph, {"images": IMAGES, "orig_target_sizes": np.array([[640, 480]])}, tmp_path)
    with torch.inference_mode():
        outputs = model(pixel_values=torch.from_numpy(IMAGES))
    (want,) = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=[(480, 640)])
    order = np.argsort(-want["scores"].numpy(), kind="stable")
    assert len(set(want["labels"].tolist())) > 1
    assert (got["labels"][0] == want["labels"].numpy()[order]).all()
    assert abs(got["scores"][0] - want["scores"].numpy()[order]).max() <= 1e-5
    assert abs(got["boxes"][0] - want["boxes"].numpy()[order]).max() <= 1e-2  # of 640 pixels


def test_transformers_loads_what_convert_writes(tmp_path):
    """From its own folder to the release's layout and back: every weight is found, and nothing is another one's."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra test)")
    model = hub_model()
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "back").mkdir()
    model.config.save_pretrained(tmp_path / "back")
    given = (
        "--system", "rtdetr", "--variant", "tiny", "--set", "size=64", "--set", "classes=5",
        *words({"csp_depth": 3, "points": [2, 2, 2], "top_k": 6, "queries": 6}),
    )  # fmt: skip
    for source, out, to in (
        (tmp_path / "hub", tmp_path / "official.pth", "official-v1"),
        (tmp_path / "official.pth", tmp_path / "back" / "model.safetensors", "hugging-face"),
    ):
        result = effdeploy("convert", source, out, "--to", to, *given)
        assert result.exit_code == 0, result.stdout + result.stderr
    again, told = transformers.RTDetrForObjectDetection.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not [key for key in told["missing_keys"] if not key.endswith("num_batches_tracked")]
    assert not told["mismatched_keys"]
    assert all(key.startswith(("class_embed.", "bbox_embed.")) for key in told["unexpected_keys"])
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
