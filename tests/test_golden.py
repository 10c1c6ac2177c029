"""Op histograms of every exported graph: a refactor proves here that it changed nothing.

After a wanted change: ``python tests/test_golden.py``, and say in the commit why the graphs changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from deploy.graph.pipeline import run_passes
from deploy.models import SYSTEMS, find_system
from deploy.models.base import load_model
from deploy.precision.convert import convert_precision
from deploy.records import Precision, Target
from deploy.resolve import resolve_recipe
from deploy.trace import TraceRequest, choose_opset, onnx_from_torch

GOLDEN = Path(__file__).parent / "golden"
CASES = [(name, target) for name in SYSTEMS for target in Target]


def histogram(name: str, target: Target, folder: Path) -> str:
    from deploy.graph.io import load_model as load_onnx
    from deploy.graph.io import op_counts

    system = find_system(name)
    recipe = resolve_recipe(name, {"variant": ("", "tiny"), "batch": ("", "1:2:4")})
    loaded = load_model(system, recipe, target)
    opset = choose_opset(None, target, attention_op=False)
    request = TraceRequest(inputs=loaded.inputs, outputs=system.outputs, batch=recipe.batch, opset=opset)
    traced = onnx_from_torch(loaded.deploy, request, folder)
    patched = run_passes(folder / traced.artifact.name, target, folder)
    typed = convert_precision(folder / patched.artifact.name, Precision.FP16, folder, target=target)
    fp16 = op_counts(load_onnx(folder / typed.artifact.name))
    stages = {"traced": traced.op_counts, "patched": patched.op_counts, "fp16": fp16}
    lines = [f"{stage} {op} {count}" for stage, counts in stages.items() for op, count in sorted(counts.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "target"), CASES)
def test_graphs_are_the_golden_ones(name, target, tmp_path):
    golden = (GOLDEN / f"{name}-{target.value}.txt").read_text()
    assert histogram(name, target, tmp_path) == golden


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            (GOLDEN / f"{case[0]}-{case[1].value}.txt").write_text(histogram(*case, Path(scratch)))
