"""The documents tell the truth: links, paths, names, commands, exit codes, tables made from data, and their examples.

``python tests/test_docs.py`` writes the tables again.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
import typer.main
from graph.graph_cases import apply, build
from support import effdeploy

import deploy.models
import deploy.recipe
import deploy.resolve
from deploy import errors
from deploy.cli import app
from deploy.graph.pipeline import PIPELINE
from deploy.precision import policy
from deploy.records import Precision, Target

ROOT = Path(__file__).parent.parent
DOCS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "engines" / "README.md")
    if path.is_file()
] + sorted((ROOT / "docs").glob("*.md"))
GENERATED = ROOT / "docs"

every_document = pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))


# ---------------------------------------------------------------------------------------------------------- checkers


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links whose file is missing, or whose heading is not in that file."""
    found = []
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        path = folder / name
        if path.exists() and heading:
            page = path.read_text(encoding="utf-8") if name else text
            found += [] if heading in headings(page) else [target]
        elif not path.exists():
            found.append(target)
    return found


def headings(text: str) -> set[str]:
    """Anchors that a Markdown page has."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_paths(text: str) -> list[str]:
    """Paths of the repository that are written down and do not exist; ``<...>`` and ``*`` are placeholders."""
    rooms = "deploy|tests|docs|export_configs"
    named = re.findall(rf"(?<![\w./\-])((?:{rooms})/[\w./*<>\-]*|\.ci/\w+|[A-Z]+\.md)", text)
    return [p for p in (n.rstrip(".") for n in named) if not set("*<>") & set(p) and not (ROOT / p).exists()]


def unknown_names(text: str) -> list[str]:
    """Dotted names that start with ``deploy.`` and that Python does not find."""
    return [name for name in sorted(set(re.findall(r"\bdeploy(?:\.\w+)+", text))) if not resolves(name)]


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def options_of() -> dict[str, set[str]]:
    """Options by command of the command line; ``""`` holds those before a command."""
    group = typer.main.get_command(app)
    helps = {"-h", "--help"}
    commands = {name: command.params for name, command in group.commands.items()}
    return {
        name: helps | {o for p in params for o in (*p.opts, *p.secondary_opts)}
        for name, params in {**commands, "": group.params}.items()
    }


def command_lines(text: str) -> Iterator[str]:
    """Every ``effdeploy ...`` in a code block or code span."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in (*spans, *(line for block in blocks for line in block.splitlines())):
        for part in re.split(r"&&|\|", line):
            if re.match(r"\s*(?:#\s*)?effdeploy(\s|$)", part):
                yield " ".join(part.replace("#", " ", part.strip().startswith("#")).split())


def wrong_commands(text: str) -> list[str]:
    """Commands and options of ``effdeploy ...`` lines, and options on their own, that do not exist."""
    known, found = options_of(), []
    everything = set().union(*known.values())
    for line in command_lines(text):
        words = shlex.split(line)[1:]
        command = words[0] if words and not words[0].startswith("-") else ""
        if command not in known:
            found.append(line)
            continue
        given = [word.partition("=")[0] for word in words if word.startswith("-") and word != "-"]
        found += [f"{line}: {option}" for option in given if option not in known[command]]
    alone = re.findall(r"`(--[a-z][a-z0-9\-]*)[^`]*`", text)
    return found + [option for option in alone if option not in everything]


def exit_codes_in(text: str) -> dict[int, str]:
    """Read a table ``| code | error | meaning |``."""
    return {int(code): error for code, error in re.findall(r"^\| (\d+) \| `?(\w+|-)`? \|", text, re.MULTILINE)}


def exit_codes() -> dict[int, str]:
    """Return what the code says: every error, and the codes that are nobody's."""
    kinds = [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, errors.EffdeployError)]
    return {0: "-", 2: "-", 130: "-"} | {kind.exit_code: kind.__name__ for kind in kinds}


