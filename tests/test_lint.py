"""``effdeploy lint``: its rules on a corpus of small graphs, its command line, and how it takes damaged files."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import onnx
import pytest
import yaml
from lint_corpus import CASES, MADE, TEXTS, text_model, with_weight, written
from packaging.specifiers import SpecifierSet
from support import effdeploy
from test_completion import complete

import deploy
from deploy.artifacts import read_manifest
from deploy.console import Console, Mode
from deploy.errors import BundleError, EffdeployError, LintError, PrecisionError, RecipeError, UnknownNameError
from deploy.known_bad import known_bad
from deploy.linting import table as tables
from deploy.linting.build import check_before_build
from deploy.linting.checks import CHECKS
from deploy.linting.run import lint_file
from deploy.linting.table import Goal, goal_of_backend, parse_goals, read_table, table
from deploy.linting.view import View
from deploy.precision.qdq import lint as quantisation_lint
from deploy.records import LintRecord, Target, from_json, to_json
from deploy.report import render
from deploy.report.lint import lint_blocks

ALL = parse_goals(())
SILENT = Console(Mode.SILENT)


def rules_of(record: LintRecord) -> set[str]:
    """The rules that a file breaks; those of known-bad versions, which come and go with that table, have their test."""
    return {finding.rule for finding in record.findings if not finding.known_bad}


def test_every_graph_breaks_exactly_its_rules(tmp_path):
    wrong = {}
    for name, case in CASES.items():
        (tmp_path / name).mkdir()
        record = lint_file(case.write(tmp_path / name), ALL)
        if (found := rules_of(record)) != case.rules:
            wrong[name] = (sorted(found - case.rules), sorted(case.rules - found))
        assert not [note for note in record.notes if "could not be checked" in note]
        assert from_json(LintRecord, to_json(record)) == record
    assert wrong == {}


def test_every_rule_has_a_graph_and_a_near_miss():
    """A near miss holds an operator that the rule looks at and is let be; presence has none but other operators."""
    used = {rule for case in CASES.values() for rule in case.rules}
    assert {rule.id for rule in table().rules} - used == set(TRAPS)
    operators = _operators()
    for rule in table().rules:
        near = [n for n, c in CASES.items() if rule.id not in c.rules and operators[n] & {*rule.operators}]
        assert near or not rule.operators or rule.check in ("present", "together"), rule.id


def _operators() -> dict[str, set[str]]:
    """Graph of the corpus -> the operators of its main graph."""
    found = {name: set() for name in CASES}
    for item in yaml.safe_load(TEXTS.read_text(encoding="utf-8")):
        model = text_model(item["graph"], item["opset"], tuple(item.get("domains", ())))
        found[item["name"]] = {node.op_type for node in model.graph.node}
    return found


TRAPS = {
    "gridsample-deformable-attention": ("grid16", "resize"),
    "gridsample-opset-20": ("grid16", "grid-opset-16"),
    "fused-attention-blackwell": ("att-pattern", "matmul"),
    "vit-int8-slow": ("vit-int8", "qdq"),
}


def test_rules_of_known_bad_versions_take_them_from_that_table(tmp_path):
    rules = {rule.id: rule for rule in table().rules if rule.known_bad}
    assert set(rules) == set(TRAPS)
    traps = {trap.id: trap for trap in known_bad()}
    for name, (hit, missed) in TRAPS.items():
        rule, trap = rules[name], traps[rules[name].known_bad]
        assert (rule.warnings, rule.what, rule.errors) == ({trap.package: trap.versions}, trap.symptom, {})
        for case, expected in ((hit, True), (missed, False)):
            view = View.of(CASES[case].write(tmp_path))
            about = not rule.opsets or SpecifierSet(rule.opsets).contains(str(view.opsets[""]))
            assert bool(list(CHECKS[rule.check](view, rule)) if about else ()) is expected, (name, case)


def test_versions_decide(tmp_path):
    path = CASES["squeeze-noaxes"].write(tmp_path)
    for version, found in (("10.16.1.11", {"squeeze-axes"}), ("11.4", {"squeeze-axes"}), ("11.5", set())):
        assert rules_of(lint_file(path, (Goal(runtime="tensorrt", version=version),))) == found
    assert rules_of(lint_file(path, (Goal(runtime="tensorrt_rtx", version="1.7"),))) == set()


# Scales and integers behind another operator: the stage writes none of them, so it does not follow them.
FOLDED = {
    "qdq-folded-scale",
    "q-int8-reshape",
    "qdq-fp16",
    "qdq-fp16-sub",
    "scale-axis-conv",
    "scale-axis-ok",
    "q-f8",
    "q-f8-e5",
}


def test_the_quantisation_stage_refuses_nothing_that_the_table_passes(tmp_path):
    """Two readings of Q/DQ, one for files that effdeploy quantised and one for any, come to the same."""
    refused: dict[str, str] = {}
    passed = set()
    for name, case in CASES.items():
        model = onnx.load(case.write(tmp_path), load_external_data=False) if name not in MADE else None
        if model is None or name in FOLDED or not any("Quantize" in node.op_type for node in model.graph.node):
            continue
        if not rules_of(lint_file(tmp_path / "model.onnx", parse_goals(["tensorrt==11.4"]))):
            passed.add(name)
        refused |= _refused(name, model)
    assert {name: refused[name] for name in passed & set(refused)} == {}
    assert len(refused) > 5


def _refused(name: str, model: onnx.ModelProto) -> dict[str, str]:
    try:
        quantisation_lint(model, Target.TENSORRT)
    except PrecisionError as error:
        return {name: error.message}
    return {}


def test_goals_as_they_are_typed():
    assert [str(goal) for goal in parse_goals(["tensorrt==11.4", "tensorrt-rtx", "onnxruntime==1.22"])] == [
        "tensorrt==11.4", "tensorrt_rtx==1.7", "onnxruntime==1.22",
    ]  # fmt: skip
    assert [str(goal) for goal in parse_goals(["tensorrt"])] == ["tensorrt==10.16", "tensorrt==11.4"]
    assert len(ALL) == 4


@pytest.mark.parametrize(
    ("text", "error", "message", "hint"),
    [
        ("tensort", UnknownNameError, "no runtime 'tensort'", "did you mean 'tensorrt'"),
        ("tensorrt==eleven", RecipeError, "expected a version such as 11.4", "--for tensorrt==11.4"),
        ("tensorrt==8.6", RecipeError, "the rules cover tensorrt >=10.12,<12", "--for tensorrt==11.4"),
        ("tensorrt>=11", RecipeError, "expected a runtime or RUNTIME==VERSION", "--for tensorrt==11.4"),
        ("tensorrt==", RecipeError, "expected a version", "--for tensorrt==11.4"),
    ],
)
def test_goals_that_cannot_be(text, error, message, hint):
    with pytest.raises(error, match=message.replace(">", r"\>")) as caught:
        parse_goals([text])
    assert hint in caught.value.hint


def test_the_command_line(tmp_path):
    path = CASES["topk3841"].write(tmp_path)
    result = effdeploy("lint", path)
    assert result.exit_code == LintError.exit_code == 23
    assert all(word in result.stdout for word in ("topk-k", "tensorrt==10.16", "onnxruntime==1.31", "io-int64", "3841"))
    assert "https://github.com/NVIDIA/TensorRT/issues/4244" in result.stdout
    assert "exit code 23 (LintError)" in result.stderr
    assert effdeploy("lint", path, "--for", "onnxruntime").exit_code == 0
    assert effdeploy("lint", path, "--for", "tensorrt==11.4", "--for", "onnxruntime").exit_code == 23


def test_strict_counts_warnings(tmp_path):
    path = CASES["resize-cubic"].write(tmp_path)
    assert effdeploy("lint", path, "--for", "tensorrt==11.4").exit_code == 0
    result = effdeploy("lint", path, "--for", "tensorrt==11.4", "--strict")
    assert result.exit_code == 23
    assert "resize-cubic" in result.stderr


def test_json_holds_the_findings(tmp_path):
    result = effdeploy("lint", CASES["topk3841"].write(tmp_path), "--for", "tensorrt==11.4", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    record = from_json(LintRecord, next(e["record"] for e in events if e["event"] == "result"))
    assert record.findings[0].rule == "topk-k"
    assert record.findings[0].severities == {"tensorrt==11.4": "error"}
    assert events[-1]["exit_code"] == 23


def test_the_shell_completes_goals(tmp_path):
    assert complete("lint model.onnx --for tensorrt==1") == ["tensorrt==11.4", "tensorrt==10.16"]
    (tmp_path / "model.onnx").touch()
    assert complete("lint m", cwd=str(tmp_path)) == ["model.onnx"]


def test_the_api_raises_with_the_findings(tmp_path):
    with pytest.raises(LintError) as caught:
        deploy.lint(CASES["topk3841"].write(tmp_path), for_="tensorrt==11.4,onnxruntime")
    assert rules_of(caught.value.record) == {"topk-k", "io-int64"}
    assert deploy.lint(CASES["relu-op26"].write(tmp_path), for_=["onnxruntime"]).findings == ()


def test_what_is_no_model_is_said(tmp_path):
    (tmp_path / "cut.onnx").write_bytes(CASES["ln"].write(tmp_path).read_bytes()[:40])
    for name, code in (("cut.onnx", 10), ("nowhere.onnx", 19), (".", 19)):
        result = effdeploy("lint", tmp_path / name)
        assert result.exit_code == code, name
        assert "hint:" in result.stderr


def test_damaged_files_end_in_errors_of_ours_or_findings(tmp_path):
    """Four hundred mutations; ONNX's own inference must survive them too."""
    chance = random.Random(0)
    sources = [CASES[name].write(tmp_path).read_bytes() for name in ("ln", "qdq", "if", "loop", "att16", "gelu-split")]
    refused = 0
    for _ in range(400):
        data = bytearray(chance.choice(sources))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path = tmp_path / "m.onnx"
        path.write_bytes(bytes(data))
        try:
            lint_file(path, ALL)
        except EffdeployError:
            refused += 1
    assert 0 < refused < 400


