"""Reports: complete, honest about what is missing, safe with foreign strings, the same bytes for the same record."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy import summary, units
from deploy.errors import BundleError, StorageError, UnknownNameError
from deploy.records import DecisionCheck, Precision, RunRecord, from_json, to_json
from deploy.report import render
from deploy.report.markdown import escape
from deploy.report.page import SECTIONS, failures_of, run_page
from deploy.report.provenance import export_command, polygraphy_commands

from . import sample

RUNS: dict[str, Callable[[], RunRecord]] = {
    "full": sample.full_run,
    "failed": sample.failed_run,
    "stopped": sample.stopped_run,
    "ahead of time": sample.ahead_of_time_run,
    "broken numbers": sample.broken_numbers_run,
    "hostile": sample.hostile_run,
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Collects text, tags and attributes, and complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def html_of(run: RunRecord, folder: Path) -> str:
    (path,) = render([run], folder, formats=("html",))
    return path.read_text(encoding="utf-8")


def markdown_of(run: RunRecord, folder: Path) -> str:
    (path,) = render([run], folder, formats=("md",))
    return path.read_text(encoding="utf-8")


def test_the_reader_sees_unbalanced_pages() -> None:
    for broken in ("<p><b>x</p></b>", "<div>", "</div>"):
        with pytest.raises(AssertionError):
            Reader(broken)


@pytest.mark.parametrize("name", RUNS)
def test_html_is_whole_offline_and_small(name: str, tmp_path: Path) -> None:
    text = html_of(RUNS[name](), tmp_path)
    page = Reader(text)
    assert "script" not in page.tags
    assert not {"iframe", "object", "embed", "link", "img"} & set(page.tags)
    for _, attribute, value in page.attributes:
        assert not attribute.startswith("on")
        if attribute in ("src", "href", "data", "action", "xlink:href"):
            assert value.startswith("#"), value
    assert "@import" not in text
    assert "url(" not in text
    ids = [value for _, attribute, value in page.attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, attribute, value in page.attributes if attribute == "href"}
    assert links <= set(ids)
    assert len(text.encode()) < 400_000
    assert sample.STATEMENT in page.text


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("form", ["html", "md"])
def test_same_record_same_bytes_and_again_from_the_manifest(name: str, form: str, tmp_path: Path) -> None:
    run = RUNS[name]()
    manifest = json.dumps(to_json(run), sort_keys=True)  # sorted, so the order of every mapping is another one
    again = from_json(RunRecord, json.loads(manifest))
    files = []
    for index, each in enumerate((run, run, again)):
        folder = tmp_path / str(index)
        folder.mkdir()
        files += render([each], folder, formats=(form,))
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_other_processes_write_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom deploy.report import render\nfrom report import sample\n"
        "render([sample.full_run()], Path(sys.argv[2]))\n"
    )
    render([sample.full_run()], tmp_path)
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        arguments = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(folder)]
        subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for name in ("report.html", "report.md"):
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_every_section_is_on_both_pages(name: str, tmp_path: Path) -> None:
    run = RUNS[name]()
    page = Reader(html_of(run, tmp_path))
    markdown = markdown_of(run, tmp_path)
    titles = [section(run).title for section in SECTIONS]
    positions = [markdown.index(f"\n## {title}\n") for title in titles]
    assert positions == sorted(positions)
    for title in titles:
        assert title in page.text


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("full", summary.PASSED), ("failed", summary.FAILED), ("broken numbers", summary.FAILED),
        ("stopped", summary.INCOMPLETE), ("ahead of time", summary.PASSED_UNRUN),
    ],
)  # fmt: skip
def test_the_verdict_comes_first_in_words(name: str, status: str, tmp_path: Path) -> None:
    run = RUNS[name]()
    text = html_of(run, tmp_path)
    heading = text.index("<h1>")
    assert status in text[heading : heading + 200]
    assert heading < text.index(run.verdict) < text.index(run.model.weights.statement) < text.index("<section")
    assert markdown_of(run, tmp_path).startswith(f"# {status}: ")
    assert f"<title>{status}: " in text


def test_a_failure_is_named_before_everything_else(tmp_path: Path) -> None:
    run = sample.failed_run()
    text = html_of(run, tmp_path)
    why = "max relative 0.31 &gt; 0.02"
    assert text.index("What failed") < text.index(why) < text.index('class="tiles"')
    page = Reader(text)
    assert "✗ FAIL: max relative 0.31 > 0.02; top-1 84.0 % < 100 %" in page.text
    assert "FAIL 0.310 of 0.02" in page.text
    assert "✗ 0.310" in page.text
    passed = Reader(html_of(sample.full_run(), tmp_path))
    assert "FAIL" not in passed.text
    assert "What failed" not in passed.text


def test_a_wrong_choice_and_a_drift_are_named_as_failures() -> None:
    run = sample.full_run(ok=False, verdict="the deploy form is off; parity.max_drift allows 0.1")
    assert run.parity is not None
    assert failures_of(run) == (run.verdict,)
    wrong = DecisionCheck(
        stage="fp16", module="blocks.1", what="merges", images=8, flips=3, margin=0.4, limit=0.01, same=0.9, ok=False
    )
    run = dataclasses.replace(run, parity=dataclasses.replace(run.parity, decisions=(wrong,)))
    (told,) = failures_of(run)
    assert told == "fp16, blocks.1: PyTorch preferred its own merges by up to 0.400 (limit 0.0100)"


def test_an_audit_that_fails_is_named(tmp_path: Path) -> None:
    run = sample.full_run()
    audit = dataclasses.replace(run.engines[0].audit, ok=False, statement="asked fp16; all kernels compute in fp32")
    run = dataclasses.replace(run, engines=(dataclasses.replace(run.engines[0], audit=audit),))
    text = html_of(run, tmp_path)
    assert text.index("What failed") < text.index("all kernels compute in fp32") < text.index("<section")
    assert "✗ FAIL: asked fp16; all kernels compute in fp32" in Reader(text).text


def test_foreign_strings_stay_strings(tmp_path: Path) -> None:
    text = html_of(sample.hostile_run(), tmp_path)
    page = Reader(text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert "{{ 7*7 }}" in page.text  # shown, not computed
    assert "49" not in re.findall(r"\|(\S+)\|", page.text)
    assert "\x1b" not in text
    markdown = markdown_of(sample.hostile_run(), tmp_path)
    outside_code = re.sub(r"^```json\n.*?^```$", "", markdown, flags=re.S | re.M)
    assert re.search(r"(?<!\\)<script", outside_code) is None
    assert "\x1b" not in outside_code


@pytest.mark.parametrize("name", [n for n in RUNS if n != "hostile"])
def test_templates_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    for text in (html_of(RUNS[name](), tmp_path), markdown_of(RUNS[name](), tmp_path)):
        for leftover in ("{{", "}}", "{%", "Undefined", "Markup(", "Cell(", "None", "object at 0x"):
            assert leftover not in text


@pytest.mark.parametrize("name", RUNS)
def test_markdown_tables_have_as_many_cells_as_columns(name: str, tmp_path: Path) -> None:
    tables = 0
    lines = markdown_of(RUNS[name](), tmp_path).splitlines()
    for above, rule in itertools.pairwise(lines):
        if re.fullmatch(r"\|( -{3}:? \|)+", rule):
            tables += 1
            width = rule.count("|")
            body = lines[lines.index(rule, lines.index(above)) :]
            for row in (above, *(r for r in body[: body.index("") if "" in body else None])):
                assert len(re.findall(r"(?<!\\)\|", row)) == width, row
    assert tables >= 4


def test_spot_checks_of_figures(tmp_path: Path) -> None:
    run = sample.full_run()
    page = Reader(html_of(run, tmp_path)).text
    assert run.bench is not None
    assert run.parity is not None
    for c in run.bench.latencies:
        for value in (c.p50, c.p90, c.p95, c.p99, c.mean):
            assert units.milliseconds(value) in page
    for comparison in run.parity.comparisons:
        assert units.number(comparison.max_relative) in page
        assert units.number(comparison.mean_abs) in page
    for words in ("1.08x (1.05 to 1.09)", "40.2 %", "50 → 25", "237 → 217", "41,200", "11,915,176 → 11,900,840"):
        assert words in page
    for name, size, sha256 in summary.files(run):
        assert f"{name} {units.size(size)} {sha256}" in page


def test_every_number_on_the_page_comes_from_the_record(tmp_path: Path) -> None:
    """Change every figure of the record: one that stays on the page would be one that the report made up."""
    data = to_json(sample.full_run())
    before, once, twice = (  # two changes, since a changed figure may by chance look like another one
        set(re.findall(r"(?<![\w.-])\d+\.\d+(?:e-?\d+)?", _figures(markdown_of(from_json(RunRecord, d), tmp_path))))
        for d in (data, _scaled(data), _scaled(_scaled(data)))
    )
    quoted = set(re.findall(r"\d+\.\d+", " ".join(_strings(data))))  # sentences of the record keep their figures
    assert len(before - quoted) > 60
    assert not (before & once & twice) - quoted


def _figures(markdown: str) -> str:
    """Return the page up to its recipe, which the change leaves alone, without the table of its limits."""
    head, _, tail = markdown.partition("## Recipe")[0].partition("**Limits of the recipe**")
    return head + tail.partition("<details>")[2]


def _strings(data: object) -> list[str]:
    if isinstance(data, dict):
        return [s for value in data.values() for s in _strings(value)]
    if isinstance(data, list):
        return [s for value in data for s in _strings(value)]
    return [data] if isinstance(data, str) else []


def _scaled(data: object) -> object:
    if isinstance(data, dict):
        return {k: v if k in ("recipe", "tolerances", "schema_version") else _scaled(v) for k, v in data.items()}
    if isinstance(data, list):
        return [_scaled(v) for v in data]
    if isinstance(data, float):
        return data * 0.37219
    return int(data * 3.7219) if isinstance(data, int) and not isinstance(data, bool) and data > 1000 else data


def test_missing_stages_are_said_not_drawn(tmp_path: Path) -> None:
    text = html_of(sample.stopped_run(), tmp_path)
    page = Reader(text)
    assert page.text.count("the run stopped after trace (--until trace)") >= 7
    assert "svg" not in page.tags
    unrun = Reader(html_of(sample.ahead_of_time_run(), tmp_path))
    assert "not run: no NVIDIA GPU on this machine: the engine is for sm89" in unrun.text
    assert "no: no NVIDIA GPU on this machine" in unrun.text


def test_charts_are_there_and_speak(tmp_path: Path) -> None:
    page = Reader(html_of(sample.full_run(), tmp_path))
    assert page.tags.count("svg") == 5
    assert page.tags.count("desc") == 5
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-labelledby"]
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert all(set(label.split()) <= ids for label in labels)
    stages, leaving, entering = 5, 6, 5  # what enters the first module has no error, and no place on a logarithmic axis
    assert page.tags.count("circle") == 3 * 120 + stages + leaving + entering


def test_the_error_by_module_is_drawn_with_its_jump_and_else_says_why_not(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.parity is not None
    assert run.precision is not None
    calm = Reader(html_of(run, tmp_path)).text
    assert "3.27e-4 → 4.83e-4" in calm
    assert "jump" not in calm
    spoilt = tuple(
        dataclasses.replace(b, after=math.inf, jump=True) if b.module == "stages.2" else b for b in run.parity.modules
    )
    broken = dataclasses.replace(run, parity=dataclasses.replace(run.parity, modules=spoilt))
    page = Reader(html_of(broken, tmp_path)).text
    assert "stages.2 3.27e-4 → infinite, jump" in page
    assert "| stages.2 | 3.27e-4 | infinite | jump | stages.2/out |" in markdown_of(broken, tmp_path)
    many = tuple(dataclasses.replace(run.parity.modules[0], module=f"m{i}", after=i / 100) for i in range(40))
    long = Reader(html_of(dataclasses.replace(run, parity=dataclasses.replace(run.parity, modules=many)), tmp_path))
    assert "the 12 of 40 modules that add most" in long.text
    older = dataclasses.replace(run, parity=dataclasses.replace(run.parity, modules=()))
    assert "not measured: the record holds none. effdeploy bisect BUNDLE" in Reader(html_of(older, tmp_path)).text
    high = dataclasses.replace(older, precision=dataclasses.replace(run.precision, precision=Precision.FP32))
    assert "Error by module: not measured: the graph is in FP32" in Reader(html_of(high, tmp_path)).text


def test_broken_numbers_are_shown_as_they_are(tmp_path: Path) -> None:
    text = html_of(sample.broken_numbers_run(), tmp_path)
    page = Reader(text)
    assert "FAIL NaN of 0.02" in page.text
    assert "-infinite" in page.text
    assert "No distribution at batch 1: it needs two samples; engine: 1 call; naive: 0 calls." in page.text
    assert "Time per module: not measured" in page.text
    assert "no baseline was asked for" in page.text
    numbers = [value for _, name, value in page.attributes if name in ("x", "cx", "width", "x1", "x2", "cy", "height")]
    assert numbers
    assert all(re.fullmatch(r"-?\d+(\.\d+)?%?", value) for value in numbers)


def test_ten_thousand_samples_stay_a_small_page(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.bench is not None
    many = (*(10 + math.sin(i) for i in range(9_999)), 500.0)
    long = tuple(dataclasses.replace(c, samples=many, p50=10.0, p99=11.0) for c in run.bench.latencies)
    text = html_of(dataclasses.replace(run, bench=dataclasses.replace(run.bench, latencies=long)), tmp_path)
    page = Reader(text)
    assert len(text) < 400_000
    assert "1 beyond the axis" in page.text
    positions = [float(v[:-1]) for tag, name, v in page.attributes if tag == "circle" and name == "cx"]
    assert max(positions) <= 100


def test_calls_are_those_timed_not_those_kept(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.bench is not None
    first, *rest = run.bench.latencies
    bench = dataclasses.replace(run.bench, latencies=(dataclasses.replace(first, calls=4_321), *rest))
    page = Reader(html_of(dataclasses.replace(run, bench=bench), tmp_path)).text
    assert "engine: 4,321 calls, 120 kept; naive: 120 calls" in page
    assert "calls evenly in time" in page
    table = markdown_of(dataclasses.replace(run, bench=bench), tmp_path).partition("**Latency in figures")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| engine") or "| calls |" in line]
    assert rows[1][rows[0].index("calls")] == "4,321"


def test_near_ties_stand_beside_the_agreement(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.parity is not None
    *others, last = run.parity.comparisons
    tied = dataclasses.replace(last, top1=0.875, top1_ties=1)
    run = dataclasses.replace(run, parity=dataclasses.replace(run.parity, comparisons=(*others, tied)))
    assert "87.5 % (1 near tie)" in Reader(html_of(run, tmp_path)).text
    assert "87.5 % (1 near tie)" in markdown_of(run, tmp_path)
    assert "near tie" not in markdown_of(sample.full_run(), tmp_path)


def test_the_recipe_file_comes_before_the_options(tmp_path: Path) -> None:
    text = markdown_of(sample.full_run(), tmp_path)
    assert text.index("recipe.yaml holds every setting") < text.index("effdeploy export recipe.yaml\n")
    assert text.index("effdeploy export recipe.yaml\n") < text.index("effdeploy export riformer")
    assert "effdeploy export recipe.yaml --until trace\n" in markdown_of(sample.stopped_run(), tmp_path)


def test_large_graphs_are_cut_and_summed(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.passes is not None
    assert run.bench is not None
    many = {f"Op{i}": i + 1 for i in range(40)}
    passes = dataclasses.replace(run.passes, op_counts_before=many, op_counts=many)
    bench = dataclasses.replace(run.bench, modules={f"blocks.{i}": 0.025 for i in range(40)})
    page = Reader(html_of(dataclasses.replace(run, passes=passes, bench=bench), tmp_path))
    assert "28 other operators" in page.text
    assert f"{sum(range(1, 29))}" in page.text
    assert "28 other modules" in page.text
    assert "70.0 %" in page.text


def test_several_runs_give_a_comparison(tmp_path: Path) -> None:
    runs = [build() for build in RUNS.values()]
    html, markdown = render(runs, tmp_path)
    assert (html.name, markdown.name) == ("comparison.html", "comparison.md")
    page = Reader(html.read_text(encoding="utf-8"))
    assert "2 of 6 runs passed, 2 failed, 2 not fully judged" in page.text
    assert page.text.index("FAILED") < page.text.index("Overview")
    assert page.tags.count("svg") == 2  # latency against drift, and latency by batch
    assert "script" not in page.tags
    assert markdown.read_text(encoding="utf-8").startswith("# FAILED: ")


def test_commands_repeat_what_the_recipe_asked() -> None:
    run = sample.full_run()
    assert export_command(run) == (
        "effdeploy export riformer --variant s12 --size 224x224 --batch 1 --fp16 --weights random "
        "--backend onnxruntime --baseline naive,eager --threads 1"
    )
    assert export_command(sample.stopped_run()).endswith("--until trace")
    odd = dataclasses.replace(run, recipe={"weights": "my files/a;b.pth", "bench": "not a section"})
    assert export_command(odd) == "effdeploy export riformer --weights 'my files/a;b.pth'"
    first, second = polygraphy_commands(run).splitlines()
    assert first == "polygraphy run 10-traced.onnx --onnxrt --seed 0 --save-outputs traced.json"
    assert second.endswith(
        "--load-outputs traced.json --compare cosine_similarity --cosine-similarity-threshold 0.9995"
    )
    assert polygraphy_commands(sample.stopped_run()) == ""


def test_dynamic_axes_are_given_to_polygraphy() -> None:
    run = sample.full_run()
    assert run.trace is not None
    spec = dataclasses.replace(run.trace.inputs[0], shape=("batch", 3, 224, 224))
    batch = dataclasses.replace(run.trace.batch, opt=8, max=32)
    run = dataclasses.replace(run, trace=dataclasses.replace(run.trace, inputs=(spec,), batch=batch))
    assert "--input-shapes 'images:[8,3,224,224]'" in polygraphy_commands(run)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("0.5 of 2", "0.5 of 2"), ("stages.2_x.fc1", "stages.2_x.fc1"), ("a|b", r"a\|b"), ("<b>", r"\<b>"),
        ("1. first", r"1\. first"), ("- item", r"\- item"), ("-1.5", "-1.5"), ("# head", r"\# head"),
        ("two\nlines", "two lines"),
        ("&lt;", r"\&lt;"), ("--- rule", r"\--- rule"), ("[a](b)", r"\[a\](b)"),
    ],
)  # fmt: skip
def test_markdown_escapes(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_formats_and_faults(tmp_path: Path) -> None:
    run = sample.full_run()
    assert [p.name for p in render([run], tmp_path)] == ["report.html", "report.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]
    with pytest.raises(UnknownNameError, match="pdf"):
        render([run], tmp_path, formats=("pdf",))
    with pytest.raises(BundleError, match="no bundle"):
        render([], tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        render([run], tmp_path / "absent")


@pytest.mark.parametrize(
    ("p10", "p90", "words"),
    [(1.05, 1.2, "faster than naive"), (0.8, 0.9, "slower than naive"), (0.9, 1.1, "no clear difference from naive")],
)
def test_a_ratio_is_not_called_faster_unless_it_is(p10: float, p90: float, words: str) -> None:
    run = sample.full_run()
    assert run.bench is not None
    ratio = dataclasses.replace(run.bench.ratios[0], p10=p10, p90=p90)
    bench = dataclasses.replace(run.bench, ratios=(ratio,))
    assert run_page(dataclasses.replace(run, bench=bench)).tiles[1].note.startswith(words)


def test_unverified_passes_have_no_column_for_it(tmp_path: Path) -> None:
    run = sample.full_run()
    assert run.passes is not None
    assert "change of outputs" in markdown_of(run, tmp_path)
    bare = tuple(dataclasses.replace(p, max_abs_change=None) for p in run.passes.passes)
    passes = dataclasses.replace(run.passes, passes=bare)
    assert "change of outputs" not in markdown_of(dataclasses.replace(run, passes=passes), tmp_path)


def test_page_object_has_the_tiles() -> None:
    page = run_page(sample.full_run())
    assert [t.value for t in page.tiles] == ["31.9 ms", "1.08x", "0.00126", "24.0 MB"]
