"""The Python API: what is public, that it is what the command line does, and that it stays quiet and quick."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer.main

import deploy
from deploy import api
from deploy.artifacts import read_manifest
from deploy.cli import app
from deploy.errors import BundleError, RecipeError, UnknownNameError

ROOT = Path(__file__).parent.parent

# The public names. A name that goes is a breaking change; a new one is added here on purpose.
FUNCTIONS = {
    "benchmark", "bisect", "build", "convert", "diagnose", "diff", "evaluate", "export", "inspect", "lint",
    "package", "plan", "predict", "render", "show", "systems", "tune", "verify",
}  # fmt: skip
TYPES = {
    "BenchRecord", "BisectRecord", "BuildRecord", "BundleDiff", "BundleReport", "CheckpointReport", "Console",
    "ConversionRecord", "Diagnosis", "EffdeployError", "EngineReport", "EvalRecord", "GraphReport", "LintRecord",
    "Mode", "PackageRecord",
    "ParityRecord", "PlanRecord", "Precision", "PredictionRecord",
    "RunRecord", "ShowRecord", "Stage", "SystemRecord", "Target", "TuneRecord",
}  # fmt: skip

# Command -> function. They differ where a submodule has the command's name, or where it is a builtin of Python.
COMMANDS = {
    "export": "export", "verify": "verify", "bench": "benchmark", "report": "render", "list": "systems",
    "convert": "convert", "inspect": "inspect", "diff": "diff", "build": "build", "lint": "lint",
    "doctor": "diagnose", "eval": "evaluate", "package": "package", "run": "predict", "show": "show", "tune": "tune",
    "bisect": "bisect",
}  # fmt: skip
TERMINAL = {"as_json", "quiet", "log"}  # the console says it
RENAMED = {
    "fp32": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "int8": "precision",
    "fp8": "precision",
    "no_reuse": "reuse",
    "pretrained": "weights",
}
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python_api.md").read_text(), re.DOTALL | re.MULTILINE)


def commands():
    return typer.main.get_command(app).commands


def keyword(parameter):
    """The keyword of a command-line parameter: the long option with underscores."""
    name = parameter.name
    if parameter.param_type_name == "option":
        name = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
    name = RENAMED.get(name, name)
    return f"{name}_" if name in ("from", "set", "for") else name


def keywords(command):
    found = {keyword(p) for p in command.params if p.name not in TERMINAL | {"help"}}
    return found - {"dry_run"}


def test_public_names_are_pinned():
    assert set(deploy.__all__) == FUNCTIONS | TYPES | {"__version__"}
    assert all(getattr(deploy, name).__doc__ for name in FUNCTIONS | TYPES)
    assert set(deploy.__all__) <= set(dir(deploy))
    with pytest.raises(AttributeError, match="no attribute 'exprt'"):
        deploy.exprt  # noqa: B018


def test_type_checkers_see_the_same_names():
    text = (ROOT / "deploy" / "__init__.py").read_text()
    seen = set(re.findall(r"^    from [\w.]+ import (\w+) as \1$", text, re.MULTILINE))
    assert seen == FUNCTIONS | TYPES
    assert (ROOT / "deploy" / "py.typed").is_file()


def test_no_function_has_the_name_of_a_submodule():
    """Importing the submodule would put a module in the function's place."""
    assert [name for name in FUNCTIONS if importlib.util.find_spec(f"deploy.{name}")] == []
    assert importlib.util.find_spec("deploy.bench")  # negative control


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_has_a_function_with_its_options(command):
    assert command in COMMANDS, f"give {command} a function in deploy/api.py and name it in COMMANDS"
    parameters = inspect.signature(getattr(deploy, COMMANDS[command])).parameters
    assert set(parameters) - {"console"} == keywords(commands()[command])
    assert parameters["console"].default is None


def test_the_contract_notices_an_option_that_the_function_lacks():
    extra = typer.Typer()

    @extra.command()
    def verify(bundle: str, depth: int = 3) -> None: ...

    command = typer.main.get_command(extra)
    assert keywords(command) - set(inspect.signature(deploy.verify).parameters) >= {"depth"}