def test_weights_beside_the_file_are_read_only_for_their_values(tmp_path, monkeypatch):
    from lint_corpus import with_data

    path = with_data(tmp_path, 256)
    read = []
    monkeypatch.setattr(onnx.numpy_helper, "to_array", lambda tensor, base="": read.append(tensor.name) or np.zeros(1))
    lint_file(path, ALL)
    assert read == ["w", "w"]  # the range and the numbers; nothing else


def test_a_rule_that_cannot_be_applied_is_said(tmp_path, monkeypatch):
    def broken(view, rule):
        raise IndexError("no such input")
        yield

    monkeypatch.setitem(CHECKS, "weight_nan", broken)
    record = lint_file(written(with_weight(np.zeros(4, np.float32)), tmp_path), ALL)
    assert record.notes == ("weight-nan could not be checked: IndexError: no such input",)


def test_a_build_stops_at_errors_and_goes_on_in_a_version_that_nobody_checked(tmp_path, monkeypatch):
    path = CASES["topk3841"].write(tmp_path)
    monkeypatch.setattr(tables, "_installed", lambda backend: "11.4.0.106")
    with pytest.raises(LintError, match=r"TopK.*K is 3841"):
        check_before_build(path, "tensorrt", "auto", SILENT)
    told = check_before_build(path, "tensorrt", "auto", SILENT, stop=False)
    assert rules_of(told) == {"topk-k", "io-int64"}
    assert told.count("error") == 1
    monkeypatch.setattr(tables, "_installed", lambda backend: "13.0")
    assert goal_of_backend("tensorrt") == (Goal(runtime="tensorrt", version="11.4"), False)
    assert rules_of(check_before_build(path, "tensorrt", "auto", SILENT)) == {"topk-k", "io-int64"}
    assert check_before_build(path, "no-such-backend", "auto", SILENT) is None


