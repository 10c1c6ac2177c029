"""Precision: writes FP16, BF16, INT8 or FP8 into a float32 graph, with the checks and the emulation that judge it.

TensorRT 11 has no precision flags: what runs in 16 bits is what the ONNX file says. So this room writes the file.

- ``convert.convert_precision`` is the stage: patched graph in, ``30-<precision>.onnx`` and a ``PrecisionRecord`` out.
- ``policy`` says, as data with reasons, what stays float32; ``decide`` applies it, with ``keep`` and measured values.
- ``schema`` reads from the ONNX operator schemas which slots of a node follow its type; ``view`` indexes the graph.
- ``rewrite`` writes the decision: one cast per tensor and type, one copy per weight and type. ``weights`` rounds them.
- ``opset`` raises the opset where bfloat16 needs it. ``ranges`` measures activations, ``emulate`` rounds like a GPU.
- ``quantize`` writes INT8 and FP8 as Q/DQ: ``select`` chooses products, ``images`` and ``calibrate`` measure ranges,
  ``histogram`` clips them, ``write_qdq`` writes, ``fp8`` retypes, ``qdq`` reads and lints, ``cpu`` knows overflow.
"""
