"""The runtimes, by name. Nothing heavy is imported until one is asked for."""

from __future__ import annotations

import importlib

from deploy.backends.base import Backend
from deploy.errors import UnknownNameError, did_you_mean

AUTO = "auto"  # no backend: ``export`` measures those of the CPU and takes the fastest (deploy.fastest)

# name -> module with one constant BACKEND
BACKENDS = {
    "onnxruntime": "deploy.backends.onnxruntime",
    "openvino": "deploy.backends.openvino",
    "tensorrt": "deploy.backends.tensorrt",
    "tensorrt_rtx": "deploy.backends.tensorrt_rtx",
}


def load_backend(name: str) -> Backend:
    """Import and return a backend; whether it works here is ``available()``'s answer.

    Raises:
        UnknownNameError: no backend of that name.
    """
    if name == AUTO:
        raise UnknownNameError(
            f"backend {AUTO!r} is chosen by measurement, which only export does", hint=f"one of {', '.join(BACKENDS)}"
        )
    if name not in BACKENDS:
        raise UnknownNameError(
            f"unknown backend {name!r}; {did_you_mean(name, BACKENDS)}", hint="--backend onnxruntime"
        )
    backend: Backend = importlib.import_module(BACKENDS[name]).BACKEND
    return backend