def test_rules_about_cpu_kernels_are_for_the_cpu(tmp_path):
    path = CASES["bf16-add"].write(tmp_path)
    assert rules_of(check_before_build(path, "onnxruntime", "cuda", SILENT)) == set()
    with pytest.raises(LintError, match="bfloat16"):
        check_before_build(path, "onnxruntime", "cpu", SILENT)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx"])
def test_build_stops_before_the_builder(backend, tmp_path):
    if backend == "tensorrt_rtx":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path = CASES["add-mixed"].write(tmp_path)
    result = effdeploy("build", path, "--backend", backend, "--batch", 4)
    assert result.exit_code == 23, result.stderr
    assert "types-disagree" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
    result = effdeploy("build", path, "--backend", backend, "--batch", 4, "--lint", "warn")
    assert result.exit_code == 13, result.stderr  # the runtime's own refusal
    assert "types-disagree" in result.stderr + result.stdout


def test_what_a_build_found_is_in_its_record_and_its_warnings(tmp_path):
    path = CASES["unused-in"].write(tmp_path)
    result = effdeploy("build", path, "--backend", "onnxruntime", "--batch", 4, "--json")
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (record,) = [e["record"]["engine"]["lint"] for e in events if e["event"] == "result"]
    assert [finding["rule"] for finding in record["findings"]] == ["unread-input"]
    assert any("unread-input" in e["message"] for e in events if e["event"] == "warning")


