"""RT-DETR's exported graph against the graphs that users have today, of the same weights, on ONNX Runtime's CPU.

    python benchmarks/rtdetr.py --write

Float32, one thread, interleaved rounds; ratios of CPU time. Against (a) transformers' ``RTDetrForObjectDetection`` as
Optimum exports it (TorchScript, opset 18, dynamic batch, height and width; its settings by hand, since it pins an
older transformers), (b) the same model through bare ``torch.onnx.export``, (c) our training form, which is the
release's, with its post-processor through bare ``torch.onnx.export``. Random weights, mapped from one layout to the
others. Ours and (c) give detections; (a) and (b) give raw predictions, so ours does a little more than they do. Before
anything is timed, all graphs must give the same detections.

Also timed: our graph with one of its forms exchanged, and TensorRT-RTX: kernels in the logs of ahead-of-time builds
(needs the extra ``tensorrt-rtx``), evidence for fusion, none for speed. ``--smoke`` runs everything on small images.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, THREADS, arguments, figures, write_results
from safetensors.torch import save_file
from torch import Tensor, nn

from deploy.backends import load_backend
from deploy.backends.base import BuildOptions, Feeds
from deploy.backends.onnxruntime import open_model
from deploy.bench import BenchCandidate, BenchOptions, measure
from deploy.graph.pipeline import run_passes
from deploy.models.base import Loaded, load_model
from deploy.models.rtdetr import SYSTEM
from deploy.models.rtdetr.system import detections
from deploy.models.rtdetr.weights import HUGGING_FACE, WEIGHT_MAPS, split_attention
from deploy.parity.detection import align_detections
from deploy.precision.convert import convert_precision
from deploy.records import Batch, BenchRecord, Precision, Target, to_json
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, bare_export, choose_opset, onnx_from_torch, quiet_torch

VARIANTS = ("r18vd", "r50vd")
SHARE, NEAR = 0.99, 1e-3  # of detections that must have a partner this near, in score and in parts of the image
EXCHANGED = {
    "direct convolutions": {"convolutions": "direct"},
    "sampling by Gather": {"sampling": "gather"},
}


class Raw(nn.Module):
    """transformers' model with plain outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes."""
        out = self.model(pixel_values=pixel_values)
        return out.logits, out.pred_boxes


def load(variant: str, size: int, target: Target = Target.ONNXRUNTIME, **options: str) -> Loaded:
    asked = {"variant": ("", variant), "size": ("", size), **{f"options.{k}": ("", v) for k, v in options.items()}}
    return load_model(SYSTEM, resolve_recipe("rtdetr", asked), target)


def ours(loaded: Loaded, batch: int, folder: Path) -> Path:
    """Trace the deploy form as ``effdeploy export`` does and run the target's passes."""
    folder.mkdir(parents=True)
    request = TraceRequest(
        inputs=loaded.inputs, outputs=loaded.outputs, batch=Batch.parse(batch),
        opset=choose_opset(None, loaded.target, False),
    )  # fmt: skip
    traced = onnx_from_torch(loaded.deploy, request, folder)
    return folder / run_passes(folder / traced.artifact.name, loaded.target, folder).artifact.name


