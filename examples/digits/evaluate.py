"""Export the three trained networks in every precision and print top-1 of PyTorch and of each engine.

    python examples/digits/evaluate.py [--backend onnxruntime]

The images are the half of scikit-learn's digits that no network was trained on. INT8 is calibrated on the other half.
The same by hand: ``effdeploy export examples/digits/riformer.yaml --fp16``, then ``effdeploy eval``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import write_images

import deploy

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "fp16", "int8")
RUNS: Mapping[str, Sequence[str]] = {
    "riformer": (),
    "convmixer": (),
    "tome, r=0": ("options.r=0",),
    "tome, r=8": (),
}  # name -> settings


def evaluate(
    folder: Path,
    backend: str = "onnxruntime",
    runs: Mapping[str, Sequence[str]] = RUNS,
    precisions: Sequence[str] = PRECISIONS,
) -> list[deploy.EvalRecord]:
    """Export into ``folder`` and score every engine.

    Returns:
        One record per network and precision, in the order of ``runs`` and ``precisions``.
    """
    images = write_images(folder / "held-out", held_out=True)
    known = write_images(folder / "calibration", held_out=False, by_class=False)
    found = []
    for name, settings in runs.items():
        for precision in precisions:
            out = folder / f"{name} {precision}".replace(", ", "-").replace(" ", "-").replace("=", "")
            deploy.export(
                HERE / f"{name.split(',')[0]}.yaml", precision=precision, backend=backend, set_=settings,
                until="engine", calib=known if precision == "int8" else None, out=out,
            )  # fmt: skip
            found.append(deploy.evaluate(out, imagefolder=images))
    return found


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--backend", default="onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        for record in evaluate(Path(folder), arguments.parse_args().backend):
            print(line(record), flush=True)


def line(record: deploy.EvalRecord) -> str:
    """Write one engine's top-1 beside PyTorch's, in per cent."""
    engine, pytorch = (run.scores["top-1"] for run in record.runs)
    low, high = record.runs[0].intervals["top-1"]
    return (
        f"{record.bundle:18} PyTorch {pytorch:.2%}, engine {engine:.2%} ({low:.2%} to {high:.2%}), "
        f"lost {100 * (pytorch - engine):+.2f} points, same class {record.agreement or 0:.2%}"
    )


if __name__ == "__main__":
    main()
