"""Parity of networks that choose: arithmetic with PyTorch's choices imposed, and each choice judged by its margin.

Two runs of an exported file beside the usual comparison, with the file's own nodes; it is only cut where choices leave
the modules that make them (``deploy.models.decisions``):

    free      choices become outputs: how many elements end in the same place is information, never a gate, because
              one early near-tie moves everything after it
    imposed   every choice is replaced, behind the module that makes it, by PyTorch's, so that the state of each layer
              is PyTorch's up to arithmetic: the outputs are compared within ``ARITHMETIC``, and a module that chooses
              otherwise than PyTorch must have been near a tie: at most ``MARGIN`` of what it ranks

The choices are those of the deploy form in PyTorch, float32, and so are the outputs that the imposed run is compared
with. The deploy form itself is held to the training form in the same way: the training form follows its choices, and
judges them by its own scores.

A free run whose choices were turned near a tie, and nowhere else, computes something else than PyTorch and is right:
where it breaks its precision's tolerance, it is held to ``FLIPPED`` instead.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from deploy import units
from deploy.backends.base import Array, Feeds, Runner
from deploy.errors import ParityError
from deploy.graph.io import module_of, save_model
from deploy.parity.batch import ROUNDING
from deploy.parity.compare import Candidate, check_parity
from deploy.parity.inputs import InputPack
from deploy.parity.metrics import usage
from deploy.parity.tallies import Followed, FormRunner, Tally
from deploy.records import Comparison, DecisionCheck, ParityRecord, Precision, Tolerance

if TYPE_CHECKING:
    from deploy.models.decisions import Decided, DecidingModel

# With the same choices a network is as smooth as one without any; these are the limits of such systems' recipes.
ARITHMETIC = {
    Precision.FP32: Tolerance(max_relative=1e-4, cosine=0.999999),
    Precision.FP16: Tolerance(max_relative=1e-2, cosine=0.9999),
    Precision.BF16: Tolerance(max_relative=8e-2, cosine=0.998),
    Precision.INT8: Tolerance(cosine=0.98),
    Precision.FP8: Tolerance(cosine=0.95),
}
# What rounding alone moves scores of size 1 by, as between batches (``deploy.parity.batch``).
MARGIN = {precision: ROUNDING[precision.value] for precision in ARITHMETIC}
IMPOSED = "decisions imposed"
FORM = "deploy form"
# How far a free run may get by flips near ties. Over random weights, where ties are many: cosine 0.9987 and 4.7 % of
# the largest logit (DeiT-Ti, float16, one flip in the first block), 3.4 % (ViT-B gap, float32).
FLIPPED = Tolerance(max_relative=1e-1, cosine=0.995, top1=1.0)
NEAR_TIES = "flipped near ties"

Names = Mapping[str, tuple[str, ...]]  # module -> the values that leave it; "" where an output is in no graph
Open = Callable[[Path], Runner]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecidingFile:
    """An exported file to check: its stage, what it computes in, and its graph, runnable on ONNX Runtime's CPU."""

    stage: str
    precision: Precision
    load: Callable[[], onnx.ModelProto]