def transformers_model(loaded: Loaded, folder: Path) -> Raw:
    """Write the weights as a checkpoint folder of the Hub and let transformers load it."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection
    from transformers.models.rt_detr.configuration_rt_detr_resnet import RTDetrResNetConfig

    small = {
        "backbone_config": RTDetrResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_indices=[2, 3, 4]
        ),
        "encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 3,
    }  # fmt: skip
    config = RTDetrConfig(num_labels=80, **(small if loaded.record.variant == "r18vd" else {}))
    names = next(m for m in WEIGHT_MAPS if m.layout == HUGGING_FACE)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    state = {names.inverse(key): value.clone() for key, value in split_attention(loaded.reference.state_dict()).items()}
    heads = {key: value for key, value in state.items() if "class_embed" in key or "bbox_embed" in key}
    state |= {key.removeprefix("model.decoder."): value.clone() for key, value in heads.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, told = RTDetrForObjectDetection.from_pretrained(folder, output_loading_info=True)
    if missing := {key for key in told["missing_keys"] if not key.endswith("num_batches_tracked")}:
        raise SystemExit(f"transformers finds no weights for {sorted(missing)[:5]}")
    return Raw(model.eval()).eval()


def optimum_style(model: Raw, images: Tensor, path: Path) -> Path:
    """Export with Optimum's settings."""
    axes = {"pixel_values": {0: "batch_size", 2: "height", 3: "width"}, "logits": {0: "batch_size"}}
    with quiet_torch():
        torch.onnx.export(
            model, (images,), path, dynamo=False, opset_version=18, do_constant_folding=True,
            input_names=["pixel_values"], output_names=["logits", "pred_boxes"],
            dynamic_axes={**axes, "pred_boxes": {0: "batch_size"}},
        )  # fmt: skip
    return path


def racers(loaded: Loaded, batch: int, folder: Path) -> dict[str, Path]:
    """Export all graphs of one variant and batch size, the baselines unless they are there; ours is the first."""
    size = loaded.record.size
    images, sizes = torch.rand(batch, 3, *size), torch.full((batch, 2), size[0])
    graphs = {"ours": ours(loaded, batch, Path(tempfile.mkdtemp(dir=folder)) / "ours")}
    optimum, plain, official = (folder / name for name in ("optimum.onnx", "bare.onnx", "official.onnx"))
    if not official.exists():
        model = transformers_model(loaded, folder / "hub")
        optimum_style(model, images, optimum)
        bare_export(model.eval(), (images,), plain, ("pixel_values",))
        bare_export(loaded.reference, (images, sizes), official, ("images", "orig_target_sizes"))
    return {
        **graphs,
        "transformers, Optimum-style": optimum,
        "transformers, bare export": plain,
        "training form, bare export": official,
    }


def feeds_of(names: list[str], images: np.ndarray) -> Feeds:
    sizes = np.full((len(images), 2), images.shape[2], np.int64)
    return {name: sizes if name == "orig_target_sizes" else images for name in names}


def race(graphs: Mapping[str, Path], images: np.ndarray, rounds: int) -> BenchRecord:
    """Time graphs against each other, after all have given the same detections."""
    with contextlib.ExitStack() as stack:
        candidates, first = [], {}
        for name, path in graphs.items():
            runner = stack.enter_context(open_model(path, BuildOptions(threads=THREADS, device="cpu")))
            feeds = feeds_of([spec.name for spec in runner.inputs], images)
            found = detected(list(runner.infer(feeds).values()), images)
            first = first or found
            require_same(name, first, found)
            call = lambda runner=runner, feeds=feeds: runner.infer(feeds)  # noqa: E731
            candidates.append(BenchCandidate(name=name, call=call, batch=len(images), threads=THREADS, device="cpu"))
        options = BenchOptions(min_rounds=rounds, min_seconds=1.0, max_seconds=900, slice_seconds=0.01)
        return measure(candidates, options)


