"""Care for native code that calls back into Python."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector out of TensorRT's calls.

    TensorRT logs while it holds a lock. A collection inside that callback may free an older builder (one that an
    exception's traceback kept in a cycle), whose destructor waits for the same lock: a deadlock, seen with
    TensorRT-RTX 1.7.1.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
