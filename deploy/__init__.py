"""effdeploy: efficient vision models from a PyTorch checkpoint to an engine that is proven right and measured."""

__version__ = "0.1.0"