def check_decisions(
    model: DecidingModel,
    traced: onnx.ModelProto,
    files: Sequence[DecidingFile],
    inputs: InputPack,
    open_: Open,
    task: str = "classification",
) -> ParityRecord:
    """Compare files with PyTorch's choices imposed, and judge the choices that they would have made.

    Args:
        model: The deploy form in PyTorch.
        traced: The float32 graph as exported, in which each module's outputs are told apart by their values.
        files: What is checked; later stages of ``traced``.
        inputs: The parity inputs.
        open_: Opens an ONNX file on ONNX Runtime's CPU.
        task: As in ``check_parity``.

    Returns:
        A record whose comparisons are those of the imposed runs, with ``decisions``.

    Raises:
        ParityError: choices cannot be found in a graph.
    """
    names = values_of(model, traced, inputs.chunks[0].feeds, open_)
    watched = [_Watched(file=file, model=model, names=names, open=open_) for file in files]
    candidates = [
        Candidate(stage=f"{w.file.stage}, {IMPOSED}", precision=w.file.precision, open=w.opened) for w in watched
    ]
    limits = {precision.value: tolerance for precision, tolerance in ARITHMETIC.items()}
    followed = Followed(model=model)
    form = Candidate(stage=f"{FORM}, {IMPOSED}", precision=Precision.FP32, open=lambda: FormRunner(model))
    records = (
        check_parity(followed.reference, [form], inputs, limits, task=task),
        check_parity(lambda feeds: model.decide(feeds).outputs, candidates, inputs, limits, task=task),
    )
    checks = (*followed.rows(FORM, MARGIN[Precision.FP32]), *(check for w in watched for check in w.checks()))
    wide = [check for check in checks if not check.ok]
    verdicts = [*(r.verdict for r in records if not r.ok), *(told(check) for check in wide), records[1].verdict]
    return dataclasses.replace(
        records[1],
        ok=all(r.ok for r in records) and not wide,
        verdict=verdicts[0],
        tolerances={f"{precision}, {IMPOSED}": limit for r in records for precision, limit in r.tolerances.items()},
        comparisons=tuple(_named(comparison) for r in records for comparison in r.comparisons),
        decisions=checks,
        seconds=sum(r.seconds for r in records),
    )


def with_decisions(parity: ParityRecord, decisions: ParityRecord) -> ParityRecord:
    """Add the check of choices to a parity record; either one's failure is the verdict.

    Where the choices are right, free runs that broke their tolerance after flips near ties are held to ``FLIPPED``.
    """
    parity = _excused(parity, decisions.decisions) if decisions.ok and not parity.ok else parity
    flipped = [check for check in decisions.decisions if check.flips]
    note = (
        f"{sum(c.flips for c in flipped)} {decisions.decisions[0].what} flipped near ties, within the precision's "
        f"noise: PyTorch preferred its own by {units.number(max((c.margin for c in flipped), default=0.0))} at most"
    )
    return dataclasses.replace(
        parity,
        ok=parity.ok and decisions.ok,
        verdict=decisions.verdict if parity.ok and not decisions.ok else parity.verdict,
        tolerances={**parity.tolerances, **decisions.tolerances},
        comparisons=_before_last(parity.comparisons, decisions.comparisons),
        notes=(*parity.notes, note) if flipped and decisions.ok else parity.notes,
        decisions=decisions.decisions,
        seconds=parity.seconds + decisions.seconds,
    )


def _excused(parity: ParityRecord, checks: Sequence[DecisionCheck]) -> ParityRecord:
    """Judge comparisons that fail again, by ``FLIPPED``, where a flip near a tie explains why they do."""
    last = checks[-1].stage.removesuffix(", rounded")
    comparisons, tolerances = [], dict(parity.tolerances)
    for comparison in parity.comparisons:
        stage = comparison.stage
        explaining = {FORM, stage, last if stage.startswith("engine") else stage}
        turned = any(check.flips for check in checks if check.stage in explaining)
        if not comparison.passed and turned and not _breaks_flipped(comparison):
            name = f"{comparison.precision}, {NEAR_TIES}"
            comparison = dataclasses.replace(comparison, passed=True, failures=(), precision=name)
            tolerances[name] = FLIPPED
        comparisons.append(comparison)
    failed = [c for c in comparisons if not c.passed]
    moved = sum(c.precision.endswith(NEAR_TIES) for c in comparisons)
    verdict = (
        f"parity fails at {failed[0].stage!r}, output {failed[0].output!r}: {'; '.join(failed[0].failures)} "
        f"({len(failed)} of {len(comparisons)} comparisons fail)"
        if failed
        else f"parity holds over {len(comparisons)} comparisons; {moved} of them after {checks[0].what} that flipped "
        f"near ties, held to a cosine of {FLIPPED.cosine:g} (with PyTorch's imposed they are within their tolerance)"
    )
    return dataclasses.replace(
        parity, ok=not failed, verdict=verdict, comparisons=tuple(comparisons), tolerances=tolerances
    )


