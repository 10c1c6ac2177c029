"""A small detector that was trained, and the pictures that it was trained for."""

from pathlib import Path

RECIPE = Path(__file__).parent / "detector.yaml"
WEIGHTS = Path(__file__).parent / "detector.safetensors"
