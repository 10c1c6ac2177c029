"""Charts as inline SVG, drawn by hand: no library, no script, the same bytes for the same figures.

Positions along x are percentages and everything else is in pixels, without a viewBox: a chart is as wide as its column
and its text stays readable on a phone. Colours are CSS classes, so that dark mode and print follow the page. Each chart
has a title and a description for screen readers, and each mark stands beside its figure in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup

MOST_BARS = 12  # what a chart shows one by one; the rest is summed
_ROW, _BAR, _DOT = 40, 10, 3.2
_EDGE = 2.0  # per cent left free at both ends, so that a mark on the border is seen whole
_LABEL_START, _LABEL_END = 11, 22  # a phone has room for this many characters
_DOTS_PER_CHART = 900
_GUTTER, _HEIGHT = 9.0, 240  # of a scatter: room for the labels of its upright axis, and its height


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A labelled length; ``before`` draws a second, paler bar above it."""

    label: str
    value: float
    text: str
    before: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A labelled value on a logarithmic axis with the limit it was held against; ``before`` draws a paler dot."""

    label: str
    value: float
    text: str
    limit: float | None = None
    bad: bool = False
    before: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A numbered run on two axes; ``front``: no other run is better in both."""

    number: int
    x: float
    y: float
    front: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """All samples of one candidate, with the marks that summarise them."""

    label: str
    samples: tuple[float, ...]
    text: str
    p50: float
    p99: float


def bars(slug: str, title: str, sentence: str, rows: Sequence[Bar]) -> Markup:
    """Draw horizontal bars from zero."""
    top = max((v for r in rows for v in (r.value, r.before or 0.0) if math.isfinite(v)), default=0.0) or 1.0
    body = []
    for index, row in enumerate(rows):
        y = index * _ROW
        body.append(_heading(y, row.label, row.text))
        body.append(_track(y + 20, _BAR))
        if row.before is not None:
            body.append(_bar("bar-before", y + 20, row.before / top))
        if math.isfinite(row.value):
            body.append(_bar("bar", y + 20, row.value / top))
    return _svg(slug, title, sentence, len(rows) * _ROW, body)


def log_points(slug: str, title: str, sentence: str, rows: Sequence[Point]) -> Markup:
    """Draw values on a logarithmic axis, each with its limit; what is zero or not finite has words but no mark."""
    shown = [v for r in rows for v in (r.value, r.limit, r.before) if _has_a_place(v)]
    low = math.floor(math.log10(min(shown))) if shown else -1
    high = max(math.ceil(math.log10(max(shown))) if shown else 0, low + 1)
    height = len(rows) * _ROW

    def x(value: float) -> float:
        return _EDGE + (100 - 2 * _EDGE) * (math.log10(value) - low) / (high - low)

    step = max(1, math.ceil((high - low) / 5))
    body = [_axis([(x(10.0**p), f"1e{p}" if p else "1") for p in range(low, high + 1, step)], height)]
    for index, row in enumerate(rows):
        y = index * _ROW
        body.append(_heading(y, row.label, row.text, bad=row.bad))
        body.append(_track(y + 20, _BAR))
        if row.limit is not None and row.limit > 0:
            over = Markup('<rect class="beyond" x="{:.2f}%" y="{}" width="{:.2f}%" height="10"/>')
            body.append(over.format(x(row.limit), y + 20, 100 - x(row.limit)))
            body.append(_tick("limit", x(row.limit), y + 18, y + 34))
        for kind, value in (("dot-before", row.before), ("dot-bad" if row.bad else "dot", row.value)):
            if _has_a_place(value):
                body.append(Markup('<circle class="{}" cx="{:.2f}%" cy="{}" r="5.5"/>').format(kind, x(value), y + 25))
    return _svg(slug, title, sentence, height + 22, body)


