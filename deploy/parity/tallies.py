"""What runs show of a network's choices, added up by module, and the training form as a reference that follows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deploy.backends.base import Array, Feeds
from deploy.records import DecisionCheck

if TYPE_CHECKING:
    from deploy.models.decisions import DecidingModel


@dataclass(kw_only=True)
class Tally:
    """What the runs of one stage showed, by module."""

    model: DecidingModel
    images: int = 0
    flips: dict[str, int] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)

    def add(self, module: str, count: NDArray[np.int64], margin: NDArray[np.float64]) -> None:
        """Keep how a module chose on some images, [N] each."""
        self.flips[module] = self.flips.get(module, 0) + int(count.sum())
        self.margins[module] = max(self.margins.get(module, 0.0), float(margin.max(initial=0.0)))

    def share(self, shares: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep which share ended in the same place, running freely."""
        for module, share in shares.items():
            self.shares.setdefault(module, []).extend(float(s) for s in share)

    def rows(self, stage: str, limit: float) -> Iterator[DecisionCheck]:
        """Give a row a module; ``limit``: of the margin."""
        for module, flips in self.flips.items():
            margin = self.margins[module]
            yield DecisionCheck(
                stage=stage, module=module, what=self.model.what, images=self.images, flips=flips, margin=margin,
                limit=limit, same=float(np.mean(self.shares[module])), ok=margin <= limit,
            )  # fmt: skip


@dataclass(kw_only=True)
class Followed(Tally):
    """The training form as a reference that follows the deploy form's choices, and judges them by its own scores."""

    def reference(self, feeds: Feeds) -> Mapping[str, Array]:
        """Run the training form."""
        outputs, judged = self.model.follow(feeds, self.model.decide(feeds))
        for module in judged.flips:
            self.add(module, judged.flips[module], judged.margins[module])
        self.share(judged.shares)
        self.images += len(next(iter(outputs.values())))
        return outputs


class FormRunner:
    """The deploy form in PyTorch behind the Runner protocol."""

    name, device = "deploy form", "cpu"

    def __init__(self, model: DecidingModel) -> None:
        self._model = model

    def __enter__(self) -> FormRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run it freely: it is the training form that follows."""
        return dict(self._model.decide(feeds).outputs)
