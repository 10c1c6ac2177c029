"""Bundles: what is in the way, and what another version wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report import sample

from deploy.artifacts import MANIFEST, publish, read_manifest, run_folder, write_json, write_manifest
from deploy.errors import BundleError, StorageError
from deploy.records import SCHEMA_VERSION, to_json


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    write_manifest(sample.full_run(), tmp_path)
    assert read_manifest(tmp_path) == sample.full_run()


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_a_manifest_of_another_version_is_refused_by_its_version(version: Any, tmp_path: Path) -> None:
    newer = {**to_json(sample.full_run()), "schema_version": version, "effdeploy": "9.1", "field_of_tomorrow": 1}
    write_json(tmp_path / MANIFEST, newer)
    with pytest.raises(BundleError, match=f"schema_version {version!r}, expected {SCHEMA_VERSION}") as caught:
        read_manifest(tmp_path)
    assert "effdeploy 9.1" in caught.value.hint
    assert "export again" in caught.value.hint


@pytest.mark.parametrize("data", [[], {}, {"model": 1}])
def test_what_is_no_manifest_is_refused(data: Any, tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, data)
    with pytest.raises(BundleError, match="cannot read RunRecord"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_in_the_way_is_said_before_the_work(kind: str, tmp_path: Path) -> None:
    final = tmp_path / "out"
    if kind == "file":
        final.write_text("mine")
    else:
        final.mkdir()
        (final / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not a bundle") as early, run_folder(final):
        pytest.fail("work was begun")
    with pytest.raises(StorageError) as late:
        publish(tmp_path / "scratch", final)
    assert early.value.message == late.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_earlier_bundle_is_not_in_the_way(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for name in ("first", "second"):
        with run_folder(final) as scratch:
            write_manifest(sample.full_run(name=name), scratch)
            publish(scratch, final)
        assert read_manifest(final).name == name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
