"""Validation copies of a detector's graph: with the selection of its queries as an output, or as an input.

They are made to be run once and are never shipped: the same nodes, the same constants, more outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deploy.backends.base import Array, Feeds, Runner
from deploy.errors import ParityError
from deploy.graph.io import module_of, save_model
from deploy.parity.compare import Candidate
from deploy.parity.decisions import leaving
from deploy.parity.inputs import InputPack
from deploy.records import Precision

if TYPE_CHECKING:
    from deploy.models.selecting import Selected, SelectingModel

Open = Callable[[Path], Runner]
Float = NDArray[np.float64]

IMPOSED = "imposed/selection"
_FLOAT32_CHAIN = ("Add", "Clip", "Mul", "ReduceMax", "Sigmoid", "Sub")  # what lies between a head and what it decides


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectingFile:
    """A stage whose graph can be looked into.

    Attributes:
        stage: Its name.
        precision: Chooses the gate and its limits.
        load: The graph, runnable on ONNX Runtime's CPU.
        typed: The graph whose types are audited; ``None``: none.
    """

    stage: str
    precision: Precision
    load: Callable[[], onnx.ModelProto]
    typed: Callable[[], onnx.ModelProto] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Values of a graph: positions selected, scores of all positions, logits and boxes of the decoder."""

    index: str
    scores: str
    logits: str
    boxes: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a graph shows of one image besides its outputs.

    Attributes:
        index: [Q], the positions that it selected, best first.
        rows: [Q], the positions of the rows of ``logits`` and ``boxes``: ``index``, or what was imposed.
        logits: [Q,classes].
        boxes: [Q,4], centre and size in 0..1.
        placed: [Q,classes], the logits of the free run.
        scores: [L], of every position.
    """

    index: NDArray[np.int64]
    rows: NDArray[np.int64]
    logits: Float
    boxes: Float
    placed: Float
    scores: Float


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One image of a run: the outputs that are judged, and what else its graph shows, if there is one."""

    outputs: Mapping[str, Array]
    seen: Seen | None

    def finite(self) -> bool:
        """Whether there is neither NaN nor infinity."""
        arrays = [*self.outputs.values(), *((self.seen.logits, self.seen.boxes) if self.seen else ())]
        return all(bool(np.isfinite(array).all()) for array in arrays)


def names_of(float32: onnx.ModelProto, model: SelectingModel, feeds: Feeds, expected: Selected, open_: Open) -> Names:
    """Find a float32 graph's selection, and which of the values that leave its decoder are logits and boxes.

    Raises:
        ParityError: it is not where the system says.
    """
    where = model.selection
    ranking = [n for n in float32.graph.node if n.op_type == "TopK" and module_of(n.name) == where.selector]
    made = {output for node in float32.graph.node for output in node.output if _inside(node.name, where.decoder)}
    left = [
        *leaving(float32, [where.decoder])[where.decoder],
        *(o.name for o in float32.graph.output if o.name in made),
    ]
    with _opened(exposed(float32, left), open_) as runner:
        ran = runner.infer(feeds)
    logits = [n for n in left if ran[n].shape == expected.logits.shape and not _shares(ran[n])]
    boxes = [n for n in left if ran[n].shape == expected.boxes.shape and _shares(ran[n])]
    if len(ranking) != 1 or len(logits) != 1 or len(boxes) != 1:
        raise ParityError(
            f"the graph has {len(ranking)} TopK in {where.selector!r}, and {', '.join(left) or 'nothing'} leaves "
            f"{where.decoder!r}; expected one TopK, logits {list(expected.logits.shape)} and boxes "
            f"{list(expected.boxes.shape)} in 0..1",
            hint="the system's Selection names the modules; see docs/adding_a_model.md",
        )
    return Names(index=ranking[0].output[1], scores=ranking[0].input[0], logits=logits[0], boxes=boxes[0])


def _inside(node_name: str, module: str) -> bool:
    path = module_of(node_name)
    return path == module or path.startswith(f"{module}.")


def _shares(array: Array) -> bool:
    values = array.astype(np.float64)
    return bool((values >= 0).all() and (values <= 1).all())


