"""Predicates that most rules share: an operator, an attribute, a type, a rank, a constant, a limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.linting.checks.base import Check, Hit, has, hit, sites
from deploy.linting.view import Site, View, type_name


def present(view: View, rule: Any) -> Iterator[Hit]:
    """The operator is there."""
    yield from (hit(site) for site in sites(view, rule))


def together(view: View, rule: Any) -> Iterator[Hit]:
    """All of the rule's operators are there; the first node of the first one stands for them."""
    found = {site.node.op_type: site for site in reversed(list(sites(view, rule)))}
    if rule.operators and set(rule.operators) <= set(found):
        yield hit(found[rule.operators[0]])


def attribute(view: View, rule: Any) -> Iterator[Hit]:
    """An attribute (with its default) has a refused value, or one that is not allowed; of lists, any element.

    ``types`` limits it to nodes whose first input has one of these types, ``indices`` to such a second input.
    """
    given = rule.given
    allowed, refused = given.get("allowed"), given.get("refused", ())
    for site in sites(view, rule):
        first, second = (type_name(view.type_of(site.node, place)) for place in (0, 1))
        if first not in given.get("types", (first,)) or second != given.get("indices", second):
            continue
        value = view.attribute(site.node, given["name"])
        values = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        wrong = [v for v in values if (allowed is not None and v not in allowed) or v in refused]
        if wrong:
            yield hit(site, wrong[0])


def attribute_given(view: View, rule: Any) -> Iterator[Hit]:
    """One of the attributes ``names`` is written down."""
    for site in sites(view, rule):
        found = [held.name for held in site.node.attribute if held.name in rule.given["names"]]
        if found:
            yield hit(site, found[0])


def computed_input(view: View, rule: Any) -> Iterator[Hit]:
    """An input that must be a constant depends on the graph's inputs, or, unless ``folded``, on any operator."""
    for site in sites(view, rule):
        for name in (site.node.input[place] for place in rule.given["inputs"] if has(site, place)):
            known = name in view.constants if rule.given.get("folded", True) else view.value(name) is not None
            if not known:
                yield hit(site, name)


def input_left_out(view: View, rule: Any) -> Iterator[Hit]:
    """An optional input is not given."""
    yield from (hit(site) for site in sites(view, rule) if not has(site, rule.given["input"]))


def input_value(view: View, rule: Any) -> Iterator[Hit]:
    """A constant input holds a value above ``most``, or one of ``refused``."""
    most, refused = rule.given.get("most"), rule.given.get("refused", ())
    for site in sites(view, rule):
        values = view.value(site.node.input[rule.given["input"]]) if has(site, rule.given["input"]) else None
        if values is None or not values.size:
            continue
        worst = values.reshape(-1).max().item()
        if (most is not None and worst > most) or worst in refused:
            yield hit(site, worst)


def outputs_beyond(view: View, rule: Any) -> Iterator[Hit]:
    """The node makes more than its first ``most`` outputs, whether they are read or not."""
    for site in sites(view, rule):
        extra = [name for name in site.node.output[rule.given["most"] :] if name]
        if extra:
            yield hit(site, ", ".join(extra))


def input_type(view: View, rule: Any) -> Iterator[Hit]:
    """One of ``inputs`` (all, where none is named) has a refused element type."""
    for site in sites(view, rule):
        for place in rule.given.get("inputs", range(len(site.node.input))):
            if (name := type_name(view.type_of(site.node, place))) in rule.given["refused"]:
                yield hit(site, name)
                break


def unequal_types(view: View, rule: Any) -> Iterator[Hit]:
    """``inputs`` have different element types, where the operator's schema would allow it; ``except`` is let be."""
    left_out = rule.given.get("except", ())
    for site in sites(view, rule):
        known = [type_name(t) for place in rule.given["inputs"] if (t := view.type_of(site.node, place))]
        if len({*known} - {*left_out}) > 1:
            yield hit(site, " and ".join(dict.fromkeys(known)))


def rank(view: View, rule: Any) -> Iterator[Hit]:
    """The rank of an input is known and not among ``allowed``."""
    for site in sites(view, rule):
        shape = view.shape_of(site.node, rule.given["input"])
        if shape is not None and len(shape) not in rule.given["allowed"]:
            yield hit(site, len(shape))


def early_axis(view: View, rule: Any) -> Iterator[Hit]:
    """The axis is not among the last ``last`` ones."""
    for site in sites(view, rule):
        shape, axis = view.shape_of(site.node, 0), view.attribute(site.node, "axis", -1)
        if shape is not None and 0 <= axis % max(len(shape), 1) < len(shape) - rule.given["last"]:
            yield hit(site, f"axis {axis} of rank {len(shape)}")


def dynamic_input(view: View, rule: Any) -> Iterator[Hit]:
    """The shape of an input is not fixed."""
    for site in sites(view, rule):
        shape = view.shape_of(site.node, rule.given["input"])
        if shape is not None and any(not isinstance(axis, int) for axis in shape):
            yield hit(site, _shape(shape))


def same_input(view: View, rule: Any) -> Iterator[Hit]:
    """The same tensor is read at all of ``inputs``."""
    for site in sites(view, rule):
        if all(has(site, place) for place in rule.given["inputs"]) and _shared(site, rule.given["inputs"]):
            yield hit(site, site.node.input[rule.given["inputs"][0]])


def _shared(site: Site, places: tuple[int, ...]) -> bool:
    return len({site.node.input[place] for place in places}) == 1


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ",".join("?" if axis is None else str(axis) for axis in shape) + "]"


GENERIC: dict[str, Check] = {
    check.__name__: check
    for check in (
        present, together, attribute, attribute_given, computed_input, input_left_out, input_value, outputs_beyond,
        input_type, unequal_types, rank, early_axis, dynamic_input, same_input,
    )
}  # fmt: skip
