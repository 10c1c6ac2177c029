"""The exporter's library of operators, without its sources being read again at every export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from onnxscript import values


class Translated:
    """A function of the library as the exporter's registry asks for it: by its domain, and hardly ever by more.

    The domain is known; the rest comes from the function's source, and is read when somebody does ask.
    """

    def __init__(self, function: values.TracedOnnxFunction, read: property) -> None:
        self.domain = function.opset.domain
        self._function, self._read = function, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read.__get__(self._function), name)


@contextlib.contextmanager
def unread_sources() -> Iterator[None]:
    """Let the exporter fill its registry without parsing the 500 Python functions in it: a sixth of a small export.

    A release of onnxscript without the property that does so needs no help.
    """
    read = getattr(values.TracedOnnxFunction, "function_ir", None)
    if not isinstance(read, property):
        yield
        return
    values.TracedOnnxFunction.function_ir = property(lambda function: Translated(function, read))
    try:
        yield
    finally:
        values.TracedOnnxFunction.function_ir = read