def islands(typed: onnx.ModelProto, names: Names) -> tuple[str, ...]:
    """Say where a typed graph leaves float32 on the way to its scores of positions, or in its chain of boxes."""
    types = _types(typed)
    made = {output: node for node in typed.graph.node for output in node.output}
    todo, seen, low = [names.scores, names.boxes], set(), []
    while todo:
        name = todo.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        if types.get(name) != TensorProto.FLOAT:
            low.append(name)
        if made[name].op_type in _FLOAT32_CHAIN:
            todo += made[name].input
    return (f"not float32 although selection or boxes depend on it: {', '.join(sorted(low))}",) if low else ()


def exposed(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """Return a validation copy in which values are outputs as well.

    Raises:
        ParityError: the graph has no such value.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known, given = _types(model), {output.name for output in model.graph.output}
    if missing := [value for value in values if value not in known]:
        raise ParityError(f"the graph has no value {missing[0]!r}", hint="effdeploy inspect shows its nodes")
    copy.graph.output.extend(
        helper.make_tensor_value_info(value, known[value], None)
        for value in dict.fromkeys(values)
        if value not in given
    )
    return copy


def imposed(model: onnx.ModelProto, names: Names) -> onnx.ModelProto:
    """Return a validation copy that takes its selection as an input, ``IMPOSED``."""
    copy = exposed(model, dataclasses.astuple(names))
    for node in copy.graph.node:
        for place, name in enumerate(node.input):
            if name == names.index:
                node.input[place] = IMPOSED
    copy.graph.input.append(helper.make_tensor_value_info(IMPOSED, TensorProto.INT64, [None, None]))
    return copy


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}


@contextmanager
def _opened(model: onnx.ModelProto, open_: Open) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "validation.onnx"
        save_model(model, path)
        with open_(path) as runner:
            yield runner


def images_of(run: Selected, count: int) -> list[Image]:
    """Take the first ``count`` images of PyTorch's run apart."""
    rows = zip(run.index, run.logits, run.boxes, run.scores, strict=True)
    seen = [Seen(index=i, rows=i, logits=x, boxes=b, placed=x, scores=s) for i, x, b, s in rows]
    return [Image(outputs=_row(run.outputs, n), seen=seen[n]) for n in range(count)]


def run_outputs(candidate: Candidate, inputs: InputPack, judged: Sequence[str]) -> list[Image]:
    """Run a stage of which only the outputs can be seen, such as a built engine."""
    with candidate.open() as runner:
        runs = [(runner.infer(chunk.feeds), len(chunk.groups)) for chunk in inputs.chunks]
    return [Image(outputs=_row(outputs, n, judged), seen=None) for outputs, count in runs for n in range(count)]


def run_file(
    file: SelectingFile, names: Names, inputs: InputPack, expected: Sequence[Selected], open_: Open
) -> list[Image]:
    """Run a file over all inputs, and return its images.

    In float32, images whose selection is not PyTorch's run once more with PyTorch's imposed, so that all of their rows
    and outputs can be held to PyTorch's; what was selected stays the free run's.
    """
    judged, found = tuple(expected[0].outputs), []
    with contextlib.ExitStack() as stack:
        model = file.load()
        free = stack.enter_context(_opened(exposed(model, dataclasses.astuple(names)), open_))
        forced: Runner | None = None
        for chunk, mine in zip(inputs.chunks, expected, strict=True):
            got = free.infer(chunk.feeds)
            other = [n for n in range(len(mine.index)) if {*mine.index[n]} != {*got[names.index][n]}]
            rows, aligned = got[names.index].copy(), {n: got[n].astype(np.float64) for n in (names.logits, names.boxes)}
            told = got
            if other and file.precision is Precision.FP32:
                forced = forced or stack.enter_context(_opened(imposed(model, names), open_))
                told = forced.infer({**chunk.feeds, IMPOSED: mine.index})
                rows[other] = mine.index[other]
                for name, array in aligned.items():
                    array[other] = told[name][other]
            for n in range(len(chunk.groups)):
                seen = Seen(
                    index=got[names.index][n], rows=rows[n], logits=aligned[names.logits][n],
                    boxes=aligned[names.boxes][n], placed=got[names.logits][n].astype(np.float64),
                    scores=got[names.scores][n].astype(np.float64),
                )  # fmt: skip
                found.append(Image(outputs=_row(told if n in other else got, n, judged), seen=seen))
    return found


def _row(outputs: Mapping[str, Array], row: int, names: Sequence[str] | None = None) -> dict[str, Array]:
    return {name: outputs[name][row] for name in (outputs if names is None else names)}
