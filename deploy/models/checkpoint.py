"""Checkpoint files: read safely, unwrap, and map strictly onto a model.

Pickles are opened with ``weights_only=True`` and nothing else. Nothing is loaded with ``strict=False``: a key that is
missing, left over or of another shape is an error that names its nearest neighbours.
"""

from __future__ import annotations

import difflib
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deploy.artifacts import sha256_of
from deploy.errors import CheckpointError, NonFiniteWeightsError, UnsafeCheckpointError
from deploy.models.sources import SUFFIXES

# Where training frameworks put the weights, best first: released detectors and classifiers are evaluated with the EMA.
_WRAPPERS = (
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module", "net",
)  # fmt: skip
_PREFIXES = ("module.", "model.", "_orig_mod.")
# Bookkeeping that EMA and data-preprocessor wrappers leave among the weights.
_BOOKKEEPING = re.compile(r"^(steps|n_averaged|num_updates|decay|data_preprocessor\..*)$")
_SHOWN = 8
_SHOWN_MISFITS = 6
_NEIGHBOURS = 200  # keys that a neighbour is looked for among
_FOREIGN = 0.5  # share of the model's keys that a checkpoint of another model lacks
_EXACT = 256  # whole numbers up to here survive every float type, bfloat16 included
_DEEPEST = 8  # wrappers inside wrappers; a pickle can hold itself

State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """One checkpoint layout.

    Attributes:
        name: What the report calls it.
        layout: Passed to ``System.build``: which module the keys belong to.
        rename: Checkpoint key to model key; a key it does not know is returned unchanged.
        inverse: Model key to checkpoint key, so that ``rename(inverse(key)) == key``; ``None``: the layout is read,
            never written by ``effdeploy convert``.
        twin: Checkpoint key to the second name under which files of this layout hold the same tensor, or ``None``.
    """

    name: str
    layout: str
    rename: Callable[[str], str]
    inverse: Callable[[str], str] | None = None
    twin: Callable[[str], str | None] = lambda key: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The tensors of a file after unwrapping; ``wrapping`` says what was unwrapped, ``dtypes`` what the file holds."""

    tensors: State
    sha256: str
    wrapping: str
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A state dict that fits a layout of the model exactly; ``adapted`` says which tensors got another shape."""

    name: str
    layout: str
    state: State
    adapted: str = ""


class Template(dict[str, torch.Tensor]):
    """The state dict that a layout expects (meta device is enough), and how a checkpoint's tensors are brought to it.

    ``adapt`` takes renamed tensors; what it cannot bring to its shape it returns unchanged.
    """

    adapt: Callable[[State], State] = staticmethod(lambda state: state)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``; weights come back as float32 on the CPU.

    Raises:
        CheckpointError: missing, truncated, of an unknown type, without weights, or with sparse, quantised or complex
            ones.
        UnsafeCheckpointError: a pickle that holds more than tensors and plain containers.
        NonFiniteWeightsError: NaN, infinity, or values that float32 cannot hold, with the names of the tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", hint="--weights PATH, hf://OWNER/REPO, https://... or random")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors, wrapping = unwrap(raw, path)
    _check_plain(tensors, path)
    state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    _check_finite(state, path)
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in tensors.items()}
    return Checkpoint(tensors=state, sha256=sha256_of(path), wrapping=wrapping, dtypes=dtypes)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as safetensors: {error}", hint="download it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path.name}: unknown type {path.suffix!r}, expected {', '.join(SUFFIXES)}",
            hint="rename it, or convert it to .safetensors",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - this is the one place
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise _unreadable(path, error) from error
        raise UnsafeCheckpointError(
            f"{path.name} holds more than tensors; loading it would run code from the file: {_first_line(error)}",
            hint='if you trust its author, convert it once: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path.name}', weights_only=False)['state_dict'], '{path.stem}.safetensors')\"",
        ) from error
    except Exception as error:  # torch.load raises a dozen types for broken files, depending on where they break
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name} cannot be read ({path.stat().st_size} bytes): {_first_line(error)}",
        hint="the file is truncated or not a PyTorch checkpoint; download it again",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return re.split(r"(?<=[a-z`])\. ", (named or lines or [type(error).__name__])[0])[0][:200]


