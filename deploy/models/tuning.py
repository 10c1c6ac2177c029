"""What a system tells ``effdeploy tune``: a choice a layer that trades speed for drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Options = Mapping[str, Any]
Size = tuple[int, int]
Schedule = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """A schedule: how many elements each layer takes away from those that are left.

    Attributes:
        what: Of a schedule, for people: "tokens merged by each block".
        option: The architecture option that takes a schedule as a list.
        start: ``(options, size) -> (elements before the first layer, layers)``.
        most: ``(options, left) -> the most that one layer may take of so many``.
        seeds: ``(options, size) -> schedules by name`` that are measured first, the table of latencies is made from
            them; the first one takes nothing away and is what the others are compared with.
        layer: Regular expression on the start of node names; its first group is the number of the layer.
        reschedule: ``(training form, schedule) -> a copy with this schedule`` that shares the weights.
        plain: The network whose layers take nothing, for people: "unmerged".
        taking: What taking elements away is called: "merging".
        schedule: ``(options, size) -> the schedule that the options ask for``.
    """

    what: str
    option: str
    start: Callable[[Options, Size], tuple[int, int]]
    most: Callable[[Options, int], int]
    seeds: Callable[[Options, Size], Mapping[str, Schedule]]
    layer: str
    reschedule: Callable[[nn.Module, Schedule], nn.Module]
    plain: str
    taking: str
    schedule: Callable[[Options, Size], Schedule]
