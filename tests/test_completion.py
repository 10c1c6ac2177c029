"""Shell completion, through the protocol that bash and zsh use, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer.main

from deploy.backends import BACKENDS
from deploy.cli import app, completing
from deploy.models import SYSTEMS
from deploy.recipe import Recipe
from deploy.records import Precision, Stage

CODE = (
    "import atexit, sys; sys.argv[0] = 'effdeploy'\n"
    "atexit.register(lambda: print('HEAVY', *{'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules),"
    " file=sys.stderr))\n"
    "from deploy.cli import main; main()\n"
)


def complete(typed: str, shell: str = "bash", cwd: str | None = None) -> list[str]:
    """What the shell is offered behind ``effdeploy <typed>``; checks that nothing heavy was loaded for it."""
    line = f"effdeploy {typed}"
    words = line.split()
    protocol = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - (0 if typed.endswith(" ") else 1))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
    }[shell]
    env = {**os.environ, "_EFFDEPLOY_COMPLETE": f"complete_{shell}", **protocol}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, cwd=cwd, timeout=60)
    assert done.stderr.split() == ["HEAVY"], done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_stages_and_variants_in_both_shells(shell):
    assert [word for word in complete("export riformer --until p", shell) if "parity" in word]
    offered = " ".join(complete("export riformer --variant s", shell))
    assert all(name in offered for name in ("s12", "s24", "s36"))
    assert "m36" not in offered


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("export riform", ["riformer"]),
        ("export riformer --from ", [stage.value for stage in Stage]),
        ("export riformer --backend tensorrt_", ["tensorrt_rtx"]),
        ("export riformer --baseline eager,n", ["eager,naive"]),
        ("export riformer --set precision=", [f"precision={precision.value}" for precision in Precision]),
        ("export riformer --fp", ["--fp32", "--fp16", "--fp8"]),
    ],
)
def test_values(typed, offered, tmp_path):
    assert complete(typed, cwd=str(tmp_path)) == offered


def test_bundles_and_recipes(tmp_path):
    for name in ("a-fp16", "a-fp32", "b"):
        (tmp_path / "engines" / name).mkdir(parents=True)
    for name in ("a-fp16", "b"):
        (tmp_path / "engines" / name / "manifest.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text("system: riformer\n")
    (tmp_path / "notes.txt").write_text("")
    assert complete("verify ", cwd=str(tmp_path)) == ["engines/a-fp16/", "engines/b/"]
    assert complete("bench engines/a", cwd=str(tmp_path)) == ["engines/a-fp16/", "engines/a-fp32/"]
    assert complete("export m", cwd=str(tmp_path)) == ["mine.yaml"]
    assert complete("diff engines/a-fp16 ", cwd=str(tmp_path)) == ["engines/a-fp16/", "engines/b/"]


def test_bundles_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines" / "a").mkdir(parents=True)
    (tmp_path / "engines" / "a" / "manifest.json").write_text("{}")
    for name in ("m.onnx", "w.pth"):
        (tmp_path / name).write_text("")
    assert completing.bundles_and_models("") == ["engines/a/", "m.onnx"]
    assert completing.files("") == ["engines/a/", "engines/", "m.onnx", "w.pth"]
    assert completing.files("w") == ["w.pth"]


def test_what_is_offered_is_what_there_is():
    """The names are literal, or read without the rooms that own them: those would load NumPy or PyTorch."""
    assert completing.backends("") == list(BACKENDS)
    assert completing.systems("") == list(SYSTEMS)
    fields = Recipe.model_fields
    sections = fields["bench"].annotation.model_fields
    assert set(completing.BASELINES) == set(sections["baselines"].annotation.__args__[0].__args__)
    assert set(completing.DEVICES) == set(fields["engine"].annotation.model_fields["device"].annotation.__args__)
    assert {"size=", "engine.backend=", "bench.rounds="} <= set(completing.assignments(""))
    assert completing.assignments("bench.rounds=") == []
    assert completing.bundles("nowhere/x") == []


def test_the_check_for_heavy_modules_can_fail():
    code = CODE.replace("from deploy.cli", "import numpy\nfrom deploy.cli")
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == ["HEAVY", "numpy"]


def test_help_lists_the_stages():
    helps = {p.name: p.help for p in typer.main.get_command(app).commands["export"].params}
    for name in ("until", "start"):
        assert "model, trace, passes, precision, engine, parity, latency, report" in helps[name]


def test_completion_can_be_installed():
    done = subprocess.run(
        [sys.executable, "-c", CODE, "--show-completion", "bash"],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "_EFFDEPLOY_COMPLETE=complete_bash" in done.stdout
