"""Detectors whose queries are selected: where PyTorch and the graph show what was selected, and with which scores.

A transformer detector takes the positions with the best class scores as its queries. Rounding swaps neighbours and
moves the cut, and every row of its outputs follows. ``deploy.parity.selection`` therefore compares rows of the same
position. A system says where to look; nothing of it is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from deploy.models.base import Loaded

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Where a system's queries are selected, by names of modules.

    Attributes:
        selector: Of the deploy form: the module that takes the best positions, with one TopK in the graph.
        decoder: Of both forms: returns logits [N,Q,classes] and boxes [N,Q,4] (centre and size in 0..1).
        scores: Of the training form: class logits [N,L,classes] of every position; their maximum is what is ranked.
    """

    selector: str
    decoder: str
    scores: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """One run over some images.

    Attributes:
        index: [N,Q], the position that each row was selected from.
        scores: [N,L], of every position.
        logits: [N,Q,classes].
        boxes: [N,Q,4], centre and size in 0..1.
        outputs: What parity judges.
    """

    index: NDArray[np.int64]
    scores: NDArray[np.float64]
    logits: NDArray[np.float64]
    boxes: NDArray[np.float64]
    outputs: Arrays


class SelectingModel:
    """The training form in PyTorch, float32, with what it selected."""

    def __init__(self, loaded: Loaded, selection: Selection) -> None:
        self._loaded, self.selection = loaded, selection

    def select(self, feeds: Arrays) -> Selected:
        """Run once; arrays in input order."""
        from deploy.models.base import run_module

        seen: dict[str, Any] = {}
        reference = self._loaded.reference

        def keep(name: str, module: nn.Module) -> Any:
            return module.register_forward_hook(lambda _, __, result: seen.update({name: result}))

        names = (self.selection.decoder, self.selection.scores)
        hooks = [keep(name, reference.get_submodule(name)) for name in names]
        try:
            found = run_module(reference, feeds, self._loaded.outputs)
        finally:
            for hook in hooks:
                hook.remove()
        logits, boxes = seen[self.selection.decoder]
        ranked: Tensor = seen[self.selection.scores].amax(-1)
        return Selected(
            index=ranked.topk(logits.shape[1], dim=1).indices.numpy(),
            scores=ranked.double().numpy(),
            logits=logits.double().numpy(),
            boxes=boxes.double().numpy(),
            outputs={name: found[name] for name in self._loaded.system.outputs},
        )
