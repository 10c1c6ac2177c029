"""What a person asks for: a YAML recipe, merged with defaults and options into one validated ``Recipe``.

Precedence, lowest first: system default, YAML, the YAML's section for the chosen variant, command-line option,
``--set a.b=value``. Every mistake is reported at once, each with the place where it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
)  # fmt: skip

from deploy.errors import EffdeployError, RecipeError, SizeError, did_you_mean
from deploy.records import Batch, Precision, Target
from deploy.sections import (
    BatchField,
    BenchSection,
    EngineSection,
    ParitySection,
    PassesSection,
    PrecisionSection,
    PreprocessSection,
    QuantizationSection,
    Section,
    Size,
    ToleranceSection,
    TraceSection,
)

Keys = tuple[str, ...]
SCHEMA = "recipe.schema.json"


class Recipe(Section):
    """One resolved recipe: everything that decides what a run does."""

    system: str = Field(description="which model family, see `effdeploy list`")
    variant: str = Field(description="which size of it")
    size: Size = Field(description="input side, or HEIGHTxWIDTH")
    batch: BatchField = Field(default_factory=Batch, description="a number, or min:opt:max")
    precision: Precision = Precision.FP32
    weights: str = Field(
        "random", description="a file, hf://OWNER/REPO[/FILE][@REVISION], https://..., random[:SEED] or pretrained"
    )
    pretrained: str | None = Field(
        None, description="where the released weights are, with #sha256=...; --pretrained takes them"
    )
    classes: int = Field(1000, ge=1, le=1_000_000)
    labels: Path | None = Field(None, description="text file with a class name per line; they travel with the model")
    target: Target | None = Field(None, description="runtime family to lower the graph for; default: the backend's")
    options: Mapping[str, Any] = Field(default_factory=dict, description="architecture options of the system")
    trace: TraceSection = TraceSection()
    passes: PassesSection = PassesSection()
    typing: PrecisionSection = PrecisionSection()
    quantization: QuantizationSection = QuantizationSection()
    engine: EngineSection = EngineSection()
    parity: ParitySection = ParitySection()
    bench: BenchSection = BenchSection()
    preprocess: PreprocessSection = PreprocessSection()

    def to_data(self) -> dict[str, Any]:
        """Return plain JSON data that resolves to this recipe again."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def to_yaml(self) -> str:
        """Return YAML that resolves to this recipe again."""
        return yaml.safe_dump(self.to_data(), sort_keys=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One mistake in a recipe: its key, what is wrong, the error that it is when it comes alone, where it stands."""

    keys: Keys
    text: str
    kind: type[EffdeployError] = RecipeError
    place: str = ""

    def __str__(self) -> str:
        key = ".".join(self.keys)
        where = self.place if self.place in (f"--{key}", f"--set {key}") else f"{self.place}: {key}"
        return f"{where}: {self.text}"

    def order(self) -> tuple[bool, str, int]:
        """Sort by file and line; options of the command line come last."""
        file, _, line = self.place.rpartition(":")
        return (False, file, int(line)) if file and line.isdigit() else (True, "", 0)


# What only the rooms above know of merged settings (systems, backends); ``place`` is filled in here.
Check = Callable[[Mapping[str, Any]], Iterable[Mistake]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One source of settings. ``places`` says where each key was written, for error messages."""

    name: str
    data: Mapping[str, Any]
    places: Mapping[Keys, str] = field(default_factory=dict)
    variants: Mapping[str, Layer] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: in 1.1 an unquoted ``1:8:32`` is the number 4112, ``1e-4`` a text and ``no`` a boolean."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - declared so by its base class


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def configs_folder() -> Path:
    """Return the folder of the shipped recipes: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "export_configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "export_configs"


def _examples() -> str:
    return f"examples: {_shown(configs_folder())}"


def read_yaml(path: Path) -> Layer:
    """Read a recipe file and remember the line of every key.

    Raises:
        RecipeError: it cannot be read, is not YAML, is not a mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}", hint="effdeploy list shows the shipped recipes") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", hint=_examples()) from error
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise RecipeError(f"{path}: got {type(data).__name__}, expected keys and values", hint=_examples())
    places: dict[Keys, str] = {}
    duplicates: list[str] = []
    _collect_places(root, (), path.name, places, duplicates)
    if duplicates:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {d}" for d in duplicates), hint="remove one of each")
    return _split_variants(path, data, places)


