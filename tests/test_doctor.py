"""``doctor`` on this machine and on installations that are broken on purpose; the form of the known-bad table."""

from __future__ import annotations

import json
import os
import re

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from support import effdeploy

from deploy.doctor import CPU_FEATURES, cpu_flags, disk_check, examine, torch_against_driver, torch_cuda
from deploy.errors import BundleError
from deploy.known_bad import TABLE, known_bad, matching, read_table, traps_of_build


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts the metadata of a distribution in front of everything installed."""

    def put(name, version, *requires):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")

    monkeypatch.syspath_prepend(tmp_path)
    return put


def named(diagnosis, name):
    return [check for check in diagnosis.checks if check.name == name]


def test_this_installation_can_run():
    result = effdeploy("doctor")
    assert result.exit_code == 0, result.stdout + result.stderr
    for words in (
        "python",
        "torch",
        "backend onnxruntime: builds and runs",
        "cpu:",
        "gpu:",
        "disk for bundles",
        "disk for stages and downloads (EFFDEPLOY_CACHE)",
        os.environ["EFFDEPLOY_CACHE"],
        "can run",
    ):
        assert words in result.stdout
    events = [json.loads(line) for line in effdeploy("doctor", "--json").stdout.splitlines()]
    record = next(e["record"] for e in events if e["event"] == "result")
    assert record["ok"]
    assert {check["state"] for check in record["checks"]} <= {"good", "warn", "bad"}


def test_every_backend_that_cannot_be_used_says_what_to_do(tmp_path):
    for check in examine(tmp_path).checks:
        if check.name.startswith("backend") and check.state != "good":
            assert "pip install" in check.statement or "--backend" in check.statement


def test_both_wheels_of_onnxruntime_are_noticed(install, tmp_path):
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(name, "1.31.0")
    found = named(examine(tmp_path), "onnxruntime wheels")
    assert [check.state for check in found] == ["warn"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found[0].hint


def test_one_wheel_is_no_finding(tmp_path):
    assert named(examine(tmp_path), "onnxruntime wheels") == []


def test_a_missing_or_old_requirement_stops_the_default_road(install):
    install("effdeploy", "0.0.1", "surely-not-installed>=1", "numpy>=99", "torch; extra == 'never'")
    result = effdeploy("doctor")
    assert result.exit_code == 12
    assert "surely-not-installed is missing" in result.stderr
    assert "numpy" in result.stderr
    assert "torch" not in result.stderr


def test_a_tensorrt_stub_without_libraries_is_noticed(install, tmp_path):
    install("tensorrt", "11.1.0.106")
    diagnosis = examine(tmp_path)
    assert diagnosis.ok
    assert "neither is there" in named(diagnosis, "tensorrt wheel")[0].statement
    assert {"gridsample-deformable-attention", "precision-flags-11"} <= {trap.id for trap in diagnosis.known_bad}
    shown = effdeploy("doctor")
    assert "https://github.com/NVIDIA/TensorRT/issues/4813" in shown.stdout
    assert "builds engines" not in "".join(c.statement for c in named(diagnosis, "backend tensorrt"))


def test_tensorrt_under_its_other_names_meets_the_table(install, tmp_path):
    install("tensorrt-cu13", "11.1.0.106")
    diagnosis = examine(tmp_path)
    assert named(diagnosis, "tensorrt wheel") == []
    assert "segformer-batch" in {trap.id for trap in diagnosis.known_bad}


# ------------------------------------------------------------------------------------------------------- the table


def test_every_entry_has_its_form():
    table = known_bad()
    assert len({entry.id for entry in table}) == len(table) >= 10
    for entry in table:
        assert re.fullmatch(r"[a-z0-9.\-]+", entry.id)
        assert entry.threads
        assert entry.seen
        assert entry.symptom.endswith(".")
        assert entry.workaround
        assert len(str(SpecifierSet(entry.versions))) > 0
        for link in entry.threads:
            assert re.fullmatch(r"https://github\.com/[\w.\-]+/[\w.\-]+/(issues|pull)/\d+", link), link
        for text in entry.seen:
            if re.fullmatch(r"\d+(\.\d+)+", text):
                assert SpecifierSet(entry.versions).contains(Version(text)), (entry.id, text)


@pytest.mark.parametrize(
    "change",
    [
        {"effect": "odd"},
        {"versions": "about 10"},
        {"threads": "one"},
        {"sm": ["eighty"]},
        {"more": 1},
        {"symptom": None},
    ],
)
def test_a_wrong_entry_is_refused(change, tmp_path):
    entry = yaml.safe_load(TABLE.read_text(encoding="utf-8"))[0]
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump([entry]))
    assert read_table(path)[0].id == entry["id"]
    path.write_text(yaml.safe_dump([{**entry, **change}]))
    with pytest.raises(BundleError, match=r"table\.yaml cannot be read"):
        read_table(path)


@pytest.mark.parametrize("text", ["", "[", "just words", "{a: 1}"])
def test_a_broken_table_is_refused(text, tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(BundleError):
        read_table(path)


@pytest.mark.parametrize(
    ("packages", "options", "met"),
    [
        ({"tensorrt": "11.1.0.106"}, {}, True),
        ({"tensorrt": "10.13.3.9"}, {}, False),
        ({"tensorrt-rtx": "11.1"}, {}, False),
        ({}, {}, False),
        ({"tensorrt": "no version"}, {}, False),
        ({"tensorrt": "11.1.0.106"}, {"operators": {"Conv", "GridSample"}}, True),
        ({"tensorrt": "11.1.0.106"}, {"operators": {"Conv"}}, False),
    ],
)
def test_versions_and_operators_decide(packages, options, met):
    assert ("gridsample-deformable-attention" in {e.id for e in matching(packages, **options)}) is met


def test_the_gpu_decides_where_the_table_names_one():
    def ids(**options):
        return {entry.id for entry in matching({"tensorrt": "10.16.1.11"}, **options)}

    assert "fused-attention-blackwell" in ids(sm=120)
    assert "fused-attention-blackwell" not in ids(sm=89)
    assert "fused-attention-blackwell" in ids()


# ---------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("build", "driver", "gpu", "state"),
    [
        (None, None, False, "good"),
        (None, (13, 0), True, "warn"),
        ((13, 0), None, False, "good"),
        ((13, 0), (12, 8), True, "warn"),
        ((12, 8), (13, 0), True, "good"),
        ((12, 8), (12, 4), True, "good"),
    ],
)
def test_torch_is_held_against_the_driver(build, driver, gpu, state):
    check = torch_against_driver(build, driver, gpu)
    assert check.state == state
    assert bool(check.hint) is (state == "warn")


@pytest.mark.parametrize(
    ("version", "cuda"), [("2.9.1+cu128", (12, 8)), ("2.15.0+cu130", (13, 0)), ("2.9.0+cpu", None)]
)
def test_the_cuda_of_a_torch_wheel_is_in_its_version(version, cuda):
    assert torch_cuda(version) == cuda


def test_little_space_is_said(tmp_path):
    assert disk_check("disk", tmp_path / "not" / "yet", needed=1).state == "good"
    check = disk_check("disk", tmp_path, needed=10**30)
    assert check.state == "warn"
    assert check.hint


def test_cpu_features_are_read(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma avx512f\n")
    assert {"avx2", "avx512f"} <= cpu_flags(path) & set(CPU_FEATURES)
    path.write_text("Features\t: fp asimd i8mm\n")
    assert cpu_flags(path) == {"fp", "asimd", "i8mm"}
    assert cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(
    ("backend", "version", "operators", "model", "sm", "found"),
    [
        ("tensorrt", "11.1.0", {"GridSample"}, "", (), {"gridsample-deformable-attention", "gridsample-opset-20"}),
        ("tensorrt", "10.12", {"GridSample"}, "", (), set()),
        ("tensorrt", "11.1.0", {"Conv"}, "", (), set()),  # entries about any graph are for doctor
        ("tensorrt", "10.14", {"Conv"}, "rtdetr r18vd", (110,), {"rtdetr-thor"}),
        ("tensorrt", "10.14", {"Conv"}, "rtdetr r18vd", (89,), set()),
        ("tensorrt", "10.14", {"Conv"}, "riformer s12", (110,), set()),
        ("tensorrt", "10.14", {"Conv"}, "rtdetr r18vd", (89, 110), {"rtdetr-thor"}),
        ("onnxruntime", "11.1.0", {"GridSample"}, "", (), set()),
    ],
)
def test_which_traps_a_build_is_warned_of(backend, version, operators, model, sm, found, monkeypatch):
    monkeypatch.setattr("deploy.known_bad._installed", lambda name: {name: version})
    traps = traps_of_build(backend, operators=operators, model=model, sm=sm)
    assert {trap.id for trap in traps} == found
