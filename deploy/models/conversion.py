"""A checkpoint in one layout to a plain one in another: mapped strictly, read back, and compared in its outputs."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from deploy.answers import ConversionRecord
from deploy.artifacts import artifact_of
from deploy.errors import CheckpointError, StorageError, UnknownNameError, did_you_mean
from deploy.models.base import (
    System,
    build_uninitialised,
    empty_state,
    example_inputs,
    fitting_variant,
    graph_inputs,
    resolve_options,
    run_module,
    specialised,
)
from deploy.models.checkpoint import Fitted, State, WeightMap, fit_checkpoint, read_checkpoint
from deploy.recipe import Recipe

SUFFIXES = (".safetensors", ".pth", ".pt")
MAX_RELATIVE = 1e-5  # what the deploy form of a system may differ by in float32 as well


def layout_names(system: System) -> dict[str, WeightMap]:
    """Return the layouts of a system's checkpoints by the name that ``--to`` takes."""
    return {re.sub(r"[^a-z0-9]+", "-", m.name.lower()).strip("-"): m for m in system.weight_maps}


def convert_checkpoint(
    system: System, recipe: Recipe, source: Path, out: Path, *, to: str | None = None, force: bool = False
) -> ConversionRecord:
    """Write ``source`` as a plain state dict in another layout; ``out`` appears whole or not at all.

    Args:
        system: Which model family.
        recipe: Says the variant, the number of classes and the image size.
        source: Checkpoint in any layout and wrapping that loads.
        out: File to write, ``.safetensors``, ``.pth`` or ``.pt``; float32.
        to: Layout by name; the source's own when left out.
        force: Replace a file that is there.

    Raises:
        UnknownNameError: no such layout; lists them.
        CheckpointError: the source does not fit, the layout cannot be had from it, or the outputs differ.
        StorageError: the file exists, or cannot be written.
    """
    start = time.perf_counter()
    system = specialised(system, recipe)
    names = layout_names(system)
    if to is not None and to not in names:
        raise UnknownNameError(f"{system.name} has no layout {to!r}", hint=did_you_mean(to, names))
    _check_out(out, force)
    checkpoint = read_checkpoint(source)
    template = partial(empty_state, system, resolve_options(system, recipe), recipe.size)
    other = partial(fitting_variant, system, recipe, checkpoint.tensors)
    fitted = fit_checkpoint(checkpoint, system.weight_maps, template, other)
    target = names[to] if to else next(m for m in system.weight_maps if m.name == fitted.name)
    state = _renamed(_relayout(system, fitted, target, template(target.layout)), target)
    twins = {twin: tensor.clone() for name, tensor in state.items() if (twin := target.twin(name))}
    temporary = _write({**state, **twins}, out)
    try:
        written = fit_checkpoint(read_checkpoint(temporary), (target,), template, str)
        change = _compare(system, recipe, fitted, written)
        _publish(temporary, out, force)
    finally:
        temporary.unlink(missing_ok=True)
    return ConversionRecord(
        source=source.name,
        source_sha256=checkpoint.sha256,
        source_layout=fitted.name + checkpoint.wrapping,
        layout=target.name,
        artifact=artifact_of(out, out.parent),
        tensors=len(state) + len(twins),
        parameters=sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()),
        max_relative=change,
        seconds=time.perf_counter() - start,
    )


def _check_out(out: Path, force: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{out.name}: got type {out.suffix!r}, expected {', '.join(SUFFIXES)}",
            hint=f"{out.with_suffix(SUFFIXES[0])}",
        )
    if out.is_dir() or (out.exists() and not force):
        raise StorageError(
            f"{out} exists and was left alone", hint="another name, or --force to replace a file" if out.is_file() else
            "name a file, not a folder"
        )  # fmt: skip


def _relayout(system: System, fitted: Fitted, target: WeightMap, expected: Mapping[str, torch.Tensor]) -> State:
    """Take a state dict to the target's layout, in float64 so that each weight is rounded once."""
    if fitted.layout == target.layout:
        return fitted.state
    fold = system.relayouts.get((fitted.layout, target.layout))
    if fold is None:
        possible = [name for name, m in layout_names(system).items()
                    if m.layout == fitted.layout or (fitted.layout, m.layout) in system.relayouts]  # fmt: skip
        raise CheckpointError(
            f"the checkpoint has the {fitted.name} layout; {target.name} cannot be had from it: "
            "what was folded together cannot be taken apart",
            hint=f"possible from here: --to {' or '.join(possible)}",
        )
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in fitted.state.items()}
    folded = fold(doubled)
    return {name: folded[name].to(like.dtype) for name, like in expected.items()}


def _renamed(state: State, target: WeightMap) -> State:
    if target.inverse is None:
        raise CheckpointError(
            f"the {target.name} layout can be read, not written", hint="choose another layout with --to"
        )
    return {target.inverse(name): tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _write(state: State, out: Path) -> Path:
    """Write a state dict beside ``out``; whatever happens, no file of that name is left half written."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.stem}.partial-", suffix=out.suffix, dir=out.parent)
        os.close(handle)
        temporary = Path(name)
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, temporary)
        else:
            torch.save(state, temporary)
        temporary.chmod(0o644)  # mkstemp makes it private
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
    except Exception as error:  # torch and safetensors raise their own types for a full disk
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise _cannot_write(out, error) from error
    return temporary


def _publish(temporary: Path, out: Path, force: bool) -> None:
    """Give the file its name; without ``force`` by a link, which fails if another process took the name meanwhile."""
    try:
        if force:
            temporary.replace(out)
        else:
            _link(temporary, out)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _link(temporary: Path, out: Path) -> None:
    """Link, or where the file system has no hard links (FAT, many network shares) look and rename."""
    try:
        os.link(temporary, out)
    except FileExistsError:
        raise
    except OSError:
        if out.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        temporary.rename(out)


def _cannot_write(out: Path, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return StorageError(f"cannot write {out}: {reason}", hint="a folder that exists, with space, where you may write")


def _compare(system: System, recipe: Recipe, before: Fitted, after: Fitted) -> float:
    """Return the largest difference of the outputs relative to the largest output.

    Raises:
        CheckpointError: above ``MAX_RELATIVE``, or not a number.
    """
    options = resolve_options(system, recipe)
    inputs = graph_inputs(system, recipe.size)
    feeds = {s.name: t.numpy() for s, t in zip(inputs, example_inputs(inputs, 2), strict=True)}
    runs = []
    for fitted in (before, after):
        model = build_uninitialised(system, options, recipe.size, fitted.layout)
        model.load_state_dict(fitted.state, strict=True, assign=True)
        runs.append(run_module(model.eval(), feeds, system.outputs))
    changes = [_relative(runs[1][name], expected) for name, expected in runs[0].items()]
    if not all(change <= MAX_RELATIVE for change in changes):
        raise CheckpointError(
            f"the outputs differ by {max(changes):.2g} of the largest, expected at most {MAX_RELATIVE:g}; "
            "nothing was written",
            hint="the weights are extreme, or the system's relayout is wrong",
        )
    return max(changes)


def _relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest difference over the largest value; a difference from nothing but zeros is infinite."""
    difference, scale = float(abs(got - expected).max()), float(abs(expected).max())
    return difference / scale if scale else float("inf") if difference else 0.0
