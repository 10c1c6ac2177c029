"""What predicates share: the hit that they yield, and the nodes that a rule is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from deploy.linting.view import DEFAULT_DOMAIN, Site, View
from deploy.records import record


@record
class Hit:
    """A place that breaks a rule. ``found`` goes into the rule's words."""

    name: str
    operator: str
    found: str = ""


Check = Callable[[View, Any], Iterator[Hit]]  # a view and the rule -> hits


def sites(view: View, rule: Any) -> Iterator[Site]:
    """Yield the nodes of the rule's operators, of all levels; of every operator where it names none."""
    for site in view.sites:
        if site.node.domain in DEFAULT_DOMAIN and (not rule.operators or site.node.op_type in rule.operators):
            yield site


def hit(site: Site, found: object = "") -> Hit:
    """Make a hit of a node."""
    return Hit(name=site.name, operator=site.node.op_type, found=str(found))


def has(site: Site, place: int) -> bool:
    """Whether a node has an input at a place; optional ones may be left out or empty."""
    return place < len(site.node.input) and bool(site.node.input[place])
