"""RT-DETR as a system: variants, weight maps, what the graph takes and gives, which form it is exported in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy.errors import RecipeError, SizeError, did_you_mean
from deploy.models.base import Flag, System, Variant
from deploy.models.checkpoint import State
from deploy.models.rtdetr.backbone import HGNet, ResNet
from deploy.models.rtdetr.decoder import STRIDES, Decoder, map_sizes
from deploy.models.rtdetr.deploy import DeployDecoder
from deploy.models.rtdetr.drawing import DRAWING
from deploy.models.rtdetr.encoder import HybridEncoder
from deploy.models.rtdetr.forms import CONVOLUTIONS, SAMPLING, forms
from deploy.models.rtdetr.layers import folded
from deploy.models.rtdetr.pyramid import without_concatenation
from deploy.models.rtdetr.sampling import BILINEAR
from deploy.models.rtdetr.weights import RELAYOUTS, UNREAD, WEIGHT_MAPS
from deploy.models.rtdetr.winograd import with_winograd
from deploy.models.selecting import Selection
from deploy.recipe import Recipe
from deploy.records import Precision, Target, TensorSpec

_FEATURES = ("s3", "s4", "s5")


class RTDETR(nn.Module):
    """Backbone, hybrid encoder and decoder as in the checkpoint: images to raw predictions."""

    def __init__(self, backbone: nn.Module, encoder: nn.Module, decoder: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone, self.encoder, self.decoder = backbone, encoder, decoder
        self.options = dict(options)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N,Q,classes] and boxes [N,Q,4] (cx, cy, w, h in 0..1) of ``images`` [N,3,H,W] in 0..1."""
        return self.decoder(self.encoder(self.backbone(images)))


