"""What the graph tests share: building a model from text and arrays, applying a pass, running before and after."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort

from deploy.graph.base import GraphPass, PassResult, parse_example
from deploy.graph.io import graph_of, model_of


def build(text: str, opset: int = 21, **arrays: object) -> onnx.ModelProto:
    """Parse a graph and add ``arrays`` as its initialisers; Python floats become float32, lists of int become int64."""
    model = parse_example(text, opset=opset)
    for name, values in arrays.items():
        array = np.asarray(values)
        if isinstance(values, (float, list)) and array.dtype == np.float64:
            array = array.astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def apply(graph_pass: GraphPass, model: onnx.ModelProto) -> tuple[PassResult, onnx.ModelProto]:
    """Apply a pass to a copy of ``model``."""
    graph = graph_of(onnx.load_from_string(model.SerializeToString()))
    result = graph_pass.apply(graph)
    after = model_of(graph)
    onnx.checker.check_model(after, full_check=True)
    return result, after


def outputs_of(model: onnx.ModelProto, batch: int = 2) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    feeds = {}
    for i in session.get_inputs():
        values = 100 * draw(*(d if isinstance(d, int) else batch for d in i.shape)) if "int" in i.type else None
        if values is not None:
            feeds[i.name] = values.astype(i.type[7:-1])
        elif i.type == "tensor(bool)":
            feeds[i.name] = draw(*i.shape) > 0
        else:
            feeds[i.name] = draw(*(d if isinstance(d, int) else batch for d in i.shape)).astype(types[i.type])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, atol: float = 1e-6, batch: int = 2) -> None:
    expected, got = outputs_of(before, batch), outputs_of(after, batch)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        assert (values.dtype, values.shape) == (got[name].dtype, got[name].shape)
        np.testing.assert_allclose(got[name], values, rtol=0, atol=atol)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
