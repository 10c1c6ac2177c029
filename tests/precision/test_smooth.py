"""SmoothQuant: the same function in float32, a better one in INT8 where channels have outliers, else none."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantised_cases import images

from deploy.precision.quantize import Quantised, QuantizationRequest, quantize
from deploy.precision.select import select
from deploy.precision.smooth import channels_of, factors_of, sites_of, smoothed, strengths_of
from deploy.precision.view import view_of
from deploy.records import Precision, Target

WIDTH, RTX = 32, Target.TENSORRT


def network(*, outlier: float = 40.0, residual: bool = False) -> onnx.ModelProto:
    """Two norms that share scale and offset, each before a linear layer; a few channels of the scale are outliers."""
    rng = np.random.default_rng(0)
    scale = np.ones(WIDTH, np.float32)
    scale[[3, 17]] = outlier
    weights = {
        "embed": rng.standard_normal((64, WIDTH)) / 8, "scale": scale, "offset": rng.standard_normal(WIDTH) / 10,
        "fc1": rng.standard_normal((WIDTH, 48)) / 6, "back": rng.standard_normal((48, WIDTH)) / 7,
        "fc2": rng.standard_normal((WIDTH, 16)) / 6,
    }  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([0, 3, -1], np.int64), "flat"))
    norm = {"axis": -1, "epsilon": 1e-6}
    nodes = [
        helper.make_node("Reshape", ["images", "flat"], ["t"], "embed/Reshape"),
        helper.make_node("MatMul", ["t", "embed"], ["e"], "embed/MatMul"),
        helper.make_node("LayerNormalization", ["e", "scale", "offset"], ["n1"], "norm1/LayerNormalization", **norm),
        helper.make_node("MatMul", ["n1", "fc1"], ["f"], "fc1/MatMul"),
        helper.make_node("Tanh", ["f"], ["g"], "act/Tanh"),
        helper.make_node("MatMul", ["g", "back"], ["b"], "back/MatMul"),
        helper.make_node("Add", ["b", "n1" if residual else "e"], ["r"], "Add"),
        helper.make_node("LayerNormalization", ["r", "scale", "offset"], ["n2"], "norm2/LayerNormalization", **norm),
        helper.make_node("MatMul", ["n2", "fc2"], ["logits"], "fc2/MatMul"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, 16])], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, dict(feeds))[0] for feeds in images(8, seed=9).batches()])


def error(model: onnx.ModelProto, found: Quantised) -> float:
    whole = run(model)
    return float(np.linalg.norm(run(found.model) - whole) / np.linalg.norm(whole))


def written(model: onnx.ModelProto, *, smooth: bool | None, digest: str = "net", target: Target = RTX) -> Quantised:
    request = QuantizationRequest(images=images(), smooth=smooth, weight_bits=8, kept={"^embed": "first"})
    return quantize(model, Precision.INT8, target, request, digest=digest)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_folding_keeps_the_function_in_float32(strength: float) -> None:
    model = network()
    view = view_of(model)
    sites = sites_of(view, select(view, Target.ONNXRUNTIME, ("^embed",), {}, {"e": 3}))
    assert [view.nodes[s.norm].name for s in sites] == ["norm1/LayerNormalization", "norm2/LayerNormalization"]
    channels = channels_of(model, view, sites, images())
    changed = smoothed(model, view, sites, channels, {s.norm: strength for s in sites})
    np.testing.assert_allclose(run(changed), run(model), rtol=0, atol=2e-5 * float(np.abs(run(model)).max()))
    factors = factors_of(
        channels[sites[0].norm], [numpy_helper.to_array(view.constants["fc1"]).astype(float)], strength
    )
    assert factors[3] > 2 * np.median(factors)
    before, after = (next(t for t in m.graph.initializer if t.name == "fc1") for m in (model, changed))
    np.testing.assert_allclose(
        numpy_helper.to_array(after), numpy_helper.to_array(before) * factors[:, None], rtol=1e-6
    )


def test_outliers_are_found_and_int8_gains_from_it() -> None:
    with_, without = (written(network(), smooth=smooth) for smooth in (True, False))
    assert set(with_.record.smoothed) == {"norm1/LayerNormalization", "norm2/LayerNormalization"}
    assert without.record.smoothed == {}
    assert error(network(), with_) < 0.5 * error(network(), without)


def test_a_network_without_outliers_stays_as_it_is() -> None:
    plain = network(outlier=1.0)
    found = written(plain, smooth=True, digest="plain")
    assert found.record.smoothed == {}
    assert found.model == written(plain, smooth=False, digest="plain").model


def test_a_norm_that_a_residual_reads_too_is_left_alone() -> None:
    found = written(network(residual=True), smooth=True, digest="residual")
    assert "norm1/LayerNormalization" not in found.record.smoothed


def test_it_is_on_for_tensorrt_and_off_for_onnxruntime() -> None:
    assert written(network(), smooth=None).record.smoothed
    assert not written(network(), smooth=None, target=Target.ONNXRUNTIME).record.smoothed


def test_the_search_takes_nothing_that_does_not_halve_the_expected_error() -> None:
    model = network(outlier=1.5)
    view = view_of(model)
    sites = sites_of(view, select(view, RTX, ("^embed",), {}, {}))
    channels = channels_of(model, view, sites, images())
    assert strengths_of(view, sites, channels, bits=8, symmetric=True) == {}
