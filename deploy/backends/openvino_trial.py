"""Compile and run a network once in a process of its own: what ends OpenVINO natively must not end ours.

OpenVINO 2026.4.1 ends with a segmentation fault while it compiles a small transformer for one thread. The child is run
by the path of this file and imports nothing of effdeploy, so that a trial costs little more than OpenVINO's own import.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.backends.openvino_child import REFUSED
from deploy.errors import EngineBuildError

TRIAL = Path(__file__).with_name("openvino_child.py")


def survive(model: Path, batch: tuple[int, int], settings: Mapping[str, str]) -> None:
    """Try a network in a child. What OpenVINO merely refuses is left to the caller, who meets it again with its words.

    Args:
        model: ONNX file.
        batch: Smallest and largest size of a dynamic axis 0.
        settings: What it is compiled with.

    Raises:
        EngineBuildError: a signal ended the child, or it could not try at all.
    """
    asked = json.dumps({"model": str(model), "batch": batch, "settings": dict(settings)})
    done = subprocess.run(
        [sys.executable, str(TRIAL), asked], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode < 0:
        raise EngineBuildError(
            f"OpenVINO itself was ended by {_name(-done.returncode)} while it compiled or ran {model.name}",
            hint="--threads 2 may help (with one it was seen); --backend onnxruntime runs the same graph",
        )
    if done.returncode not in (0, REFUSED):
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise EngineBuildError(
            f"OpenVINO could not be tried with {model.name}: its process ended with {done.returncode} ({last})",
            hint="--backend onnxruntime runs the same graph",
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
