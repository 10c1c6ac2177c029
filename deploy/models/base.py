"""What a system is: one file with an architecture, checkpoint maps, a deploy transform and a default recipe.

``load_model`` takes a recipe to a loaded reference model and its deploy form; no caller knows which system it holds.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from deploy.console import Console
from deploy.errors import (
    CheckpointError,
    EffdeployError,
    RecipeError,
    SizeError,
    TraceError,
    UnknownNameError,
    did_you_mean,
)
from deploy.models.checkpoint import Checkpoint, State, Template, WeightMap, fit_checkpoint, read_checkpoint
from deploy.models.decisions import Decisions
from deploy.models.drawing import Drawing
from deploy.models.embedding import embed, normalised, pixel_inputs
from deploy.models.selecting import Selection
from deploy.models.sources import Source, choose_text, fetch, parse_source
from deploy.models.tuning import Tuning
from deploy.models.weights import random_state
from deploy.recipe import Recipe
from deploy.records import Drift, ModelRecord, Target, TensorSpec, WeightsSource

Size = tuple[int, int]
Arrays = Mapping[str, NDArray[np.generic]]
Options = Mapping[str, Any]
Apart = Callable[[Arrays, Arrays], tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """An export form of a system for one target, and the measured reason for it."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One size of a system: architecture options and where the paper's figures can be looked up."""

    options: Options
    summary: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """An option of a system's own that can be typed as ``--name VALUE``, short for ``--set key=VALUE``."""

    name: str
    key: str
    help: str


def _unchanged(state: State, options: Options, size: Size) -> State:
    return state


def _as_drawn(state: State) -> State:
    return state


def _as_declared(options: Options) -> Mapping[str, Any]:
    return {}


def _none(options: Options) -> tuple[str, ...]:
    return ()


def _nothing_to_note(options: Options, size: Size) -> tuple[str, ...]:
    return ()


def _undecided(recipe: Recipe) -> Options:
    return {}


def _nothing_high(options: Options) -> Mapping[str, str]:
    return {}


def _exact(options: Options) -> bool:
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A model family on the road.

    Attributes:
        name: What the user types.
        task: ``"classification"``; decides how outputs are compared.
        paper: Title, venue and arXiv number.
        variants: Name to architecture options. ``tiny`` builds and runs in under a second, for tests.
        build: ``(options, size, layout) -> nn.Module`` in eval mode; ``layout`` is a ``WeightMap.layout``.
        weight_maps: Every checkpoint layout that loads; the first one's layout is the training form.
        to_deploy: ``(model, target) -> nn.Module``: a re-parameterised copy; the input stays untouched. Works in the
            dtype of the model.
        forms: Which export form each target takes, and why.
        recipe: Defaults below the YAML.
        relayouts: (layout, layout) to a function that takes a state dict of the first to one of the second, in our
            keys and any dtype, without changing its input; a direction that cannot be is left out.
        stride: Image sides must be multiples of this; or the name of the option that says of what.
        inputs: Graph inputs with symbolic axes ``batch``, ``height``, ``width``, ``height/8`` and the like.
        outputs: Graph output names that parity judges.
        extra_outputs: ``options -> names`` of further outputs, which follow them and are not judged.
        adapt: ``(state, options, size) -> state``: brings a checkpoint's tensors, in our keys, to what a model of these
            options and size has (a position embedding of another size), and drops what inference computes itself or
            never reads; what it cannot adapt it returns unchanged.
        random: ``state -> state``: makes random weights sensible where names and shapes do not say enough, without
            changing its input.
        approximate: ``options -> whether the deploy form leaves out something of the training form that matters``.
            Parity then compares with the deploy form in PyTorch, and what it leaves out is measured over the sample
            images and held to the recipe's ``parity.max_drift``. Everything else must be exact up to rounding.
        keep_fp32: ``options -> regular expressions`` on node names that stay float32 in every reduced precision.
        keep_high: ``options -> {regular expression on node names: reason}``: products that stay out of INT8 and FP8,
            besides those that ``deploy.precision.select`` leaves out of every graph.
        options_for: ``recipe -> options`` that it decides where nobody else does, e.g. a form for float32 alone.
        flags: Options that the command line offers by a name of their own.
        feeds: Makers of the inputs other than ``images`` for parity: images float32 [n,3,H,W] to an array of n rows.
        decisions: What the deploy form chooses where rounding can turn the choice; parity then compares it apart.
        selection: Where a detector selects its queries; parity then goes through ``deploy.parity.selection``.
        drawing: What ``effdeploy show`` draws on a photo.
        tuning: What ``effdeploy tune`` searches.
        notes: ``(options, size) -> what a user must know`` of what these options come to.
        interface: ``options -> fields`` of this class that depend on the options: ``inputs``, ``outputs``, ``task``,
            ``feeds``, ``forms``; see ``specialised``.
    """

    name: str
    task: str
    paper: str
    variants: Mapping[str, Variant]
    build: Callable[[Options, Size, str], nn.Module]
    weight_maps: tuple[WeightMap, ...]
    to_deploy: Callable[[nn.Module, Target], nn.Module]
    forms: Mapping[Target, Form]
    recipe: Mapping[str, Any]
    relayouts: Mapping[tuple[str, str], Callable[[State], State]] = field(default_factory=dict)
    stride: int | str = 1
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec(name="images", dtype="float32", shape=("batch", 3, "height", "width")),
    )
    outputs: tuple[str, ...] = ("logits",)
    extra_outputs: Callable[[Options], tuple[str, ...]] = _none
    adapt: Callable[[State, Options, Size], State] = _unchanged
    random: Callable[[State], State] = _as_drawn
    approximate: Callable[[Options], bool] = _exact
    keep_fp32: Callable[[Options], tuple[str, ...]] = _none
    keep_high: Callable[[Options], Mapping[str, str]] = _nothing_high
    options_for: Callable[[Recipe], Options] = _undecided
    flags: tuple[Flag, ...] = ()
    feeds: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.generic]]] = field(default_factory=dict)
    decisions: Decisions | None = None
    selection: Selection | None = None
    drawing: Drawing | None = None
    tuning: Tuning | None = None
    notes: Callable[[Options, Size], tuple[str, ...]] = _nothing_to_note
    interface: Callable[[Options], Mapping[str, Any]] = _as_declared


@dataclass(kw_only=True, slots=True)
class Loaded:
    """A loaded model: the float32 reference as in the checkpoint, and the deploy form that is exported.

    ``outputs`` are the graph's: those that parity judges, and the options' extra ones. ``approximate``: the deploy form
    is not the reference's function (``System.approximate``).
    """

    system: System
    target: Target
    reference: nn.Module
    deploy: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    record: ModelRecord
    approximate: bool = False

    def run(self, feeds: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run what parity compares with, in float32 on host arrays; returns the outputs that are judged.

        The training form, or the deploy form where that is approximate.
        """
        found = run_module(self.deploy if self.approximate else self.reference, feeds, self.outputs)
        return {name: found[name] for name in self.system.outputs}


