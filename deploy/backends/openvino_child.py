"""The child of ``deploy.backends.openvino_trial``: compiles a network, runs it on zeros, and ends with 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REFUSED = 3  # exit code: OpenVINO said no in its own words


def main(asked: dict[str, Any]) -> None:
    """Do in this process what a build does in the other.

    Args:
        asked: ``model``, ``batch`` (smallest and largest) and ``settings``.
    """
    here = Path(__file__).resolve().parent  # where another openvino lies
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != here]
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say: not installed
    import numpy as np
    import openvino

    try:
        _try(openvino, np, asked)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(REFUSED) from error


def _try(openvino: Any, np: Any, asked: dict[str, Any]) -> None:
    network = openvino.Core().read_model(asked["model"])
    shapes = {port: port.partial_shape for port in network.inputs if port.partial_shape.is_dynamic}
    batch = openvino.Dimension(*asked["batch"])
    if shapes:
        network.reshape({port: openvino.PartialShape([batch, *list(shape)[1:]]) for port, shape in shapes.items()})
    compiled = openvino.Core().compile_model(network, "CPU", asked["settings"])
    feeds = {
        port.any_name: np.zeros(
            [axis.get_min_length() for axis in port.partial_shape], np.dtype(port.element_type.to_dtype())
        )
        for port in compiled.inputs
    }
    compiled.create_infer_request().infer(feeds)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
