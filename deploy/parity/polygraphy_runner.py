"""The adapter from our runners to polygraphy's; the only file of parity that imports polygraphy when it loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from deploy.backends.base import Array, Feeds


class CallableRunner(BaseRunner):  # type: ignore[misc]  # polygraphy has no types
    """A polygraphy runner around a function from feeds to outputs.

    Args:
        name: Shown in polygraphy's log.
        infer: Feeds -> outputs, host arrays.
        like: One set of feeds. Polygraphy casts, reshapes and drops inputs until they fit a runner's metadata, so the
            metadata is taken from the feeds themselves and every batch size fits: nothing is changed on the way.
    """

    def __init__(self, name: str, infer: Callable[[Feeds], Mapping[str, Array]], like: Feeds) -> None:
        super().__init__(name=name)
        self._infer = infer
        self._like = like

    def get_input_metadata_impl(self) -> Any:
        """Return name, dtype and shape of every input, axis 0 open."""
        metadata = TensorMetadata()
        for name, array in self._like.items():
            metadata.add(name, array.dtype, (None, *array.shape[1:]))
        return metadata

    def infer_impl(self, feed_dict: Feeds) -> dict[str, Array]:
        """Run once and keep the time, which polygraphy asks for."""
        start = time.perf_counter()
        outputs = {name: np.asarray(value) for name, value in self._infer(feed_dict).items()}
        self.inference_time = time.perf_counter() - start
        return outputs