def _split_variants(path: Path, data: dict[str, Any], places: dict[Keys, str]) -> Layer:
    sections = data.pop("variants", None) or {}
    if not isinstance(sections, dict) or not all(isinstance(v, (dict, type(None))) for v in sections.values()):
        raise RecipeError(f"{places[('variants',)]}: variants: expected a mapping of variant to settings")
    variants = {}
    for name, section in sections.items():
        prefix = ("variants", str(name))
        inner = {k[2:]: v for k, v in places.items() if k[:2] == prefix and len(k) > 2}
        variants[str(name)] = Layer(name=f"{path.name} ({name})", data=section or {}, places=inner)
    return Layer(name=path.name, data=data, places=places, variants=variants)


def _collect_places(
    node: yaml.Node | None, keys: Keys, file: str, places: dict[Keys, str], duplicates: list[str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            inner = (*keys, str(key_node.value))
            place = f"{file}:{key_node.start_mark.line + 1}"
            if inner in places:
                duplicates.append(f"{place}: {'.'.join(inner)}: given twice, first at {places[inner]}")
            places[inner] = place
            _collect_places(value, inner, file, places, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*keys, str(index))
            places[inner] = f"{file}:{value.start_mark.line + 1}"
            _collect_places(value, inner, file, places, duplicates)


def layer_of_data(name: str, data: Mapping[str, Any]) -> Layer:
    """Wrap settings that a program wrote, such as a manifest's recipe."""
    return Layer(name=name, data=data, places={(key,): name for key in data})


def layer_of_assignments(assignments: Iterable[str]) -> Layer:
    """Read ``--set a.b=value`` options; values are YAML scalars or lists.

    Raises:
        RecipeError: an assignment without ``=`` or with an empty key.
    """
    data: dict[str, Any] = {}
    places: dict[Keys, str] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            raise RecipeError(f"--set {assignment}: expected KEY=VALUE", hint="--set bench.threads=4")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {assignment}: the value is not valid YAML", hint="quote it") from error
        _assign(data, keys, value, assignment)
        places[keys] = f"--set {name.strip()}"
    return Layer(name="--set", data=data, places=places)


def _assign(data: dict[str, Any], keys: Keys, value: Any, assignment: str) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {assignment}: {key} was already set to a value", hint="set one of them")
    data[keys[-1]] = value


def layer_of_options(options: Mapping[str, Any]) -> Layer:
    """Read command-line options given as ``{"engine.backend": ("--backend", value)}``; ``None`` values are absent."""
    data: dict[str, Any] = {}
    places: dict[Keys, str] = {}
    for dotted, (flag, value) in options.items():
        if value is not None:
            keys = tuple(dotted.split("."))
            _assign(data, keys, value, flag)
            places[keys] = flag
    return Layer(name="command line", data=data, places=places)


def resolve(layers: Sequence[Layer], check: Check = lambda merged: ()) -> Recipe:
    """Merge the layers, lowest precedence first, and validate the result.

    Args:
        layers: Where settings come from.
        check: Finds what is wrong besides types and ranges; called with the merged settings.

    Raises:
        RecipeError: lists every mistake with its place, by file and line; also those in variants that were not chosen.
        EffdeployError: of one kind, such as SizeError or UnknownNameError, where all mistakes are of that kind.
    """
    variant = next((layer.data["variant"] for layer in reversed(layers) if "variant" in layer.data), None)
    mistakes: dict[str, Mistake] = {}
    recipe = _validate(_with_variant(layers, str(variant)), mistakes, check)
    for layer in layers:
        for other in layer.variants:
            if other != variant:
                _validate([*layers, layer.variants[other]], mistakes, check)
    if mistakes or recipe is None:
        listing = "\n".join(f"  {m}" for m in sorted(mistakes.values(), key=Mistake.order))
        kinds = {mistake.kind for mistake in mistakes.values()}
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) != 1 else ''}"
        raise (kinds.pop() if len(kinds) == 1 else RecipeError)(
            f"{count} in the recipe:\n{listing}", hint=f"keys and types: {_shown(configs_folder() / SCHEMA)}"
        )
    return recipe


