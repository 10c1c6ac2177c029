"""TensorRT's description of a built engine, read: the build log's listing and the inspector's JSON of 10.x and 11.x.

Both name the final fused kernels with the types of their tensors and the ONNX nodes that they came from. Pure functions
of text and data: nothing here needs TensorRT.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.backends.audit import UNKNOWN, Kernel
from deploy.errors import PrecisionAuditError

# Entries that launch nothing on the GPU: shape arithmetic on the host and synchronisation between streams.
_NOT_KERNELS = frozenset({"shape_call", "signal", "wait", "NoOp"})
_TYPES = (  # longest names first; as written by the log ("Half") and by 10.x's combined field ("... FP16 format ...")
    ("bfloat16", "bf16"), ("bf16", "bf16"), ("half", "fp16"), ("fp16", "fp16"), ("float16", "fp16"), ("fp8", "fp8"),
    ("e4m3", "fp8"), ("int8", "int8"), ("fp32", "fp32"), ("float", "fp32"),
)  # fmt: skip
_INTEGERS = ("int64", "int32", "int4", "bool", "uint8")
_ENTRY = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, StreamId: .*?, Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)
_TENSOR = re.compile(r"Name: .*?, (?:Location: \w+, )?Dimensions: \[(?P<dims>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer|[\x1d-\x1f]|__|\s|$)")  # "]__gemm_from_conv1x1" occurs

_IO = re.compile(r"^ ?Name: (?P<name>.*?), IOMode: \w+, ", re.MULTILINE)
_PROFILE = re.compile(r" \[profile \d+\]$")  # 10.x repeats its bindings for each optimisation profile

_AGAIN = "build again; an engine needs the profiling verbosity DETAILED to tell its layers"

Tensor = tuple[str, tuple[int, ...]]  # precision ("" for integers, "unknown" for what is no known type), shape


def kernels_from_log(log: str) -> list[Kernel]:
    """Read the ``Layers:`` listing that ends a verbose TensorRT-RTX build log."""
    return [
        _kernel(
            entry["name"],
            entry["type"],
            inputs=_tensors(entry["inputs"]),
            constants=_tensors(entry["constants"]),
            outputs=_tensors(entry["outputs"]),
            metadata=entry["metadata"],
        )
        for entry in _ENTRY.finditer(log)
        if entry["type"] not in _NOT_KERNELS
    ]


def inspector_data(text: str) -> dict[str, Any]:
    """Read the JSON text of ``get_engine_information``.

    Raises:
        PrecisionAuditError: it is cut, or no object with a list of layers: nothing can be audited.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PrecisionAuditError(
            f"the engine inspector's JSON ({len(text)} characters) cannot be read: {error}", hint=_AGAIN
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("Layers"), list):
        raise PrecisionAuditError(
            f"the engine inspector gave {text[:80]!r}, expected an object with Layers", hint=_AGAIN
        )
    return data


def kernels_from_inspector(data: Mapping[str, Any]) -> list[Kernel]:
    """Read ``get_engine_information(JSON)``, built with detailed profiling verbosity.

    10.x has one field ``Format/Datatype`` for a tensor, 11.x has ``Format`` and ``Datatype``; both are understood.
    """
    return [
        _kernel(
            layer.get("Name", ""),
            layer.get("LayerType", ""),
            inputs=[_json_tensor(t) for t in layer.get("Inputs", ())],
            constants=[_json_tensor(t) for t in layer.get("Constants", ())],
            outputs=[_json_tensor(t) for t in layer.get("Outputs", ())],
            metadata=layer.get("Metadata", ""),
        )
        if isinstance(layer, Mapping)
        else Kernel(name=str(layer), precision=UNKNOWN, reads=frozenset())  # built with names only
        for layer in data.get("Layers", ())
        if not (isinstance(layer, Mapping) and layer.get("LayerType") in _NOT_KERNELS)
    ]


def io_from_inspector(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of an engine's inputs and outputs: ``Bindings`` in 10.x, ``I/O Tensors`` in 11.x."""
    if "I/O Tensors" in data:
        return tuple(tensor["Name"] for tensor in data["I/O Tensors"])
    return tuple(dict.fromkeys(_PROFILE.sub("", name) for name in data.get("Bindings", ())))


def io_from_log(log: str) -> tuple[str, ...]:
    """Return the names of an engine's inputs and outputs from the list that follows ``Layers:``; a cut log has none."""
    return tuple(found["name"] for found in _IO.finditer(log))


def _tensors(text: str) -> list[Tensor]:
    return [(_precision(t["type"]), _shape(t["dims"].split(","))) for t in _TENSOR.finditer(text)]


def _json_tensor(tensor: Mapping[str, Any]) -> Tensor:
    named = tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype", "")
    return _precision(str(named)), _shape(tensor.get("Dimensions", ()))


def _shape(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Read a shape; a size that is known only at run time counts as 1."""
    return tuple(int(n) if str(n).strip().isdigit() else 1 for n in sizes if str(n).strip())


def _precision(text: str) -> str:
    low = text.lower()
    if any(low.startswith(integer) for integer in _INTEGERS):
        return ""
    return next((precision for word, precision in _TYPES if word in low), UNKNOWN)


def _kernel(
    name: str,
    kind: str,
    *,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    outputs: Sequence[Tensor],
    metadata: str,
) -> Kernel:
    weights = {precision for precision, shape in constants if precision and len(shape) >= 2}
    reads = {precision for precision, _ in inputs if precision}
    writes = {precision for precision, _ in outputs if precision}
    deciding = weights if len(weights) == 1 else reads or writes
    silent = not (inputs or constants or outputs) or UNKNOWN in deciding
    counted: Counter[str] = Counter()
    for precision, shape in constants:
        if precision:
            counted[precision] += math.prod(shape)
    return Kernel(
        name=name,
        precision=UNKNOWN if silent else _one_of(deciding),
        reads=frozenset(reads | weights) - {UNKNOWN},
        writes=frozenset(writes) - {UNKNOWN},
        fused=_fused(name, kind),
        nodes=tuple(_NODE.findall(metadata)),
        weights=dict(counted),
    )


def _one_of(types: set[str]) -> str:
    return "other" if not types else next(iter(types)) if len(types) == 1 else "mixed"


def _fused(name: str, kind: str) -> str:
    """Name the kind of a fused kernel from the ops that its name strings together, e.g. ``__myl_FcAddAdd_myl0_5``."""
    if "mha" in name.lower():
        return "attention"
    ops = re.findall(r"[A-Z][a-z0-9]+", name.removeprefix("__myl_").split("_myl")[0]) if "__myl_" in name else []
    if "Inor" in ops or {"Mean", "Sqrt"} <= set(ops) or "normalization" in kind.lower():
        return "norm"
    if kind == "correlation" or {"Corr", "Conv"} & set(ops):
        return "conv"
    return "matmul" if kind == "gemm" or {"Fc", "Gemm"} & set(ops) else ""
