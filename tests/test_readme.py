"""The README's commands run as written, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
INSTALL_AND_RUN = "pip install -e . && effdeploy export riformer --fp16"
INSTALL_AND_TEST = "pip install -e '.[test]' && pytest"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("effdeploy ")]


def test_the_two_set_up_commands_are_the_ones_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text().replace("pip install -q ", "pip install ")
    for command in (INSTALL_AND_RUN, INSTALL_AND_TEST):
        assert f"{command}\n" in README
        assert f"{command}\n" in script


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run_as_written(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="the README builds for TensorRT-RTX: pip install -e '.[test]'")
    photos = tmp_path / "photos"
    photos.mkdir()
    _copy_photos(photos)
    (tmp_path / "weights.pth").write_bytes(_checkpoint(tmp_path))
    assert len(commands()) >= 8
    for command in commands():
        arguments = [sys.executable, "-m", "deploy", *shlex.split(command)[1:]]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _copy_photos(folder: Path) -> None:
    import shutil

    import skimage

    for name in ("astronaut.png", "chelsea.png", "coffee.png"):
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)


def _checkpoint(folder: Path) -> bytes:
    from support import reference_case

    path = reference_case("riformer_s12_train").save(folder / "made.pth")
    data = path.read_bytes()
    path.unlink()
    return data
