"""Runs that are killed, interrupted, refused by the disk, or not alone: nothing looks finished, the next goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from survivor import METHODS

from deploy.artifacts import read_manifest

STAGES = tuple(METHODS)
QUICK = ("--seconds", "0.05", "--set", "bench.warmup_seconds=0.05", "--set", "bench.rounds=3")


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory):
    """Return a cache that holds every stage, and the bundle that they came from."""
    folder = tmp_path_factory.mktemp("finished")
    answer = server.export(*QUICK, "--out", folder / "b", cache=str(folder / "cache"), output=str(folder / "log"))
    assert answer["code"] == 0, answer["output"]
    return folder


@pytest.fixture
def export(server, finished, tmp_path):
    """Export to ``tmp_path/b`` in another process, with every stage of an earlier run at hand."""
    shutil.copytree(finished / "cache", tmp_path / "cache")

    def run(*arguments, out=tmp_path / "b", **request):
        request = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "log"), **request}
        return server.export(*QUICK, *arguments, "--out", out, **request)

    return run


def beside(folder):
    """List what lies in the folder of the bundle, without what this test itself put there."""
    return sorted(p.name for p in folder.iterdir() if p.name != "cache" and not p.name.startswith("log."))


def reused(out):
    origins = read_manifest(out).origins
    return [stage for stage in STAGES if stage in origins and origins[stage].reused]


def test_after_kill_9_in_every_stage_the_next_run_goes_on(server, tmp_path):
    """One bundle, killed once in each stage in turn: each run takes what the ones before it had finished."""
    request = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "log")}
    for position, stage in enumerate(STAGES):
        answer = server.export(*QUICK, "--out", tmp_path / "b", stop=(stage, signal.SIGKILL), **request)
        assert answer["code"] == -signal.SIGKILL, answer["output"]
        # The stage before was killed as well: it is made again, and all before that is there.
        assert answer["output"].count("reused, ") == max(position - 1, 0), answer["output"]
        left = beside(tmp_path)
        assert left[0] == ".b.lock"
        assert len(left) == 2, "what the run before left was not cleared away"
        assert left[1].startswith(".b.partial-")
    answer = server.export(*QUICK, "--out", tmp_path / "b", **request)
    assert answer["code"] == 0, answer["output"]
    assert beside(tmp_path) == ["b"]
    assert reused(tmp_path / "b") == list(STAGES[:-1])


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_every_stage(stage, export, tmp_path):
    answer = export("--from", stage, stop=(stage, signal.SIGINT))
    assert answer["code"] == 130, answer["output"]
    assert "interrupted; no bundle was written" in answer["output"]
    assert "Traceback" not in answer["output"]
    assert beside(tmp_path) == []


def test_after_ctrl_c_the_next_run_goes_on(export, tmp_path):
    assert export("--fp16", stop=("engine", signal.SIGINT))["code"] == 130
    answer = export("--fp16", "--until", "engine")
    assert answer["code"] == 0, answer["output"]
    assert reused(tmp_path / "b") == ["model", "trace", "passes", "precision"]


def test_two_exports_to_one_bundle(export, server, tmp_path):
    marker = tmp_path / "log.marker"
    first = export("--from", "engine", pause=("engine", str(marker)), wait=False)
    wait_for(marker)
    second = export()
    assert second["code"] == 19, second["output"]
    assert f"another run is writing {tmp_path / 'b'} (process {first['pid']})" in second["output"]
    other = export(out=tmp_path / "c")  # another bundle is nobody's business
    assert other["code"] == 0, other["output"]
    os.kill(first["pid"], signal.SIGKILL)
    ended = server.ask({"wait_for": first["pid"], "output": first["output"]})
    assert ended["code"] == -signal.SIGKILL
    third = export()
    assert third["code"] == 0, third["output"]
    assert beside(tmp_path) == ["b", "c"]


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_crash_between_the_two_renames_loses_no_bundle(export, finished, tmp_path):
    shutil.copytree(finished / "b", tmp_path / "b")
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    assert export(stop_publishing=True)["code"] == -signal.SIGKILL
    assert not (tmp_path / "b").exists(), "the crash did not happen where this test wants it"
    assert export("--from", "engine", stop=("engine", signal.SIGINT))["code"] == 130
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    assert beside(tmp_path) == ["b"]
    assert export()["code"] == 0
    assert (tmp_path / "b" / "manifest.json").read_bytes() != before


@pytest.fixture
def mount(tmp_path):
    """Mount a small file system of memory; skipped where that is not permitted."""
    mounted = []

    def make(name, options):
        place = tmp_path / name
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("size", "stage"), [("64k", "trace"), ("320k", "passes"), ("640k", "report")])
def test_no_space_left(size, stage, export, mount, tmp_path):
    disk = mount("disk", f"size={size}")
    answer = export("--from", stage, out=disk / "b")
    assert answer["code"] == 19, answer["output"]
    assert "No space left on device" in answer["output"]
    assert "free some space" in answer["output"]
    assert "Traceback" not in answer["output"]
    assert beside(disk) == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    assert export(out=disk / "b")["code"] == 0
    assert beside(disk) == ["b"]


def test_no_space_for_what_is_kept_costs_the_reuse_only(export, mount, tmp_path):
    disk = mount("small", "size=4k")
    answer = export("--until", "model", cache=str(disk / "cache"))
    assert answer["code"] == 0, answer["output"]
    assert answer["output"].count("cannot be kept for the next run") == 1
    assert "No space left on device" in answer["output"]


def test_a_limit_on_file_sizes(export, tmp_path):
    answer = export(file_size=100_000)
    assert answer["code"] == 19, answer["output"]
    assert "File too large" in answer["output"]
    assert "ulimit -f" in answer["output"]
    assert beside(tmp_path) == []


def test_a_read_only_file_system(export, mount, tmp_path):
    disk = mount("disk", "size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    answer = export(out=disk / "b")
    assert answer["code"] == 19, answer["output"]
    assert "Read-only file system" in answer["output"]
    assert "trace" not in answer["output"], "work was begun"


def test_a_folder_that_one_may_not_write_to(export, tmp_path):
    with tempfile.TemporaryDirectory() as place:  # tmp_path itself may be closed to other users
        folder = Path(place) / "closed"
        folder.mkdir()
        folder.chmod(0o555)
        Path(place).chmod(0o755)
        user = {"user": 65534} if os.geteuid() == 0 else {}  # root may write everywhere
        answer = export(out=folder / "b", **user)
        assert answer["code"] == 19, answer["output"]
        assert "Permission denied" in answer["output"]
        assert "choose a folder that you may write to" in answer["output"]
        assert list(folder.iterdir()) == []
        folder.chmod(0o755)
