"""FP32, FP16 and INT8 against each other on ONNX Runtime's CPU: time, size, and how far the logits move.

    python benchmarks/precision.py --only riformer --write

224 x 224 (RT-DETR: 640 x 640), random weights, one thread, interleaved rounds; ratios of CPU time. INT8 is calibrated
on the generated images that ``effdeploy export --int8`` takes without ``--calib``; cosine and top-1 agreement with FP32
are over other generated images. On random weights the classes are decided by a hair, so top-1 says less than the
cosine; a detector's queries change places, so it is timed alone, and tests/test_detector.py holds a trained one. Every
precision has the form that ``effdeploy export`` gives it: RT-DETR filters its convolutions in FP32 alone. INT8 pays
where the CPU has an 8-bit dot product (AVX-512 VNNI, AVX-VNNI): the result says whether this one has.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import arguments, figures, race, write_results

from deploy import api
from deploy.backends.base import BuildOptions
from deploy.backends.onnxruntime import open_model
from deploy.models import find_system
from deploy.models.base import resolve_options, specialised
from deploy.parity.inputs import natural_image
from deploy.precision.convert import convert_precision
from deploy.precision.cpu import dot_product
from deploy.precision.quantize import QuantizationRequest
from deploy.recipe import Recipe, layer_of_data, resolve
from deploy.records import Precision, Target
from deploy.resolve import calibration_images

IMAGES, SEED = 16, 5000
SHOWN = (Precision.FP32, Precision.FP16, Precision.INT8)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network to convert: system, variant, options of the recipe."""

    system: str
    variant: str
    options: dict[str, object]


SUBJECTS: dict[str, dict[str, Subject]] = {
    "deit": {
        "DeiT-S": Subject(system="tome", variant="deit_small_patch16_224", options={"options.r": 0}),
        "ToMe r13": Subject(system="tome", variant="deit_small_patch16_224", options={"options.r": 13}),
    },
    "riformer": {"RIFormer-S12": Subject(system="riformer", variant="s12", options={})},
    "convmixer": {"ConvMixer-1024/20": Subject(system="convmixer", variant="1024_20", options={})},
    "sparseformer": {"SparseFormer-T": Subject(system="sparseformer", variant="t", options={})},
    "alternet": {"AlterNet-18": Subject(system="alternet", variant="18", options={})},
    "castling": {"Castling-DeiT-S": Subject(system="castling", variant="deit_small", options={})},
    "rtdetr": {"RT-DETR r18": Subject(system="rtdetr", variant="r18vd", options={"options.head": "raw"})},
}


def converted(subject: Subject, batch: int, bits: int | str, folder: Path) -> tuple[dict[str, Path], Recipe]:
    """Write a network in every precision; INT8 also says what it left out."""
    found = {}
    for precision in SHOWN:
        place = folder / precision.value
        run = api.export(
            subject.system, variant=subject.variant, batch=batch, precision=precision.value, set_=subject.options,
            until="passes", out=place,
        )  # fmt: skip
        assert run.passes is not None
        recipe = resolve([layer_of_data("manifest", run.recipe)])
        system = specialised(find_system(recipe.system), recipe)
        options = resolve_options(system, recipe)
        request = QuantizationRequest(
            images=calibration_images(system, recipe), weight_bits=bits, kept=system.keep_high(options)
        )
        record = convert_precision(
            place / run.passes.artifact.name, precision, place, keep=system.keep_fp32(options),
            target=Target.ONNXRUNTIME, quantization=request,
        )  # fmt: skip
        found[precision.value] = place / record.artifact.name
        if record.quantization:
            print(
                f"{record.quantization.nodes} of {record.quantization.products} products; {record.quantization.weights}"
            )
    return found, recipe


def moved(graphs: dict[str, Path], recipe: Recipe) -> dict[str, dict[str, float]]:
    """Compare a classifier's logits with FP32's over generated images: mean cosine, share of equal best classes."""
    if find_system(recipe.system).task != "classification":
        return {name: {} for name in graphs}
    batch, spec = recipe.batch.opt, recipe.preprocess.record()
    images = np.stack([natural_image(recipe.size, spec, SEED + i) for i in range(IMAGES)])
    outputs = {}
    for name, path in graphs.items():
        with open_model(path, BuildOptions(threads=1, device="cpu")) as runner:
            rows = [runner.infer({"images": images[i : i + batch]})["logits"] for i in range(0, IMAGES, batch)]
        outputs[name] = np.concatenate(rows)
    whole = outputs[Precision.FP32.value]
    found = {}
    for name, logits in outputs.items():
        cosines = (logits * whole).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(whole, axis=1)
        same = float((logits.argmax(1) == whole.argmax(1)).mean())
        found[name] = {"cosine": float(cosines.mean()), "lowest cosine": float(cosines.min()), "top-1 as FP32": same}
    return found


def measured(group: str, rounds: int, batch: int, bits: int | str) -> dict[str, object]:
    """Convert, compare and race the networks of one group."""
    with tempfile.TemporaryDirectory() as scratch:
        graphs: dict[str, Path] = {}
        about: dict[str, object] = {}
        for name, subject in SUBJECTS[group].items():
            found, recipe = converted(subject, batch, bits, Path(scratch) / name.replace("/", "-"))
            about[name] = {
                precision: {**values, "bytes": found[precision].stat().st_size}
                for precision, values in moved(found, recipe).items()
            }
            print(name, about[name])
            graphs |= {f"{name} {precision}": path for precision, path in found.items()}
        # The first is the one that the others are compared with: INT8's first, so that every ratio is one of INT8.
        first = next(name for name in graphs if name.endswith(Precision.INT8.value))
        graphs = {first: graphs.pop(first), **graphs}
        spec = recipe.preprocess.record()
        images = np.stack([natural_image(recipe.size, spec, SEED + i) for i in range(batch)])
        return {"against FP32": about, **figures(race(graphs, images, rounds), group)}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=list(SUBJECTS), action="append", help="groups; default: all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bits", default="auto", choices=["auto", "7", "8"], help="of INT8 weights")
    options = parser.parse_args()
    bits = options.bits if options.bits == "auto" else int(options.bits)
    for group in options.only or list(SUBJECTS):
        result = measured(group, options.rounds, options.batch, bits)
        if options.write:
            command = f"python benchmarks/precision.py --only {group} --rounds {options.rounds} --write"
            about = {"command": command, "8-bit dot product": dot_product() or "none", "batch": options.batch}
            write_results(f"precision-{group}", {**about, **result})


if __name__ == "__main__":
    main()
