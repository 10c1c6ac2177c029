"""ONNX graphs: reading and writing, and the rewrites between the traced file and the file that a target likes."""
