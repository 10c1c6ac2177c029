"""Train the three small networks of this example; two CPU cores need a few minutes.

    python examples/digits/train.py tests/data/digits [riformer] [tome] [convmixer]

RIFormer is made as its paper does it. A PoolFormer is trained first; then the student takes the teacher's weights, each
affine mixer is fitted to the pooling that it replaces on the teacher's own activations (module imitation), and the
whole student is trained on labels and the teacher's logits. ConvMixer and the ViT, which ToMe merges without any
training, are trained on labels. Everything is seeded. The checkpoints hold float16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from data import digits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from deploy.models import find_system
from deploy.models.base import resolve_options
from deploy.models.riformer import Block, RIFormer, to_openmmlab
from deploy.resolve import resolve_recipe

HERE = Path(__file__).parent
EPOCHS, BATCH, SEED = 60, 64, 0
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Pooling(nn.Module):
    """PoolFormer's token mixer: a 3 x 3 mean without the padding, minus the identity."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix."""
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x


def network(name: str) -> nn.Module:
    """Build a recipe's network in training form, with PyTorch's own initial weights."""
    recipe = resolve_recipe(str(HERE / f"{name}.yaml"))
    system = find_system(recipe.system)
    torch.manual_seed(SEED)
    return system.build(resolve_options(system, recipe) | ({"r": 0} if name == "tome" else {}), recipe.size, "training")


def tensors(held_out: bool) -> tuple[Tensor, Tensor]:
    """Return images [N,3,32,32] from -1 to 1, and classes."""
    images, labels = digits(held_out)
    grey = torch.from_numpy(images).float().div(127.5).sub(1)[:, None]
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each batch by up to 3 pixels."""
    down, right = torch.randint(-3, 4, (2,), generator=generator).tolist()
    padded = functional.pad(images, (3, 3, 3, 3), value=-1.0)
    return padded[:, :, 3 + down : 35 + down, 3 + right : 35 + right]


def labelled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with smoothed labels."""
    return functional.cross_entropy(model(images), labels, label_smoothing=0.1)


def fit(model: nn.Module, loss: Loss, epochs: int = EPOCHS, rate: float = 3e-3) -> nn.Module:
    """Train with AdamW, warm-up and a cosine; the order of images is seeded."""
    images, labels = tensors(held_out=False)
    generator = torch.Generator().manual_seed(SEED)
    trained = [p.requires_grad_() for p in model.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // BATCH * BATCH].split(BATCH):
            optimiser.zero_grad()
            loss(model, shifted(images[chosen], generator), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return top-1 on the held-out digits."""
    images, labels = tensors(held_out=True)
    return float((model(images).argmax(1) == labels).float().mean())


def blocks_of(model: nn.Module) -> list[Block]:
    """List the blocks in order."""
    return [module for module in model.modules() if isinstance(module, Block)]


def poolformer() -> nn.Module:
    """Build the teacher: RIFormer's shape, with pooling where the student has an affine map."""
    teacher = network("riformer")
    for block in blocks_of(teacher):
        block.token_mixer = cast("nn.Module", Pooling())  # type: ignore[assignment]
    return teacher


@torch.no_grad()
def imitate(student: nn.Module, teacher: nn.Module) -> None:
    """Fit each affine mixer to the teacher's mixer, block by block: least squares per channel, in closed form.

    The input of both is the teacher's first norm, so that errors of earlier blocks do not reach later ones.
    """
    images, _ = tensors(held_out=False)
    for mine, theirs in zip(blocks_of(student), blocks_of(teacher), strict=True):
        seen: list[tuple[Tensor, Tensor]] = []
        hook = theirs.token_mixer.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given[0], out)))
        teacher(images)
        hook.remove()
        (given, wanted) = (tensor.transpose(0, 1).flatten(1) for tensor in seen[0])
        wanted = wanted + given  # the official mixer subtracts the identity
        mean, goal = given.mean(1), wanted.mean(1)
        spread = given - mean[:, None]
        slope = (spread * (wanted - goal[:, None])).sum(1) / spread.square().sum(1).clamp_min(1e-12)
        mine.token_mixer.affine.weight.copy_(slope[:, None, None, None])
        mine.token_mixer.affine.bias.copy_(goal - slope * mean)


def riformer() -> nn.Module:
    """Train the teacher, then the student."""
    teacher = fit(poolformer(), labelled).requires_grad_(requires_grad=False)
    print(f"PoolFormer, the teacher: {accuracy(teacher):.2%}")
    student = cast(RIFormer, network("riformer"))
    student.load_state_dict(teacher.state_dict(), strict=False)  # all but the mixers
    imitate(student, teacher)
    print(f"RIFormer after module imitation: {accuracy(student):.2%}")

    def distilled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits, wanted = model(images), teacher(images)
        agreed = functional.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        return agreed + functional.cross_entropy(logits, labels, label_smoothing=0.1)

    return fit(student, distilled, rate=2e-3)


def main(folder: Path, *names: str) -> None:
    """Train all three, or those that are named, and write their checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "riformer": riformer,
        "tome": lambda: fit(network("tome"), labelled, rate=2e-3),
        "convmixer": lambda: fit(network("convmixer"), labelled),
    }
    for name in names or made:
        model = made[name]()
        state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
        model.load_state_dict(state)  # what is measured is what is written
        print(f"{name}: {accuracy(model):.2%}, {sum(p.numel() for p in model.parameters())} parameters", flush=True)
        named = {to_openmmlab(key) if name == "riformer" else key: value for key, value in state.items()}
        save_file({key: value.contiguous() for key, value in named.items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
