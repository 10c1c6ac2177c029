"""Gates: ``latency>5%`` on the difference of two bundles.

An expression is a metric, one of ``> >= < <=``, and a limit:

* ``latency>5%``: the metric of B is more than 5 % above that of A;
* ``ops>+10``: with a sign, the difference B - A, here more than 10 nodes;
* ``error>0.01``: without one, the value of B alone.

Times take ``ms`` and ``s``, sizes ``B``, ``kB``, ``MB`` and ``GB``. A gate fires when the limit is crossed. For
latencies it fires, or passes, only when the noise cannot change the answer; in between it is undecided. NaN fires
every gate. A gate on what was not measured is an error, never a pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping

from deploy import units
from deploy.errors import BenchmarkError, RecipeError
from deploy.records import record

# metric -> kind of unit; deploy.comparing reads them
METRICS: Mapping[str, str] = {
    "latency": "ms", "p99": "ms", "throughput": "number", "memory": "bytes", "size": "bytes", "error": "number",
    "cosine": "cosine", "top1": "share", "drift": "number", "ops": "count", "casts": "count", "kernels": "count",
    "parameters": "count", "macs": "count",
}  # fmt: skip
_SCALES: Mapping[str, Mapping[str, float]] = {
    "ms": {"": 1, "ms": 1, "s": 1e3},
    "bytes": {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9},
}
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_FORM = re.compile(
    r"(?P<metric>[a-zA-Z0-9_]+) *(?P<operator>[<>]=?) *(?P<sign>[+-]?)"
    r"(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?) *(?P<unit>%|[a-zA-Z]*)"
)
_TEXT: Mapping[str, Callable[[float], str]] = {
    "ms": units.milliseconds, "bytes": lambda v: units.size(round(v)), "count": lambda v: units.count(round(v)),
    "cosine": units.cosine, "share": units.percent, "number": units.number,
}  # fmt: skip


@record
class Metric:
    """A figure of both bundles.

    ``noise`` is a share of the value: a change of that size may be chance. ``ratio`` is B / A where both were measured
    against each other. ``obstacle`` says why A and B cannot be compared.
    """

    name: str
    meaning: str
    kind: str
    a: float | None
    b: float | None
    noise: float = 0.0
    ratio: float | None = None
    obstacle: str = ""

    @property
    def change(self) -> float | None:
        """Relative change from A to B, or ``None`` where there is none to give."""
        if self.obstacle or self.a is None or self.b is None:
            return None
        if self.ratio is not None:
            return self.ratio - 1
        if self.a == 0:
            return 0.0 if self.b == 0 else math.copysign(math.inf, self.b)
        return (self.b - self.a) / abs(self.a)

    def text(self, value: float | None) -> str:
        """Format a value of this metric with its unit."""
        if value is None:
            return units.NOT_MEASURED
        return _TEXT[self.kind](value) if math.isfinite(value) else units.number(value)

    def change_text(self) -> str:
        """Format the change with its noise: ``"+5.2 % (noise 1.1 %)"``."""
        change = self.change
        if change is None:
            return "-"
        noise = f" (noise {100 * self.noise:.1f} %)" if self.noise else ""
        if not math.isfinite(change):
            return units.number(change)
        rounded = round(100 * change, 1) + 0.0  # no -0.0
        return f"{rounded:+.1f} %{noise}" if rounded else f"0.0 %{noise}"

    def remark(self) -> str:
        """Say what the metric is, or why it cannot be compared."""
        return f"not comparable: {self.obstacle}" if self.obstacle else self.meaning


@record
class Expression:
    """A parsed gate. ``mode`` is "relative", "difference" or "value"; ``limit`` a share or in the metric's unit."""

    text: str
    metric: str
    operator: str
    mode: str
    limit: float


@record
class Gate:
    """A judged gate: ``state`` is "passed", "fired" or "undecided"."""

    expression: str
    state: str
    statement: str


def parse_gate(text: str) -> Expression:
    """Read ``latency>5%``.

    Raises:
        RecipeError: not of the form, or no such metric or unit; the hint lists the metrics.
    """
    hint = f"metrics: {', '.join(METRICS)}; for example --fail-if 'latency>5%', 'ops>+10' or 'error>0.01'"
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"--fail-if: got {text!r}, expected METRIC, one of > >= < <=, and a number", hint=hint)
    name, sign, unit = match["metric"], match["sign"], match["unit"]
    if name not in METRICS:
        raise RecipeError(f"--fail-if: no metric {name!r} in {text!r}", hint=hint)
    scales = _SCALES.get(METRICS[name], {"": 1})
    if unit != "%" and unit not in scales:
        known = ", ".join(["%", *filter(None, scales)])
        raise RecipeError(f"--fail-if: {name} has no unit {unit!r} in {text!r}, expected {known} or none", hint=hint)
    number = float(match["number"]) * (-1 if sign == "-" else 1)
    if unit == "%":
        return Expression(text=text, metric=name, operator=match["operator"], mode="relative", limit=number / 100)
    mode = "difference" if sign else "value"
    return Expression(text=text, metric=name, operator=match["operator"], mode=mode, limit=number * scales[unit])


def check_gate(expression: Expression, metric: Metric) -> Gate:
    """Judge one gate.

    Raises:
        BenchmarkError: the metric was not measured, or the bundles cannot be compared in it.
    """
    value, noise = _value(expression, metric)
    what = f"{metric.name} is {metric.text(metric.b)}"
    if expression.mode != "value":
        what = f"{metric.name} went from {metric.text(metric.a)} to {metric.text(metric.b)}, {metric.change_text()}"
    if math.isnan(value):
        return Gate(expression=expression.text, state="fired", statement=f"{what}: NaN fires every gate")
    crossed = _OPERATORS[expression.operator]
    answers = {crossed(value + side, expression.limit) for side in (-noise, 0.0, noise)}
    if len(answers) == 2:
        statement = f"{what}: the limit lies inside the noise; --measure times both engines against each other, longer"
        return Gate(expression=expression.text, state="undecided", statement=statement)
    return Gate(expression=expression.text, state="fired" if answers.pop() else "passed", statement=what)


def _value(expression: Expression, metric: Metric) -> tuple[float, float]:
    """Return the value that is held against the limit, and its noise in the same unit."""
    if metric.b is None or (expression.mode != "value" and (metric.a is None or metric.obstacle)):
        which = " and ".join(name for name, value in (("A", metric.a), ("B", metric.b)) if value is None)
        reason = metric.obstacle or f"{which} has none"
        latency = metric.name in ("latency", "p99", "throughput")
        raise BenchmarkError(
            f"--fail-if {expression.text!r}: {metric.name} of these bundles cannot be judged: {reason}",
            hint="effdeploy diff A B --measure times both engines here" if latency else "export without --until",
        )
    change = metric.change
    if expression.mode == "value" or change is None:
        return metric.b, metric.noise * abs(metric.b)
    if expression.mode == "relative":
        return (metric.b if math.isnan(metric.b) else change), metric.noise
    before = metric.a or 0.0
    difference = change * before if metric.ratio is not None else metric.b - before
    return difference, metric.noise * abs(before)