def unwrap(raw: Any, path: Path) -> tuple[State, str]:
    """Find the state dict inside trainers' wrappers and strip prefixes that every key has.

    Returns:
        The tensors, and a note such as ``", from ema.module"`` (empty when nothing was unwrapped).
    """
    steps: list[str] = []
    while isinstance(raw, Mapping):
        tensors = {str(k): v for k, v in raw.items() if isinstance(v, torch.Tensor) and not _BOOKKEEPING.match(str(k))}
        inner = next((w for w in _WRAPPERS if isinstance(raw.get(w), Mapping) and _holds_weights(raw[w])), None)
        # Trainers keep scalars such as the epoch beside the wrapper.
        if inner is None or sum(v.ndim > 0 for v in tensors.values()) > 1 or len(steps) == _DEEPEST:
            break
        steps.append(inner)
        raw = raw[inner]
    if not isinstance(raw, Mapping) or not _holds_weights(tensors):
        got = sorted(map(str, raw))[:_SHOWN] if isinstance(raw, Mapping) else type(raw).__name__
        raise CheckpointError(f"{path.name} holds no weights; got {got}", hint="expected a state dict of tensors")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        steps.append(prefix + "*")
    return tensors, f", from {'.'.join(steps)}" if steps else ""


def _holds_weights(value: Any) -> bool:
    """Whether a tensor that is not a scalar lies in a mapping, at any depth."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor) and item.ndim > 0:
            return True
        if isinstance(item, Mapping) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values())
    return False


def _check_plain(tensors: State, path: Path) -> None:
    bad = [f"{k} ({kind})" for k, v in tensors.items() if (kind := _strange(v))]
    if bad:
        raise CheckpointError(
            f"{path.name}: {len(bad)} of {len(tensors)} tensors are not dense and real: {_listed(bad)}",
            hint="expected a float checkpoint from before quantisation or pruning; densify or dequantise it",
        )


def _strange(tensor: torch.Tensor) -> str:
    """Say what keeps a tensor from becoming a dense float32 weight; empty when nothing does."""
    if tensor.is_complex() or tensor.is_quantized:
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return "meta device, no data"
    return "" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def _check_finite(tensors: State, path: Path) -> None:
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise NonFiniteWeightsError(
            f"{path.name}: NaN or infinity as float32 in {len(bad)} of {len(tensors)} tensors: {_listed(bad)}",
            hint="the training diverged or the file is damaged; use another checkpoint",
        )


def fit_checkpoint(
    checkpoint: Checkpoint,
    maps: tuple[WeightMap, ...],
    template: Callable[[str], Mapping[str, torch.Tensor]],
    other_variant: Callable[[], str],
) -> Fitted:
    """Map a checkpoint onto the layout that it fits exactly.

    Args:
        checkpoint: What was read.
        maps: Layouts to try.
        template: Layout to the expected state dict (meta device is enough).
        other_variant: Names a variant that would fit, for the hint; called only for an error.

    Raises:
        CheckpointError: no layout fits; counts the misfits of the nearest one and shows some of each kind.
    """
    problems: dict[str, list[_Misfit]] = {}
    keys: dict[str, int] = {}
    for weight_map in maps:
        expected = template(weight_map.layout)
        state, misfits = _apply(weight_map, checkpoint.tensors, expected)
        if not misfits:
            changes = _adapted(weight_map, checkpoint.tensors, state)
            return Fitted(name=weight_map.name, layout=weight_map.layout, state=state, adapted=changes)
        problems[weight_map.name], keys[weight_map.name] = misfits, len(expected)
    nearest = min(problems, key=lambda name: len(problems[name]))
    missing = sum(m.kind == "missing" for m in problems[nearest])
    raise CheckpointError(
        f"the checkpoint does not fit; nearest layout {nearest!r}: {_summary(problems[nearest])}",
        hint=_hint(problems[nearest], missing / max(keys[nearest], 1), other_variant()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Misfit:
    """One difference between a checkpoint and a layout; the neighbour is looked for only when it is shown.

    ``shapes``: the checkpoint's and the expected one, where they are what differs.
    """

    kind: str
    text: str
    name: str = ""
    among: Mapping[str, str] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        near = difflib.get_close_matches(self.name, list(self.among)[:_NEIGHBOURS], n=1, cutoff=0.6)
        return f"{self.kind}: {self.text}" + (f" (nearest: {self.among[near[0]]})" if near else "")


def _summary(misfits: list[_Misfit]) -> str:
    """Count the misfits of each kind, and show a few of each."""
    kinds = {kind: [m for m in misfits if m.kind == kind] for kind in dict.fromkeys(m.kind for m in misfits)}
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
    each = itertools.zip_longest(*kinds.values())
    shown = [m for row in each for m in row if m is not None][:_SHOWN_MISFITS]
    lines = [f"  {m}" for found in kinds.values() for m in found if m in shown]
    more = len(misfits) - len(lines)
    return "\n".join([counts, *lines, *([f"  ... and {more} more"] if more else [])])


def _hint(misfits: list[_Misfit], missing: float, variant: str) -> str:
    if variant:
        return f"it fits --variant {variant}"
    if classes := _classes(misfits):
        return f"another number of classes? --set classes={classes}"
    if missing > _FOREIGN:
        return "it looks like the checkpoint of another model; effdeploy list shows the systems"
    return "check --variant and the file"


def _classes(misfits: list[_Misfit]) -> int:
    """Return the number of classes that a checkpoint seems to have, where that alone makes it misfit; else 0.

    Heads of another number have as many rows more or less, and so has a table of classes with one row for none.
    """
    shapes = [m.shapes for m in misfits if m.shapes and m.shapes[0] and m.shapes[0][1:] == m.shapes[1][1:]]
    if len(shapes) < len(misfits) or len({got[0] - want[0] for got, want in shapes}) != 1:
        return 0
    return Counter(got[0] for got, _ in shapes).most_common(1)[0][0]


def _adapted(weight_map: WeightMap, tensors: State, state: State) -> str:
    """Say which tensors have another shape than in the file."""
    before = {weight_map.rename(key): tuple(tensor.shape) for key, tensor in tensors.items()}
    kept = {name: shape for name, shape in before.items() if name in state}
    changed = [f"{n} adapted from {s} to {tuple(state[n].shape)}" for n, s in kept.items() if state[n].shape != s]
    return "".join(f", {change}" for change in changed)


def _apply(weight_map: WeightMap, tensors: State, expected: Mapping[str, torch.Tensor]) -> tuple[State, list[_Misfit]]:
    state: State = {}
    origin: dict[str, str] = {}
    misfits = []
    for key, tensor in tensors.items():
        name = weight_map.rename(key)
        if name in state:
            misfits.append(_Misfit(kind="twice", text=f"{key} and {origin[name]} both map to {name}"))
        state[name], origin[name] = tensor, key
    state = expected.adapt(state) if isinstance(expected, Template) else state
    unexpected = {k: origin[k] for k in state if k not in expected}
    free = {name: name for name in expected if name not in state}
    for name, like in expected.items():
        if name not in state:
            misfits.append(_Misfit(kind="missing", text=name, name=name, among=unexpected))
        elif state[name].shape != like.shape:
            got, want = tuple(state[name].shape), tuple(like.shape)
            text = f"{origin[name]} is {got}, {name} needs {want}"
            misfits.append(_Misfit(kind="shape", text=text, shapes=(got, want)))
        elif (fitting := _as_type(state[name], like.dtype, name)) is None:
            types = [str(d).removeprefix("torch.") for d in (state[name].dtype, like.dtype)]
            misfits.append(_Misfit(kind="dtype", text=f"{origin[name]} is {types[0]}, {name} needs {types[1]}"))
        else:
            state[name] = fitting
    misfits += [_Misfit(kind="unexpected", text=key, name=name, among=free) for name, key in unexpected.items()]
    return state, misfits


def _as_type(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor | None:
    """Return a tensor in the model's type; ``None`` where that would change what it says.

    Trainers that store everything in half precision also do it to counters and indices.
    """
    if dtype.is_floating_point:
        return tensor if tensor.is_floating_point() else None
    if name.endswith("num_batches_tracked"):  # counts training steps; inference never reads it
        return tensor.to(dtype)
    if tensor.is_floating_point() and bool((tensor.abs() > _EXACT).any()):
        return None
    whole = tensor.to(dtype)
    return whole if torch.equal(whole.to(tensor.dtype), tensor) else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