def _has_a_place(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic axis has a place for a value."""
    return value is not None and math.isfinite(value) and value > 0


def scatter(slug: str, title: str, sentence: str, spots: Sequence[Spot], unit: str) -> Markup:
    """Draw numbered runs: ``x`` linear from zero, ``y`` logarithmic; those that no other beats in both stand out."""
    high = max(spot.x for spot in spots) * 1.08 or 1.0
    logs = [math.log10(spot.y) for spot in spots]
    low, top = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)

    def x(value: float) -> float:
        return _GUTTER + (100 - _GUTTER - _EDGE) * value / high

    def y(power: float) -> float:
        return 12 + (_HEIGHT - 24) * (top - power) / (top - low)

    step = max(1, math.ceil((top - low) / 5))
    body = [_axis([(x(t), f"{t:g} {unit}") for t in ticks(0.0, high)], _HEIGHT)]
    for mark_at in range(low, top + 1, step):
        line = Markup('<line class="grid" x1="{:.2f}%" x2="100%" y1="{:.1f}" y2="{:.1f}"/>')
        body.append(line.format(_GUTTER, y(mark_at), y(mark_at)))
        label = Markup('<text class="axis" x="0" y="{:.1f}">{}</text>')
        body.append(label.format(y(mark_at) + 4, f"1e{mark_at}" if mark_at else "1"))
    for spot, power in sorted(zip(spots, logs, strict=True), key=lambda pair: pair[0].front):
        kind = "spot-front" if spot.front else "spot"
        mark = Markup(
            '<circle class="{}" cx="{:.2f}%" cy="{:.1f}" r="11"/>'
            '<text class="{}-number" x="{:.2f}%" y="{:.1f}" text-anchor="middle">{}</text>'
        )
        body.append(mark.format(kind, x(spot.x), y(power), kind, x(spot.x), y(power) + 4, spot.number))
    return _svg(slug, title, sentence, _HEIGHT + 22, body)


def strips(slug: str, title: str, sentence: str, rows: Sequence[Strip], unit: str) -> Markup:
    """Draw every sample as a dot (a long series by evenly spaced ranks), with ticks at p50 and p99.

    The axis ends a little above the largest p99, so that one hiccup does not squeeze everything else; what lies
    beyond is counted in words.
    """
    values = [v for r in rows for v in r.samples if math.isfinite(v)]
    if not values:
        return Markup("")
    low = min(values)
    tails = [r.p99 for r in rows if math.isfinite(r.p99)]
    high = min(max(values), low + 1.15 * (max(tails) - low)) if tails else max(values)
    high = high if high > low else low + (abs(low) * 0.05 or 1.0)

    def x(value: float) -> float:
        return _EDGE + (100 - 2 * _EDGE) * (value - low) / (high - low)

    pitch, body = 74, []
    height = len(rows) * pitch
    body.append(_axis([(x(t), f"{t:g} {unit}") for t in ticks(low, high)], height))
    for index, row in enumerate(rows):
        body += _strip(row, index * pitch, x, high, _DOTS_PER_CHART // len(rows))
    return _svg(slug, title, sentence, height + 22, body)


def _strip(row: Strip, y: int, x: Callable[[float], float], high: float, most: int) -> list[Markup]:
    finite = sorted(v for v in row.samples if math.isfinite(v))
    beyond = sum(v > high for v in finite)
    text = f"{row.text}; {beyond} beyond the axis" if beyond else row.text
    # Label and figures on lines of their own: side by side they would run into each other on a phone.
    body = [_heading(y, row.label, ""), _words(y + 30, text), _track(y + 36, 28)]
    dots = Markup("").join(
        Markup('<circle cx="{:.1f}%" cy="{:.1f}" r="{}"/>').format(x(v), y + 50 + 18 * ((i * 0.618034) % 1 - 0.5), _DOT)
        for i, v in enumerate(thin(finite, most))
        if v <= high
    )
    body.append(Markup('<g class="dots">{}</g>').format(dots))
    for kind, value in (("p50", row.p50), ("p99", row.p99)):
        if math.isfinite(value) and value <= high:
            body.append(_tick(kind, x(value), y + 34, y + 66))
    return body


def thin(ordered: Sequence[float], most: int) -> list[float]:
    """Return at most ``most`` values at evenly spaced ranks, first and last included."""
    if len(ordered) <= most:
        return list(ordered)
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers within a range."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _svg(slug: str, title: str, sentence: str, height: int, body: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" role="img" aria-labelledby="{0}-title {0}-desc" width="100%" height="{1}">'
        '<title id="{0}-title">{2}</title><desc id="{0}-desc">{3}</desc>{4}</svg>'
    ).format(slug, height, title, sentence, Markup("").join(body))


def _heading(y: int, label: str, text: str, *, bad: bool = False) -> Markup:
    """Put the label at the left end and the figure at the right end of the line above a mark."""
    fits = len(label) <= _LABEL_START + _LABEL_END + 1
    short = label if fits else f"{label[:_LABEL_START]}…{label[-_LABEL_END:]}"
    return Markup(
        '<text class="label" x="0" y="{0}"><title>{1}</title>{2}</text>'
        '<text class="{3}" x="100%" y="{0}" text-anchor="end">{4}</text>'
    ).format(y + 14, label, short, "value bad" if bad else "value", text)


def _words(y: int, text: str) -> Markup:
    return Markup('<text class="value" x="0" y="{}">{}</text>').format(y, text)


def _track(y: int, height: int) -> Markup:
    return Markup('<rect class="track" x="0" y="{}" width="100%" height="{}" rx="3"/>').format(y, height)


def _bar(kind: str, y: int, share: float) -> Markup:
    mark = Markup('<rect class="{}" x="0" y="{}" width="{:.2f}%" height="{}" rx="3"/>')
    return mark.format(kind, y, 100 * share, _BAR)


def _tick(kind: str, x: float, top: int, bottom: int) -> Markup:
    return Markup('<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="{2}" y2="{3}"/>').format(kind, x, top, bottom)


def _axis(marks: Sequence[tuple[float, str]], height: int) -> Markup:
    label = Markup('<text class="axis" x="{:.2f}%" y="{}" text-anchor="{}">{}</text>')
    parts = []
    for x, text in marks:
        anchor = "start" if x < 8 else "end" if x > 92 else "middle"
        grid = _tick("grid", x, 0, height) if anchor == "middle" else Markup("")  # labels stand at the edges
        parts += [grid, label.format(x, height + 15, anchor, text)]
    return Markup("").join(parts)
