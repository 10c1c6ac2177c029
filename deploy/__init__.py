"""effdeploy: efficient vision models from a PyTorch checkpoint to an engine that is proven right and measured."""

import os

# ONNX Runtime 1.31 opens a telemetry client when it is imported, unless told not to before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