def test_an_export_is_linted_and_the_report_shows_it(tmp_path):
    result = effdeploy("export", "riformer", "--variant", "tiny", "--until", "engine", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    run = read_manifest(tmp_path / "b")
    (engine,) = run.engines
    assert engine.lint.goals == (str(goal_of_backend("onnxruntime")[0]),)
    assert engine.lint.findings == ()
    assert f"Lint for {engine.lint.goals[0]}: clean" in render([run], tmp_path)[1].read_text()
    finding = lint_file(CASES["resize-cubic"].write(tmp_path), parse_goals(["tensorrt==11.4"]))
    (block,) = lint_blocks([dataclasses.replace(engine, lint=finding)] * 2)
    assert "Lint for tensorrt==11.4: 1 findings" in str(block)
    assert "resize-cubic" in str(block)
    assert lint_blocks([dataclasses.replace(engine, lint=None)]) == ()


WRONG_RULES = {
    "check": ("no check", {"check": "no_such"}),
    "runtime": ("no runtime", {"errors": {"tensorflow": ">=1"}}),
    "versions": ("Invalid specifier", {"errors": {"tensorrt": "newer"}}),
    "source": ("what, fix, source", {"source": ""}),
    "field": ("unexpected|unknown|severity", {"severity": "error"}),
    "trap": ("no entry 'none'", {"known_bad": "none"}),
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_a_damaged_table_is_an_error(case, tmp_path):
    message, change = WRONG_RULES[case]
    rule = {"id": "a", "check": "present", "errors": {"tensorrt": ">=10"}, "what": "a", "fix": "b", "source": "c"}
    runtimes = {"tensorrt": {"covered": ">=10", "shown": ["11.4"]}}
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"runtimes": runtimes, "rules": [rule]}))
    assert len(read_table(path).rules) == 1
    path.write_text(yaml.safe_dump({"runtimes": runtimes, "rules": [{**rule, **change}]}))
    with pytest.raises(BundleError, match=message):
        read_table(path)
    path.write_text(yaml.safe_dump({"runtimes": runtimes, "rules": [rule, rule]}))
    with pytest.raises(BundleError, match="two rules have one id"):
        read_table(path)


def test_every_source_is_a_public_page():
    assert all(rule.source.startswith("https://") for rule in table().rules)
    assert {rule.check for rule in table().rules} == set(CHECKS)  # no predicate without a rule