def block(text: str, name: str) -> str:
    """Return what stands between ``<!-- begin name -->`` and its end."""
    match = re.search(rf"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", text, re.DOTALL)
    assert match, f"no block {name!r}"
    return match[1]


# ------------------------------------------------------------------------------------------------- tables from data


def layers_block() -> str:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        layers = tomllib.load(stream)["tool"]["importlinter"]["contracts"][0]["layers"]
    return "```\n" + "\n".join(layers) + "\n```\n"


def policy_block() -> str:
    reasons: dict[str, list[str]] = {}
    for operator, reason in policy.KEPT_OPS.items():
        reasons.setdefault(reason, []).append(operator)
    reasons[policy.SCATTER] = [f"{operator} that adds" for operator in sorted(policy.ACCUMULATING)]
    rows = [(", ".join(operators), reason) for reason, operators in reasons.items()]
    low = [(t.value, ", ".join(sorted(ops)) or "none") for t, ops in policy.FLOAT32_INSIDE.items()]
    return (
        table(("operator", "stays float32 because"), rows)
        + "\n"
        + table(("target", "low after all, with float32 statistics inside"), low)
    )


def limits_block() -> str:
    rows = [
        (p.value.upper(), f"{policy.LIMIT[p]:.6g}", f"{policy.NORMAL[p]:.3g}", f"{policy.SMALLEST[p]:.3g}")
        for p in (Precision.FP16, Precision.BF16)
    ]
    head = ("precision", "largest finite", "smallest with full precision", "smallest above zero")
    return table(head, rows) + f"\nHeadroom: {policy.HEADROOM:g}.\n"


def pipeline_block() -> str:
    parts = []
    for target, steps in PIPELINE.items():
        rows = [(f"`{step.pass_.name}`", step.reason) for step in steps]
        parts.append(f"For `{target.value}`:\n\n" + table(("pass", "why it is there"), rows))
    return "\n".join(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


BLOCKS = {
    ("architecture.md", "layers"): layers_block,
    ("precision.md", "policy"): policy_block,
    ("precision.md", "limits"): limits_block,
    ("adding_a_pass.md", "pipeline"): pipeline_block,
}


def write_blocks() -> None:
    for (name, title), make in BLOCKS.items():
        path = GENERATED / name
        text = path.read_text(encoding="utf-8")
        start, end = f"<!-- begin {title} -->\n", f"<!-- end {title} -->"
        head, _, rest = text.partition(start)
        path.write_text(head + start + make() + end + rest.partition(end)[2], encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- tests


def test_all_documents_are_there():
    names = {str(path.relative_to(ROOT)) for path in DOCS}
    needed = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "engines/README.md", "docs/architecture.md")
    assert names >= {*needed, "docs/adding_a_model.md", "docs/adding_a_pass.md", "docs/precision.md"}


@every_document
def test_links_lead_somewhere(path):
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


@every_document
def test_paths_exist(path):
    assert missing_paths(path.read_text(encoding="utf-8")) == []


@every_document
def test_python_names_exist(path):
    assert unknown_names(path.read_text(encoding="utf-8")) == []


@every_document
def test_commands_and_options_exist(path):
    assert wrong_commands(path.read_text(encoding="utf-8")) == []


def test_the_exit_codes_are_those_of_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert exit_codes_in(block(text, "exit codes")) == exit_codes()


@pytest.mark.parametrize(("name", "title"), BLOCKS, ids=lambda v: v)
def test_tables_made_from_data_are_up_to_date(name, title):
    text = (GENERATED / name).read_text(encoding="utf-8")
    assert block(text, title) == BLOCKS[name, title](), "python tests/test_docs.py writes it again"


def test_every_room_is_described():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {p.name for p in (ROOT / "deploy").iterdir() if p.name not in ("__pycache__", "__init__.py", "__main__.py")}
    assert {room for room in rooms if f"`deploy/{room}" not in text} == set()


def test_the_markers_are_those_of_pytest():
    with (ROOT / "pyproject.toml").open("rb") as stream:
        markers = tomllib.load(stream)["tool"]["pytest"]["ini_options"]["markers"]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [marker.partition(":")[0] for marker in markers]


def test_every_command_is_mentioned_somewhere():
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
    assert {name for name in options_of() if name and f"effdeploy {name}" not in text} == set()


# --------------------------------------------------------------------------------------------------- negative controls


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A title, and more\n```\n# no title\n```\n")
    good = "[a](there.md) [b](there.md#a-title-and-more) [c](https://example.org/x) [d](#here)\n\n## Here\n"
    assert broken_links(good, tmp_path) == []
    bad = "[a](gone.md) [b](there.md#no-title) [c](#nowhere)"
    assert broken_links(bad, tmp_path) == ["gone.md", "there.md#no-title", "#nowhere"]


def test_a_missing_path_is_found():
    assert missing_paths("see `deploy/cli/`, tests/models/, `deploy/models/<name>.py` and docs/*.md.") == []
    wrong = "`deploy/gone.py`, (tests/nothing/), docs/none.md and GONE.md"
    assert missing_paths(wrong) == ["deploy/gone.py", "tests/nothing/", "docs/none.md", "GONE.md"]


def test_an_unknown_name_is_found():
    assert unknown_names("`deploy.trace.onnx_from_torch` in `deploy.trace`.") == []
    assert unknown_names("`deploy.trace.gone` and deploy.nowhere") == ["deploy.nowhere", "deploy.trace.gone"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`effdeploy export riformer --fp16`, `effdeploy list | head`, `effdeploy --version`, `effdeploy`", []),
        ("```\npip install -e . && effdeploy export riformer --set a.b=1\n```", []),
        ("`effdeploy exprt riformer`", ["effdeploy exprt riformer"]),
        ("`effdeploy list --fp16`", ["effdeploy list --fp16: --fp16"]),
        ("```\npip install -e . && effdeploy export x --int9\n```", ["effdeploy export x --int9: --int9"]),
        ("with `--untill precision`", ["--untill"]),
        ("`pip install --upgrade x`, `--until trace`", []),
    ],
)
def test_a_wrong_command_is_found(text, wrong):
    assert wrong_commands(text) == wrong


