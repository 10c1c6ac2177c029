"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from deploy import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.5, "1.50"), (31.949, "31.9"), (9.999, "10.0"), (99.95, "100"), (1234.4, "1,234"),
        (0.00126, "0.00126"), (1.26e-6, "1.26e-6"), (-4.104e-7, "-4.10e-7"), (65504.0, "65,504"), (3.2e38, "3.20e38"),
        (math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "-infinite"), (None, "not measured"),
    ],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert units.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"), (1.0000000002, "1"), (0.9999983, "0.9999983"), (0.91, "0.910"), (1 - 1e-11, "> 0.999999999"),
        (-0.5, "-0.500"), (math.nan, "NaN"), (None, "not measured"),
    ],
)  # fmt: skip
def test_cosine_keeps_its_nines(value: float | None, text: str) -> None:
    assert units.cosine(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "100 %"), (0.99999, "> 99.9 %"), (0.984, "98.4 %"), (0.0, "0.0 %"), (math.nan, "NaN")]
)
def test_percent_never_rounds_up_to_all(value: float, text: str) -> None:
    assert units.percent(value) == text


@pytest.mark.parametrize(("value", "text"), [(812, "812 B"), (1240, "1.24 kB"), (23_911_002, "23.9 MB"), (0, "0 B")])
def test_sizes_are_decimal(value: int, text: str) -> None:
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.031, "31.0 ms"), (2.68, "2.68 s"), (125.2, "2 min 5 s"), (math.nan, "NaN"), (0.0, "0 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


def test_every_unit_is_there() -> None:
    assert units.milliseconds(31.94) == "31.9 ms"
    assert units.ratio(1.078, 1.051, 1.093) == "1.08x (1.05 to 1.09)"
    assert units.millions(11_915_176) == "11.9 M"
    assert units.giga(1_822_000_000) == "1.82 G"
    assert units.given(1e-4) == "0.0001"
    assert units.count(11_915_176) == "11,915,176"


@pytest.mark.parametrize(
    ("text", "value"),
    [("4GiB", 4 << 30), ("512 MB", 512_000_000), ("1G", 1 << 30), (1024, 1024), ("0", 0), ("12b", 12), ("1 KIB", 1024)],
)
def test_sizes_that_people_type(text, value):
    assert units.bytes_of(text) == value


@pytest.mark.parametrize("text", ["", "lots", "4TB", "-1", "1.5GiB", True, "4 Gi B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="expected bytes or a size such as 4GiB"):
        units.bytes_of(text)


@pytest.mark.parametrize(("value", "text"), [(4 << 30, "4 GiB"), (3 << 29, "1536 MiB"), (1000, "1000 B"), (0, "0 B")])
def test_exact_binary_sizes(value, text):
    assert units.binary(value) == text
    assert units.bytes_of(text) == value
