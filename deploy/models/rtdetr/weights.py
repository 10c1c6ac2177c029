"""Checkpoint layouts: the release's first and second version, before and after RepVGG conversion, and Hugging Face's.

Our keys are those of the release's second version, with ``enc_output.linear`` instead of its ``enc_output.proj``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deploy.models.checkpoint import State, WeightMap

OFFICIAL, CONVERTED, HUGGING_FACE = "official", "official, converted", "huggingface"

Rules = Sequence[tuple[str, str]]

_FIRST: Rules = (
    (r"^encoder\.input_proj\.(\d+)\.0\.", r"encoder.input_proj.\1.conv."),
    (r"^encoder\.input_proj\.(\d+)\.1\.", r"encoder.input_proj.\1.norm."),
    (r"^decoder\.enc_output\.0\.", "decoder.enc_output.linear."),
    (r"^decoder\.enc_output\.1\.", "decoder.enc_output.norm."),
)
_FIRST_BACK: Rules = (
    (r"^encoder\.input_proj\.(\d+)\.conv\.", r"encoder.input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d+)\.norm\.", r"encoder.input_proj.\1.1."),
    (r"^decoder\.enc_output\.linear\.", "decoder.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "decoder.enc_output.1."),
)
# HGNetV2 pads in front of its 2x2 convolutions with a module of its own, which shifts the convolution's index.
_SECOND: Rules = (
    (r"^decoder\.enc_output\.proj\.", "decoder.enc_output.linear."),
    (r"^(backbone\.(?:stem|stages)\..*)\.bn\.", r"\1.norm."),
    (r"^(backbone\.stem\.stem2[ab])\.conv\.1\.", r"\1.conv."),
)
_SECOND_BACK: Rules = (
    (r"^decoder\.enc_output\.linear\.", "decoder.enc_output.proj."),
    (r"^(backbone\.(?:stem|stages)\..*)\.norm\.", r"\1.bn."),
    (r"^(backbone\.stem\.stem2[ab])\.conv\.weight", r"\1.conv.1.weight"),
)

# Both generations: transformers 5 shows other names in memory (aifi, o_proj, mlp.fc1) than its files and those of
# transformers 4 have. A file whose keys all start with "model." has lost that prefix when it gets here.
_FACE: Rules = (
    (r"^model\.", ""),
    (r"^backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"backbone.res_layers.\1.blocks.\2."),
    (r"^(backbone\..*)\.shortcut\.1\.", r"\1.short.conv."),
    (r"^(backbone\..*)\.shortcut\.", r"\1.short."),
    (r"^(backbone\..*)\.layer\.0\.", r"\1.branch2a."),
    (r"^(backbone\..*)\.layer\.1\.", r"\1.branch2b."),
    (r"^(backbone\..*)\.layer\.2\.", r"\1.branch2c."),
    (r"^(backbone\..*)\.convolution\.", r"\1.conv."),
    (r"^(backbone\..*)\.normalization\.", r"\1.norm."),
    (r"^(encoder|decoder)_input_proj\.(\d+)\.0\.", r"\1.input_proj.\2.conv."),
    (r"^(encoder|decoder)_input_proj\.(\d+)\.1\.", r"\1.input_proj.\2.norm."),
    (r"^encoder\.aifi\.", "encoder.encoder."),
    (r"^enc_output\.0\.", "decoder.enc_output.linear."),
    (r"^enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"decoder.\1."),
    (r"^decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^decoder\.layers\.", "decoder.decoder.layers."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)
_FACE_BACK: Rules = (
    (r"^backbone\.conv1\.conv1_1\.", "backbone.model.embedder.embedder.0."),
    (r"^backbone\.conv1\.conv1_2\.", "backbone.model.embedder.embedder.1."),
    (r"^backbone\.conv1\.conv1_3\.", "backbone.model.embedder.embedder.2."),
    (r"^(backbone\..*)\.short\.conv\.(conv|norm)\.", r"\1.shortcut.1.\2."),
    (r"^(backbone\..*)\.short\.", r"\1.shortcut."),
    (r"^(backbone\..*)\.branch2a\.", r"\1.layer.0."),
    (r"^(backbone\..*)\.branch2b\.", r"\1.layer.1."),
    (r"^(backbone\..*)\.branch2c\.", r"\1.layer.2."),
    (r"^backbone\.res_layers\.(\d+)\.blocks\.(\d+)\.", r"backbone.model.encoder.stages.\1.layers.\2."),
    (r"^(backbone\..*)\.conv\.", r"\1.convolution."),
    (r"^(backbone\..*)\.norm\.", r"\1.normalization."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.conv\.", r"\1_input_proj.\2.0."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.norm\.", r"\1_input_proj.\2.1."),
    (r"^decoder\.enc_output\.linear\.", "enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "enc_output.1."),
    (r"^decoder\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"\1."),
    (r"^decoder\.dec_score_head\.", "decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "decoder.bbox_embed."),
    (r"^decoder\.decoder\.layers\.", "decoder.layers."),
    (r"^((?:en|de)coder\..*layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(encoder\..*layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"^(decoder\..*layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"^(decoder\..*layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"^", "model."),
)

UNREAD = re.compile(
    r".*\.num_batches_tracked"  # counts training steps
    r"|decoder\.(?:anchors|valid_mask)|.*\.(?:num|n)_points_scale"  # computed, for the size that is exported
    r"|(?:class_embed|bbox_embed)\..*"  # the decoder's own heads under a second name
)
"""Checkpoint keys, in our names, that are not needed."""


def _renaming(rules: Rules) -> Callable[[str], str]:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(key: str) -> str:
        for pattern, replacement in compiled:
            key = pattern.sub(replacement, key)
        return key

    return rename


def _map(name: str, layout: str, there: Rules, back: Rules, **more: Any) -> WeightMap:
    return WeightMap(name=name, layout=layout, rename=_renaming(there), inverse=_renaming(back), **more)


def _second_head_name(key: str) -> str | None:
    """Return the decoder heads' name beside the decoder: files of transformers 4, and of its RT-DETRv2, have both."""
    match = re.fullmatch(r"model\.decoder\.((?:class|bbox)_embed\..*)", key)
    return match[1] if match else None


