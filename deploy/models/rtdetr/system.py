"""RT-DETR as a system: variants, weight maps, what the graph takes and gives, which form it is exported in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deploy.models.rtdetr.backbone import HGNet, ResNet
from deploy.models.rtdetr.decoder import Decoder
from deploy.models.rtdetr.deploy import DeployDecoder
from deploy.models.rtdetr.encoder import HybridEncoder
from deploy.models.rtdetr.layers import folded
from deploy.records import Target

FORMS = {Target.ONNXRUNTIME: "grid_sample", Target.TENSORRT: "gather"}


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

    def forward(self, images: Tensor, orig_target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    query = (index - labels) // classes
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
    """
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
    """Return the folded copy for a target, in the dtype of ``model``; ``model`` stays untouched."""
    source = cast(RTDETR, model)
    options = source.options
    form = FORMS[target] if options["sampling"] == "auto" else options["sampling"]
    with torch.no_grad():
        encoder = folded(source.encoder)
        if isinstance(source, EncoderPart):
            return EncoderPart(nn.Identity(), encoder, nn.Identity(), options)
        decoder = DeployDecoder(cast(Decoder, source.decoder), form)
        return type(source)(folded(source.backbone), encoder, decoder, options)


