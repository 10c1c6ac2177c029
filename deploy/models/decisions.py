"""Decisions of a network that rounding can turn: what a system says about them, and how PyTorch's own are recorded.

A network that chooses (which tokens merge, which queries survive) is continuous only between its choices: where two
candidates are near a tie, another rounding chooses otherwise and every later value follows. ``deploy.parity.decisions``
therefore compares arithmetic and choices apart. A system whose deploy form chooses names the modules that do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from deploy.models.base import Loaded

Arrays = Mapping[str, NDArray[np.generic]]
Outputs = tuple[Tensor, ...]
Followed = tuple[Any, list[Outputs], list[Outputs]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """How a system's choices are found and judged.

    Attributes:
        what: What is chosen, for people: "merges".
        modules: Regular expression on whole names of the deploy form's modules whose outputs are choices and nothing
            else; every tensor that leaves such a module in the exported graph is one of its outputs.
        flips: ``(module, inputs, expected, got) -> (count, margin)``, both [N]: how many choices of ``got`` are other
            than those that the module made, ``expected``, and the largest amount by which its own scores, from these
            inputs, preferred them; 0 where nothing flipped, infinite where ``got`` is no possible choice.
        shares: ``(modules, expected, got) -> one [N] a module``: the share of elements that ended in the same place
            when every module's choices are taken together up to it.
        follow: ``(training form, modules, chosen, inputs) -> (outputs, given, own)``: runs the training form with
            these choices in place of its own (``None``: with its own), and returns beside its outputs for each module
            what the training form chooses from, as that module's inputs, and what it chooses itself, in a form that
            ``flips`` and ``shares`` take.
    """

    what: str
    modules: str
    flips: Callable[[nn.Module, Outputs, Outputs, Outputs], tuple[Tensor, Tensor]]
    shares: Callable[[Sequence[nn.Module], Sequence[Outputs], Sequence[Outputs]], Sequence[Tensor]]
    follow: Callable[[nn.Module, Sequence[nn.Module], Sequence[Outputs] | None, Outputs], Followed]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The deploy form's choices of one run, by module: other than the training form's, by which margin, and the share
    of elements that end in the same place when both run freely; [N] each.
    """

    flips: Mapping[str, NDArray[np.int64]]
    margins: Mapping[str, NDArray[np.float64]]
    shares: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """One run of the deploy form in PyTorch: what parity judges, and each deciding module's inputs and outputs."""

    outputs: Arrays
    inputs: Mapping[str, Outputs]
    chosen: Mapping[str, Outputs]


class DecidingModel:
    """The deploy form in PyTorch, float32, whose choices are recorded; the measure of every candidate's."""

    def __init__(self, loaded: Loaded, decisions: Decisions) -> None:
        self._loaded, self._decisions = loaded, decisions
        pattern = re.compile(decisions.modules)
        self.modules = {name: m for name, m in loaded.deploy.named_modules() if pattern.fullmatch(name)}
        self.what = decisions.what

    def decide(self, feeds: Arrays) -> Decided:
        """Run once; arrays in input order."""
        from deploy.models.base import run_module

        inputs: dict[str, Outputs] = {}
        chosen: dict[str, Outputs] = {}

        def record(name: str, module: nn.Module, given: Any, result: Any) -> None:
            inputs[name] = tuple(value for value in given)
            chosen[name] = result if isinstance(result, tuple) else (result,)

        hooks = [m.register_forward_hook(partial(record, name)) for name, m in self.modules.items()]
        try:
            found = run_module(self._loaded.deploy, feeds, self._loaded.outputs)
        finally:
            for hook in hooks:
                hook.remove()
        judged = {name: found[name] for name in self._loaded.system.outputs}
        return Decided(outputs=judged, inputs=inputs, chosen=chosen)

    def follow(self, feeds: Arrays, decided: Decided) -> tuple[Arrays, Judged]:
        """Run the training form with the deploy form's choices; also judge these by the training form's own scores."""
        images = tuple(torch.from_numpy(np.array(array)) for array in feeds.values())
        modules, chosen = list(self.modules.values()), [decided.chosen[name] for name in self.modules]
        decisions, reference = self._decisions, self._loaded.reference
        with torch.inference_mode():
            outputs, given, own = decisions.follow(reference, modules, chosen, images)
            found = [decisions.flips(*each) for each in zip(modules, given, own, chosen, strict=True)]
            free = decisions.follow(reference, modules, None, images)[2]
            shares = decisions.shares(modules, free, chosen)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        judged = Judged(
            flips={name: count.numpy() for name, (count, _) in zip(self.modules, found, strict=True)},
            margins={name: margin.numpy() for name, (_, margin) in zip(self.modules, found, strict=True)},
            shares={name: share.numpy() for name, share in zip(self.modules, shares, strict=True)},
        )
        return {n: t.numpy() for n, t in zip(self._loaded.system.outputs, tensors, strict=False)}, judged

    def flips(
        self, name: str, decided: Decided, got: Sequence[NDArray[np.generic] | None]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Count other choices of one module per image, and give the widest margin; ``None``: an output not in a graph.

        Args:
            name: Of the module.
            decided: PyTorch's run.
            got: The candidate's choices, given PyTorch's in every earlier module.
        """
        expected = decided.chosen[name]
        with torch.inference_mode():
            count, margin = self._decisions.flips(
                self.modules[name], decided.inputs[name], expected, _tensors(expected, got)
            )
        return count.numpy().astype(np.int64), margin.numpy().astype(np.float64)

    def shares(
        self, decided: Decided, got: Mapping[str, Sequence[NDArray[np.generic] | None]]
    ) -> dict[str, NDArray[np.float64]]:
        """Return by module the share [N] of elements that ended in the same place, the candidate running freely."""
        names = list(self.modules)
        expected = [decided.chosen[name] for name in names]
        theirs = [_tensors(mine, got[name]) for name, mine in zip(names, expected, strict=True)]
        with torch.inference_mode():
            found = self._decisions.shares([self.modules[name] for name in names], expected, theirs)
        return {name: share.numpy().astype(np.float64) for name, share in zip(names, found, strict=True)}


def _tensors(expected: Outputs, got: Sequence[NDArray[np.generic] | None]) -> Outputs:
    """Return host arrays as tensors of the expected types; what the graph does not have is taken as expected."""
    pairs = zip(expected, got, strict=True)
    return tuple(mine if theirs is None else torch.from_numpy(theirs.copy()).to(mine.dtype) for mine, theirs in pairs)
