"""Shared fixtures: a small bundle that many tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import effdeploy


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an FP32 bundle of the tiny RIFormer, exported through the command line; tests must not change it."""
    out = tmp_path_factory.mktemp("engines") / "tiny"
    result = effdeploy(
        "export", "riformer", "--variant", "tiny", "--seconds", "0.2", "--baseline", "naive", "--out", out
    )
    assert result.exit_code == 0, result.stdout + result.stderr
    return out
