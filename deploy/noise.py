"""How sure a latency is: intervals of medians, and what the machine itself did while it was measured.

Calls of one turn share what the machine did meanwhile, so they are no independent samples: an interval that takes them
for such is far too narrow. Rounds stand for repeats; whole rounds are drawn again (bootstrap of clusters), in blocks of
neighbours where there are many, since a disturbance often outlasts a round.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.records import MachineNoise

DRAWS = 1000
MOST_BLOCKS, MOST_VALUES = 200, 50
CONFIDENCE = (2.5, 97.5)  # percentiles of the drawn medians: 95 %
FEWEST = 6  # rounds below which no 95 % interval of a median exists
WORK_BYTES = 1 << 20
_BUSY = bytes(WORK_BYTES)

Rounds = Sequence[Sequence[float]] | Sequence[NDArray[np.float64]] | NDArray[np.float64]


def interval_of_median(rounds: Rounds, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of the median over all values, by drawing whole rounds; ``None`` below ``FEWEST``.

    Args:
        rounds: The values of each round, in order of time.
        seed: Of the draws; the same values give the same interval.
    """
    if len(rounds) < FEWEST:
        return None
    values = _blocks(rounds)
    draws = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    medians = np.array([np.median(values[chosen]) for chosen in draws])
    low, high = np.percentile(medians, CONFIDENCE)
    return float(low), float(high)


def _blocks(rounds: Rounds) -> NDArray[np.float64]:
    """Join neighbours to at most ``MOST_BLOCKS``, and keep of each block as many values, at evenly spaced ranks."""
    size = -(-len(rounds) // MOST_BLOCKS)
    joined = [np.concatenate(rounds[i : i + size]) for i in range(0, len(rounds), size)]
    keep = min(MOST_VALUES, min(len(block) for block in joined))
    ranks = (np.arange(keep) + 0.5) / keep
    return np.stack([np.quantile(block, ranks) if len(block) > keep else np.sort(block) for block in joined])


@dataclass(kw_only=True, slots=True)
class MachineWatch:
    """Does the same work once a round, which nothing but the machine can make slower, and counts what others took.

    Attributes:
        clock: Wall time in nanoseconds.
    """

    clock: Callable[[], int]
    times: list[int] = field(default_factory=list)
    before: tuple[int, int] | None = field(default_factory=lambda: _stolen())
    load: float | None = field(default_factory=lambda: _load())

    def work(self) -> None:
        """Hash a mebibyte: arithmetic on one thread, in the caches, without a lock of Python's."""
        start = self.clock()
        hashlib.sha256(_BUSY).digest()
        self.times.append(self.clock() - start)

    def record(self) -> MachineNoise | None:
        """Return what was seen; ``None`` where the clock saw no time pass."""
        times = np.asarray(self.times, np.float64)
        if not len(times) or not times.min() > 0:
            return None
        after = _stolen()
        total = after[1] - self.before[1] if after and self.before else 0
        return MachineNoise(
            work="SHA-256 of 1 MiB on one thread, once a round",
            runs=len(times),
            p50=float(np.median(times)) / 1e6,
            cov=float(times.std() / times.mean()),
            slowest=float(times.max() / np.median(times)),
            stolen=(after[0] - self.before[0]) / total if after and self.before and total > 0 else None,
            load_before=self.load,
            load_after=_load(),
        )


def _load() -> float | None:
    """Return the processes that ran or waited over the last minute; ``None`` where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _stolen() -> tuple[int, int] | None:
    """Return ticks that a hypervisor gave to others, and all ticks, since the start (Linux ``/proc/stat``)."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as stream:
            ticks = [int(word) for word in stream.readline().split()[1:]]
    except (OSError, ValueError):
        return None
    return (ticks[7], sum(ticks[:8])) if len(ticks) >= 8 else None
