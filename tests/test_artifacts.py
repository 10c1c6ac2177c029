"""Bundles: what is in the way, and what another version wrote."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from report import sample

from deploy.artifacts import (
    MANIFEST,
    publish,
    read_manifest,
    refuse_to_shorten,
    refused_writes,
    run_folder,
    write_json,
    write_manifest,
)
from deploy.errors import BundleError, StorageError, TraceError
from deploy.records import SCHEMA_VERSION, Stage, to_json


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


def bundle(final: Path, name: str) -> None:
    with run_folder(final) as scratch:
        write_manifest(sample.full_run(name=name), scratch)
        publish(scratch, final)


@pytest.mark.parametrize("stops", [KeyboardInterrupt, OSError])
def test_publishing_that_stops_halfway_leaves_the_earlier_bundle(
    stops: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out"
    bundle(final, "first")
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise stops
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises((KeyboardInterrupt, StorageError)):
        bundle(final, "second")
    assert read_manifest(final).name == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_what_dead_runs_of_this_bundle_left_is_cleared_away(tmp_path: Path) -> None:
    bundle(tmp_path / "aside", "first")
    names = [".out.partial-abcdefgh", ".out.old-abcdefgh", ".out.failed.partial-abcdefgh"]
    others = [".out.partial-x.partial-abcdefgh", ".other.partial-abcdefgh", ".out.partial-short"]
    for name in (*names, *others):
        (tmp_path / name).mkdir()
    (tmp_path / "aside").rename(tmp_path / ".out.old-abcdefgh" / "bundle")
    with run_folder(tmp_path / "out") as scratch:
        assert read_manifest(tmp_path / "out").name == "first"  # moved aside by a run that was killed
        assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.lock", scratch.name, *others}
    assert {p.name for p in tmp_path.iterdir()} == {"out", *others}


def test_one_run_at_a_time_writes_a_bundle(tmp_path: Path) -> None:
    with run_folder(tmp_path / "out"), run_folder(tmp_path / "other"):
        with pytest.raises(StorageError, match="another run is writing") as caught, run_folder(tmp_path / "out"):
            pytest.fail("work was begun")
        assert "--out" in caught.value.hint
    with run_folder(tmp_path / "out"):
        pass


def fail_to_export() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise TraceError("the exporter failed") from error


def test_a_full_disk_is_found_behind_a_librarys_error() -> None:
    words = "stage x: cannot write: No space left on device"
    with pytest.raises(StorageError, match=words), refused_writes("stage x: cannot write"):
        fail_to_export()


OTHERS = [TraceError("bad graph"), FileNotFoundError(errno.ENOENT, "no such file"), KeyError()]


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_are_not_taken_for_a_full_disk(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, refused_writes("stage x: cannot write"):
        raise error
    assert caught.value is error


def test_a_bundle_that_cannot_be_read_is_replaced_by_a_whole_run_only(tmp_path: Path) -> None:
    """The error of a damaged manifest says to export again: that must not end in the same error."""
    (tmp_path / MANIFEST).write_text("{")
    refuse_to_shorten(tmp_path, Stage.REPORT)
    with pytest.raises(StorageError, match=r"cannot be read.* a run until trace might replace more than it makes"):
        refuse_to_shorten(tmp_path, Stage.TRACE)


def test_a_bundle_that_went_further_is_kept(tmp_path: Path) -> None:
    write_manifest(sample.full_run(), tmp_path)
    refuse_to_shorten(tmp_path, Stage.REPORT)
    with pytest.raises(StorageError, match="went on to report; a run until engine would replace it"):
        refuse_to_shorten(tmp_path, Stage.ENGINE)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_text("")
    with pytest.raises(BundleError, match="is a file, expected a bundle folder"):
        read_manifest(tmp_path / "x.plan")


def test_what_is_no_bundle_names_the_bundles_there(tmp_path: Path) -> None:
    whole = tmp_path / "engines" / "whole"
    whole.mkdir(parents=True)
    write_manifest(sample.full_run(), whole)
    for wrong in (whole.parent, whole.parent / "hole"):
        with pytest.raises(BundleError, match="is not a bundle") as caught:
            read_manifest(wrong)
        assert str(whole) in caught.value.hint
    with pytest.raises(BundleError, match="is not a bundle") as nothing:
        read_manifest(tmp_path / "none" / "at" / "all")
    assert "effdeploy export" in nothing.value.hint
