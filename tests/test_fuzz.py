"""Recipes and command lines that nobody would write: refused with a reason and a code of their own, or planned."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import effdeploy

from deploy import api, errors
from deploy.cli import app
from deploy.recipe import Recipe

COUNT = int(os.environ.get("EFFDEPLOY_FAULTS", "25"))
CODES = {0, 2} | {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)}
CODES -= {1}  # a defect's
OFTEN = settings(
    max_examples=COUNT, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

WORDS = (
    "riformer", "tome", "tiny", "s12", "fp16", "32", "224", "-1", "0", "1:2:4", "4:2:1", "32x48", "0x0", "nan", "1e9",
    "parity", "engine", "onnxruntime", "tensorrt_rtx", "cpu", "cuda:7", "cosine=0.9", "a.b=1", "bench.rounds=x", "/",
    ".", "é", "", "[/b]",
)  # fmt: skip
TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=20).filter(lambda text: "\x00" not in text))
OPTIONS = {
    parameter.opts[0]: parameter.is_flag
    for parameter in typer.main.get_command(app).commands["export"].params
    if parameter.opts[0].startswith("--") and parameter.opts[0] not in ("--dry-run", "--help", "--log", "--out")
}
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def command_lines(draw):
    """Draw a system and up to six options with values that fit and values that do not."""
    line = [draw(st.sampled_from(("riformer", "tome", "rtdetr", "convmixer", "no such system", "")))]
    if draw(st.booleans()):
        line += ["--variant", "tiny"]
    for option in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=6)):
        line += [option] if OPTIONS[option] else [option, draw(TEXT)]
    return line


@st.composite
def recipes(draw):
    """Draw a recipe whose sections and keys exist, and whose values may be anything."""
    document = {"system": "riformer", "variant": "tiny"}
    for name in draw(st.lists(st.sampled_from(sorted(Recipe.model_fields)), max_size=5)):
        section = getattr(Recipe.model_fields[name].annotation, "model_fields", None)
        if section and draw(st.booleans()):
            document[name] = {key: draw(VALUES) for key in draw(st.lists(st.sampled_from(sorted(section)), max_size=3))}
        else:
            document[name] = draw(VALUES)
    if draw(st.booleans()):
        document[draw(TEXT)] = draw(VALUES)
    return document


def planned(*arguments: object) -> None:
    with tempfile.TemporaryDirectory() as place:
        result = effdeploy("export", *arguments, "--dry-run", "--out", f"{place}/b")
        said = result.stdout + result.stderr
        assert result.exit_code in CODES, said
        assert "Traceback" not in said
        if result.exit_code:
            assert said.strip(), f"{result.exit_code} without a reason"
        assert list(Path(place).iterdir()) == []


@OFTEN
@given(command_lines())
def test_command_lines(line):
    planned(*line)


@OFTEN
@given(recipes())
def test_recipes(document):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(document, file, allow_unicode=True)
        file.flush()
        planned(file.name)


def test_a_defect_would_be_seen(monkeypatch):
    """The negative control: an exception that is no refusal gets through."""
    monkeypatch.setattr(api, "plan", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        planned("riformer")