def run_module(module: nn.Module, feeds: Arrays, outputs: tuple[str, ...]) -> dict[str, NDArray[np.generic]]:
    """Run a module on host arrays given in input order; returns named host arrays."""
    with torch.inference_mode():
        result = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values()))
    tensors = result if isinstance(result, tuple) else (result,)
    return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}


def load_model(system: System, recipe: Recipe, target: Target, console: Console | None = None) -> Loaded:
    """Build the model, fetch or draw its weights, and re-parameterise it for the target.

    Args:
        system: Which model family.
        recipe: Says the variant, the size and where the weights come from.
        target: Runtime family to lower for.
        console: Where the progress of a download goes; nowhere when left out.

    Raises:
        UnknownNameError: no such variant.
        SizeError: the model cannot take ``recipe.size``.
        CheckpointError: the weights cannot be read or do not fit.
        DownloadError: the weights cannot be fetched, or are not those that were pinned.
        RecipeError: a source text that is none; an architecture option that the system does not have, or a value that
            it cannot be built with.
    """
    start = time.perf_counter()
    system, options = specialised(system, recipe), resolve_options(system, recipe)
    check_size(system, recipe.size, options)
    macs = _macs_of_options(system, recipe, options)
    reference, weights = _with_weights(system, recipe, options, console)
    deploy = system.to_deploy(reference, target).eval()
    inputs, spec = input_specs(system, recipe), recipe.preprocess.record()
    for module in (reference, deploy) if spec.embed else ():
        embed(module, spec)
    record = ModelRecord(
        system=system.name,
        variant=recipe.variant,
        task=system.task,
        paper=system.paper,
        size=recipe.size,
        parameters=_parameters(reference),
        deploy_parameters=_parameters(deploy),
        macs=macs,
        weights=weights,
        preprocess=spec,
        form=system.forms[target].name,
        form_reason=system.forms[target].reason,
        seconds=time.perf_counter() - start,
        notes=system.notes(options, recipe.size),
    )
    return Loaded(
        system=system,
        target=target,
        reference=reference,
        deploy=deploy,
        inputs=inputs,
        outputs=(*system.outputs, *system.extra_outputs(options)),
        record=record,
        approximate=system.approximate(options),
    )