def _shown(path: Path) -> str:
    """Write a path as short as it can be copied from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _with_variant(layers: Sequence[Layer], variant: str) -> list[Layer]:
    chosen: list[Layer] = []
    for layer in layers:
        chosen.append(layer)
        if variant in layer.variants:
            chosen.append(layer.variants[variant])
    return chosen


def _validate(layers: Sequence[Layer], mistakes: dict[str, Mistake], check: Check) -> Recipe | None:
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer.data)
    found: list[Mistake] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        found = [_mistake(tuple(str(k) for k in problem["loc"]), problem) for problem in error.errors()]
    refused = {mistake.keys for mistake in found}
    found += [mistake for mistake in check(merged) if mistake.keys not in refused]
    for mistake in found:
        placed = replace(mistake, place=_place(mistake.keys, layers))
        mistakes.setdefault(str(placed), placed)
    return None if found else recipe


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping):
            inner = base.get(key)
            base[key] = dict(inner) if isinstance(inner, Mapping) else {}
            _merge(base[key], value)
        else:
            base[key] = value


def _place(keys: Keys, layers: Sequence[Layer]) -> str:
    """Say where a key, or the nearest one around it, was written last."""
    return next(
        (
            layer.places[keys[:depth]]
            for depth in range(len(keys), 0, -1)
            for layer in reversed(layers)
            if keys[:depth] in layer.places
        ),
        "recipe",
    )


def _mistake(keys: Keys, problem: Mapping[str, Any]) -> Mistake:
    if problem["type"] == "extra_forbidden":
        return Mistake(keys=keys, text=f"no such key; {did_you_mean(keys[-1], _known_keys(keys[:-1]))}")
    text = str(problem["msg"]).removeprefix("Value error, ")
    got = "" if text.startswith("got ") or problem["type"] == "missing" else f" (got {problem['input']!r})"
    return Mistake(keys=keys, text=f"{text}{got}", kind=SizeError if keys[:1] == ("size",) else RecipeError)


def dotted_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """List what ``--set`` takes, as it is typed: ``size``, ``engine.backend``, ..."""
    names: list[str] = []
    for name, about in section.model_fields.items():
        kind = about.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        names += dotted_keys(kind, f"{prefix}{name}.") if inner else [prefix + name]  # type: ignore[arg-type]
    return names


def _known_keys(path: Keys) -> list[str]:
    section: type[BaseModel] = Recipe
    for key in path:
        kind = section.model_fields[key].annotation if key in section.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return list(ToleranceSection.model_fields)
        section = kind
    return list(section.model_fields)


def json_schema() -> str:
    """Return the JSON schema of a recipe file, for editors; ``export_configs/recipe.schema.json`` holds it."""
    schema = Recipe.model_json_schema(mode="validation")
    schema.pop("required", None)
    schema["title"] = "effdeploy recipe"
    properties = dict(schema["properties"])
    definition = {"type": "object", "additionalProperties": False, "properties": properties}
    schema["$defs"] = {**schema.get("$defs", {}), "Variant": definition}
    schema["properties"] = {
        **properties,
        "variants": {
            "type": "object",
            "additionalProperties": {"anyOf": [{"$ref": "#/$defs/Variant"}, {"type": "null"}]},
        },
    }
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":  # python -m deploy.recipe > export_configs/recipe.schema.json
    print(json_schema(), end="")
