"""Weights taken out of a serialized model: the same tensors, from bytes and from files, and damaged files stay harmless."""

import mmap
import warnings
from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.errors import InvalidModelError, MiniccError
from minicc.frontend import weights
from minicc.frontend.model import load_model
from minicc.frontend.tensors import TensorReader
from minicc.frontend.weights import OwnFile, without_weights
from tests.strategies import models

LARGE = st.integers(1, 4000)
LEAST = st.integers(256, 4096)  # bytes; a reference takes some 100


def chain(arrays, attributes):
    """x plus initializers plus Constant nodes."""
    nodes, last = [], "x"
    initializers = [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(arrays)]
    for i, a in enumerate(attributes):
        nodes.append(helper.make_node("Constant", [], [f"c{i}"], value=numpy_helper.from_array(a, f"c{i}")))
    for number, name in enumerate([*(t.name for t in initializers), *(f"c{i}" for i in range(len(attributes)))]):
        nodes.append(helper.make_node("Add", [last, name], [f"y{number}"]))
        last = f"y{number}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tensors_of(proto):
    return [*proto.graph.initializer, *(a.t for n in proto.graph.node for a in n.attribute if a.HasField("t"))]


@settings(deadline=None)
@given(st.lists(LARGE, min_size=1, max_size=4), st.lists(LARGE, max_size=3), LEAST)
def test_tensors_are_the_same_wherever_they_are(sizes, in_nodes, least):
    draw = np.random.default_rng(sum(sizes))
    proto = chain(*([draw.random(n, np.float32) for n in group] for group in (sizes, in_nodes)))
    data = proto.SerializeToString()
    own = OwnFile(data, len(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SMALL", least)
        rest = without_weights(data, own.location)
    stripped = onnx.ModelProto.FromString(rest)
    reader = TensorReader(None, 1 << 30, own)
    for found, wanted in zip(tensors_of(stripped), tensors_of(proto), strict=True):
        assert len(found.raw_data) < least
        np.testing.assert_array_equal(reader.read(found), numpy_helper.to_array(wanted))
    for tensor in (*tensors_of(stripped), *tensors_of(proto)):
        for name in ("raw_data", "external_data", "data_location"):
            tensor.ClearField(name)
    assert stripped == proto  # nothing else has changed


@settings(deadline=None, max_examples=30)
@given(models())
def test_models_without_large_weights_stay_as_they_are(model):
    data = model[0].SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SMALL", len(data))
        assert without_weights(data, "here") == data


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_models_end_in_an_error_or_a_model(data):
    whole = bytearray(chain([np.ones(600, np.float32)], [np.ones(500, np.float32)]).SerializeToString())
    cut = data.draw(st.integers(1, len(whole)))
    for at in data.draw(st.lists(st.integers(0, cut - 1), max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    with suppress(MiniccError):
        load_model(bytes(whole[:cut]))


def test_more_fields_than_the_limit_are_left_to_the_parser(monkeypatch):
    monkeypatch.setattr(weights, "MAX_FIELDS", 3)
    data = chain([np.ones(600, np.float32)], []).SerializeToString()
    assert without_weights(data, "here") == data


def test_nobody_can_name_the_own_file():
    proto = chain([np.ones(600, np.float32)], [])
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="0" * 32)
    with pytest.raises(InvalidModelError, match="folder"):
        load_model(proto.SerializeToString())


def test_a_wrong_size_names_the_tensor():
    proto = chain([np.ones(600, np.float32)], [])
    proto.graph.initializer[0].dims[0] = 599
    with pytest.raises(InvalidModelError, match="'w0' needs 2396 bytes, it has 2400"):
        load_model(proto.SerializeToString())


def test_large_weights_of_a_file_are_mapped_each_on_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAPPED", 4096)
    path = tmp_path / "m.onnx"
    arrays = [np.arange(n, dtype=np.float32).reshape(-1, *[1] * i) for i, n in enumerate((1500, 300, 2000))]
    path.write_bytes(chain(arrays, []).SerializeToString())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a file left open
        constants = load_model(path).graph.constants()
    owners = []
    for value, wanted in zip(constants, arrays, strict=True):
        np.testing.assert_array_equal(value.data, wanted)
        owner = value.data
        while isinstance(owner, np.ndarray):
            owner = owner.base
        owners.append(owner.obj)
    assert [isinstance(o, mmap.mmap) for o in owners] == [True, False, True]
    assert owners[0] is not owners[2]


def test_a_module_does_not_need_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAPPED", 4096)
    path = tmp_path / "m.onnx"
    array = np.arange(2000, dtype=np.float32)
    path.write_bytes(chain([array], []).SerializeToString())
    module = minicc.compile(path)
    size = path.stat().st_size
    path.write_bytes(b"\xff" * size)  # the same file, so a mapping would show it
    np.testing.assert_array_equal(module(np.ones(1, np.float32)), array + 1)