def specialised(system: System, recipe: Recipe) -> System:
    """Return the system with what its graph takes and gives under the recipe's options.

    Raises:
        UnknownNameError: no such variant.
        RecipeError: an option that the variant does not have.
    """
    return dataclasses.replace(system, **system.interface(resolve_options(system, recipe)))


def resolve_options(system: System, recipe: Recipe) -> dict[str, Any]:
    """Merge the variant's architecture options with the recipe's.

    Raises:
        UnknownNameError: no such variant.
        RecipeError: an option that the variant does not have.
    """
    if recipe.variant not in system.variants:
        raise UnknownNameError(
            f"{system.name} has no variant {recipe.variant!r}", hint=did_you_mean(recipe.variant, system.variants)
        )
    options = dict(system.variants[recipe.variant].options)
    if unknown := sorted(set(recipe.options) - set(options)):
        hints = "; ".join(f"options.{name}: {did_you_mean(name, options)}" for name in unknown)
        raise RecipeError(f"{system.name} has no option {', '.join(unknown)}", hint=hints)
    return {**options, **recipe.options, "classes": recipe.classes}


def check_size(system: System, size: Size, options: Options | None = None) -> None:
    """Refuse image sides that the model cannot take; without ``options`` a stride that is one of them is not checked.

    Raises:
        SizeError: a side is not a multiple of the stride.
    """
    stride = system.stride if isinstance(system.stride, int) else int((options or {}).get(system.stride, 1))
    if any(side % stride for side in size):
        near = "x".join(str(max(stride, round(side / stride) * stride)) for side in size)
        raise SizeError(
            f"size: got {size[0]}x{size[1]}, {system.name} needs multiples of {stride}", hint=f"--size {near}"
        )


def graph_inputs(system: System, size: Size) -> tuple[TensorSpec, ...]:
    """Return the system's inputs with ``height``, ``width/8`` and the like replaced; ``batch`` stays symbolic."""
    values = {"height": size[0], "width": size[1]}

    def bound(axis: int | str) -> int | str:
        name, _, divisor = str(axis).partition("/")
        return values[name] // int(divisor or 1) if name in values else axis

    return tuple(
        TensorSpec(name=spec.name, dtype=spec.dtype, shape=tuple(bound(axis) for axis in spec.shape))
        for spec in system.inputs
    )


def input_specs(system: System, recipe: Recipe) -> tuple[TensorSpec, ...]:
    """Return the inputs of the recipe's graph: the system's, with pixels for images where it normalises itself.

    Raises:
        RecipeError: it is to normalise, and takes no images.
    """
    inputs = graph_inputs(system, recipe.size)
    return pixel_inputs(inputs) if recipe.preprocess.embed else inputs


def example_inputs(inputs: tuple[TensorSpec, ...], batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Draw deterministic inputs: normal noise for floats, any value for pixels, ones for other integers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in inputs:
        shape = [batch if axis == "batch" else int(axis) for axis in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator))
        elif dtype == torch.uint8:
            tensors.append(torch.randint(256, shape, generator=generator, dtype=dtype))
        else:
            tensors.append(torch.ones(shape, dtype=dtype))
    return tuple(tensors)


def count_macs(system: System, options: Options, size: Size) -> int:
    """Count multiply-adds of one image in the training form, on the meta device (no memory, no arithmetic)."""
    with torch.device("meta"):
        model = system.build(options, size, system.weight_maps[0].layout).requires_grad_(False)
        inputs = [t.to("meta") for t in example_inputs(graph_inputs(system, size), 1)]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def _macs_of_options(system: System, recipe: Recipe, options: Options) -> int:
    """Count multiply-adds; a model that fails only with the recipe's options is the recipe's mistake, not a defect."""
    try:
        return count_macs(system, options, recipe.size)
    except EffdeployError:
        raise
    except Exception as error:  # an architecture raises whatever its code meets
        if not recipe.options:
            raise
        defaults = system.variants[recipe.variant].options
        told = "; ".join(f"options.{k}: got {v!r}, expected e.g. {defaults[k]!r}" for k, v in recipe.options.items())
        reason = (str(error).splitlines() or [""])[0][:200]
        raise RecipeError(
            f"{system.name} cannot be built: {told} ({type(error).__name__}: {reason})",
            hint=f"the values in the message are those of variant {recipe.variant}; lists go together in length",
        ) from error


