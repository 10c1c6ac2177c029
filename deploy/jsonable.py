"""Dataclasses to plain JSON data and back, strictly: a field of another type or name is an error that says where."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from deploy.errors import BundleError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Turn a record into plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)  # JSON has no NaN or infinity; from_json reads the strings back
    return value


def from_json(cls: type[T], data: Any) -> T:
    """Rebuild a record from ``to_json`` data.

    Raises:
        BundleError: the data does not have the record's fields and types.
    """
    try:
        return typing.cast(T, _decode(cls, data))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"cannot read {cls.__name__} from JSON: {error}",
            hint="the file was written by another version or changed by hand; export again",
        ) from error


def _decode(kind: Any, data: Any) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_record(kind, data)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(data)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), data)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), data)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise TypeError(f"expected an object, got {type(data).__name__}")
        return {k: _decode(typing.get_args(kind)[1], v) for k, v in data.items()}
    return _decode_scalar(kind, data)


def _decode_record(kind: type, data: Any) -> Any:
    if not isinstance(data, dict):
        raise TypeError(f"{kind.__name__}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    if extra := sorted(set(data) - known):
        raise ValueError(f"{kind.__name__}: unknown fields {extra}")
    return kind(**{k: _decode(hints[k], v) for k, v in data.items()})


def _decode_union(options: tuple[Any, ...], data: Any) -> Any:
    if data is None and type(None) in options:
        return None
    rest = [o for o in options if o is not type(None)]
    if len(rest) == 1:
        return _decode(rest[0], data)
    if not isinstance(data, tuple(rest)) or isinstance(data, bool):
        raise TypeError(f"expected one of {rest}, got {type(data).__name__}")
    return data


def _decode_tuple(args: tuple[Any, ...], data: Any) -> Any:
    if not isinstance(data, list):
        raise TypeError(f"expected a list, got {type(data).__name__}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], v) for v in data)
    if len(args) != len(data):
        raise TypeError(f"expected {len(args)} values, got {len(data)}")
    return tuple(_decode(a, v) for a, v in zip(args, data, strict=True))


def _decode_scalar(kind: Any, data: Any) -> Any:
    if kind is Any:
        return data
    if kind is float and isinstance(data, (int, float, str)) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise TypeError(f"expected {kind.__name__}, got {type(data).__name__}")
    return data
