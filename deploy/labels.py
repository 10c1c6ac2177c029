"""Names of classes: a text file with one per line, in the order of the training."""

from __future__ import annotations

from pathlib import Path

from deploy.errors import ImageError

_HINT = "UTF-8 text, a line for each class in the order of the training"


def read_labels(path: Path, classes: int) -> tuple[str, ...]:
    """Read class names; empty lines do not count.

    Raises:
        ImageError: the file cannot be read, or has another number of names than the network has classes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"labels {path} cannot be read: {error}", hint=_HINT) from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != classes:
        raise ImageError(f"labels {path}: got {len(names)} names, the network has {classes} classes", hint=_HINT)
    return names
