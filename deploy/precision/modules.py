"""Modules of a graph, read from its node names: ``blocks.3.mlp.fc1/MatMul`` lies in three of them, one in another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from deploy.graph.io import module_of

TOP = "(network)"  # the nodes that no module made


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A part of the network: its path, how deep it lies, and the names of those of its nodes that are looked at.

    ``whole``: every module below it is meant; else only what the module computes itself, such as a residual sum.
    """

    path: str
    depth: int
    nodes: frozenset[str]
    whole: bool = True

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path if self.whole else f"{self.path} (itself)"


def path_parts(path: str) -> tuple[str, ...]:
    """Split a path; a number belongs to the name before it: ``stages.0.blocks.1`` -> ``stages.0``, ``blocks.1``."""
    parts: list[str] = []
    for part in path.split(".") if path else ():
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return tuple(parts)


def children(nodes: Iterable[str], under: str = "") -> list[Module]:
    """Part nodes by the modules directly below one, in the order in which they come.

    What has only one child is that child: ``encoder`` with nothing but ``encoder.layers.0`` inside is never shown.

    Args:
        nodes: Node names, of the module ``under``.
        under: Module path; ``""`` for the network.
    """
    level, found = len(path_parts(under)), defaultdict[str, list[str]](list)
    for node in nodes:
        parts = path_parts(module_of(node))
        found[".".join(parts[: level + 1]) if len(parts) > level else under].append(node)
    if len(found) == 1 and (only := next(iter(found))) != under:
        deeper = children(found[only], only)
        return deeper if len(deeper) > 1 else [_module(only, found[only], whole=True)]
    return [_module(path, names, whole=path != under) for path, names in found.items()]


def leaves(nodes: Sequence[str]) -> list[Module]:
    """Part nodes by the innermost module that each lies in, in the order in which they come."""
    found = defaultdict[str, list[str]](list)
    for node in nodes:
        found[module_of(node)].append(node)
    return [_module(path, names, whole=True) for path, names in found.items()]


def splits(module: Module) -> bool:
    """Whether a module has others inside."""
    return module.whole and len(children(module.nodes, module.path if module.path != TOP else "")) > 1


def _module(path: str, nodes: Collection[str], *, whole: bool) -> Module:
    depth = max(1, len(path_parts(path)) + (0 if whole else 1))
    return Module(path=path or TOP, depth=depth, nodes=frozenset(nodes), whole=whole or not path)