WEIGHT_MAPS = (
    _map("official v1", OFFICIAL, _FIRST, _FIRST_BACK),
    _map("official v2", OFFICIAL, _SECOND, _SECOND_BACK),
    _map("official v1, converted", CONVERTED, _FIRST, _FIRST_BACK),
    _map("official v2, converted", CONVERTED, _SECOND, _SECOND_BACK),
    _map("Hugging Face", HUGGING_FACE, _FACE, _FACE_BACK, twin=_second_head_name),
)

_PACKED = re.compile(r"^(.*\.self_attn)\.in_proj_(weight|bias)$")
_SPLIT = re.compile(r"^(.*\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def split_attention(state: State) -> State:
    """Take the packed input projections of attention apart, in the order q, k, v."""
    out: State = {}
    for key, tensor in state.items():
        if match := _PACKED.match(key):
            out |= {f"{match[1]}.{n}_proj.{match[2]}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            out[key] = tensor
    return out


def pack_attention(state: State) -> State:
    """Join the input projections of attention in the order q, k, v."""
    out = {key: tensor for key, tensor in state.items() if not _SPLIT.match(key)}
    for prefix, leaf in {(m[1], m[3]) for key in state if (m := _SPLIT.match(key))}:
        out[f"{prefix}.in_proj_{leaf}"] = torch.cat([state[f"{prefix}.{n}_proj.{leaf}"] for n in "qkv"])
    return out


RELAYOUTS: dict[tuple[str, str], Callable[[State], State]] = {
    (OFFICIAL, HUGGING_FACE): split_attention,
    (HUGGING_FACE, OFFICIAL): pack_attention,
}
