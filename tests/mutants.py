"""Broken files, drawn from whole ones by a seed: what disks, networks and people do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
VALUES: tuple[Any, ...] = (
    None, True, "", " ", "..", "../../../etc/passwd", "\x00", "é" * 300, "x" * 20_000, 0, -1, 1e308, -0.5, 2**63,
    float("nan"), float("inf"), [], {}, [[]], {"": None}, [0] * 1000,
)  # fmt: skip


def mutate(data: bytes, seed: int) -> bytes:
    """Change a file in one to four places."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        data = draw.choice(CHANGES)(data, draw)
    return data


def _flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 8, 64)) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _drop(data: bytes, draw: random.Random) -> bytes:
    start = _near_a_header(data, draw)
    return data[:start] + data[start + draw.randint(1, 64) :]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    start = _near_a_header(data, draw)
    size = draw.randint(1, 200)
    return data[: start + size] + data[start : start + size] * draw.randint(1, 5) + data[start + size :]


def _number(data: bytes, draw: random.Random) -> bytes:
    start, size = _near_a_header(data, draw), draw.choice((1, 2, 4, 8))
    value = (draw.choice(NUMBERS) & (256**size - 1)).to_bytes(size, draw.choice(("little", "big")))
    return data[:start] + value + data[start + size :]


def _noise(data: bytes, draw: random.Random) -> bytes:
    start = _near_a_header(data, draw)
    noise = draw.randbytes(draw.randint(1, 64))
    return data[:start] + noise + data[start + len(noise) :]


def _near_a_header(data: bytes, draw: random.Random) -> int:
    """Choose a place: structure is at the ends of a file, and most of the rest is numbers like any others."""
    if not data:
        return 0
    near = min(len(data), 2000)
    first, last = draw.randrange(near), len(data) - 1 - draw.randrange(near)
    return draw.choice((first, last, draw.randrange(len(data))))


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _drop, _repeat, _number, _noise)


def mutate_json(data: bytes, seed: int) -> bytes:
    """Change a JSON document in one to three places and keep it JSON, or, once in four times, as any other file."""
    draw = random.Random(seed)
    if draw.random() < 0.25:
        return mutate(data, seed)
    document = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        _replace(document, draw)
    return json.dumps(document).encode()


def _replace(document: Any, draw: random.Random) -> None:
    """Walk down to somewhere and delete, swap or replace what is there."""
    while True:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(document[key], dict | list) and document[key] and draw.random() < 0.85:
            document = document[key]
            continue
        if (how := draw.random()) < 0.2:
            del document[key]
        elif how < 0.3:
            document[key] = document[draw.choice(keys)]
        else:
            document[key] = draw.choice(VALUES)
        return
