"""The fewest modules of DeiT-S that INT8 must leave high for a cosine, and what that costs in time.

    python benchmarks/budget.py --budget cosine=0.999 --budget cosine=0.9999 --write

224 x 224, random weights, batch 1, one thread, generated images: ``effdeploy export ... --int8 --budget``. Errors
decide and repeat; the times are of this machine. INT8 pays where the CPU has an 8-bit dot product: the result says
whether this one has.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

from common import arguments, write_results

from deploy import api
from deploy.answers import BudgetRecord
from deploy.console import Console, Mode
from deploy.precision.cpu import dot_product
from deploy.records import from_json


def searched(budget: str, seconds: float, folder: Path) -> BudgetRecord:
    """Search once, and return what was found."""
    stream = io.StringIO()
    api.export(
        "tome", variant="deit_small_patch16_224", precision="int8", set_={"options.r": 0}, budget=budget,
        until="precision", seconds=seconds, out=folder / "bundle", console=Console(Mode.JSON, stdout=stream),
    )  # fmt: skip
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    return from_json(BudgetRecord, next(e["record"] for e in events if e.get("type") == "BudgetRecord"))


def figures(found: BudgetRecord) -> dict[str, object]:
    """Keep what a reader asks for."""
    return {
        "kept": list(found.kept), "modules": found.modules, "verdict": found.verdict, "advice": found.advice,
        "graphs run": found.runs, "seconds": round(found.seconds, 1), "images": found.images,
        "most sensitive": {s.module: s.apart.error for s in found.order[:8]},
        "choices": {
            p.name: {
                "error": p.apart.error, "cosine": p.apart.cosine, "milliseconds": p.milliseconds,
                "over FP32": [p.p10, p.speedup, p.p90], "front": p.front, "chosen": p.chosen,
            }
            for p in found.points
        },
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--budget", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    budgets = options.budget or ["cosine=0.999", "cosine=0.9999"]
    result: dict[str, object] = {}
    for budget in budgets:
        with tempfile.TemporaryDirectory() as scratch:
            result[budget] = figures(searched(budget, options.seconds, Path(scratch)))
        print(budget, json.dumps(result[budget], indent=1), flush=True)
    if options.write:
        command = "python benchmarks/budget.py " + " ".join(f"--budget {b}" for b in budgets)
        command += f" --seconds {options.seconds:g} --write"
        write_results("budget", {"command": command, "8-bit dot product": dot_product() or "none", **result})


if __name__ == "__main__":
    main()
