"""Recipes: precedence, and every mistake at its line."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from deploy.errors import RecipeError, SizeError, UnknownNameError
from deploy.models import SYSTEMS
from deploy.recipe import Recipe, configs_folder, json_schema, layer_of_assignments, read_yaml
from deploy.records import Batch
from deploy.resolve import default_name, resolve_recipe, stages_between

ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("system: riformer\n" + text)
    return str(path)


def test_precedence_is_default_yaml_variant_option_assignment(tmp_path):
    mine = write(tmp_path, "size: 256\nbatch: 2\nprecision: fp16\nvariants: {m36: {size: 320, batch: 3}}\n")
    assert resolve_recipe("riformer").size == (224, 224)
    assert resolve_recipe(mine).size == (256, 256)
    m36 = {"variant": ("--variant", "m36")}
    assert resolve_recipe(mine, m36).size == (320, 320)
    assert resolve_recipe(mine, m36 | {"size": ("--size", "384")}).size == (384, 384)
    final = resolve_recipe(mine, m36 | {"size": ("--size", "384")}, ["size=96x64"])
    assert (final.size, final.batch, final.precision.value) == ((96, 64), Batch.parse("3"), "fp16")


def test_sections_merge_key_by_key():
    recipe = resolve_recipe("riformer", assignments=["parity.tolerances.fp32.cosine=0.5", "bench.threads=4"])
    assert recipe.parity.tolerances["fp32"].cosine == 0.5
    assert recipe.parity.tolerances["fp32"].top1 == 1.0
    assert recipe.bench.threads == 4


def test_a_recipe_without_a_system_says_so(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("variant: s12\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml names no system") as caught:
        resolve_recipe(str(path))
    assert all(name in caught.value.hint for name in SYSTEMS)


def test_a_flag_that_names_the_key_says_it_once():
    with pytest.raises(SizeError, match=r"--size: got 'abc'"):
        resolve_recipe("riformer", {"size": ("--size", "abc")})
    with pytest.raises(RecipeError, match=r"--set foo: no such key"):
        resolve_recipe("riformer", assignments=["foo=1"])
    with pytest.raises(UnknownNameError, match=r"--backend: engine\.backend: "):
        resolve_recipe("riformer", {"engine.backend": ("--backend", "tensorr")})


def test_all_mistakes_come_at_once_with_their_places(tmp_path):
    text = "size: 12a\nbatchh: 3\nengine:\n  backend: 4\n  sm: [a]\nvariants:\n  s12: {}\n  s24: {presision: fp16}\n"
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(write(tmp_path, text), assignments=["bench.threads=x"])
    lines = caught.value.message.splitlines()
    assert lines[0] == "6 mistakes in the recipe:"
    found = "\n".join(lines)
    for expected in (
        "mine.yaml:2: size: got '12a'",
        "mine.yaml:3: batchh: no such key; did you mean 'batch'?",
        "mine.yaml:5: engine.backend",
        "mine.yaml:6: engine.sm.0",
        "mine.yaml:9: presision: no such key; did you mean 'precision'?",
        "--set bench.threads: Input",
    ):
        assert expected in found
    assert caught.value.exit_code == 3


def test_what_only_systems_and_backends_know_is_told_with_the_rest_and_by_line(tmp_path):
    text = "batch: 0\nengine:\n  backend: onnxrt\nsize: 225\nbench: {threads: x}\noptions: {depth: 3}\n"
    options = {"variant": ("--variant", "tiny"), "seed": ("--seed", 1)}
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(write(tmp_path, text), options)
    places = [line.split(": ")[0].strip() for line in caught.value.message.splitlines()[1:]]
    assert places == [*(f"mine.yaml:{line}" for line in (2, 4, 5, 6, 7)), "--seed"]
    for words in ("did you mean 'onnxruntime'", "multiples of 32; --size 224x224", "did you mean 'depths'"):
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("engine: {backend: onnxrt}\n", UnknownNameError),
        ("size: 225\nvariants: {s24: {size: 33}}\n", SizeError),
        ("size: 225\nengine: {backend: onnxrt}\n", RecipeError),
    ],
)
def test_mistakes_of_one_kind_keep_their_exit_code(tmp_path, text, kind):
    with pytest.raises(kind) as caught:
        resolve_recipe(write(tmp_path, text))
    assert type(caught.value) is kind


def test_the_hint_names_a_schema_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("riformer", {"batch": ("--batch", "0")})
    path = Path(caught.value.hint.removeprefix("keys and types: "))
    assert json.loads(path.read_text()) == json.loads(json_schema())
    monkeypatch.chdir(path.parent.parent)
    with pytest.raises(RecipeError, match=r"export_configs/recipe\.schema\.json") as caught:
        resolve_recipe("riformer", {"batch": ("--batch", "0")})
    assert str(path.parent.parent) not in str(caught.value)  # short where it can be


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size: 224\nsize: 256\n", "given twice"),
        ("size: [\n", "not valid YAML"),
        ("variants: [s12]\n", "expected a mapping"),
        ("batch: 8:2:1\n", "min <= opt <= max"),
        ("batch: 0\n", "min <= opt <= max"),
        ("bench: {seconds: .inf}\n", "finite"),
        ("preprocess: {crop: 2}\n", "less than or equal to 1"),
        ("parity: {tolerances: {fp64: {cosine: 0.9}}}\n", "fp64"),
        ("parity: {tolerances: {fp32: {cosin: 0.9}}}\n", "did you mean 'cosine'"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, words):
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(write(tmp_path, text))
    assert words in caught.value.message


def test_yaml_scalars_are_those_of_yaml_1_2(tmp_path):
    recipe = resolve_recipe(write(tmp_path, "batch: 1:8:32\nparity: {tolerances: {fp32: {max_relative: 1e-3}}}\n"))
    assert recipe.batch == Batch(min=1, opt=8, max=32)  # YAML 1.1 reads 4112
    assert recipe.parity.tolerances["fp32"].max_relative == 1e-3  # YAML 1.1 reads a text
    assert resolve_recipe("riformer", assignments=["batch=1:8:32"]).batch == recipe.batch


def test_not_a_mapping_and_not_a_file(tmp_path):
    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n")
    with pytest.raises(RecipeError, match="got list"):
        read_yaml(listing)
    with pytest.raises(RecipeError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("size", ["224.5", "0", "-1", "224x", "1x2x3", "²", "100000"])
def test_a_wrong_size_is_a_size_error(size):
    with pytest.raises(SizeError, match="expected a side"):
        resolve_recipe("riformer", {"size": ("--size", size)})


@pytest.mark.parametrize("assignment", ["a", "=1", "a..b=1", "size=[", "size=1"])
def test_assignments(assignment):
    if assignment == "size=1":
        assert layer_of_assignments([assignment]).data == {"size": 1}
    else:
        with pytest.raises(RecipeError):
            layer_of_assignments([assignment])


def test_unknown_names_have_a_suggestion(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'riformer'"):
        resolve_recipe("riformr")
    with pytest.raises(UnknownNameError, match="did you mean 's12'"):
        resolve_recipe("riformer", {"variant": ("--variant", "s121")})
    with pytest.raises(UnknownNameError, match="s99"):
        resolve_recipe(write(tmp_path, "variants: {s99: {}}\n"))
    with pytest.raises(UnknownNameError, match="did you mean 'trace'"):
        stages_between("trase", None)
    with pytest.raises(RecipeError, match="comes after"):
        stages_between("engine", "trace")


def test_a_resolved_recipe_resolves_to_itself(tmp_path):
    recipe = resolve_recipe("riformer", {"batch": ("--batch", "1:8:32"), "size": ("--size", "384x512")})
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert resolve_recipe(str(path)) == recipe
    assert Recipe.model_validate(recipe.to_data()) == recipe


def test_names_of_bundles():
    assert default_name(resolve_recipe("riformer")) == "riformer-s12-224-fp32-onnxruntime"
    options = {"batch": ("", "1:8:32"), "size": ("", "384x512"), "precision": ("", "fp16")}
    assert default_name(resolve_recipe("riformer", options)) == "riformer-s12-384x512-b1-8-32-fp16-onnxruntime"


def test_the_committed_schema_is_the_generated_one():
    assert (ROOT / "export_configs" / "recipe.schema.json").read_text() == json_schema(), (
        "python -m deploy.recipe > export_configs/recipe.schema.json"
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_shipped_recipes_satisfy_the_schema(name):
    schema = json.loads(json_schema())
    jsonschema.validate(yaml.safe_load((configs_folder() / f"{name}.yaml").read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"sytem": name}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"variants": {"s12": {"presision": "fp16"}}}, schema)


@pytest.mark.slow
def test_the_wheel_carries_the_recipes(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    for expected in ("riformer.yaml", "recipe.schema.json"):
        assert f"deploy/export_configs/{expected}" in names
    assert "deploy/report/template/page.html.j2" in names
    assert not [n for n in names if n.startswith("tests/")]