def measure_drift(loaded: Loaded, apart: Apart, feeds: Arrays | None = None) -> Drift:
    """Compare the deploy form with the training form in float32 and, re-parameterised again, in float64.

    Args:
        loaded: Both forms.
        apart: ``(reference, candidate)``, outputs by name, to their largest difference, absolute and relative.
        feeds: What to compare them on, in input order; noise when left out, which is enough for exact algebra.

    Raises:
        TraceError: the model's outputs are all zero.
    """
    images = tuple(torch.tensor(a) for a in feeds.values()) if feeds else example_inputs(loaded.inputs, 1)
    if loaded.record.preprocess.embed:  # what re-parameterisation changes begins behind it
        images = (normalised(images[0], loaded.record.preprocess), *images[1:])
    doubled = tuple(t.double() if t.is_floating_point() else t for t in images)
    precise = copy.deepcopy(loaded.reference).double()
    precise_deploy = loaded.system.to_deploy(precise, loaded.target).eval()
    with torch.inference_mode():
        single = apart(_named(loaded, loaded.reference(*images)), _named(loaded, loaded.deploy(*images)))
        double = apart(_named(loaded, precise(*doubled)), _named(loaded, precise_deploy(*doubled)))
    return Drift(fp32_max_abs=single[0], fp32_relative=single[1], fp64_max_abs=double[0], fp64_relative=double[1])


def _named(loaded: Loaded, outputs: Any) -> dict[str, NDArray[np.generic]]:
    """Return the outputs that are judged as host arrays by name."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {name: tensor.numpy() for name, tensor in zip(loaded.system.outputs, tensors, strict=False)}
    if not any(array.any() for array in named.values()):
        raise TraceError("the model's outputs are all zero; nothing can be compared", hint="check the weights")
    return named


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _with_weights(
    system: System, recipe: Recipe, options: Options, console: Console | None
) -> tuple[nn.Module, WeightsSource]:
    text = choose_text(recipe.weights, recipe.pretrained, f"{system.name} {recipe.variant}")
    source = parse_source(text)
    if source.kind == "random":
        return _random_model(system, recipe, options, source)
    fetched = fetch(source, console)
    checkpoint = read_checkpoint(fetched.path)
    fitted = fit_checkpoint(
        checkpoint,
        system.weight_maps,
        cache(lambda layout: empty_state(system, options, recipe.size, layout)),
        lambda: fitting_variant(system, recipe, checkpoint.tensors),
    )
    model = build_uninitialised(system, options, recipe.size, fitted.layout)
    model.load_state_dict(fitted.state, strict=True, assign=True)
    known = f"sha256 {checkpoint.sha256[:12]}, {fitted.name} layout{checkpoint.wrapping}{fitted.adapted}"
    record = WeightsSource(
        kind=source.kind,
        statement=f"weights: {fetched.name} ({known})",
        path=fetched.path.name if source.kind == "file" else "",
        sha256=checkpoint.sha256,
        layout=fitted.name,
        source=fetched.source,
        revision=fetched.revision,
    )
    return model.eval().requires_grad_(False), record


def _random_model(system: System, recipe: Recipe, options: Options, source: Source) -> tuple[nn.Module, WeightsSource]:
    model = build_uninitialised(system, options, recipe.size, system.weight_maps[0].layout)
    state = system.random(random_state(model.state_dict(), source.seed))
    model.load_state_dict(state, strict=True, assign=True)
    statement = f"weights: random (seed {source.seed}): latency and numerics only, not accuracy"
    record = WeightsSource(kind="random", statement=statement, seed=source.seed)
    return model.eval().requires_grad_(False), record


class _SkipInit(TorchFunctionMode):
    """Leave parameters uninitialised: they are assigned right after. Buffers are still computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def build_uninitialised(system: System, options: Options, size: Size, layout: str) -> nn.Module:
    """Build a model whose weights are about to be assigned; saves the seconds that random initialisation takes."""
    with _SkipInit():
        return system.build(options, size, layout)


def empty_state(system: System, options: Options, size: Size, layout: str) -> Template:
    """Return the state dict of a layout on the meta device: names, shapes and types without memory."""
    with torch.device("meta"):
        expected = Template(system.build(options, size, layout).state_dict())
    expected.adapt = lambda state: system.adapt(state, options, size)
    return expected


def fitting_variant(system: System, recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> str:
    """Name another variant that the checkpoint would fit, for the error's hint; empty when there is none."""
    checkpoint = Checkpoint(tensors=dict(tensors), sha256="", wrapping="")
    tried: list[Options] = []
    for name, variant in system.variants.items():
        if variant.options in tried:
            continue
        tried.append(variant.options)
        template = partial(empty_state, system, {**variant.options, "classes": recipe.classes}, recipe.size)
        try:
            fit_checkpoint(checkpoint, system.weight_maps, cache(template), str)
        except (CheckpointError, SizeError):  # a variant may not exist at this size
            continue
        return name
    return ""
