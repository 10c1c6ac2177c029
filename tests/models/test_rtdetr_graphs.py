"""RT-DETR's exported graphs, from checkpoint files through the command line, against the official outputs.

Rows are aligned by the positions that a validation copy of the graph gives: what shipped is what is judged.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faults import with_attribute
from reference import rtdetr_fill
from reference.rtdetr_cases import about, arrays, case_of
from support import effdeploy
from test_rtdetr import CASES, gate, save

from deploy.artifacts import read_manifest
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.graph.io import load_model, save_model
from deploy.parity.validation import exposed

OPTIONS = BuildOptions(threads=1)
IMAGES = np.random.default_rng(0).uniform(0, 1, (1, 3, 64, 96)).astype(np.float32)


def exported(weights, out, *options):
    result = effdeploy("export", "rtdetr", "--weights", weights, *options, "--until", "engine", "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    return load_model(out / read_manifest(out).engines[0].artifact.name)


def run(graph, feeds, folder):
    save_model(graph, folder / "validation.onnx")
    with open_model(folder / "validation.onnx", OPTIONS) as runner:
        return runner.infer(feeds)


def raw_of(graph, images, folder):
    """Run a raw graph, and return the positions selected [Q], logits [Q,C] and boxes [Q,4] of one image."""
    (ranking,) = [n.output[1] for n in graph.graph.node if n.op_type == "TopK"]
    got = run(exposed(graph, [ranking]), {"images": images}, folder)
    return got[ranking][0], got["pred_logits"][0], got["pred_boxes"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtdetr_r18vd_480x640"])
def test_the_graph_meets_the_official_outputs_row_by_row(name, tmp_path):
    case, path = case_of(name), save(name, tmp_path / "official.pth")
    options = ("--variant", CASES[name][0], "--size", case.size, "--head", "raw")
    graph = exported(path, tmp_path / "bundle", *options)
    within, errors = gate(case, *raw_of(graph, case.images, tmp_path))
    assert within, errors
    # Negative controls: another padding, and the other GELU, which the small trained detector hardly feels (2e-5).
    for spoilt in (
        with_attribute(graph, "GridSample", padding_mode="border"),
        with_attribute(graph, "Gelu", approximate="tanh"),
    ):
        within, errors = gate(case, *raw_of(spoilt, case.images, tmp_path))
        assert not within, errors


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
    options = {"csp_depth": 3, "points": [2, 2, 2], "top_k": 6, "queries": 6}
    given = [word for key, value in options.items() for word in ("--set", f"options.{key}={value}")]
    graph = exported(
        tmp_path / "hub" / "model.safetensors", tmp_path / "bundle", "--variant", "tiny", "--size", "64x96",
        "--set", "classes=5", *given,
    )  # fmt: skip
    got = run(graph, {"images": IMAGES, "orig_target_sizes": np.array([[640, 480]])}, tmp_path)
    with torch.inference_mode():
        outputs = model(pixel_values=torch.from_numpy(IMAGES))
    (want,) = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=[(480, 640)])
    order = np.argsort(-want["scores"].numpy(), kind="stable")
    assert len(set(want["labels"].tolist())) > 1
    assert (got["labels"][0] == want["labels"].numpy()[order]).all()
    assert abs(got["scores"][0] - want["scores"].numpy()[order]).max() <= 1e-5
    assert abs(got["boxes"][0] - want["boxes"].numpy()[order]).max() <= 1e-2  # of 640 pixels
