"""RIFormer's MLP in other forms: could its convolutions be faster on ONNX Runtime's CPU?

    python benchmarks/mlp_forms.py --write

Four MLPs with their residuals (1x1 convolution to four times the width, GELU, 1x1 convolution back) at the widths and
sizes of S12's stages, one thread, interleaved, ratios of CPU time against the form that is shipped. *Rows*: linear
layers over positions. *2, 4, 8 groups*: the hidden layer in groups of channels one after the other, so that each stays
in the cache; the second convolutions add up, which ONNX Runtime does inside of them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from common import arguments, figures, race, write_results
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from deploy.graph.io import save_model

STAGES = ((64, 56), (128, 28), (320, 14), (512, 7))  # width, side
RATIO, DEPTH = 4, 4
Weights = dict[str, NDArray[np.float32]]


def weights(width: int, place: int) -> Weights:
    """Draw an MLP's weights, as linear layers: [out,in] and [out]."""
    random, hidden = np.random.default_rng(place), RATIO * width
    drawn = {"w1": random.normal(0, width**-0.5, (hidden, width)), "b1": random.normal(0, 0.1, hidden)}
    drawn |= {"w2": random.normal(0, 0.3 * hidden**-0.5, (width, hidden)), "b2": random.normal(0, 0.1, width)}
    return {f"{name}_{place}": value.astype(np.float32) for name, value in drawn.items()}


def rows(x: str, place: int, drawn: Weights) -> tuple[list[NodeProto], Weights]:
    """Write linear layers over rows [N*H*W,C]."""
    names = {name: f"{name}_{place}" for name in ("w1", "b1", "h", "a", "w2", "b2", "c", "x")}
    nodes = [
        helper.make_node("Gemm", [x, names["w1"], names["b1"]], [names["h"]], transB=1),
        helper.make_node("Gelu", [names["h"]], [names["a"]]),
        helper.make_node("Gemm", [names["a"], names["w2"], names["b2"]], [names["c"]], transB=1),
        helper.make_node("Add", [names["c"], x], [names["x"]]),
    ]
    return nodes, drawn


def grouped(x: str, place: int, drawn: Weights, groups: int) -> tuple[list[NodeProto], Weights]:
    """Write 1x1 convolutions over [N,C,H,W], the hidden layer in groups of channels."""
    nodes, kept, total = list[NodeProto](), Weights(), x
    first, bias, second = (np.split(drawn[f"{n}_{place}"], groups, a) for n, a in (("w1", 0), ("b1", 0), ("w2", 1)))
    for group in range(groups):
        end = f"{place}_{group}"
        kept |= {f"w1_{end}": first[group][..., None, None], f"b1_{end}": bias[group]}
        kept[f"w2_{end}"] = np.ascontiguousarray(second[group])[..., None, None]
        shift = [f"b2_{place}"] if group == 0 else []
        nodes += [
            helper.make_node("Conv", [x, f"w1_{end}", f"b1_{end}"], [f"h_{end}"]),
            helper.make_node("Gelu", [f"h_{end}"], [f"a_{end}"]),
            helper.make_node("Conv", [f"a_{end}", f"w2_{end}", *shift], [f"c_{end}"]),
            helper.make_node("Add", [f"c_{end}", total], [f"x_{end}"]),
        ]
        total = f"x_{end}"
    nodes[-1].output[0] = f"x_{place}"
    return nodes, {**kept, f"b2_{place}": drawn[f"b2_{place}"]}


def graph(form: str, batch: int, width: int, side: int, folder: Path) -> Path:
    """Write ``DEPTH`` MLPs one after the other in a form."""
    shape, x, nodes, kept = [batch, width, side, side], "images", list[NodeProto](), Weights()
    if form == "rows":  # what the numbers mean does not matter, so nothing is transposed
        nodes.append(helper.make_node("Reshape", ["images", "shape"], [x := "rows"]))
    for place in range(DEPTH):
        drawn = weights(width, place)
        more, named = rows(x, place, drawn) if form == "rows" else grouped(x, place, drawn, int(form.split()[0]))
        nodes, kept, x = [*nodes, *more], {**kept, **named}, f"x_{place}"
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)]
    constants = [numpy_helper.from_array(value, name) for name, value in kept.items()]
    constants.append(numpy_helper.from_array(np.array([-1, width]), "shape"))
    body = helper.make_graph(nodes, "mlps", inputs, outputs, constants)
    path = folder / f"{form} {batch} {width}.onnx"
    save_model(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def main() -> None:
    options, measured = arguments(__doc__ or "").parse_args(), dict[str, object]()
    forms = {"shipped": "1 group", "rows": "rows", **{f"{n} groups": f"{n} groups" for n in (2, 4, 8)}}
    with tempfile.TemporaryDirectory() as scratch:
        for batch in (1, 8):
            for width, side in STAGES:
                graphs = {name: graph(form, batch, width, side, Path(scratch)) for name, form in forms.items()}
                images = np.random.default_rng(0).standard_normal((batch, width, side, side)).astype(np.float32)
                label = f"batch {batch}, {width} channels, {side} x {side}"
                measured[label] = figures(race(graphs, images, options.rounds), label)
    if options.write:
        command = f"python benchmarks/mlp_forms.py --rounds {options.rounds} --write"
        write_results("mlp_forms", {"command": command, "cpu": measured})


if __name__ == "__main__":
    main()
