"""What ``--budget`` asks, and which of the measured choices is worth having."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy import units
from deploy.answers import Apart, BudgetPoint
from deploy.errors import RecipeError
from deploy.records import Precision

_LIMITS: Mapping[str, tuple[float, float]] = {"cosine": (0.0, 1.0), "top1": (0.0, 100.0), "matched": (0.0, 1.0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a network may lose against FP32; ``None``: not asked.

    ``cosine``: of the worst image, at least. ``top1``: percentage points of images with another best class, at most.
    ``matched``: share of the detections above 0.5 with a partner, at least.
    """

    cosine: float | None = None
    top1: float | None = None
    matched: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``cosine=0.999``, ``top1=0.1``, ``matched=0.99``, or several of them with commas.

        Raises:
            RecipeError: so not; the message says what is expected.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            limit = _LIMITS.get(name)
            try:
                number = float(value)
            except ValueError:
                number = float("nan")
            if not equals or limit is None or name in found or not limit[0] <= number <= limit[1]:
                raise RecipeError(
                    f"--budget: got {text!r}, expected cosine=0 to 1, top1=0 to 100 (points) or matched=0 to 1, "
                    "each once",
                    hint="--budget cosine=0.999, or --budget cosine=0.999,top1=0.1",
                )
            found[name] = number
        return cls(**found)

    def met_by(self, apart: Apart) -> bool:
        """Whether measured errors are within it; the float32 graph itself has none."""
        if apart.error == 0:
            return True
        points = None if apart.top1 is None else 100 * (1 - apart.top1)
        return (
            (self.cosine is None or apart.cosine >= self.cosine)
            and (self.top1 is None or (points is not None and points <= self.top1 + 1e-9))
            and (self.matched is None or (apart.matched is not None and apart.matched >= self.matched))
        )

    @staticmethod
    def refuse_precision(precision: Precision) -> None:
        """Refuse a precision that modules cannot be kept out of.

        Raises:
            RecipeError: so.
        """
        if not precision.quantised:
            raise RecipeError(
                f"--budget: got precision {precision.value}, expected int8 or fp8", hint="add --int8 or --fp8"
            )

    def refuse_unmeasured(self, apart: Apart) -> None:
        """Refuse a budget of what this network has not.

        Raises:
            RecipeError: so.
        """
        for name, value in (("top1", apart.top1), ("matched", apart.matched)):
            if getattr(self, name) is not None and value is None:
                what = "gives no class scores" if name == "top1" else "found no detection above 0.5 on these images"
                raise RecipeError(
                    f"--budget {name}: the network {what}: there is nothing to count",
                    hint="--budget cosine=0.999, or --images with photos that show what it was trained for",
                )

    def told(self, apart: Apart) -> str:
        """Say what was measured of what is asked."""
        texts = {
            "cosine": f"cosine {units.cosine(apart.cosine)}",
            "top1": f"{100 * (1 - (apart.top1 or 0)):.3g} points of {apart.images} images with another best class",
            "matched": f"{units.percent(apart.matched)} of detections matched",
        }
        return ", ".join(text for name, text in texts.items() if getattr(self, name) is not None)

    def reachable(self, best: Apart) -> str:
        """Write the tightest budget of this kind that was measured, as ``--budget`` takes it."""
        if self.cosine is not None:
            return f"cosine={math.floor(1e6 * best.cosine) / 1e6:.6f}"
        if self.top1 is not None and best.top1 is not None:
            return f"top1={math.ceil(1e4 * (1 - best.top1)) / 100:g}"
        return f"matched={math.floor(1e3 * (best.matched or 0)) / 1e3:g}"

    def __str__(self) -> str:
        names = ("cosine", "top1", "matched")
        return ",".join(f"{n}={units.given(getattr(self, n))}" for n in names if getattr(self, n) is not None)


def with_front(points: Sequence[BudgetPoint]) -> tuple[BudgetPoint, ...]:
    """Mark the choices that no other beats in both speed and error."""
    return tuple(dataclasses.replace(p, front=not any(_beats(o, p) for o in points)) for p in points)


def _beats(other: BudgetPoint, point: BudgetPoint) -> bool:
    """Whether another choice is as good in both and better in one; what was not timed goes by what it keeps."""
    if other.speedup is None or point.speedup is None:
        mine, theirs = (-float(point.kept), point.apart.error), (-float(other.kept), other.apart.error)
    else:
        mine, theirs = (point.speedup, point.apart.error), (other.speedup, other.apart.error)
    return theirs != mine and theirs[0] >= mine[0] and theirs[1] <= mine[1]


def advice(points: Sequence[BudgetPoint], low: str) -> str:
    """Say so where the 8-bit network is not the fastest of those that are exact enough, beyond the noise.

    Args:
        points: What was measured.
        low: The 8-bit precision, with which its choices' names begin.
    """
    timed = [p for p in points if p.speedup is not None]
    own = [p for p in timed if p.chosen] or [p for p in timed if p.name.startswith(low)]
    others = [p for p in timed if not p.name.startswith(low) and p.meets]
    if not own or not others:
        return ""
    best, mine = max(others, key=lambda p: p.speedup or 0), own[0]
    if (mine.p10 or 0) > (best.speedup or 0):
        return ""
    slower = (mine.speedup or 0) <= (best.speedup or 0)
    times = f"{units.milliseconds(mine.milliseconds)} and {best.name} {units.milliseconds(best.milliseconds)}"
    what = f"{mine.name} is {'slower than' if slower else 'not faster beyond the noise than'} {best.name} here"
    return f"{what} ({mine.name} takes {times}), with more error: --{best.name} is better on this machine"
