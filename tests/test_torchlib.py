"""The stand-in for what the exporter reads from its library's sources."""

from __future__ import annotations

import inspect

import pytest
from onnxscript import values
from onnxscript.function_libs.torch_lib.ops.core import aten_addmm

from deploy.torchlib import unread_sources


@pytest.fixture
def reads(monkeypatch):
    """Count how often a source is read."""
    read, seen = inspect.getsource, []
    monkeypatch.setattr(inspect, "getsource", lambda thing: seen.append(thing) or read(thing))
    return seen


def test_a_domain_is_told_without_the_source(reads):
    want = aten_addmm.function_ir.domain
    assert reads  # what the exporter does by itself, 500 times
    reads.clear()
    with unread_sources():
        assert aten_addmm.function_ir.domain == want
        assert not reads


def test_what_else_is_asked_comes_from_the_source(reads):
    want = [value.name for value in aten_addmm.function_ir.inputs]
    with unread_sources():
        assert [value.name for value in aten_addmm.function_ir.inputs] == want
        with pytest.raises(AttributeError):
            _ = aten_addmm.function_ir.nothing_of_the_kind


def test_the_library_is_left_as_it_was(monkeypatch):
    before = values.TracedOnnxFunction.function_ir
    with unread_sources():
        assert values.TracedOnnxFunction.function_ir is not before
    with pytest.raises(ZeroDivisionError), unread_sources():
        _ = 1 / 0
    assert values.TracedOnnxFunction.function_ir is before
    monkeypatch.delattr(values.TracedOnnxFunction, "function_ir")  # a release that needs no help
    with unread_sources():
        assert not hasattr(values.TracedOnnxFunction, "function_ir")
