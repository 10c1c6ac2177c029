"""Numbers as people read them: three significant digits, always with a unit; shared by the terminal and the reports."""

from __future__ import annotations

import math
import re
from typing import Any

NOT_MEASURED = "not measured"


def number(value: float | None, digits: int = 3) -> str:
    """Format a figure: ``0.00123``, ``1.50``, ``1,234``, ``4.10e-7``; never hides NaN, infinity or a missing value."""
    if value is None:
        return NOT_MEASURED
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -3 or exponent >= 6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    if exponent >= digits:
        return f"{value:,.0f}"
    return f"{rounded:.{digits - 1 - exponent}f}"


def given(value: float) -> str:
    """Format a number that a person wrote, a limit for example, as it was written: ``0.02``, ``0.99995``, ``1e-04``."""
    return f"{value:.12g}"


def count(value: int) -> str:
    """Format a whole number with thousands separators: ``11,915,176``."""
    return f"{value:,}"


def millions(value: int) -> str:
    """Format a parameter count: ``11.9 M``."""
    return f"{number(value / 1e6)} M" if value else NOT_MEASURED


def giga(value: int) -> str:
    """Format multiply-adds: ``1.82 G``."""
    return f"{number(value / 1e9)} G" if value else NOT_MEASURED


def milliseconds(value: float | None) -> str:
    """Format a time that is given in milliseconds: ``8.51 ms``."""
    return _with_unit(value, "ms")


def seconds(value: float | None) -> str:
    """Format a time that is given in seconds: ``31.0 ms``, ``2.68 s``, ``2 min 5 s``."""
    if value is not None and math.isfinite(value) and value >= 60:
        whole = round(value)
        return f"{whole // 60} min {whole % 60} s"
    if value is not None and 0 < abs(value) < 1:
        return _with_unit(1000 * value, "ms")
    return _with_unit(value, "s")


def size(value: int) -> str:
    """Format bytes in decimal units: ``23.9 MB``, ``1.24 kB``, ``812 B``."""
    if value < 1000:
        return f"{value} B"
    return f"{number(value / 1e3)} kB" if value < 1_000_000 else f"{number(value / 1e6)} MB"


_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_BYTES |= {"k": 2**10, "m": 2**20, "g": 2**30, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(text: str | int) -> int:
    """Read a size: ``4GiB``, ``512 MB``, ``1048576``; bare ``K``, ``M`` and ``G`` are binary, as trtexec reads them.

    Raises:
        ValueError: not a whole number with one of these units.
    """
    found = re.fullmatch(r"(\d+)\s*([a-z]*)", str(text).strip().lower())
    if isinstance(text, bool) or found is None or found[2] not in _BYTES:
        raise ValueError(f"got {text!r}, expected bytes or a size such as 4GiB or 512MB")
    return int(found[1]) * _BYTES[found[2]]


def binary(value: int) -> str:
    """Format bytes in the largest binary unit that is exact: ``4 GiB``, ``1536 MiB``, ``1000 B``."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value and value % 2**power == 0:
            return f"{value >> power} {unit}"
    return f"{value} B"


def percent(share: float | None) -> str:
    """Format a share of one: ``100 %``, ``98.4 %``; what is below one never rounds up to 100 %."""
    if share is None or not math.isfinite(share):
        return number(share)
    text = f"{100 * share:.1f}"
    if text == "100.0":
        return "100 %" if share == 1 else "> 99.9 %"
    return f"{text} %"


def cosine(value: float | None) -> str:
    """Format a cosine with its nines and two more digits: ``0.99999959``; 1 means no difference in float64."""
    if value is None or not math.isfinite(value):
        return number(value)
    deficit = 1 - value
    if deficit < 1e-15:  # float64 cannot tell it from one; rounding may also end just above
        return "1"
    if deficit < 1e-9:
        return "> 0.999999999"
    return f"{value:.{max(1 - math.floor(math.log10(deficit)), 3)}f}"


def ratio(median: float, p10: float, p90: float) -> str:
    """Format a ratio with its spread: ``1.07x (1.05 to 1.09)``."""
    return f"{number(median)}x ({number(p10)} to {number(p90)})"


def interval(ends: tuple[float, float] | None) -> str:
    """Format an interval's ends: ``1.05 to 1.09``."""
    return NOT_MEASURED if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def size_of(value: Any) -> tuple[int, int]:
    """Read 224, "224", "384x512" (height x width) or [384, 512]."""
    parts = [str(v) for v in value] if isinstance(value, (list, tuple)) else str(value).lower().split("x")
    if len(parts) not in (1, 2) or not all(re.fullmatch(r"[1-9][0-9]{0,4}", p) for p in parts):
        raise ValueError(f"got {value!r}, expected a side such as 224 or HEIGHTxWIDTH such as 384x512")
    return int(parts[0]), int(parts[-1])


def _with_unit(value: float | None, unit: str) -> str:
    text = number(value)
    return text if value is None or not math.isfinite(value) else f"{text} {unit}"