class Detector(RTDETR):
    """RT-DETR with its post-processor: images and their original sizes to detections."""

    def forward(  # type: ignore[override]  # the parts of one model take and give different things
        self, images: Tensor, orig_target_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: [N,3,H,W] in 0..1.
            orig_target_sizes: int64 [N,2], width and height of the original images.

        Returns:
            Labels int64 [N,K], boxes [N,K,4] (x1, y1, x2, y2 in pixels of the original) and scores [N,K], best first.
        """
        logits, boxes = super().forward(images)
        top_k, threshold = self.options["top_k"], self.options["score_threshold"]
        return detections(logits, boxes, orig_target_sizes, top_k, threshold)


class EncoderPart(RTDETR):
    """The hybrid encoder alone."""

    def forward(self, s3: Tensor, s4: Tensor, s5: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the encoder's maps of the backbone's maps at strides 8, 16 and 32."""
        return tuple(self.encoder([s3, s4, s5]))


def detections(
    logits: Tensor, boxes: Tensor, sizes: Tensor, top_k: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn raw predictions into the best ``top_k`` pairs of query and class.

    A query can appear with several classes. The sigmoid is monotone, so it runs on what was chosen. With a threshold,
    detections below it have label -1, score 0 and a box of zeros: the shape is fixed.
    """
    classes = logits.shape[2]
    scores, index = logits.flatten(1).topk(top_k, dim=1)
    labels = index % classes
    query = torch.div(index - labels, classes, rounding_mode="trunc")
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], -1)
    wide = torch.zeros(1, 1, 4, dtype=torch.int64, device=index.device)
    scale = torch.cat([sizes, sizes], 1).to(boxes.dtype)[:, None]
    chosen, scores = corners.gather(1, query[..., None] + wide) * scale, scores.sigmoid()
    if threshold > 0:
        keep = scores >= threshold
        labels, scores = torch.where(keep, labels, -1), scores * keep
        chosen = chosen * keep[..., None]
    return labels, chosen, scores


def build(options: Mapping[str, Any], size: tuple[int, int], layout: str) -> nn.Module:
    """Build the training form for an image size.

    Args:
        options: See ``variants``.
        size: Height and width in pixels.
        layout: ``<origin>`` or ``official, converted``; decides how attention weights and RepVGG blocks are kept, and
            the order of the position embedding unless ``options["position"]`` names it.

    Raises:
        SizeError: the maps have fewer positions than there are queries.
    """
    positions = sum(height * width for height, width in map_sizes(size))
    if positions < options["queries"]:
        raise SizeError(
            f"size: {size[0]}x{size[1]} has {positions} positions, expected at least one for each of "
            f"{options['queries']} queries",
            hint="a larger --size; checkpoints are trained at 640",
        )
    origin = layout.partition(",")[0]
    packed = origin != "huggingface"
    position = origin if options["position"] == "checkpoint" else options["position"]
    backbone = _backbone(options)
    encoder = HybridEncoder(
        backbone.channels, options["hidden"], size, heads=options["heads"], hidden=options["ffn"],
        expansion=options["expansion"], depth=options["csp_depth"], position=position, packed=packed,
        converted=layout.endswith("converted"),
    )  # fmt: skip
    decoder = Decoder(
        [options["hidden"]] * 3, size, options["classes"], dim=options["decoder_hidden"], heads=options["heads"],
        hidden=options["decoder_ffn"], depth=options["decoder_layers"], eval_idx=options["eval_idx"],
        points=options["points"], queries=options["queries"], discrete=options["discrete"], packed=packed,
    )  # fmt: skip
    return _kind(options)(backbone, encoder, decoder, options).eval()


def _backbone(options: Mapping[str, Any]) -> ResNet | HGNet:
    if options["backbone"] == "hgnetv2":
        return HGNet(options["stem"], options["widths"], options["outs"], options["depths"], options["hg_layers"])
    return ResNet(options["depths"], options["width"], bottleneck=options["backbone"] == "bottleneck")


def _kind(options: Mapping[str, Any]) -> type[RTDETR]:
    if options["part"] == "encoder":
        return EncoderPart
    return RTDETR if options["head"] == "raw" else Detector


def to_deploy(model: nn.Module, target: Target) -> nn.Module:
    """Return the folded copy for a target, in the dtype of ``model``; ``model`` stays untouched.

    All of it is composed in float64, so that each number is rounded once, at the end.
    """
    source, dtype = cast(RTDETR, copy.deepcopy(model).double()), next(model.parameters()).dtype
    options = source.options
    form = _sampling(options, target)
    with torch.no_grad():
        backbone, decoder = source.backbone, source.decoder
        encoder = _convolutions(folded(source.encoder), options, target)
        if isinstance(source, EncoderPart):
            backbone, decoder = nn.Identity(), nn.Identity()
        else:
            backbone = _convolutions(folded(backbone), options, target)
            decoder = DeployDecoder(cast(Decoder, decoder), form, stacked=target is Target.TENSORRT)
        return type(source)(backbone, encoder, decoder, options).to(dtype)


def _sampling(options: Mapping[str, Any], target: Target) -> str:
    """Choose the form of the bilinear sampling.

    Raises:
        RecipeError: TensorRT's plugin for another runtime, or for a checkpoint that does not interpolate.
    """
    form = str(SAMPLING[target] if options["sampling"] == "auto" else options["sampling"])
    if form == "plugin" and (target is not Target.TENSORRT or options["discrete"]):
        what, other = f"the target is {target.value}", "or --backend tensorrt"
        if options["discrete"]:
            what, other = "checkpoints of this variant take pixels", "or a variant without _dsp"
        raise RecipeError(
            f"options.sampling: got plugin, TensorRT's operator for bilinear sampling, and {what}",
            hint=f"--set options.sampling=auto, {other}",
        )
    return form


def _filters_pay(recipe: Recipe) -> bool:
    """Whether filtered convolutions are for this runtime: others filter by themselves, or have no float32 digits."""
    engine = recipe.engine
    return recipe.precision is Precision.FP32 and engine.backend == "onnxruntime" and engine.device != "cuda"


def _convolutions(module: nn.Module, options: Mapping[str, Any], target: Target) -> nn.Module:
    """Choose the form of a folded backbone's or encoder's convolutions; TensorRT chooses its own."""
    if isinstance(module, HybridEncoder) and target is Target.ONNXRUNTIME:
        module = without_concatenation(module)
    form = CONVOLUTIONS[target] if options["convolutions"] == "auto" else options["convolutions"]
    return module if form == "direct" else with_winograd(module, always=options["convolutions"] == "winograd")


def adapt(state: State, options: Mapping[str, Any], size: tuple[int, int]) -> State:
    """Drop what inference never reads or computes itself: counters of norms, anchors, the heads' second names."""
    return {key: tensor for key, tensor in state.items() if not UNREAD.fullmatch(key)}


def interface(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the graph takes and gives, detections, raw predictions or the encoder's maps, and what forms it has.

    Raises:
        RecipeError: an option's value that is none of its choices.
    """
    for key, known in _CHOICES.items():
        if options[key] not in known:
            raise RecipeError(
                f"options.{key}: got {options[key]!r}, expected one of {', '.join(known)}",
                hint=did_you_mean(str(options[key]), known),
            )
    pairs = options["queries"] * options["classes"]
    if not 0 < options["top_k"] <= pairs:
        raise RecipeError(
            f"options.top_k: got {options['top_k']}, expected 1 to {pairs}, the pairs of query and class",
            hint="--set options.top_k=300",
        )
    if not 0 <= options["score_threshold"] < 1:
        raise RecipeError(
            f"options.score_threshold: got {options['score_threshold']}, expected a score from 0 to below 1",
            hint="--set options.score_threshold=0.5",
        )
    found: dict[str, Any] = {}
    if options["part"] == "encoder":
        channels = _channels(options)
        specs = tuple(
            TensorSpec(name=name, dtype="float32", shape=("batch", c, f"height/{stride}", f"width/{stride}"))
            for name, c, stride in zip(_FEATURES, channels, STRIDES, strict=True)
        )
        feeds = {spec.name: _feature_maker(i, c) for i, (spec, c) in enumerate(zip(specs, channels, strict=True))}
        found = {"inputs": specs, "outputs": ("p3", "p4", "p5"), "task": "maps", "feeds": feeds, "selection": None}
    elif options["head"] == "raw":
        found = {"inputs": (_IMAGES,), "outputs": ("pred_logits", "pred_boxes"), "task": "queries"}
    return {**found, "forms": forms(options)}


def keep_fp32(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stays float32 in a 16-bit graph: the scores that select queries, and the boxes from head to head.

    Rounded scores select other queries; float16 steps by 5e-4 near 1, which is 0.3 pixels of 640. Filtered convolutions
    have no digits to spare either.
    """
    if options["part"] == "encoder":
        return (r"\.winograd/",) if options["convolutions"] == "winograd" else ()
    return (
        r"^decoder\.selection\.(norm|score_head|bbox_head)\b",
        r"^decoder\.selection/(Add|Gather)",
        r"^decoder\.bbox_head\.",
        r"^decoder/|\.winograd/",  # one pattern, because each must match and a graph need not filter
    )


def original_sizes(images: NDArray[np.float32]) -> NDArray[np.int64]:
    """Make up original sizes (width, height) of images [n,3,H,W]: no two of a batch alike, none square."""
    count, _, height, width = images.shape
    rows = np.arange(count, dtype=np.int64)
    return np.stack([width + 96 + 32 * rows, height + 64 * rows], 1)


def _channels(options: Mapping[str, Any]) -> list[int]:
    with torch.device("meta"):
        return _backbone(options).channels


def _feature_maker(level: int, channels: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return a function that makes a backbone-like map of images: averaged, mixed over colours, cut off at zero."""

    def make(images: NDArray[np.float32]) -> NDArray[np.float32]:
        stride = STRIDES[level]
        count, colours, height, width = images.shape
        cells = images.reshape(count, colours, height // stride, stride, width // stride, stride)
        mixing = np.random.default_rng([level, channels]).standard_normal((channels, colours)).astype(np.float32)
        mixed = np.einsum("kc,nchw->nkhw", mixing, cells.mean((3, 5)))
        return np.maximum(mixed, 0).astype(np.float32)

    return make


_CHOICES = {
    "head": ("detections", "raw"),
    "part": ("all", "encoder"),
    "sampling": ("auto", *BILINEAR),
    "convolutions": ("auto", "direct", "winograd"),
    "position": ("checkpoint", "official", "huggingface"),
}
_COMMON = {
    "heads": 8, "csp_depth": 3, "decoder_hidden": 256, "decoder_ffn": 1024, "eval_idx": -1, "points": [4, 4, 4],
    "queries": 300, "discrete": False, "position": "checkpoint", "sampling": "auto", "convolutions": "auto",
    "head": "detections", "part": "all", "top_k": 300, "score_threshold": 0.0,
}  # fmt: skip
_WIDE = {"hidden": 256, "ffn": 1024, "expansion": 1.0, "decoder_layers": 6}
_WIDER = {**_WIDE, "hidden": 384, "ffn": 2048}
_NARROW = {**_WIDE, "expansion": 0.5}
_R18 = {"backbone": "basic", "depths": [2, 2, 2, 2], "width": 64, **_NARROW, "decoder_layers": 3}
_R34 = {"backbone": "basic", "depths": [3, 4, 6, 3], "width": 64, **_NARROW, "decoder_layers": 4}
_R50 = {"backbone": "bottleneck", "depths": [3, 4, 6, 3], "width": 64, **_WIDE}
_R50_M = {**_R50, **_NARROW, "eval_idx": 2}
_R101 = {"backbone": "bottleneck", "depths": [3, 4, 23, 3], "width": 64, **_WIDER}
_L = {
    "backbone": "hgnetv2", "stem": [32, 48], "widths": [48, 96, 192, 384], "outs": [128, 512, 1024, 2048],
    "depths": [1, 1, 3, 1], "hg_layers": 6, **_WIDE,
}  # fmt: skip
_X = {
    "backbone": "hgnetv2", "stem": [32, 64], "widths": [64, 128, 256, 512], "outs": [128, 512, 1024, 2048],
    "depths": [1, 2, 5, 2], "hg_layers": 6, **_WIDER,
}  # fmt: skip
_TINY = {
    **_COMMON, "backbone": "basic", "depths": [1, 1, 1, 1], "width": 8, "hidden": 32, "heads": 4, "ffn": 48,
    "expansion": 0.5, "csp_depth": 1, "decoder_hidden": 32, "decoder_ffn": 48, "decoder_layers": 2,
    "points": [3, 2, 1], "queries": 12, "top_k": 10,
}  # fmt: skip


def _variant(architecture: Mapping[str, Any], summary: str, *, discrete: bool = False) -> Variant:
    return Variant(options={**_COMMON, **architecture, "discrete": discrete}, summary=summary)


_IMAGES = TensorSpec(name="images", dtype="float32", shape=("batch", 3, "height", "width"))

SYSTEM = System(
    name="rtdetr",
    task="detection",
    paper="DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024, arXiv 2304.08069; RT-DETRv2: arXiv 2407.17140",
    variants={
        "r18vd": _variant(_R18, "release: 46.5 AP"),
        "r34vd": _variant(_R34, "release: 48.9 AP"),
        "r50vd_m": _variant(_R50_M, "release: 51.3 AP; six decoder layers, three of them used"),
        "r50vd": _variant(_R50, "release: 53.1 AP"),
        "r101vd": _variant(_R101, "release: 54.3 AP"),
        "r18": _variant(_R18, "v2, release: 48.1 AP"),
        "r34": _variant(_R34, "v2, release: 49.9 AP"),
        "r50_m": _variant(_R50_M, "v2, release: 51.9 AP; six decoder layers, three of them used"),
        "r50": _variant(_R50, "v2, release: 53.4 AP"),
        "r101": _variant(_R101, "v2, release: 54.3 AP"),
        "r18_dsp": _variant(_R18, "v2 with discrete sampling, release: 47.4 AP", discrete=True),
        "r34_dsp": _variant(_R34, "v2 with discrete sampling, release: 49.2 AP", discrete=True),
        "r50_m_dsp": _variant(_R50_M, "v2 with discrete sampling, release: 51.4 AP", discrete=True),
        "r50_dsp": _variant(_R50, "v2 with discrete sampling, release: 52.9 AP", discrete=True),
        "hgnetv2_l": _variant(_L, "v2's configuration; 53.0 AP in the first release"),
        "hgnetv2_x": _variant(_X, "v2's configuration; 54.8 AP in the first release"),
        "tiny": Variant(options=_TINY, summary="for tests"),
    },
    build=build,
    weight_maps=WEIGHT_MAPS,
    to_deploy=to_deploy,
    forms=forms(_COMMON),
    recipe={"system": "rtdetr", "variant": "r18", "size": 640},
    # On an r18 and on the tests' detector, both trained for shapes, with weights of 7 bits: AP50 and AP75 stay within
    # 0.004, all detections above 0.5 are matched, and scores of the r18 move by 0.05 at most. With the values in
    # float32 too it is 0.056, so they are quantised (6 % of the products); with the maps of the ranking, 0.080. Its
    # stem in float32 makes it 0.047, for a tenth of the products.
    keep_high=lambda options: {
        r"^decoder\.(?!values)": "decoder, sampling offsets, boxes and scores: they decide what is found"
    },
    relayouts=RELAYOUTS,
    stride=32,
    inputs=(_IMAGES, TensorSpec(name="orig_target_sizes", dtype="int64", shape=("batch", 2))),
    outputs=("labels", "boxes", "scores"),
    adapt=adapt,
    keep_fp32=keep_fp32,
    options_for=lambda recipe: {} if _filters_pay(recipe) else {"convolutions": "direct"},
    selection=Selection(selector="decoder.selection", decoder="decoder", scores="decoder.enc_score_head"),
    drawing=DRAWING,
    feeds={"orig_target_sizes": original_sizes},
    interface=interface,
    flags=(
        Flag(name="head", key="options.head", help="detections, or raw for logits and boxes of the queries"),
        Flag(name="part", key="options.part", help="all, or encoder for the hybrid encoder alone"),
    ),
)
