"""Whether lint tells in advance what TensorRT-RTX says to other projects' exports.

    python benchmarks/lint_peers.py [--write]

Small networks are exported as their projects do it: timm and transformers with ``torch.onnx.export``, a token merging
with ``scatter_reduce``, FP16 and INT8 with ONNX Runtime's own converters. Lint looks at each file, then TensorRT-RTX
parses and builds it for SM 89. The script ends with 1 where they disagree.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from deploy.artifacts import environment
from deploy.backends import load_backend
from deploy.backends.base import BuildOptions
from deploy.errors import EngineBuildError, PrecisionAuditError
from deploy.linting.run import lint_file
from deploy.linting.table import goal_of_backend
from deploy.records import to_json

RESULT = Path(__file__).parent / "results" / "lint_peers.json"
SIDE, TOKENS, WIDTH = 64, 32, 16
FILES = Callable[[Path], Path]


class ScatterMerge(nn.Module):
    """Merge a fixed number of tokens into their nearest neighbours, with ``scatter_reduce``."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take [N,T,C] tokens and return the merged ones, [N,T/2,C]."""
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        nearest = (even @ odd.transpose(1, 2)).argmax(dim=-1, keepdim=True)
        return odd.scatter_reduce(1, nearest.expand(-1, -1, odd.shape[-1]), even, reduce="sum")


class SortTokens(nn.Module):
    """Order tokens by their norm."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take [N,T,C] tokens and return them in order."""
        order = tokens.sum(-1).argsort(dim=-1, descending=True)
        return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))


class Resized(nn.Module):
    """Shrink a map with antialiasing, as position embeddings are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Take [N,C,H,W] and return [N,C,H/2,W/2]."""
        return nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)


def exported(module: nn.Module, inputs: torch.Tensor, opset: int) -> FILES:
    """Export with ``torch.onnx.export`` and nothing else."""

    def write(folder: Path) -> Path:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module.eval(), (inputs,), dynamo=True, opset_version=opset, verbose=False)
        program.save(str(folder / "model.onnx"))
        return folder / "model.onnx"

    return write


def vit(opset: int) -> FILES:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, depth=2, num_classes=10)
    return exported(model, torch.randn(1, 3, SIDE, SIDE), opset)


def rtdetr(opset: int) -> FILES:
    """Export transformers' RT-DETR in a tiny configuration, its outputs as a tuple."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, use_pretrained_backbone=False, use_timm_backbone=False, backbone=None,
        encoder_hidden_dim=32, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=32, encoder_attention_heads=2,
        d_model=32, num_queries=10, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, num_labels=4, num_denoising=0, anchor_image_size=None,
    )  # fmt: skip

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = RTDetrForObjectDetection(config)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.network(images)
            return found.logits, found.pred_boxes

    return exported(Detector(), torch.randn(1, 3, 2 * SIDE, 2 * SIDE), opset)


def half(source: FILES, blocked: tuple[str, ...] = ()) -> FILES:
    """Convert to FP16 with ONNX Runtime's converter."""

    def write(folder: Path) -> Path:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        path = source(folder)
        model = convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=list(blocked))
        path.write_bytes(model.SerializeToString())
        return path

    return write


def int8(source: FILES, **options: object) -> FILES:
    """Quantise with ONNX Runtime's quantiser."""

    def write(folder: Path) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                name = onnx.load(path, load_external_data=False).graph.input[0].name
                self.feeds: Iterator[dict[str, np.ndarray]] = iter(
                    [{name: np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)}]
                )

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.feeds, None)

        path = source(folder)
        target = folder / "int8.onnx"
        quantize_static(
            str(path), str(target), Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8, **options
        )
        return target

    return write


SYMMETRIC = {
    "op_types_to_quantize": ["Conv", "Gemm"],
    "extra_options": {
        "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True,
        "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm"],
    },
}  # fmt: skip


def peers() -> dict[str, FILES]:
    """Name every export; those that a project cannot give here are left out with a word."""
    tokens = torch.randn(1, TOKENS, WIDTH)
    return {
        "timm ViT, opset 20": vit(20),
        "timm ViT, opset 23 (Attention, FP32)": vit(23),
        "timm ViT, opset 23, FP16 by ONNX Runtime": half(vit(23)),
        "timm ViT, opset 20, FP16 by ONNX Runtime": half(vit(20)),
        "timm ViT, opset 20, FP16, norms blocked": half(vit(20), ("LayerNormalization",)),
        "timm ViT, INT8 by ONNX Runtime's defaults": int8(vit(20)),
        "timm ViT, INT8 symmetric": int8(vit(20), **SYMMETRIC),
        "token merging with scatter_reduce": exported(ScatterMerge(), tokens, 18),
        "argsort of 3840 tokens": exported(SortTokens(), torch.randn(1, 3840, 2), 18),
        "argsort of 4096 tokens": exported(SortTokens(), torch.randn(1, 4096, 2), 18),
        "resize with antialias": exported(Resized(), torch.randn(1, 3, SIDE, SIDE), 18),
        "transformers RT-DETR, opset 18": rtdetr(18),
        "transformers RT-DETR, opset 23": rtdetr(23),
    }


def refused(path: Path, folder: Path) -> str:
    """Build with TensorRT-RTX and return what it says; nothing where it builds."""
    try:
        load_backend("tensorrt_rtx").build(path, folder, BuildOptions(sm=(89,)))
    except PrecisionAuditError:  # it is built, in another precision than FP32
        return ""
    except EngineBuildError as error:
        return error.message
    return ""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = arguments.parse_args()
    goal, _ = goal_of_backend("tensorrt_rtx")
    if goal is None or (reason := load_backend("tensorrt_rtx").available()):
        print(f"nothing to compare with: {reason}")
        return 2
    rows, agreed = [], 0
    for name, export in peers().items():
        with tempfile.TemporaryDirectory() as scratch:
            path = export(Path(scratch))
            record = lint_file(path, (goal,))
            errors = [f.rule for f in record.findings if "error" in f.severities.values()]
            said = refused(path, Path(scratch))
        agreed += (same := bool(errors) == bool(said))
        rows.append({"export": name, "lint": errors, "tensorrt_rtx": said[-200:], "agree": same})
        print(
            f"{'agree' if same else 'DIFFER':7} {name}: lint {errors or 'clean'}; {said[-120:] or 'builds'}", flush=True
        )
    print(f"{agreed} of {len(rows)} agree")
    if options.write:
        data = {"goal": str(goal), "exports": rows, "environment": to_json(environment())}
        RESULT.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if agreed == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