def detected(outputs: list[np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return detections; raw predictions go through the post-processor."""
    if len(outputs) == 2:
        logits, boxes = (torch.from_numpy(value) for value in outputs)
        sizes = torch.full((len(images), 2), images.shape[2])
        outputs = [value.numpy() for value in detections(logits, boxes, sizes, 300, 0.0)]
    return dict(zip(("labels", "boxes", "scores"), outputs, strict=True))


def require_same(name: str, first: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    """Refuse a graph that computes something else; the rows of two right ones may swap where scores are equal."""
    want, got = align_detections(first, other)
    side = np.abs(want["boxes"]).max()
    near = (want["labels"] == got["labels"]) & (np.abs(want["scores"] - got["scores"]) <= NEAR)
    near &= np.abs(want["boxes"] - got["boxes"]).max(2) <= NEAR * side
    if near.mean() < SHARE:
        raise SystemExit(f"{name}: only {near.mean():.1%} of its detections are ours; there is nothing to race")


def cpu(variant: str, batch: int, options: Namespace, folder: Path) -> dict[str, object]:
    loaded = load(variant, options.size)
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).random((batch, 3, *loaded.record.size), dtype=np.float32)
    return figures(race(racers(loaded, batch, folder), images, options.rounds), f"{variant}, batch {batch}")


def exchanged(variant: str, options: Namespace, folder: Path) -> dict[str, object]:
    """Race our graph against itself with one form exchanged."""
    graphs = {"ours": ours(load(variant, options.size), 1, folder / "auto")}
    for index, (name, changed) in enumerate(EXCHANGED.items()):
        graphs[name] = ours(load(variant, options.size, **changed), 1, folder / str(index))
    images = np.random.default_rng(0).random((1, 3, options.size, options.size), dtype=np.float32)
    return figures(race(graphs, images, options.rounds), f"{variant}, forms")


def engines(variant: str, options: Namespace, folder: Path) -> dict[str, object]:
    """Build both samplings in FP32 and FP16 for Ampere and Ada."""
    counts: dict[str, object] = {}
    for sampling in ("gather", "grid_sample"):
        loaded, place = load(variant, options.size, Target.TENSORRT, sampling=sampling), folder / sampling
        path = ours(loaded, 1, place)
        keep = SYSTEM.keep_fp32({**SYSTEM.variants[variant].options, "classes": 80})
        for precision in (Precision.FP32, Precision.FP16):
            typed = convert_precision(path, precision, place, keep=keep, target=Target.TENSORRT)
            asked = BuildOptions(precision=precision, batch=Batch(), inputs=loaded.inputs, sm=(80, 89))
            for engine in load_backend("tensorrt_rtx").build(place / typed.artifact.name, place, asked):
                name = f"{sampling}, {precision.value}, {engine.device}"
                counts[name] = {"kernels": sum(engine.audit.kernels.values()), "fused": to_json(engine.audit.fused)}
                print(f"{variant}, {name}: {counts[name]}", flush=True)
    return counts


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="fewer variants")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="fewer batch sizes")
    parser.add_argument("--parts", nargs="+", default=["cpu", "forms", "rtx"], help="cpu, forms, rtx; others are kept")
    parser.add_argument("--size", type=int, default=640, help="image side")
    parser.add_argument("--graphs", type=Path, help="folder that keeps the exported baselines for the next run")
    parser.add_argument("--smoke", action="store_true", help="r18 at 128 pixels, three rounds: does it still run?")
    options = parser.parse_args()
    if options.smoke:
        options.variants, options.batches, options.size, options.rounds = ["r18vd"], [1], 128, 3
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {"cpu": {}, "forms": {}, "rtx": {}}
    reason = load_backend("tensorrt_rtx").available()
    with tempfile.TemporaryDirectory() as scratch:
        for variant in options.variants:
            place = Path(scratch) / variant
            if "cpu" in options.parts:
                for batch in options.batches:
                    kept = (options.graphs / variant if options.graphs else place) / f"{options.size}-{batch}"
                    found["cpu"][f"{variant}, batch {batch}"] = cpu(variant, batch, options, kept)
            if "forms" in options.parts:
                found["forms"][variant] = exchanged(variant, options, place / "forms")
            if "rtx" in options.parts:
                found["rtx"][variant] = f"not built: {reason}" if reason else engines(variant, options, place / "rtx")
    if options.write:
        write_results("rtdetr", {"command": "python benchmarks/rtdetr.py --write", **with_earlier(found)})


def with_earlier(found: Mapping[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Add what this run has to what the result file holds: a run may be about a part only."""
    path = RESULTS / "rtdetr.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return {part: {**earlier.get(part, {}), **results} for part, results in found.items()}


if __name__ == "__main__":
    main()