def test_a_plan_takes_what_an_export_takes():
    def shape(function):
        return [(p.name, p.kind, p.default, p.annotation) for p in inspect.signature(function).parameters.values()]

    assert shape(deploy.plan) == shape(deploy.export)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_is_documented_and_typed(name):
    function = getattr(api, name)
    arguments = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(function), re.DOTALL)[1]
    parameters = inspect.signature(function).parameters
    assert [p for p in parameters if not re.search(rf"\b{p}\b", arguments)] == []
    assert {"Returns:", "Raises:"} <= set(re.findall(r"^\w+:", inspect.getdoc(function), re.MULTILINE))
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())
    for error in re.findall(r"^    (\w+Error):", inspect.getdoc(function), re.MULTILINE):
        assert issubclass(getattr(deploy.errors, error), deploy.EffdeployError)


def test_importing_costs_nothing():
    code = (
        "import sys, time; start = time.process_time(); import deploy; took = time.process_time() - start\n"
        "print(took, *[m for m in sys.modules if m.startswith('deploy.') or m in ('torch', 'numpy', 'typer')])\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert [run.stdout.split()[1:] for run in runs] == [[]] * 3
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.05


def test_errors_are_raised_and_nothing_is_printed(capfd, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'riformer'"):
        deploy.export("riformr")
    with pytest.raises(RecipeError):
        deploy.export("riformer", variant="tiny", batch="4:2", out=tmp_path / "b")
    with pytest.raises(BundleError):
        deploy.verify(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_an_export_is_that_of_the_command_line(tmp_path, tiny_bundle, capfd):
    run = deploy.export(
        "riformer", variant="tiny", set_={"bench.seconds": 0.2}, baseline=["naive"], out=tmp_path / tiny_bundle.name,
        until="passes",
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert run == read_manifest(tmp_path / tiny_bundle.name)
    of_cli = read_manifest(tiny_bundle)
    assert (run.recipe, run.trace.artifact, run.passes.artifact) == (
        of_cli.recipe, of_cli.trace.artifact, of_cli.passes.artifact,
    )  # fmt: skip


def test_a_console_is_an_opt_in(tiny_bundle, capsys, tmp_path):
    files = deploy.render(tiny_bundle, out=tmp_path, console=deploy.Console(deploy.Mode.PLAIN))
    assert [path.name for path in files] == ["report.html", "report.md"]
    assert str(files[0]) in capsys.readouterr().out
    assert deploy.render(str(tiny_bundle), out=str(tmp_path)) == files
    assert capsys.readouterr().out == ""


def test_values_may_be_python_or_as_typed(tmp_path):
    typed = deploy.plan("riformer", variant="tiny", size="32x64", batch="1:2:4", set_=["bench.rounds=5"])
    python = deploy.plan("riformer", variant="tiny", size=(32, 64), batch="1:2:4", set_={"bench.rounds": 5})
    assert typed.recipe == python.recipe
    assert python.recipe["bench"]["rounds"] == 5
    assert deploy.plan("riformer", variant="tiny", precision="fp16", batch=3).recipe["batch"] == "3"


def test_the_records_of_the_systems():
    riformer = next(system for system in deploy.systems() if system.name == "riformer")
    s12 = next(variant for variant in riformer.variants if variant.name == "s12")
    assert (round(s12.parameters / 1e6, 1), round(s12.macs / 1e9, 2), s12.size) == (11.9, 1.81, (224, 224))


@pytest.mark.slow
def test_the_documented_examples_run(tmp_path, monkeypatch):
    """Top to bottom, in one namespace, as a reader would; the checkpoint that they name is made first."""
    from support import reference_case

    monkeypatch.chdir(tmp_path)
    reference_case("riformer_s12_train").save(tmp_path / "weights.pth")
    assert len(EXAMPLES) >= 5
    namespace: dict[str, typing.Any] = {}
    for example in EXAMPLES:
        exec(compile(example, "docs/python_api.md", "exec"), namespace)
