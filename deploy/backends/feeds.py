"""What goes into an engine: checked against its inputs before it runs, and made up where only the kernels matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy.backends.base import Array, Feeds
from deploy.errors import SizeError
from deploy.records import Batch, TensorSpec


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds, batch: Batch | None = None) -> None:
    """Hold feeds against an engine's inputs: names, dtypes, ranks, every fixed axis, and the profile of dynamic ones.

    Args:
        inputs: The engine's inputs; a string axis is dynamic.
        feeds: Input name -> host array.
        batch: Range that dynamic axes must lie in; ``None`` where the runtime takes any size.

    Raises:
        SizeError: they do not fit; the message lists every mistake as got and expected.
    """
    names = [spec.name for spec in inputs]
    mistakes = [f"input {name!r}: not an input of this engine, expected {names}" for name in feeds if name not in names]
    for spec in inputs:
        if spec.name not in feeds:
            mistakes.append(f"input {spec.name!r}: missing, got {sorted(feeds)}")
            continue
        array = feeds[spec.name]
        if array.dtype.name != spec.dtype:
            mistakes.append(f"input {spec.name!r}: got dtype {array.dtype.name}, expected {spec.dtype}")
        if not _fits(array.shape, spec.shape, batch):
            within = f" with {batch.min} to {batch.max} for names" if batch and batch.dynamic else ""
            mistakes.append(f"input {spec.name!r}: got shape {list(array.shape)}, expected {list(spec.shape)}{within}")
    if mistakes:
        raise SizeError("; ".join(mistakes), hint="export with the --batch and --size that you want to run")


def _fits(got: tuple[int, ...], expected: tuple[int | str, ...], batch: Batch | None) -> bool:
    def axis_fits(size: int, want: int | str) -> bool:
        if isinstance(want, str):
            return batch is None or batch.min <= size <= batch.max
        return size == want

    return len(got) == len(expected) and all(axis_fits(s, w) for s, w in zip(got, expected, strict=True))


def example_feeds(inputs: Sequence[TensorSpec], batch: Batch) -> dict[str, Array]:
    """Make ones for every input at the smallest batch. Enough to see which kernels run, never for numerics."""
    return {
        spec.name: np.ones([batch.min if isinstance(n, str) else n for n in spec.shape], dtype=spec.dtype)
        for spec in inputs
    }
