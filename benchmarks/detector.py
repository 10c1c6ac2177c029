"""What a trained detector loses in FP16 and INT8: COCO's average precision of engine and PyTorch, and gate B's figures.

    python benchmarks/detector.py --write
    python benchmarks/detector.py --name r18 --recipe r18.yaml --weights r18.pth --coco DIR --calib DIR --write

Of the detector of ``tests/toy`` on 300 generated pictures, ranges measured on 48 others; or of another one by its
recipe, its weights, annotated images and a folder to measure ranges on. Results of other detectors are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from common import RESULTS, write_results

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from toy import RECIPE, WEIGHTS
from toy.shapes import write_coco

import deploy
from deploy.artifacts import read_manifest
from deploy.errors import ParityError
from deploy.records import Precision

PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
JUDGED = 12  # photos that the gates see


def bundle_of(precision: Precision, options: argparse.Namespace, coco: Path, calib: Path, out: Path) -> Path:
    """Export up to parity, and return the bundle; where a gate fails it is the one that failed."""
    try:
        deploy.export(
            options.recipe, weights=options.weights, precision=precision.value, images=coco / "images", batch="1:6:6",
            calib=calib if precision.quantised else None, until="parity", out=out,
            set_=[f"parity.max_images={JUDGED}", "convolutions=direct"],
        )  # fmt: skip
    except ParityError:
        return out.with_name(f"{out.name}.failed")
    return out


def measured(
    precision: Precision, options: argparse.Namespace, coco: Path, calib: Path, out: Path
) -> dict[str, object]:
    """Export in a precision, score engine and PyTorch, and return what the result file keeps."""
    bundle = bundle_of(precision, options, coco, calib, out)
    run, found = read_manifest(bundle), deploy.evaluate(bundle, coco=coco)
    if run.parity is None:
        raise SystemExit(f"{bundle} was not compared")
    gate = run.parity.selection[-1]
    fields = ("gate", "stage", "ok", "failures", "overlap", "lost", "margin", "matched", "matches", "score", "largest")
    kept = run.precision.quantization if run.precision else None
    return {
        "verdict": run.verdict,
        "gate": {name: getattr(gate, name) for name in fields},
        "quantised": kept and {"products": kept.products, "nodes": kept.nodes, "weights": kept.weights},
        "images": found.images,
        "objects": found.objects,
        "agreement": found.agreement,
        "precision": {scored.run: dict(scored.scores) for scored in found.runs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="tests/toy, 96 pixels", help="what the result file calls the detector")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--coco", type=Path, help="annotated images; generated when left out")
    parser.add_argument("--calib", type=Path, help="images to measure ranges on; generated when left out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        coco = options.coco or write_coco(folder / "coco", 300)
        calib = options.calib or write_coco(folder / "ranges", 48, first=2_000_000) / "images"
        found = {p.value: measured(p, options, coco, calib, folder / p.value) for p in PRECISIONS}
    for precision, row in found.items():
        print(f"{options.name}, {precision}: {json.dumps(row)}", flush=True)
    if options.write:
        last = RESULTS / "detector.json"
        kept = json.loads(last.read_text())["detectors"] if last.exists() else {}
        command = "python benchmarks/detector.py --write"
        write_results("detector", {"command": command, "detectors": {**kept, options.name: found}})


if __name__ == "__main__":
    main()