def _breaks_flipped(comparison: Comparison) -> bool:
    """Tell whether a comparison breaks ``FLIPPED``; NaN does."""
    return not usage(comparison, FLIPPED)[0] <= 1


def _before_last(comparisons: tuple[Comparison, ...], more: tuple[Comparison, ...]) -> tuple[Comparison, ...]:
    """Insert before the last stage, which stays the one that ships (``deploy.summary.last_stage``)."""
    last = comparisons[-1].stage
    head = tuple(c for c in comparisons if c.stage != last)
    return (*head, *more, *comparisons[len(head) :])


def told(check: DecisionCheck) -> str:
    """Say what is wrong with a flip that no rounding explains."""
    return (
        f"{check.what} of {check.module!r} differ at {check.stage!r} although PyTorch preferred its own by "
        f"{units.number(check.margin)} (limit {units.number(check.limit)}): {check.flips} over {check.images} images"
    )


def _named(comparison: Comparison) -> Comparison:
    return dataclasses.replace(comparison, precision=f"{comparison.precision}, {IMPOSED}")


def leaving(model: onnx.ModelProto, modules: Sequence[str]) -> dict[str, list[str]]:
    """Return by module the values that its nodes make and nodes outside of it read, in the graph's order."""
    home = {output: _owner(node.name, modules) for node in model.graph.node for output in node.output}
    found: dict[str, list[str]] = {module: [] for module in modules}
    sizes = _of_shapes(model)
    for node in model.graph.node:
        here = _owner(node.name, modules)
        for name in node.input:
            owner = home.get(name, "")
            if owner and owner != here and name not in found[owner] and name not in sizes:
                found[owner].append(name)
    return found


def _of_shapes(model: onnx.ModelProto) -> set[str]:
    """Return values that follow from shapes alone: a dynamic batch's size is no choice, and layers share it."""
    known = {"", *(weight.name for weight in model.graph.initializer)}
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") or known.issuperset(node.input):
            known.update(node.output)
    return known


def _owner(node_name: str, modules: Sequence[str]) -> str:
    path = module_of(node_name)
    return next((m for m in modules if path == m or path.startswith(f"{m}.")), "")


def values_of(model: DecidingModel, traced: onnx.ModelProto, feeds: Feeds, open_: Open) -> Names:
    """Find each module's outputs among the values that leave it, by running the graph: a value is one when it equals.

    Raises:
        ParityError: a value leaves a deciding module and is none of its outputs, or none leaves it.
    """
    found = leaving(traced, list(model.modules))
    decided = model.decide(feeds)
    with _opened(_exposed(traced, [v for values in found.values() for v in values]), open_) as runner:
        ran = runner.infer(feeds)
    names: dict[str, tuple[str, ...]] = {}
    for module, values in found.items():
        chosen = [tensor.numpy() for tensor in decided.chosen[module]]
        matched = {value: _nearest(ran[value], chosen) for value in values}
        if None in matched.values() or len(set(matched.values())) < len(values) or not values:
            raise ParityError(
                f"module {module!r} decides, but what leaves it in the graph ({', '.join(values) or 'nothing'}) is not "
                f"what it returns in PyTorch ({len(chosen)} tensors)",
                hint="a deciding module returns its decisions only; see docs/adding_a_model.md",
            )
        order = {place: value for value, place in matched.items()}
        names[module] = tuple(order.get(place, "") for place in range(len(chosen)))
    return names


def _nearest(value: Array, chosen: Sequence[Array]) -> int | None:
    """Return which of PyTorch's tensors has the value's shape and equals it in most places."""
    same = [
        float(np.isclose(value.astype(np.float64), c.astype(np.float64), rtol=1e-3, atol=1e-6).mean())
        if value.shape == c.shape and (value.dtype.kind == "f") == (c.dtype.kind == "f")
        else -1.0
        for c in chosen
    ]
    return int(np.argmax(same)) if max(same, default=-1.0) > 0.5 else None


