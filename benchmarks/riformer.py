"""RIFormer-S12's deploy graph against what users have today, on ONNX Runtime's CPU and in TensorRT-RTX's build log.

    python benchmarks/riformer.py --write

CPU: float32, 224 x 224, one thread, interleaved rounds; ratios of CPU time. Against (a) the training form through bare
``torch.onnx.export``, (b) timm's PoolFormer-S12 on the same road as ours, and (c) our graph without its norms: what is
left is convolutions, GELU and residuals, so no form of the norms can be faster. TensorRT-RTX: kernels in the log of an
ahead-of-time build in FP16 for SM89 (needs the extra ``tensorrt-rtx``): evidence for fusion, none for speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from common import arguments, bare, engines, figures, kernels, no_builder, on_the_road, race, write_results
from torch import nn

from deploy.models import find_system, riformer
from deploy.models.base import example_inputs, load_model
from deploy.models.weights import random_state
from deploy.records import Target
from deploy.resolve import resolve_recipe


def poolformer() -> nn.Module:
    model = timm.create_model("poolformer_s12").eval()
    model.load_state_dict(random_state(model.state_dict(), 0))
    return model.requires_grad_(False)


@contextmanager
def no_norms() -> Iterator[None]:
    """Leave the norms of the blocks out of what is exported: another function, and a bound for its time."""
    shipped = riformer.SharedNorms.forward
    riformer.SharedNorms.forward = lambda norms, x: (x, x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        riformer.SharedNorms.forward = shipped  # type: ignore[method-assign]


def cpu(batch: int, rounds: int, folder: Path) -> dict[str, object]:
    ours = load_model(find_system("riformer"), resolve_recipe("riformer"), Target.ONNXRUNTIME)
    (spec,) = ours.inputs
    images = example_inputs((spec,), batch)[0].numpy()
    graphs = {
        "riformer deploy": on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"ours{batch}"),
        "riformer training form, bare export": bare(ours.reference, images, folder / f"bare{batch}"),
        "poolformer, same road": on_the_road(poolformer(), spec, batch, Target.ONNXRUNTIME, folder / f"pool{batch}"),
    }
    with no_norms():
        graphs["without norms"] = on_the_road(ours.deploy, spec, batch, Target.ONNXRUNTIME, folder / f"bound{batch}")
    return figures(race(graphs, images, rounds), f"batch {batch}")


def counted(folder: Path) -> dict[str, int] | str:
    if reason := no_builder():
        return reason
    ours = load_model(find_system("riformer"), resolve_recipe("riformer"), Target.TENSORRT)
    counts = {}
    for name, module in {"riformer deploy": ours.deploy, "poolformer": poolformer()}.items():
        (engine,) = engines(module, ours.inputs, folder / f"rtx-{name}")
        counts[name] = kernels(engine)
        print(f"{name}: {counts[name]} kernels in FP16 on SM89")
    return counts


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {f"batch {batch}": cpu(batch, options.rounds, folder) for batch in (1, 8)}
        kernel_counts = counted(folder)
    if options.write:
        command = f"python benchmarks/riformer.py --rounds {options.rounds} --write"
        write_results("riformer", {"command": command, "cpu": measured, "kernels": kernel_counts})


if __name__ == "__main__":
    main()
