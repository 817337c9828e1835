"""Operators run by ONNX's reference implementation: types, attributes as plain data, unknown operators."""

import json

import numpy as np
import pytest

from minicc.errors import InvalidModelError, ShapeError, UnsupportedOpError
from minicc.ir.dims import symbol
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import OpaqueType, TensorType, f32, i64, string
from minicc.ops.host import host_op, opaque_type_proto, parse_type_text, type_text

N = symbol("n")
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def add(graph, op, inputs, domain="", opset=28, outputs=1, **attrs):
    attrs = {**attrs, "opset": opset, "outputs": outputs}
    return graph.add(host_op(domain, op, attrs), inputs, attrs, outputs=outputs)


def test_symbolic_sizes_survive_inference():
    graph = Graph()
    x = graph.input("x", TensorType(f32, (N, 4)))
    assert str(add(graph, "Softmax", [x], axis=-1).output.type) == "f32[n,4]"
    found = add(graph, "NonZero", [x]).output.type
    assert found.shape[0] == 2
    assert found.dtype is i64


def test_constants_are_seen_by_inference():
    graph = Graph()
    x = graph.input("x", TensorType(f32, (N, 4)))
    shape = graph.constant(np.array([4, -1], np.int64))
    assert str(add(graph, "Reshape", [x, shape]).output.type).startswith("f32[4,d_")


def test_sequences():
    graph = Graph()
    x = graph.input("x", TensorType(f32, (N, 4)))
    sequence = add(graph, "SequenceConstruct", [x, x]).output
    assert sequence.type == OpaqueType("seq(tensor(float))")
    item = add(graph, "SequenceAt", [sequence, graph.constant(np.int64(1))]).output
    graph.outputs = [sequence, item]
    found = evaluate(graph, [X])
    assert len(found[0]) == 2
    np.testing.assert_array_equal(found[1], X)


def test_plain_attributes_make_the_same_operator_again():
    attrs = {"keys_strings": ("a", "b"), "values_int64s": (7, 9), "default_int64": -1}
    again = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(attrs)).items()}
    words = np.array(["b", "a", "z"], dtype=object)
    results = []
    for given in (attrs, again):
        graph = Graph()
        x = graph.input("x", TensorType(string, (3,)))
        graph.outputs = [add(graph, "LabelEncoder", [x], domain="ai.onnx.ml", opset=4, **given).output]
        assert graph.outputs[0].type == TensorType(i64, (3,))
        results.append(evaluate(graph, [words])[0].tolist())
    assert results == [[9, 7, -1]] * 2


@pytest.mark.parametrize(
    ("op", "domain"), [("Nothing", ""), ("Relu", "acme"), ("Gradient", "ai.onnx.preview.training")]
)
def test_unknown_operators(op, domain):
    with pytest.raises(UnsupportedOpError):
        host_op(domain, op, {"opset": 1 if domain else 28, "outputs": 1})


def test_random_operators_are_not_deterministic():
    assert not host_op("", "RandomNormal", {"opset": 28, "outputs": 1}).deterministic
    assert host_op("", "Softmax", {"opset": 28, "outputs": 1}).deterministic


def test_inference_error_is_typed():
    graph = Graph()
    x = graph.input("x", TensorType(f32, (3, 4)))
    with pytest.raises(ShapeError, match="Concat"):
        add(graph, "Concat", [x, x], axis=7)


@pytest.mark.parametrize(
    "text",
    ["tensor(float)", "seq(tensor(string))", "optional(seq(tensor(bfloat16)))", "map(int64,tensor(float))",
     "seq(map(string,tensor(float)))", "sparse_tensor(double)"],
)  # fmt: skip
def test_type_texts(text):
    assert type_text(opaque_type_proto(text)) == text
    parsed = parse_type_text(text)
    assert isinstance(parsed, TensorType) == text.startswith("tensor(")


@pytest.mark.parametrize("text", ["", "tensor", "seq(", "tensor(floaty)", "list(tensor(float))"])
def test_broken_type_texts(text):
    with pytest.raises(InvalidModelError):
        opaque_type_proto(text)
