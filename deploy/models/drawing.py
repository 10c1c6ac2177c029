"""What a system draws on a photo from a network's outputs: ``effdeploy show``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # RGB [height, width, 3]
Outputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture with its title; ``agreement`` with the other run, 0 to 1, ``None`` where there is none to measure."""

    title: str
    picture: Picture
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How a system shows what its network did.

    Attributes:
        what: In words: "merged patches".
        needs: Outputs that it reads.
        feeds: Makers of inputs that are drawn with, instead of the system's, which parity takes.
        asked_by: The assignment that makes an export give them, e.g. ``options.groups=true``; empty: they are always
            there.
        panels: ``(options, picture, outputs, other) -> panels``: the photo as the network sees it, one image's outputs
            (axis 0 of length 1), and those of the run that it is shown beside; the same number of panels for each run.
    """

    what: str
    needs: tuple[str, ...]
    panels: Callable[[Mapping[str, Any], Picture, Outputs, Outputs], tuple[Panel, ...]]
    asked_by: str = ""
    feeds: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.generic]]] = field(default_factory=dict)