def test_a_wrong_exit_code_is_found():
    text = "| 3 | `RecipeError` | a |\n| 0 | - | b |\n| 4 | `SizeError` | c |\n"
    assert exit_codes_in(text) == {3: "RecipeError", 0: "-", 4: "SizeError"}
    assert exit_codes_in(text) != exit_codes()


def test_a_changed_table_is_found(monkeypatch):
    monkeypatch.setattr(policy, "KEPT_OPS", {**policy.KEPT_OPS, "Sqrt": policy.POWER})
    text = (GENERATED / "precision.md").read_text(encoding="utf-8")
    assert block(text, "policy") != policy_block()


# ------------------------------------------------------------------------------------------------ the examples in them


def example(name: str, marker: str) -> str:
    """Return the code block behind ``<!-- marker: ... -->``."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    match = re.search(rf"<!-- {marker}:.*?-->\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert match, f"{name} has no {marker!r}"
    return match[1]


def module_of(code: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def new_pass():
    return module_of(example("adding_a_pass.md", "example pass"), "invert_divisors").INVERT_DIVISORS


def test_the_example_pass_keeps_the_contract(new_pass):
    contract = importlib.import_module("contracts.test_passes")
    contract.test_the_example_has_a_site_and_none_is_left_by_a_second_run(new_pass)
    contract.test_inputs_and_outputs_stay_as_they_were(new_pass)
    contract.test_the_checker_passes_and_names_are_unique_and_keep_the_module(new_pass)
    contract.test_an_unrelated_graph_is_not_touched(new_pass)
    contract.test_a_graph_with_control_flow_is_left_alone_and_the_reason_says_so(new_pass)
    contract.test_a_pass_says_what_it_needs_and_what_it_ensures(new_pass)
    before, after = (contract.outputs_of(m, 0, 3)["y"] for m in (new_pass.example(), contract.rewritten(new_pass)))
    np.testing.assert_array_equal(before, after)


def test_the_example_near_miss_declines_for_the_reason_in_the_document(new_pass):
    text = (ROOT / "docs" / "adding_a_pass.md").read_text(encoding="utf-8")
    fields = re.search(r'Miss\(\s*INVERT_DIVISORS,\s*"thirds",\s*"(.+?)",\s*"(.+?)",\s*"(.+?)",', text)
    assert fields
    result, _ = apply(new_pass, build(fields[1], c=3.0))
    assert (result.sites, result.declined) == (0, (f"{fields[2]}: {fields[3]}",))
    result, _ = apply(new_pass, build(fields[1], c=4.0))  # negative control: a power of two is no near miss
    assert result.sites == 1


@pytest.fixture
def new_system(monkeypatch, tmp_path):
    """The example of adding_a_model.md, put where its text says: a file, a name, a recipe."""
    module = module_of(example("adding_a_model.md", "example system"), "deploy.models.plainnet")
    (tmp_path / "plainnet.yaml").write_text(example("adding_a_model.md", "example recipe"))
    monkeypatch.setitem(sys.modules, "deploy.models.plainnet", module)
    monkeypatch.setattr(deploy.models, "SYSTEMS", (*deploy.models.SYSTEMS, "plainnet"))
    for room in (deploy.recipe, deploy.resolve):
        monkeypatch.setattr(room, "configs_folder", lambda: tmp_path)
    return module.SYSTEM


def test_the_example_system_keeps_the_contract(new_system, tmp_path):
    contract = importlib.import_module("contracts.test_systems")
    contract.test_every_variant_of_the_yaml_is_a_variant_and_the_other_way_round(new_system)
    contract.test_weight_maps_fit_their_own_layout_and_no_key_is_lost(new_system)
    contract.test_a_layout_is_recognised_and_a_missing_key_is_refused(new_system)
    contract.test_random_weights_are_alive_and_deterministic(new_system)
    for target in Target:
        contract.test_to_deploy_keeps_the_function_and_its_input(new_system, target, torch.float64, 1e-10)
    contract.test_graph_agrees_with_pytorch_on_onnx_runtime(new_system, Target.ONNXRUNTIME, "1:2:4", False, tmp_path)
    assert new_system.weight_maps[0].rename("features.3.conv.weight") == "blocks.3.conv.weight"


def test_the_contract_refuses_a_fold_that_is_only_near(new_system):
    """The control of the test above: a fold that forgets the norms' epsilon."""

    def careless(model, target):
        model = copy.deepcopy(model)
        for block in model.blocks:
            block.norm.eps = 0.0
        return new_system.to_deploy(model, target)

    contract = importlib.import_module("contracts.test_systems")
    wrong = dataclasses.replace(new_system, to_deploy=careless)
    with pytest.raises(AssertionError):
        contract.test_to_deploy_keeps_the_function_and_its_input(wrong, Target.ONNXRUNTIME, torch.float64, 1e-10)


def test_the_example_system_goes_down_the_road(new_system, tmp_path):
    out = tmp_path / "bundle"
    result = effdeploy("export", "plainnet", "--variant", "tiny", "--fp16", "--seconds", "0.1", "--out", out)
    assert result.exit_code == 0, result.stdout + result.stderr
    files = {path.name for path in out.iterdir()}
    assert "30-fp16.onnx" in files
    assert undescribed(files) == set()
    assert undescribed({*files, "notes.txt"}) == {"notes.txt"}  # negative control


def undescribed(files: set[str]) -> set[str]:
    """Files of a bundle that engines/README.md does not name."""
    text = (ROOT / "engines" / "README.md").read_text(encoding="utf-8")
    return {name for name in files if f"`{name}`" not in text}


if __name__ == "__main__":
    os.chdir(ROOT)
    write_blocks()