def _exposed(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """Return a copy in which values are outputs as well."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = _typed(model)
    if missing := [value for value in values if value not in known]:
        raise ParityError(f"the graph has no value {missing[0]!r}, where the traced one decides", hint="--until trace")
    copy.graph.output.extend(known[value] for value in values)
    return copy


def imposed(model: onnx.ModelProto, names: Names) -> onnx.ModelProto:
    """Return a copy whose choices are inputs, named ``imposed/<value>``; what the modules choose stays an output."""
    copy = _exposed(model, _flat(names))
    known = _typed(model)
    modules = list(names)
    owner = {value: module for module, values in names.items() for value in values if value}
    for node in copy.graph.node:
        here = _owner(node.name, modules)
        for place, name in enumerate(node.input):
            if name in owner and owner[name] != here:
                node.input[place] = f"imposed/{name}"
    for value in owner:
        given = onnx.ValueInfoProto()
        given.CopyFrom(known[value])
        given.name = f"imposed/{value}"
        copy.graph.input.append(given)
    return copy


def _typed(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Return type and rank of every value; sizes are left open, so that any batch runs."""
    inferred = onnx.shape_inference.infer_shapes(model)
    found = {}
    for value in inferred.graph.value_info:
        kind, rank = value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)
        found[value.name] = helper.make_tensor_value_info(value.name, kind, [None] * rank)
    return found


def _flat(names: Names) -> list[str]:
    return [value for values in names.values() for value in values if value]


@contextmanager
def _opened(model: onnx.ModelProto, open_: Open) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "decisions.onnx"
        save_model(model, path)
        with open_(path) as runner:
            yield runner


@dataclass(kw_only=True)
class _Watched(Tally):
    """One file under check: runs with PyTorch's choices imposed, and keeps what it would have chosen."""

    file: DecidingFile
    names: Names
    open: Open

    def opened(self) -> _ImposedRunner:
        """Open the file twice, free and imposed."""
        return _ImposedRunner(self)

    def note(self, decided: Decided, free: Feeds, forced: Feeds) -> None:
        """Keep what a batch showed."""
        for module, values in self.names.items():
            self.add(module, *self.model.flips(module, decided, [forced.get(v) for v in values]))
        chosen = {module: [free.get(v) for v in values] for module, values in self.names.items()}
        self.share(self.model.shares(decided, chosen))
        self.images += len(next(iter(decided.outputs.values())))

    def checks(self) -> Iterator[DecisionCheck]:
        """Give a row a module."""
        return self.rows(self.file.stage, MARGIN[self.file.precision])


class _ImposedRunner:
    """A file behind the Runner protocol, with PyTorch's choices imposed."""

    name, device = "decisions imposed", "cpu"

    def __init__(self, watched: _Watched) -> None:
        self._watched = watched
        model = watched.file.load()
        self._free = _opened(_exposed(model, _flat(watched.names)), watched.open)
        self._forced = _opened(imposed(model, watched.names), watched.open)
        self._types = {value: _numpy_type(info) for value, info in _typed(model).items()}

    def __enter__(self) -> _ImposedRunner:
        self._free_runner, self._forced_runner = self._free.__enter__(), self._forced.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forced.__exit__(kind, error, trace)
        self._free.__exit__(kind, error, trace)

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run both ways, and return the outputs of the imposed run."""
        names = self._watched.names
        decided = self._watched.model.decide(feeds)
        given = {
            f"imposed/{value}": tensor.numpy().astype(self._types[value])
            for module, values in names.items()
            for value, tensor in zip(values, decided.chosen[module], strict=True)
            if value
        }
        forced = self._forced_runner.infer({**feeds, **given})
        self._watched.note(decided, self._free_runner.infer(feeds), forced)
        return {name: forced[name] for name in decided.outputs}


def _numpy_type(info: onnx.ValueInfoProto) -> np.dtype[np.generic]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
