"""Models with functions, bodies, sequences and unknown sizes: evaluated, and compared with ONNX Runtime."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from minicc.errors import InputError, UnsupportedOpError
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import OpaqueType

HEAD = '<ir_version: 10, opset_import: ["" : 17, "local" : 1]>\n'
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def check(text, feeds, tolerance=1e-6):
    """Import, evaluate, compare; returns the imported model."""
    proto = onnx.parser.parse_model(HEAD + text)
    imported = load_model(proto)
    assert_no_outer_values(imported.graph)
    found = evaluate(imported.graph, feeds)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    expected = ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)
    for ours, theirs in zip(found, expected, strict=True):
        pairs = zip(ours, theirs, strict=True) if isinstance(theirs, list) else [(ours, theirs)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)
    return imported


def assert_no_outer_values(graph: Graph):
    """Every value of a graph, and of the bodies in it, belongs to that very graph."""
    own = set(graph.inputs)
    for node in graph.nodes:
        for value in node.inputs:
            assert value is None or value in own or value.is_constant
        for item in node.attrs.values():
            if isinstance(item, Graph):
                assert_no_outer_values(item)
        own.update(node.outputs)
    assert all(v in own or v.is_constant for v in graph.outputs)


def node_of(graph, op):
    (found,) = [n for n in graph.nodes if n.op.name == op]
    return found


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_captures_become_inputs_through_two_levels(outer, inner):
    imported = check(
        """agraph (float[N,4] x, bool c, bool d) => (float[N,4] y) {
      two = Constant<value = float {2.0}>()
      z = Mul(x, two)
      y = If(c) <
        then_branch = t () => (float[N,4] a) { a = Add(x, z) },
        else_branch = e () => (float[N,4] b) {
          s = Sub(z, two)
          b = If(d) <then_branch = tt () => (float[N,4] q) { q = Neg(x) },
                     else_branch = ee () => (float[N,4] r) { r = Mul(s, z) }> }>
    }""",
        {"x": X, "c": np.array(outer), "d": np.array(inner)},
    )
    branch = node_of(imported.graph, "If")
    assert [v.name for v in branch.inputs] == ["c", "x", "z", "d"]
    assert all(len(branch.attrs[name].inputs) == 3 for name in ("then_branch", "else_branch"))
    assert str(imported.outputs[0].type) == "f32[N,4]"


@pytest.mark.parametrize("condition", [True, False])
def test_branches_of_different_sizes(condition):
    imported = check(
        """agraph (float[N,4] x, bool c) => (float[M,4] y) {
      y = If(c) <then_branch = t () => (float[K,4] a) { a = Concat<axis = 0>(x, x) },
                 else_branch = e () => (float[N,4] b) { b = Neg(x) }>
    }""",
        {"x": X, "c": np.array(condition)},
    )
    shape = imported.graph.outputs[0].shape
    assert str(shape[0]) not in ("N", "2*N")
    assert shape[1] == 4


LOOP = """agraph (float[N,4] x, int64 n, bool go) => (float[M,4] y, float[T,4] s) {
  one = Constant<value = float[1,4] {1.0, 2.0, 3.0, 4.0}>()
  y, s = Loop(n, go, x) <
    body = b (int64 i, bool cin, float[K,4] acc) => (bool cout, float[L,4] more, float[4] row4) {
    cout = Identity(cin)
    f = Cast<to = 1>(i)
    row = Add(one, f)
    more = Concat<axis = 0>(acc, row)
    first = Constant<value = int64[1] {0}>()
    row4 = Squeeze(row, first)
  }>
}"""


@pytest.mark.parametrize("trips", [0, 1, 3])
def test_loop_with_growing_value(trips):
    imported = check(LOOP, {"x": X, "n": np.array(trips), "go": np.array(True)})
    body = node_of(imported.graph, "Loop").attrs["body"]
    assert str(body.inputs[2].type).startswith("f32[carried_")
    assert imported.graph.outputs[0].shape[1] == 4


def test_loop_not_entered():
    check(LOOP, {"x": X, "n": np.array(5), "go": np.array(False)})


def test_loop_with_constant_trip_count_has_a_static_shape():
    imported = check(
        """agraph (float[N,4] x) => (float[N,4] y, float[T,N,4] s) {
      n = Constant<value = int64 {3}>()
      y, s = Loop(n, , x) <
        body = b (int64 i, bool cin, float[N,4] v) => (bool cin, float[N,4] w, float[N,4] u) {
        w = Add(v, x)
        u = Neg(w)
      }>
    }""",
        {"x": X},
    )
    assert [str(a.type) for a in imported.outputs] == ["f32[N,4]", "f32[3,N,4]"]


def test_loop_until_condition():
    check(
        """agraph (float x) => (float y) {
      limit = Constant<value = float {100.0}>()
      n = Constant<value = int64 {9223372036854775807}>()
      t = Constant<value = bool {1}>()
      y = Loop(n, t, x) <body = b (int64 i, bool cin, float v) => (bool c, float w) {
        w = Add(v, v)
        c = Less(w, limit)
      }>
    }""",
        {"x": np.array(3, np.float32)},
    )


def test_loop_in_loop_with_captures_of_both():
    check(
        """agraph (float[4] x) => (float[4] y) {
      n = Constant<value = int64 {3}>()
      t = Constant<value = bool {1}>()
      y = Loop(n, t, x) <body = b (int64 i, bool c, float[4] v) => (bool c, float[4] w) {
        fi = Cast<to = 1>(i)
        w = Loop(i, t, v) <body = bb (int64 j, bool cc, float[4] vv) => (bool cc, float[4] ww) {
          s = Add(vv, fi)
          ww = Mul(s, x)
        }>
      }>
    }""",
        {"x": X[0]},
        tolerance=1e-3,
    )


@pytest.mark.parametrize(
    "attributes",
    ["", ", scan_input_directions = [1]", ", scan_output_directions = [1]", ", scan_output_axes = [1]"],
)
def test_scan(attributes):
    imported = check(
        f"""agraph (float[4] h, float[N,4] x) => (float[4] y, float[A,B] s) {{
      y, s = Scan(h, x) <num_scan_inputs = 1{attributes},
        body = b (float[4] a, float[4] e) => (float[4] a2, float[4] o) {{
        a2 = Add(a, e)
        o = Mul(a2, h)
      }}>
    }}""",
        {"h": X[0], "x": X},
    )
    assert str(imported.outputs[1].type) == ("f32[4,N]" if "axes" in attributes else "f32[N,4]")


def test_scan_over_another_axis():
    check(
        """agraph (float[N,4] x) => (float[4,N] s) {
      s = Scan(x) <num_scan_inputs = 1, scan_input_axes = [-1],
        body = b (float[N] e) => (float[N] o) { o = Neg(e) }>
    }""",
        {"x": X},
    )


def test_sequences_and_sequence_map_with_capture():
    imported = check(
        """agraph (float[N,4] x) => (seq(float[M,4]) s, float[K,4] y) {
      s0 = SequenceConstruct(x, x)
      s = SequenceMap(s0) <body = b (float[N,4] e) => (float[N,4] o) { o = Add(e, x) }>
      y = ConcatFromSequence<axis = 0>(s)
    }""",
        {"x": X},
    )
    assert imported.outputs[0].type == OpaqueType("seq(tensor(float))")


def test_optional_input_and_missing_outputs():
    proto = onnx.parser.parse_model(
        HEAD + """agraph (optional(float[2]) o) => (bool y) { y = OptionalHasElement(o) }"""
    )
    graph = load_model(proto).graph
    assert evaluate(graph, [np.zeros(2, np.float32)])[0]
    assert not evaluate(graph, [None])[0]


FUNCTIONS = """agraph (float[N,4] x) => (float[N,4] y) { y = local.f<alpha = 2.0>(x) }
<domain: "local", opset_import: ["" : 17, "local" : 1]>
f <alpha, beta: float = 0.25> (a) => (b) {
  k = Constant<value_float : float = @alpha>()
  t = Mul(a, k)
  u = Elu<alpha : float = @beta>(t)
  b = local.g(u, a)
}
<domain: "local", opset_import: ["" : 17]>
g (a, b) => (c) { c = Add(a, b) }
"""


def test_functions_with_attributes_and_defaults():
    proto = onnx.parser.parse_model(HEAD + FUNCTIONS)
    imported = load_model(proto)
    (y,) = evaluate(imported.graph, {"x": X})
    t = X * 2
    np.testing.assert_allclose(y, np.where(t < 0, 0.25 * np.expm1(t), t) + X, rtol=1e-6)
    assert {n.op.name for n in imported.graph.nodes} == {"Mul", "Elu", "Add"}
    assert [n.origin[0] for n in imported.graph.nodes] == ["f_0/Mul_1", "f_0/Elu_2", "f_0/g_3/Add_0"]


def test_function_with_older_opset_and_body_that_captures():
    proto = onnx.parser.parse_model(
        HEAD
        + """agraph (float[N,4] x, bool c) => (float[N,4] y) { y = local.f(x, c) }
    <domain: "local", opset_import: ["" : 11]>
    f (a, c) => (b) {
      s = ReduceSum<axes = [1]>(a)
      b = If(c) <then_branch = t () => (float[N,4] p) { p = Add(a, s) },
                 else_branch = e () => (float[N,4] q) { q = Softmax<axis = 0>(a) }>
    }"""
    )
    graph = load_model(proto).graph
    (y,) = evaluate(graph, {"x": X, "c": np.array(True)})
    np.testing.assert_allclose(y, X + X.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)
    (y,) = evaluate(graph, {"x": X, "c": np.array(False)})
    flat = np.exp(X - X.max())
    np.testing.assert_allclose(y, flat / flat.sum(), rtol=1e-5)


def test_overloads_are_told_apart():
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    functions = [
        helper.make_function(
            "local", "f", ["a"], ["b"], [helper.make_node(op, ["a"], ["b"])], opsets, overload=op
        )
        for op in ("Neg", "Abs")
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 4]) for n in ("x", "y", "z")]
    calls = [
        helper.make_node("f", ["x"], [out], domain="local", overload=op)
        for out, op in (("y", "Neg"), ("z", "Abs"))
    ]
    graph = helper.make_graph(calls, "g", infos[:1], infos[1:])
    imported = load_model(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10))
    y, z = evaluate(imported.graph, {"x": X})
    np.testing.assert_array_equal(y, -X)
    np.testing.assert_array_equal(z, abs(X))


def test_operator_with_only_a_function_body_of_onnx():
    text = """<ir_version: 10, opset_import: ["" : 18]>
      agraph (float[N,4] x, int64[N] t) => (float l) { l = NegativeLogLikelihoodLoss(x, t) }"""
    targets = np.array([0, 3, 1])
    (loss,) = evaluate(load_model(onnx.parser.parse_model(text)).graph, {"x": X, "t": targets})
    np.testing.assert_allclose(loss, -X[np.arange(3), targets].mean(), rtol=1e-6)


def test_names_of_sizes():
    infos = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", "seq + 1", None, 3]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", "?", "?"]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["y"])], "g", infos, [out])
    imported = load_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert [str(a) for a in imported.inputs] == ["a: f32[batch,seq_1,a_d2,3]", "b: f32[batch,b_d1,b_d2]"]


def test_initializers_among_the_inputs_are_constants():
    proto = onnx.parser.parse_model("""<ir_version: 3, opset_import: ["" : 8]>
      agraph (float[N,4] x, float[4] w) => (float[N,4] y) <float[4] w = {1, 2, 3, 4}> { y = Mul(x, w) }""")
    imported = load_model(proto)
    assert [a.name for a in imported.inputs] == ["x"]
    (y,) = evaluate(imported.graph, {"x": X})
    np.testing.assert_array_equal(y, X * np.array([1, 2, 3, 4], np.float32))


def test_metadata_and_untouched_proto():
    proto = onnx.parser.parse_model(HEAD + FUNCTIONS)
    proto.producer_name, proto.producer_version = "maker", "1.2"
    proto.metadata_props.add(key="k", value="v")
    before = proto.SerializeToString(deterministic=True)
    imported = load_model(proto)
    assert (imported.producer, imported.opset, imported.ir_version) == ("maker 1.2", 17, 10)
    assert imported.metadata == {"k": "v"}
    assert imported.opsets == {"": 17, "local": 1}
    assert proto.SerializeToString(deterministic=True) == before


def test_path_bytes_and_proto_agree(tmp_path):
    proto = onnx.parser.parse_model(HEAD + FUNCTIONS)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    texts = {repr(load_model(s).graph.nodes) for s in (path, str(path), proto, proto.SerializeToString())}
    assert len(texts) == 1


def test_feeds_are_checked():
    graph = load_model(onnx.parser.parse_model(HEAD + FUNCTIONS)).graph
    for feeds in ({}, {"x": X, "z": X}, {"x": X.astype(np.float64)}, {"x": X[0]}, {"x": X[:, :3]}, []):
        with pytest.raises(InputError):
            evaluate(graph, feeds)


def test_an_attribute_that_nobody_knows_is_told() -> None:
    """One of another domain has no default to compare with: what switches something off is dropped, the rest is an error."""
    def model(**attributes: object) -> onnx.ModelProto:
        node = helper.make_node("BiasGelu", ["x", "b"], ["y"], domain="com.microsoft", **attributes)
        types = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xby"]
        graph = helper.make_graph([node], "g", types[:2], types[2:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])

    assert load_model(model(fast=0, note="")).graph.nodes[0].op.name == "BiasGelu"
    with pytest.raises(UnsupportedOpError, match="fast=3"):
        load_model(model(fast=3))
