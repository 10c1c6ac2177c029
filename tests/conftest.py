"""Shared fixtures: a small bundle that many tests read."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import effdeploy
from survivor import ForkServer

# Started in the background of a shell, tests and the commands that they start would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own cache out of the tests, and the tests out of it."""
    before = os.environ.get("EFFDEPLOY_CACHE")
    os.environ["EFFDEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("EFFDEPLOY_CACHE")
    if before is not None:
        os.environ["EFFDEPLOY_CACHE"] = before


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give each test a cache of its own: none may pass because another one has run before.

    It goes when the test ends: kept, the caches of one run of the suite fill 15 GB of disk.
    """
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EFFDEPLOY_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Give a server that runs the command line in processes of their own."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an FP32 bundle of the tiny RIFormer, exported through the command line; tests must not change it."""
    out = tmp_path_factory.mktemp("engines") / "tiny"
    result = effdeploy(
        "export", "riformer", "--variant", "tiny", "--seconds", "0.2", "--baseline", "naive", "--out", out
    )
    assert result.exit_code == 0, result.stdout + result.stderr
    return out
