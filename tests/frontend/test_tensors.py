"""Every element type in every way ONNX stores it, against onnx.numpy_helper."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from minicc.errors import InvalidModelError
from minicc.frontend.model import load_model
from minicc.frontend.tensors import TensorReader
from minicc.ir.evaluate import evaluate
from minicc.ir.types import BY_ONNX, DTYPES, string

READER = TensorReader(None, 1 << 30)
NUMERIC = [d for d in DTYPES if d is not string]


def number(dtype):
    return TensorProto.DataType.Value(dtype.onnx)


def samples(dtype, count=7):
    rng = np.random.default_rng(3)
    if dtype.bits < 8 and dtype.is_integer:
        low = -(1 << (dtype.bits - 1)) if dtype.kind == "i" else 0
        return (low + rng.integers(0, 1 << dtype.bits, count)).astype(dtype.numpy)
    if dtype.is_integer:
        info = np.iinfo(dtype.numpy)
        return rng.integers(info.min, info.max, count, dtype=dtype.numpy, endpoint=True)
    if dtype.kind == "b":
        return rng.random(count) < 0.5
    if dtype.kind == "c":
        return (rng.standard_normal(count) + 1j * rng.standard_normal(count)).astype(dtype.numpy)
    return rng.standard_normal(count).astype(dtype.numpy)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_raw_data(dtype):
    expected = samples(dtype)
    proto = numpy_helper.from_array(expected, "w")
    assert proto.HasField("raw_data")
    same(READER.read(proto), expected)
    same(READER.read(proto), numpy_helper.to_array(proto))


@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_typed_fields(dtype):
    expected = samples(dtype)
    proto = helper.make_tensor("w", number(dtype), [7], expected)
    assert not proto.HasField("raw_data")
    same(READER.read(proto), numpy_helper.to_array(proto).astype(expected.dtype))
    same(READER.read(proto), expected)


@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_empty_and_scalar(dtype):
    for shape in ((0, 3), ()):
        expected = samples(dtype, int(np.prod(shape))).reshape(shape)
        found = READER.read(numpy_helper.from_array(expected, "w"))
        assert found.shape == shape
        assert found.dtype == dtype.numpy


def test_strings():
    expected = np.array([["a", "bé"], ["", "d"]], dtype=object)
    np.testing.assert_array_equal(READER.read(numpy_helper.from_array(expected, "s")), expected)


def test_all_types_of_onnx_are_known():
    names = {n for n in TensorProto.DataType.keys() if n != "UNDEFINED"}  # noqa: SIM118  an enumeration, not a dict
    assert names == set(BY_ONNX)


@pytest.mark.parametrize("change", ["short", "long", "none"])
@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_wrong_number_of_elements(dtype, change):
    proto = helper.make_tensor("w", number(dtype), [7], samples(dtype))
    proto.dims[0] = {"short": 30, "long": 2, "none": 1 << 20}[change]
    with pytest.raises(InvalidModelError):
        READER.read(proto)


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializer(flat):
    dense = np.zeros((3, 4), np.float32)
    dense[0, 1], dense[2, 3] = 5, -2
    places = np.argwhere(dense)
    indices = np.ravel_multi_index(tuple(places.T), dense.shape) if flat else places
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 4]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", info[:1], info[1:])
    graph.sparse_initializer.append(
        onnx.SparseTensorProto(
            values=numpy_helper.from_array(dense[tuple(places.T)], "w"),
            indices=numpy_helper.from_array(indices.astype(np.int64), "i"),
            dims=dense.shape,
        )
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (y,) = evaluate(load_model(proto).graph, [np.ones((3, 4), np.float32)])
    np.testing.assert_array_equal(y, dense + 1)


@pytest.mark.parametrize(
    ("form", "given", "expected"),
    [
        ("value_int", 3, np.array(3, np.int64)),
        ("value_ints", [3, 4], np.array([3, 4], np.int64)),
        ("value_float", 2.5, np.array(2.5, np.float32)),
        ("value_floats", [2.5, 1], np.array([2.5, 1], np.float32)),
        ("value_string", "ab", np.array("ab", object)),
        ("value_strings", ["a", "b"], np.array(["a", "b"], object)),
        (
            "value",
            numpy_helper.from_array(np.array([[1, 2]], ml_dtypes.bfloat16)),
            np.array([[1, 2]], ml_dtypes.bfloat16),
        ),
    ],
)
def test_constant_forms(form, given, expected):
    node = helper.make_node("Constant", [], ["y"], **{form: given})
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    proto = helper.make_model(
        helper.make_graph([node], "g", [], [info]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    (y,) = evaluate(load_model(proto).graph, [])
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


def test_constant_of_two_forms_is_refused():
    node = helper.make_node("Constant", [], ["y"], value_int=1, value_float=1.0)
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    proto = helper.make_model(
        helper.make_graph([node], "g", [], [info]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    with pytest.raises(InvalidModelError, match="one value"):
        load_model(proto)
