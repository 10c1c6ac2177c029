"""Every error that effdeploy raises on purpose, in one file.

```
EffdeployError (1)
├── RecipeError (3)                 the YAML or an option says something that cannot be
├── UnknownNameError (4)            no such system, variant, backend or stage
├── SizeError (5)                   an image size or batch that the model cannot take
├── CheckpointError (6)             a weights file that does not fit or cannot be read
│   ├── UnsafeCheckpointError (7)   a pickle that would run code
│   └── NonFiniteWeightsError (8)   NaN or infinity in the weights
├── TraceError (9)                  PyTorch could not be exported, or not as asked
├── GraphPassError (10)             a graph pass broke its contract
├── PrecisionError (11)             the asked precision cannot be written into this graph
├── BackendUnavailableError (12)    the runtime is not installed or cannot run here
├── EngineBuildError (13)           parser or builder refused the graph
├── PrecisionAuditError (14)        the engine does not have the precision that was asked
├── ParityError (15)                outputs differ from PyTorch by more than the tolerance
├── BenchmarkError (16)             a measurement that cannot be made or trusted
├── BundleError (17)                a bundle that is missing, changed or unreadable
├── ImageError (18)                 an image folder or file that cannot be used
├── StorageError (19)               no space, no permission, a folder in the way
├── DownloadError (20)              weights that cannot be fetched, or that are not what was pinned
├── GateError (21)                  a --fail-if gate of diff fired
├── TuningError (22)                no schedule does what tune was asked for
├── LintError (23)                  an ONNX file that the runtime is known to refuse
└── BudgetError (24)                no choice of modules meets the accuracy budget
```

Exit code 2 belongs to the command-line parser (usage), 130 to Ctrl-C. A code is never reused: scripts depend on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class EffdeployError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What happened: what was got and what was expected.
        hint: The next command to type or the next thing to look at; empty when there is none.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RecipeError(EffdeployError):
    """A recipe or option that is malformed; the message lists every mistake."""

    exit_code = 3


class UnknownNameError(EffdeployError):
    """A name that no registry holds."""

    exit_code = 4


class SizeError(EffdeployError):
    """An image size or batch that the model cannot take."""

    exit_code = 5


class CheckpointError(EffdeployError):
    """A weights file that cannot be read or does not fit the model."""

    exit_code = 6


class UnsafeCheckpointError(CheckpointError):
    """A pickle that holds more than tensors; loading it would run its code."""

    exit_code = 7


class NonFiniteWeightsError(CheckpointError):
    """NaN or infinity among the weights."""

    exit_code = 8


class TraceError(EffdeployError):
    """torch.onnx could not export the model, or exported something else than was asked."""

    exit_code = 9


class GraphPassError(EffdeployError):
    """A graph pass changed the outputs, the interface or the validity of a graph."""

    exit_code = 10


class PrecisionError(EffdeployError):
    """The asked precision cannot be written into this graph."""

    exit_code = 11


class BackendUnavailableError(EffdeployError):
    """The runtime is not installed, or cannot do on this machine what was asked."""

    exit_code = 12


class EngineBuildError(EffdeployError):
    """A parser or builder refused the graph."""

    exit_code = 13


class PrecisionAuditError(EffdeployError):
    """The built engine does not have the precision that was asked."""

    exit_code = 14


class ParityError(EffdeployError):
    """Outputs differ from the PyTorch reference by more than the recipe's tolerance."""

    exit_code = 15


class BenchmarkError(EffdeployError):
    """A measurement that cannot be made or cannot be trusted."""

    exit_code = 16


class BundleError(EffdeployError):
    """A bundle that is missing, incomplete, changed or written by another version."""

    exit_code = 17


class ImageError(EffdeployError):
    """An image folder or file that cannot be used."""

    exit_code = 18


class StorageError(EffdeployError):
    """The file system refused: no space, no permission, or something in the way."""

    exit_code = 19


class DownloadError(EffdeployError):
    """Weights that a server or the Hub did not give, or gave otherwise than pinned."""

    exit_code = 20


class GateError(EffdeployError):
    """A gate that the user set with --fail-if fired."""

    exit_code = 21


class TuningError(EffdeployError):
    """No schedule that was measured does what ``tune`` was asked for."""

    exit_code = 22


class LintError(EffdeployError):
    """An ONNX file breaks rules of what a runtime takes; ``record`` (``LintRecord``) holds all that was found."""

    exit_code = 23
    record: object = None


class BudgetError(EffdeployError):
    """No choice of modules kept in higher precision meets what ``--budget`` asks; the best reachable is named."""

    exit_code = 24


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? known: a, b, x"`` for an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(names)
    return f"did you mean {near[0]!r}? {listing}" if near else listing
