"""Care for native code that calls back into Python."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM)


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


@contextlib.contextmanager
def signals_deferred() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C and termination back until native code has returned; they are raised at the end of the block.

    A Python signal handler runs inside the next callback. What it raises there would have to travel through C++ frames
    that were not made for it, and the process aborts.

    Yields:
        Whether one arrived: a callback that can cancel the native call asks it.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread only
        yield lambda: False
        return
    heeded = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup, `command &`
    before = {number: signal.signal(number, lambda got, frame: caught.append(got)) for number in heeded}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if caught:
            signal.raise_signal(caught[0])
