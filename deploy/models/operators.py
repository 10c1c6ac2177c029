"""Operators of our own: one node for ``torch.export``, and the ONNX nodes that they become.

A deploy form whose arithmetic is many small operators on [N,C] costs the exporter seconds, because it looks at each of
them a dozen times. As one operator it is captured at once; its translation writes the ONNX nodes directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Translation = TypeVar("Translation", bound=Callable[..., Any])

# Operator -> what writes its ONNX nodes; ``deploy.trace`` hands it to the exporter.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {}


def written_as(operator: Any) -> Callable[[Translation], Translation]:
    """Register the function that writes the ONNX nodes of a ``torch.library`` operator, with onnxscript's opset."""

    def register(translation: Translation) -> Translation:
        TRANSLATIONS[operator._opoverload] = translation
        return translation

    return register
