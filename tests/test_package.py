"""``effdeploy package``: what is written is read back with the schema of Triton's own client package."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from support import effdeploy

from deploy.artifacts import read_manifest, write_manifest
from deploy.packaging import config_text
from deploy.records import Batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of grpc, which the package imports
    from tritonclient.grpc import model_config_pb2


def parsed(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def served(run, **changes):
    """The configuration of a bundle whose trace or engine is changed."""
    trace = {k: v for k, v in changes.items() if k in ("batch", "inputs", "outputs")}
    engine = {k: v for k, v in changes.items() if k in ("backend", "device", "options")}
    options = {k: v for k, v in changes.items() if k in ("labelled", "queue_delay", "instances")}
    run = dataclasses.replace(run, trace=dataclasses.replace(run.trace, **trace))
    return parsed(config_text(run, dataclasses.replace(run.engines[0], **engine), "m", **options))


def test_a_bundle_becomes_a_version_that_the_runtime_opens(tiny_bundle, tmp_path):
    result = effdeploy("package", tiny_bundle, "--triton", tmp_path / "models")
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "models" / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["1", "README.md", "config.pbtxt"]
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 0)
    session = onnxruntime.InferenceSession(folder / "1" / config.default_model_filename)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [(t.name, list(t.dims)) for t in config.input]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [(t.name, list(t.dims)) for t in config.output]
    (warm,) = config.model_warmup
    assert list(warm.inputs["images"].dims) == [1, 3, 224, 224]
    assert warm.inputs["images"].random_data
    read_me = (folder / "README.md").read_text()
    assert "/v2/models/tiny/ready" in read_me
    assert "--gpus" not in read_me


def test_the_same_model_again_is_the_next_version(tiny_bundle, tmp_path):
    for version in ("1", "2"):
        assert effdeploy("package", tiny_bundle, "--triton", tmp_path).exit_code == 0
        assert (tmp_path / "tiny" / version / "model.onnx").is_file()
    assert not [p for p in (tmp_path / "tiny").iterdir() if p.name.startswith(".")]


def test_a_file_in_the_repositorys_place_is_told_with_the_option_that_names_it(tiny_bundle, tmp_path):
    (tmp_path / "models").write_text("not a folder")
    result = effdeploy("package", tiny_bundle, "--triton", tmp_path / "models")
    assert result.exit_code == 19
    assert "choose another folder with --triton" in result.stderr
    assert (tmp_path / "models").read_text() == "not a folder"


def test_another_configuration_under_the_name_is_refused(tiny_bundle, tmp_path):
    assert effdeploy("package", tiny_bundle, "--triton", tmp_path).exit_code == 0
    before = (tmp_path / "tiny" / "config.pbtxt").read_text()
    result = effdeploy("package", tiny_bundle, "--triton", tmp_path, "--instances", "3")
    assert result.exit_code == 19
    assert "+  count: 3" in result.stderr
    assert "--name" in result.stderr
    assert (tmp_path / "tiny" / "config.pbtxt").read_text() == before
    assert not (tmp_path / "tiny" / "2").exists()


def test_a_dynamic_batch_is_batched_and_warmed_up_at_each_size(tiny_bundle):
    run = read_manifest(tiny_bundle)
    spec = run.trace.inputs[0]
    dynamic = dataclasses.replace(spec, shape=("batch", *spec.shape[1:]))
    config = served(run, batch=Batch.parse("1:8:32"), inputs=(dynamic,), queue_delay=250)
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert list(config.input[0].dims) == list(spec.shape[1:])
    assert [warm.batch_size for warm in config.model_warmup] == [1, 8, 32]


def test_what_runs_where(tiny_bundle):
    run = read_manifest(tiny_bundle)
    group = model_config_pb2.ModelInstanceGroup
    assert served(run, device="cpu").instance_group[0].kind == group.KIND_CPU
    assert served(run, device="cuda:0").instance_group[0].kind == group.KIND_GPU
    assert served(run, backend="tensorrt", instances=2).instance_group[0].count == 2
    threads = served(run, options={"threads": "3"}).parameters["intra_op_thread_count"]
    assert threads.string_value == "3"
    profiled = dataclasses.replace(run, recipe={**run.recipe, "engine": {"profiles": ["1", "4"]}})
    assert list(served(profiled).instance_group[0].profile) == ["0", "1"]


@pytest.mark.parametrize("batch", ["2:4:8"])
def test_an_engine_without_single_images_is_refused(tiny_bundle, tmp_path, batch):
    run = read_manifest(tiny_bundle)
    trace = dataclasses.replace(run.trace, batch=Batch.parse(batch))
    for file in tiny_bundle.iterdir():
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    write_manifest(dataclasses.replace(run, trace=trace), tmp_path / "b")
    result = effdeploy("package", tmp_path / "b", "--triton", tmp_path / "models")
    assert result.exit_code == 5
    assert "--batch 1:4:8" in result.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"engines": ()}, 17, "no engine"),
        ({"verdict": "bad", "parity": "bad"}, 17, "not fit to serve"),
        ({"engines": "tensorrt_rtx"}, 12, "--backend tensorrt"),
    ],
)
def test_what_cannot_be_served_is_refused(tiny_bundle, tmp_path, change, code, says):
    run = read_manifest(tiny_bundle)
    if change.get("parity"):
        change = {"parity": dataclasses.replace(run.parity, ok=False, verdict="top-1 fell")}
    elif change["engines"]:
        change = {"engines": (dataclasses.replace(run.engines[0], backend="tensorrt_rtx"),)}
    folder = tmp_path / "b"
    folder.mkdir()
    write_manifest(dataclasses.replace(run, **change), folder)
    result = effdeploy("package", folder, "--triton", tmp_path / "models")
    assert result.exit_code == code
    assert says in result.stderr
    assert not (tmp_path / "models").exists()


def test_class_names_go_with_the_scores(tiny_bundle, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"class {n}" for n in range(1000)))
    assert effdeploy("package", tiny_bundle, "--triton", tmp_path / "m", "--labels", labels).exit_code == 0
    config = parsed((tmp_path / "m" / "tiny" / "config.pbtxt").read_text())
    assert config.output[0].label_filename == "labels.txt"
    assert (tmp_path / "m" / "tiny" / "labels.txt").read_text().splitlines()[999] == "class 999"
    labels.write_text("cat\ndog\n")
    result = effdeploy("package", tiny_bundle, "--triton", tmp_path / "m2", "--labels", labels)
    assert result.exit_code == 18
    assert "got 2 names" in result.stderr
    assert "1000" in result.stderr
    assert effdeploy("package", tiny_bundle, "--triton", tmp_path / "m2", "--labels", tmp_path / "no").exit_code == 18


@pytest.mark.parametrize("option", [("--name", "a/b"), ("--device", "tpu")])
def test_wrong_options(tiny_bundle, tmp_path, option):
    result = effdeploy("package", tiny_bundle, "--triton", tmp_path / "m", *option)
    assert result.exit_code == 3
    assert option[1] in result.stderr


def test_the_schema_notices_a_wrong_field(tiny_bundle):
    run = read_manifest(tiny_bundle)
    text = config_text(run, run.engines[0], "m")
    with pytest.raises(text_format.ParseError):
        parsed(text.replace("max_batch_size", "maximum_batch_size"))
    with pytest.raises(text_format.ParseError):
        parsed(text.replace("TYPE_FP32", '"TYPE_FP32"'))


def test_random_data_is_what_the_engine_takes(tiny_bundle, tmp_path):
    """The warm-up request, sent as Triton would send it."""
    assert effdeploy("package", tiny_bundle, "--triton", tmp_path).exit_code == 0
    config = parsed((tmp_path / "tiny" / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "tiny" / "1" / "model.onnx")
    given = {name: np.ones(value.dims, np.float32) for name, value in config.model_warmup[0].inputs.items()}
    assert list(session.run(None, given)[0].shape) == list(config.output[0].dims)
