"""``--json`` on every command: one JSON object a line on stdout, also when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skimage
import torch
import typer.main
from support import effdeploy

from deploy import answers, records
from deploy.cli import app
from deploy.cli.app import session

COMMANDS = sorted(typer.main.get_command(app).commands)
DOCUMENT = (Path(__file__).parent.parent / "docs" / "python_api.md").read_text()


def events(text: str) -> list[dict]:
    """Parse every line; each is an object that says what it is, and its kind is documented."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(f"| `{event['event']}` |" in DOCUMENT for event in found)
    return found


def arguments(command: str, bundle: Path, folder: Path) -> list[object]:
    """A call of each command that succeeds."""
    weights = folder / "w.pth"
    calls = {
        "export": ["riformer", "--variant", "tiny", "--until", "trace", "--out", folder / "b"],
        "verify": [bundle],
        "bench": [bundle, "--seconds", "0.1"],
        "report": [bundle, "--out", folder],
        "list": [],
        "doctor": [],
        "convert": [weights, folder / "o.safetensors", "--system", "riformer", "--variant", "tiny"],
        "inspect": [bundle],
        "diff": [bundle, bundle],
        "lint": [bundle / "20-patched.onnx"],
        "package": [bundle, "--triton", folder / "models"],
        "run": [bundle, Path(skimage.__file__).parent / "data" / "chelsea.png"],
        "build": [bundle / "20-patched.onnx", "--backend", "onnxruntime", "--out", folder],
    }
    return calls[command]


# test_bisect.py, test_eval.py, test_show.py and test_tune.py read the results of these: they need other bundles.
ELSEWHERE = {"bisect", "eval", "show", "tune"}


@pytest.mark.parametrize("command", sorted({*COMMANDS} - ELSEWHERE))
def test_a_success_gives_a_result(command, tiny_bundle, tmp_path):
    if command == "convert":
        from deploy.models import find_system
        from deploy.models.base import load_model
        from deploy.resolve import resolve_recipe

        recipe = resolve_recipe("riformer", {"variant": ("test", "tiny")})
        reference = load_model(find_system("riformer"), recipe, records.Target.ONNXRUNTIME).reference
        torch.save(reference.state_dict(), tmp_path / "w.pth")
    result = effdeploy(command, *arguments(command, tiny_bundle, tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    found = events(result.stdout)
    (last,) = [event for event in found if event["event"] == "result"][-1:]
    assert last["type"][0].isupper()
    assert isinstance(last["record"], dict)
    assert not [event for event in found if event["event"] == "error"]


WRONG = {
    "export": ["riformr"], "verify": ["nowhere"], "bench": ["nowhere"], "report": ["nowhere"], "inspect": ["nowhere"],
    "convert": ["none.pth", "o.pth", "--system", "riformr"], "diff": ["nowhere", "nowhere"], "lint": ["nowhere"],
    "build": ["nowhere", "--backend", "onnxruntime"], "show": ["nowhere", "photo.jpg"],
    "package": ["nowhere", "--triton", "models"], "run": ["nowhere", "photo.jpg"],
    "bisect": ["nowhere"], "eval": ["nowhere"], "tune": ["riformr"],
}  # fmt: skip


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"list", "doctor"}))
def test_a_failure_ends_with_an_error(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = effdeploy(command, *WRONG[command], "--json")
    last = events(result.stdout)[-1]
    assert (last["event"], last["exit_code"]) == ("error", result.exit_code)
    assert result.exit_code > 2
    assert last["message"]
    assert last["hint"]
    assert f"error: {last['message'].splitlines()[0]}" in result.stderr


@pytest.mark.parametrize("words", [[command, "--no-such-option"] for command in COMMANDS] + [["exprt"], []])
def test_wrong_usage_is_an_error_too(words):
    result = effdeploy(*words, "--json")
    assert result.exit_code == 2
    (only,) = events(result.stdout)
    assert (only["event"], only["exit_code"]) == ("error", 2)
    assert "Usage" in result.stderr
    assert effdeploy(*words).stdout.count('"event"') == 0  # people get no objects


def test_a_defect_is_an_error_too(capsys):
    with pytest.raises(KeyError), session(as_json=True, quiet=False, log=None):
        raise KeyError("gone")
    (only,) = events(capsys.readouterr().out)
    assert (only["event"], only["type"], only["exit_code"]) == ("error", "KeyError", 1)


def test_an_interruption_is_an_error_too(tmp_path):
    command = [sys.executable, "-m", "deploy", "export", "riformer", "--variant", "tiny", "--seconds", "60", "--json"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".b.partial-*/10-traced.onnx")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    last = events(stdout)[-1]
    assert (last["event"], last["exit_code"], process.returncode) == ("error", 130, 130)


def test_a_dry_run_is_a_plan(tmp_path):
    result = effdeploy(
        "export", "riformer", "--variant", "tiny", "--dry-run", "--json", "--out", tmp_path / "b", "--until", "trace"
    )
    last = events(result.stdout)[-1]
    assert last["type"] == "PlanRecord"
    assert records.from_json(answers.PlanRecord, last["record"]).stages[-1].stage is records.Stage.TRACE


def test_an_undocumented_event_is_noticed():
    with pytest.raises(AssertionError):
        events('{"event": "surprise"}')
    with pytest.raises(json.JSONDecodeError):
        events("[1/7] model")
