"""Train the small RT-DETR of the tests on generated shapes and write its weights: ``python train_detector.py OUT``.

Random weights prove equality of functions and nothing about precision, hence a detector that has learnt something. It
is trained from scratch on ``shapes.scene`` in minutes on one core: no denoising queries, else as the paper: Hungarian
matching, focal loss weighted by the overlap, L1 and GIoU of the boxes, behind the query selection and each layer.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from deploy.models.rtdetr import SYSTEM
from deploy.models.rtdetr.decoder import inverse_sigmoid
from deploy.models.rtdetr.layers import EPS, FrozenNorm
from toy.shapes import NAMES, scene

SIZE = 96
PICTURES = 4000  # drawn once, seen several times
OPTIONS = {"width": 12, "hidden": 48, "ffn": 96, "decoder_hidden": 48, "decoder_ffn": 96, "queries": 30, "top_k": 30}


class TrainingNorm(FrozenNorm):
    """Batch norm that learns its statistics, under the names that a checkpoint has."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.05, EPS
        )


def build() -> nn.Module:
    """Build the detector with initial weights that are meant to be trained."""
    options = {**SYSTEM.variants["tiny"].options, **OPTIONS, "classes": len(NAMES), "head": "raw"}
    model = SYSTEM.build(options, (SIZE, SIZE), "official")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is FrozenNorm:
                setattr(parent, name, TrainingNorm(len(child.weight)))
    decoder = model.decoder
    for head in (decoder.enc_score_head, *decoder.dec_score_head):
        nn.init.constant_(head.bias, -math.log(20))
    for mlp in (decoder.enc_bbox_head, *decoder.dec_bbox_head):
        nn.init.zeros_(mlp.layers[-1].weight)
        nn.init.zeros_(mlp.layers[-1].bias)
    for layer in decoder.decoder.layers:
        nn.init.zeros_(layer.cross_attn.sampling_offsets.weight)
    return model


def stages(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return logits and boxes behind the query selection and behind each layer."""
    decoder = model.decoder
    memory = decoder.memory(model.encoder(model.backbone(images)))
    features = decoder.enc_output(memory * decoder.valid)
    scores, boxes = decoder.enc_score_head(features), decoder.enc_bbox_head(features) + decoder.anchors
    index = scores.amax(-1).topk(decoder.queries, dim=1).indices[..., None]
    taken = [x.gather(1, index.expand(-1, -1, x.shape[2])) for x in (features, scores, boxes)]
    found = [(taken[1], taken[2].sigmoid())]
    x, known = taken[0].detach(), found[0][1].detach()
    for layer, box_head, score_head in zip(
        decoder.decoder.layers, decoder.dec_bbox_head, decoder.dec_score_head, strict=True
    ):
        x = layer(x, decoder.query_pos_head(known), known, memory)
        moved = (box_head(x) + inverse_sigmoid(known)).sigmoid()
        found.append((score_head(x), moved))
        known = moved.detach()
    return found


def corners(boxes: Tensor) -> Tensor:
    """Turn centre and size into corners."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU of corner boxes, broadcast."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return shared / union, shared / union - (around - union) / around


def loss_of(logits: Tensor, boxes: Tensor, truth: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Match and sum up the losses of one stage over a batch, per object."""
    target, total = torch.zeros_like(logits), logits.new_zeros(())
    for image, (labels, wanted) in enumerate(truth):
        with torch.no_grad():
            p = logits[image].sigmoid()
            focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            giou = overlaps(corners(boxes[image])[:, None], corners(wanted)[None])[1]
            cost = 2 * focal[:, labels] + 5 * torch.cdist(boxes[image], wanted, p=1) - 2 * giou
            rows, columns = linear_sum_assignment(cost.numpy())
        got, goal = boxes[image, rows], wanted[columns]
        iou, giou = overlaps(corners(got), corners(goal))
        total = total + 5 * (got - goal).abs().sum() + 2 * (1 - giou).sum()
        target[image, rows, labels[columns]] = iou.detach().clamp(0, 1)
    weight = torch.where(target > 0, target, 0.75 * logits.detach().sigmoid() ** 2)
    focal = functional.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
    return (focal + total) / sum(len(labels) for labels, _ in truth)


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw an image [3,S,S], its labels [M] and boxes [M,4] (centre and size in 0..1)."""
    drawn = scene(seed, (SIZE, SIZE))
    low, high = torch.from_numpy(drawn.boxes / SIZE).float().chunk(2, 1)
    image = torch.from_numpy(drawn.picture).permute(2, 0, 1).float() / 255
    return image, torch.from_numpy(drawn.labels), torch.cat([(low + high) / 2, high - low], 1)


def mirrored(image: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swap left and right."""
    return image.flip(2), labels, torch.cat([1 - boxes[:, :1], boxes[:, 1:]], 1)


def train(steps: int, batch: int, rate: float) -> nn.Module:
    """Train from scratch."""
    torch.manual_seed(0)
    model, pictures = build().train(), [draw(seed) for seed in range(PICTURES)]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    start, seen = time.perf_counter(), []
    for step in range(steps):
        chosen = [pictures[i] for i in torch.randint(PICTURES, (batch,)).tolist()]
        chosen = [mirrored(*each) if flip else each for each, flip in zip(chosen, torch.rand(batch) < 0.5, strict=True)]
        images, truth = torch.stack([image for image, _, _ in chosen]), [(labels, boxes) for _, labels, boxes in chosen]
        loss = sum(loss_of(*stage, truth) for stage in stages(model, images))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        seen.append(float(loss.detach()))
        if step % 100 == 99:
            print(f"step {step + 1}: loss {np.mean(seen[-100:]):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train, and write the weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = train(arguments.steps, arguments.batch, arguments.rate)
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, arguments.out)


if __name__ == "__main__":
    main()
