"""Parity: what is run must give what the float32 PyTorch model gives."""
