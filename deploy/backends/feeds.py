"""What goes into an engine: checked against its inputs before it runs, and made up where only the kernels matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy.backends.base import Array, Feeds
from deploy.errors import SizeError
from deploy.records import Batch, TensorSpec


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds) -> None:
    """Hold feeds against an engine's inputs: names, dtypes, ranks and every fixed axis.

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
        if not _fits(array.shape, spec.shape):
            mistakes.append(f"input {spec.name!r}: got shape {list(array.shape)}, expected {list(spec.shape)}")
    if mistakes:
        raise SizeError("; ".join(mistakes), hint="export with the --batch and --size that you want to run")


def _fits(got: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(got) == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(got, expected, strict=True)
    )


def example_feeds(inputs: Sequence[TensorSpec], batch: Batch) -> dict[str, Array]:
    """Make ones for every input at the smallest batch. Enough to see which kernels run, never for numerics."""
    return {
        spec.name: np.ones([batch.min if isinstance(n, str) else n for n in spec.shape], dtype=spec.dtype)
        for spec in inputs
    }
