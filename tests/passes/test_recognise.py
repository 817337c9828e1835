"""recognise: what exporters write out becomes one operator, with the numbers of ONNX Runtime; near misses stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.helper
import pytest

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import Pass, run_passes
from minicc.passes.recognise import recognise
from tests.passes.models import ops, parse, run_reference, walk

RECOGNISE = Pass("recognise", recognise)
SIMPLIFIED = (default_pipeline(Options())[0], RECOGNISE)
X = "(float[2,3,8] x) => (float[2,3,8] y)"


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def constants(**values: float | Sequence[float]) -> str:
    """Constant nodes, in ONNX text."""
    lines = []
    for name, value in values.items():
        kind = "value_float" if isinstance(value, float) else "value_floats"
        lines.append(f"{name} = Constant<{kind}={value if isinstance(value, float) else list(value)}>()")
    return " ".join(lines)


def same_numbers(model: onnx.ModelProto, graph: Graph, feeds: Mapping[str, np.ndarray], rtol: float = 2e-5) -> None:
    """The graph gives what ONNX Runtime gives for the model as written."""
    expected = run_reference(model, feeds)
    for want, got in zip(expected, evaluate(graph, feeds), strict=True):
        assert want.dtype == got.dtype
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * max(1.0, float(np.nanmax(np.abs(want), initial=0))))


def check(nodes: str, signature: str = X, expected: Mapping[str, int] | None = None, passes: Sequence = (RECOGNISE,)) -> Graph:
    """Recognise in a model of float inputs, compare with ONNX Runtime, and count the ops that are left."""
    model = parse(nodes, signature, opset=18)
    graph = load_model(model).graph
    feeds = {v.name: 3 * numbers(i, *(int(d) for d in v.shape)) for i, v in enumerate(graph.inputs)}
    run_passes(graph, passes, Options(check=1))
    same_numbers(model, graph, feeds)
    if expected is not None:
        assert ops(graph) == expected
    return graph


# -- activations

GELU = {
    "bert": "d = Div(x, r2) e = Erf(d) s = Add(e, one) h = Mul(half, s) y = Mul(x, h)",
    "half first": "h = Mul(x, half) d = Mul(x, r) e = Erf(d) s = Add(one, e) y = Mul(h, s)",
    "half last": "d = Div(x, r2) e = Erf(d) s = Add(e, one) m = Mul(s, x) y = Mul(m, half)",
    "divided by two": "d = Div(x, r2) e = Erf(d) s = Add(e, one) m = Mul(x, s) y = Div(m, two)",
    "half of x divided": "d = Div(x, r2) e = Erf(d) s = Add(e, one) h = Div(x, two) y = Mul(s, h)",
    "distributed": "d = Div(x, r2) e = Erf(d) h = Mul(e, half) s = Add(h, half) y = Mul(s, x)",
}
TANH = {
    "gpt2": "h = Mul(x, half) p = Pow(x, three) m = Mul(p, a) i = Add(x, m) j = "
            "Mul(i, c) t = Tanh(j) s = Add(t, one) y = Mul(h, s)",
    "products": "q = Mul(x, x) p = Mul(q, x) m = Mul(a, p) i = Add(m, x) j = Mul(c, i) t = Tanh(j) s = Add(t, one) "
                "h = Mul(half, s) y = Mul(x, h)",
    "factored": "q = Mul(x, x) m = Mul(q, a) i = Add(m, one) k = Mul(x, c) j = Mul(k, i) t = Tanh(j) s = Add(t, one) "
                "m2 = Mul(x, s) y = Mul(m2, half)",
    "merged": "q = Mul(x, x) m = Mul(q, ca) i = Add(m, c) j = Mul(x, i) t = "
              "Tanh(j) s = Add(t, one) h = Mul(half, s) y = Mul(x, h)",
    "left to right": "u = Mul(a, x) v = Mul(u, x) w = Mul(v, x) i = Add(x, w) j = Mul(i, c) t = Tanh(j) s = Add(t, one) "
                     "h = Mul(half, s) y = Mul(x, h)",
}  # fmt: skip
NUMBERS = constants(r2=2**0.5, r=0.5**0.5, one=1.0, half=0.5, two=2.0, three=3.0, a=0.044715, c=(2 / np.pi) ** 0.5,
                    ca=0.044715 * (2 / np.pi) ** 0.5, six=6.0, sixth=1 / 6, zero=0.0, fifth=0.2)  # fmt: skip


@pytest.mark.parametrize("passes", [(RECOGNISE,), SIMPLIFIED], ids=["alone", "after simplify"])
@pytest.mark.parametrize("form", [*GELU, *TANH])
def test_gelu(form: str, passes: Sequence) -> None:
    graph = check(NUMBERS + (GELU | TANH)[form], expected={"Gelu": 1}, passes=passes)
    assert graph.nodes[0].attrs["approximate"] == ("none" if form in GELU else "tanh")


OTHERS = {
    "Swish": ["s = Sigmoid(x) y = Mul(x, s)", "s = Sigmoid(x) y = Mul(s, x)", "b = Mul(fifth, x) s = Sigmoid(b) y = Mul(x, s)"],
    "HardSigmoid": [
        "b = Add(x, three) k = Clip(b, zero, six) y = Div(k, six)", "b = Add(x, three) k = Clip(b, zero, six) y = Mul(k, sixth)",
        "m = Mul(x, fifth) b = Add(m, half) y = Clip(b, zero, one)", "m = Mul(x, "
        "fifth) b = Add(half, m) k = Max(b, zero) y = Min(k, one)",
    ],
    "HardSwish": [
        "b = Add(x, three) k = Clip(b, zero, six) m = Mul(x, k) y = Div(m, six)",
        "b = Add(x, three) k = Clip(b, zero, six) m = Div(k, six) y = Mul(x, m)",
        "b = Add(x, three) k = Clip(b, zero, six) m = Mul(k, sixth) y = Mul(m, x)",
        "b = Add(x, three) k = Clip(b, zero, six) m = Mul(x, sixth) y = Mul(m, k)",
        "h = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, h)",
    ],
    "Softplus": [
        "e = Exp(x) s = Add(e, one) y = Log(s)",
        "p = Relu(x) a1 = Abs(x) n = Neg(a1) e = Exp(n) s = Add(one, e) l = Log(s) y = Add(l, p)",
    ],
    "Mish": ["s = Softplus(x) t = Tanh(s) y = Mul(x, t)", "e = Exp(x) q = Add(one, e) s = Log(q) t = Tanh(s) y = Mul(t, x)"],
}  # fmt: skip


@pytest.mark.parametrize("op, nodes", [(op, nodes) for op, forms in OTHERS.items() for nodes in forms])
def test_activation(op: str, nodes: str) -> None:
    check(NUMBERS + nodes, expected={op: 1})


NEAR_MISSES = {
    "gelu with another root": "d = Div(x, two) e = Erf(d) s = Add(e, one) h = Mul(half, s) y = Mul(x, h)",
    "gelu of two values": "d = Div(x, r2) e = Erf(d) s = Add(e, one) h = Mul(half, s) z = Abs(x) y = Mul(z, h)",
    "gelu with another term": "d = Div(x, r2) e = Erf(d) s = Add(e, two) h = Mul(half, s) y = Mul(x, h)",
    "swish of two values": "z = Abs(x) s = Sigmoid(x) y = Mul(z, s)",
    "hard swish with a wide clip": "b = Add(x, three) k = Clip(b, zero, three) m = Mul(x, k) y = Div(m, six)",
    "hard swish with another offset": "b = Add(x, two) k = Clip(b, zero, six) m = Mul(x, k) y = Div(m, six)",
    "hard swish with another slope": "h = HardSigmoid<alpha=0.2, beta=0.5>(x) y = Mul(x, h)",
    "softplus with another term": "e = Exp(x) s = Add(e, two) y = Log(s)",
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay(case: str) -> None:
    graph = check(NUMBERS + NEAR_MISSES[case])
    assert not {"Gelu", "Swish", "HardSwish", "Softplus", "Mish"} & set(ops(graph))


def test_inner_values_with_another_reader_stay() -> None:
    nodes = NUMBERS + "s = Sigmoid(x) y = Mul(x, s) z = Abs(s)"
    check(nodes, "(float[2,3] x) => (float[2,3] y, float[2,3] z)", {"Sigmoid": 1, "Mul": 1, "Abs": 1})


def test_integers_are_no_activations() -> None:
    nodes = ("three = Constant<value_int=3>() zero = Constant<value_int=0>() six = Constant<value_int=6>() "
             "b = Add(x, three) k = Clip(b, zero, six) y = Div(k, six)")  # fmt: skip
    graph = load_model(parse(nodes, "(int64[5] x) => (int64[5] y)", 18)).graph
    run_passes(graph, (RECOGNISE,), Options(check=2))
    assert ops(graph) == {"Add": 1, "Clip": 1, "Div": 1}


# -- normalisation

WEIGHTS = constants(gamma=[0.5, 1.0, 2.0, -1.0, 3.0, 0.25, 1.5, 1.0], beta=[1.0, 0.0, 0.5, 2.0, -1.0, 0.0, 0.25, 3.0], two=2.0,
                    half=0.5, minus=-0.5, one=1.0, eps=1e-5)  # fmt: skip
LAST = "ax = Constant<value_ints=[-1]>() "
MEAN = LAST + "m = ReduceMean<keepdims=1>(x, ax) d = Sub(x, m) "
SPREAD = "v = ReduceMean<keepdims=1>(q, ax) e = Add(v, eps) "
LAYER = {
    "pow and div": MEAN + "q = Pow(d, two) " + SPREAD + "r = Sqrt(e) n = Div(d, r) g = Mul(n, gamma) y = Add(g, beta)",
    "reciprocal": MEAN + "q = Mul(d, d) " + SPREAD + "r = Sqrt(e) i = Reciprocal(r) n = "
                  "Mul(d, i) g = Mul(gamma, n) y = Add(beta, g)",
    "pow of a half": MEAN + "q = Pow(d, two) " + SPREAD + "r = Pow(e, half) n = Div(d, r) g = Mul(n, gamma) y = Add(g, beta)",
    "negative power": MEAN + "q = Pow(d, two) " + SPREAD + "i = Pow(e, minus) n = Mul(i, d) g = Mul(n, gamma) y = Add(g, beta)",
    "centred twice": MEAN + "d2 = Sub(x, m) q = Pow(d2, two) " + SPREAD + "r = Sqrt(e) n = "
                     "Div(d, r) g = Mul(n, gamma) y = Add(g, beta)",
    "one divided": MEAN + "q = Mul(d, d) " + SPREAD + "r = Sqrt(e) i = Div(one, r) n = "
                   "Mul(d, i) g = Mul(n, gamma) y = Add(g, beta)",
}


@pytest.mark.parametrize("form", LAYER)
def test_layer_normalization(form: str) -> None:
    passes = SIMPLIFIED if form == "centred twice" else (RECOGNISE,)
    graph = check(WEIGHTS + LAYER[form], expected={"LayerNormalization": 1}, passes=passes)
    node = graph.nodes[0]
    assert node.attrs["epsilon"] == pytest.approx(1e-5) and len(node.inputs) == 3


def test_layer_normalization_over_two_axes_without_scale() -> None:
    nodes = LAYER["reciprocal"].replace("[-1]", "[1, 2]").split("g = Mul")[0].replace("n = Mul", "y = Mul")
    graph = check(WEIGHTS + nodes, expected={"LayerNormalization": 1})
    assert graph.nodes[0].attrs["axis"] == -2


@pytest.mark.parametrize(
    "nodes",
    ["q = Mul(x, x) " + SPREAD + "r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(gamma, n)",
     "q = Pow(x, two) " + SPREAD + "i = Pow(e, minus) n = Mul(x, i) y = Mul(n, gamma)",
     "q = Pow(x, two) " + SPREAD + "r = Sqrt(e) n = Div(x, r) y = Mul(n, gamma)"],
)  # fmt: skip
def test_rms_normalization(nodes: str) -> None:
    check(WEIGHTS + LAST + nodes, expected={"RMSNormalization": 1})


def test_normalisation_around_casts() -> None:
    nodes = (WEIGHTS + LAST + "h = Cast<to=10>(x) w = Cast<to=1>(h) q = Mul(w, w) " + SPREAD + "r = Sqrt(e) i = Reciprocal(r) "
             "n = Mul(w, i) g = Mul(n, gamma) k = Cast<to=10>(g) y = Cast<to=1>(k)")  # fmt: skip
    model = parse(nodes, X, 18)
    graph = load_model(model).graph
    run_passes(graph, (RECOGNISE,), Options(check=1))
    assert ops(graph) == {"Cast": 2, "RMSNormalization": 1}
    same_numbers(model, graph, {"x": numbers(0, 2, 3, 8)}, rtol=1e-3)


def test_a_residual_is_no_bias() -> None:
    nodes = LAYER["pow and div"].replace("Add(g, beta)", "Add(g, x)")
    graph = check(WEIGHTS + nodes, expected={"LayerNormalization": 1, "Add": 1})
    assert len(graph.nodes[0].inputs) == 2


@pytest.mark.parametrize(
    "old, new",
    [("[-1]", "[1]"), ("[-1]", "[0, 2]"), ("q = Pow(d, two)", "q = Pow(x, two)"),
     ("ReduceMean<keepdims=1>(q, ax)", "ReduceMax(q, ax)"),
     ("Sub(x, m)", "Sub(m, x)"), ("q = Pow(d, two)", "q = Pow(d, half)")],
)  # fmt: skip
def test_other_normalisations_stay(old: str, new: str) -> None:
    nodes = LAYER["pow and div"].replace(old, new)
    assert nodes != LAYER["pow and div"]
    if new.endswith("half)"):  # the root of a negative number
        nodes = nodes.replace("q = Pow(d, half)", "d2 = Abs(d) q = Pow(d2, half)")
    graph = check(WEIGHTS + nodes)
    assert "LayerNormalization" not in ops(graph)


GROUPS = """
    rows = Constant<value_ints=[0, 3, -1]>() scale = Constant<value_floats=[1.0, 0.5, 2.0]>()
    bias = Constant<value_floats=[0.0, 0.25, -1.0]>() r = Reshape(x, rows)
    n = InstanceNormalization<epsilon=0.001>(r, scale, bias) whole = Shape(x)
"""


@pytest.mark.parametrize(
    ("shape", "end"),
    [("2,6,4,5", "y = Reshape(n, whole)"), ("2,6,4,5", "p = Relu(n) y = Reshape(p, whole)"), ("2,3,7", "y = Reshape(n, whole)"),
     ("1,12,2,3,2", "y = Reshape(n, whole)")],
)  # fmt: skip
def test_group_normalization(shape: str, end: str) -> None:
    graph = check(GROUPS + end, f"(float[{shape}] x) => (float[{shape}] y)", passes=SIMPLIFIED)
    grouped = ops(graph).get("GroupNormalization", 0)
    assert grouped + ops(graph).get("InstanceNormalization", 0) == 1
    assert grouped == 0 if shape == "2,3,7" else grouped == 1  # a channel for each group needs no groups


@pytest.mark.parametrize("shape", ["2,4,3,6", "2,5,3,2"])
def test_rows_that_are_no_groups_of_channels_stay(shape: str) -> None:
    graph = check(GROUPS + "y = Reshape(n, whole)", f"(float[{shape}] x) => (float[{shape}] y)", passes=SIMPLIFIED)
    assert "GroupNormalization" not in ops(graph)


def test_statistics_that_are_outputs_stay() -> None:
    graph = check(WEIGHTS + LAYER["pow and div"], "(float[2,3,8] x) => (float[2,3,8] y, float[2,3,1] m)")
    assert "LayerNormalization" not in ops(graph)


# -- softmax

SOFTMAX = {
    "with maximum": "t = ReduceMax(x, ax) s = Sub(x, t) e = Exp(s) z = ReduceSum(e, ax) y = Div(e, z)",
    "plain": "e = Exp(x) z = ReduceSum(e, ax) y = Div(e, z)",
    "reciprocal": "e = Exp(x) z = ReduceSum(e, ax) i = Reciprocal(z) y = Mul(i, e)",
}


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("form", SOFTMAX)
def test_softmax(form: str, axis: int) -> None:
    axes = f"ax = Constant<value_ints=[{axis}]>() "
    graph = check(axes + SOFTMAX[form], expected={"Softmax": 1})
    assert graph.nodes[0].attrs["axis"] % 3 == axis % 3


@pytest.mark.parametrize(
    "nodes",
    ["ax = Constant<value_ints=[1, 2]>() e = Exp(x) z = ReduceSum(e, ax) y = Div(e, z)",
     "ax = Constant<value_ints=[2]>() e = Exp(x) z = ReduceSum(e, ax) y = Div(z, e)",
     "ax = Constant<value_ints=[2]>() e = Exp(x) w = Abs(x) z = ReduceSum(w, ax) y = Div(e, z)"],
)  # fmt: skip
def test_other_quotients_stay(nodes: str) -> None:
    assert "Softmax" not in ops(check(nodes))


def test_bodies_are_visited() -> None:
    body = onnx.parser.parse_graph("b (float[2,3] x) => (float[2,3] y) { s = Sigmoid(x) y = Mul(x, s) }")
    branch = onnx.helper.make_graph(list(body.node)[:], "branch", [], list(body.output))
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    types = [onnx.helper.make_tensor_value_info("x", 1, [2, 3]), onnx.helper.make_tensor_value_info("c", 9, [])]
    graph = onnx.helper.make_graph([node], "g", types, [onnx.helper.make_tensor_value_info("z", 1, [2, 3])])
    loaded = load_model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])).graph
    run_passes(loaded, (RECOGNISE,), Options(check=2))
    assert [n.op.name for n in walk(loaded)].count("Swish") == 2


# -- attention: q [2, 6, S, 8], k and v [2, 6, 5, 8], made by transposes as exporters do

HEADS = "(float[2,4,48] q0, float[2,5,48] k0, float[2,5,48] v0, float[2,1,4,5] mask0) => (float[2,6,4,8] y)"
SPLIT = (
    "hs = Constant<value_ints=[0, 0, 6, 8]>() q1 = Reshape(q0, hs) q = Transpose<perm=[0,2,1,3]>(q1) "
    "k1 = Reshape(k0, hs) k = Transpose<perm=[0,2,1,3]>(k1) v1 = Reshape(v0, hs) v = Transpose<perm=[0,2,1,3]>(v1) "
    + constants(s=8**-0.5, root=8**-0.25, d=8**0.5, low=-3.4028235e38, zero=0.0, thousand=-1000.0, one=1.0)
    + " inf = Constant<value = float {-inf}>() neg = Greater(mask0, one) keep = Not(neg) "
)
TORCH = (
    "a1 = Constant<value_ints=[12, 5, 8]>() a2 = Constant<value_ints=[2, 6, 8, 5]>() t1 = Reshape(k, a1) "
    "t2 = Transpose<perm=[0,2,1]>(t1) t3 = Reshape(t2, a2) qs = Mul(q, root) ks = Mul(t3, root) p = MatMul(qs, ks) "
)
PLAIN = "kt = Transpose<perm=[0,1,3,2]>(k) p0 = MatMul(q, kt) "
GUARD = "w0 = Softmax<axis=-1>(x) n = IsNaN(w0) w = Where(n, zero, w0) y = MatMul(w, v)"
END = "w = Softmax<axis=-1>(x) y = MatMul(w, v)"
ATTENTION = {
    "torch": TORCH + "m = Where(keep, zero, low) x = Add(p, m) " + GUARD,
    "torch with -inf": TORCH + "m = Where(keep, zero, inf) x = Add(m, p) " + GUARD,
    "no mask": TORCH + "x = Identity(p) " + END,
    "scores multiplied": PLAIN + "p = Mul(p0, s) m = Where(keep, zero, low) x = Add(p, m) " + END,
    "scores divided": PLAIN + "p = Div(p0, d) m = Where(neg, low, zero) x = Add(p, m) " + END,
    "keys transposed at once": "kt = Transpose<perm=[0,2,3,1]>(k1) qs = Div(q, d) p = MatMul(qs, kt) x = Identity(p) " + END,
    "scores replaced": PLAIN + "p = Mul(s, p0) x = Where(neg, low, p) " + END,
    "scores replaced by -inf": PLAIN + "p = Mul(p0, s) x = Where(keep, p, inf) " + GUARD,
    "mask of products": PLAIN + "p = Mul(p0, s) f = Cast<to=1>(keep) o = Sub(one, f) m = Mul(o, thousand) x = Add(p, m) " + END,
    "dropout": PLAIN + "x = Mul(p0, s) w0 = Softmax<axis=3>(x) w = Dropout(w0) y = MatMul(w, v)",
}


def heads(seed: int, batch: int = 2, groups: int = 6) -> dict[str, np.ndarray]:
    """Feeds for `HEADS`; the first query of the first batch may attend no key."""
    mask = numbers(seed + 3, batch, 1, 4, 5)
    mask[0, 0, 0] = 2
    return {"q0": numbers(seed, batch, 4, 48), "k0": numbers(seed + 1, batch, 5, 8 * groups),
            "v0": numbers(seed + 2, batch, 5, 8 * groups), "mask0": mask}  # fmt: skip


def attend(nodes: str, signature: str = HEADS, feeds: Mapping[str, np.ndarray] | None = None) -> Graph:
    """Recognise after the first passes, and compare with ONNX Runtime."""
    model = parse(SPLIT + nodes, signature, 18)
    graph = load_model(model).graph
    run_passes(graph, SIMPLIFIED, Options(check=1))
    same_numbers(model, graph, feeds or heads(0))
    return graph


@pytest.mark.parametrize("form", ATTENTION)
def test_attention(form: str) -> None:
    graph = attend(ATTENTION[form])
    found = ops(graph)
    assert found["Attention"] == 1
    assert not {"MatMul", "Softmax", "IsNaN", "Mul", "Div"} & set(found) - ({"Mul"} if form == "mask of products" else set())
    assert found["Transpose"] == found["Reshape"] == 3  # nothing but the heads of q, k and v
    node = next(n for n in graph.nodes if n.op.name == "Attention")
    assert node.attrs["scale"] == pytest.approx(8**-0.5)
    assert len(node.origin) >= 3


def test_a_scale_for_each_head() -> None:
    """Factors of scores by head multiply queries instead."""
    factors = "e = Constant<value_ints=[6, 1, 1]>() each = Reshape(six, e) p = Mul(p0, each) x = Identity(p) "
    found = ops(attend(constants(six=[1.0, 2.0, 0.5, 1.0, 3.0, -2.0]) + PLAIN + factors + END))
    assert found["Attention"] == found["Mul"] == 1 and "Softmax" not in found


def literal(name: str, *shape: int) -> str:
    """A float initializer of random numbers, in ONNX text."""
    text = ", ".join(f"{x:.3f}" for x in numbers(len(name), *shape).reshape(-1))
    return f"float[{','.join(map(str, shape))}] {name} = {{{text}}}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("order", ["r, own", "own, r"])
def test_masks_of_windows(images: int, bias: bool, order: str) -> None:
    """Two windows of each image have masks of their own; a bias of heads may come before."""
    batch = 2 * images
    nodes = (
        f"{PLAIN} p1 = Mul(p0, s) p = {'Add(p1, bias)' if bias else 'Identity(p1)'} "
        f"five = Constant<value_ints=[{images}, 2, 6, 4, 5]>() "
        f"four = Constant<value_ints=[{batch}, 6, 4, 5]>() r = Reshape(p, five) a = Add({order}) x = Reshape(a, four) {END}"
    )
    signature = HEADS.replace("[2,", f"[{batch},") + f" <{literal('bias', 1, 6, 4, 5)}, {literal('own', 2, 1, 4, 5)}>"
    graph = attend(nodes, signature, heads(0, batch=batch))
    assert ops(graph)["Attention"] == 1 and not {"Softmax", "MatMul"} & set(ops(graph))


LEFT_ALONE = {
    "rows of -inf would be NaN": PLAIN + "p = Mul(p0, s) m = Where(keep, zero, inf) x = Add(p, m) " + END,
    "a mask of any numbers": PLAIN + "p = Mul(p0, s) x = Add(p, mask0) " + END,
    "replaced by a small number": PLAIN + "p = Mul(p0, s) x = Where(keep, p, thousand) " + END,
    "scaled after masking": PLAIN + "m = Where(keep, zero, low) p = Add(p0, m) x = Mul(p, one2) " + END,
    "softmax over queries": PLAIN + "x = Mul(p0, s) w = Softmax<axis=2>(x) y = MatMul(w, v)",
    "a vector as scale": PLAIN + "x = Mul(p0, five) " + END,
}


@pytest.mark.parametrize("form", LEFT_ALONE)
def test_other_products_stay(form: str) -> None:
    graph = attend(constants(five=[1.0, 2.0, 0.5, 1.0, 2.0], one2=0.5) + LEFT_ALONE[form])
    assert "Attention" not in ops(graph) and ops(graph)["Softmax"] == 1


@pytest.mark.parametrize("value", ["p", "w"])
def test_scores_that_are_outputs_stay(value: str) -> None:
    nodes = PLAIN + "p = Mul(p0, s) x = Identity(p) " + END
    graph = attend(nodes, HEADS.replace("y)", f"y, float[2,6,4,5] {value})"))
    assert "Attention" not in ops(graph)


def test_products_of_other_rank_stay() -> None:
    nodes = "kt = Transpose<perm=[0,2,1]>(k0) p = MatMul(q0, kt) w = Softmax<axis=-1>(p) y = MatMul(w, v0)"
    model = parse(nodes, HEADS.replace("2,6,4,8", "2,4,48"), 18)
    graph = load_model(model).graph
    run_passes(graph, SIMPLIFIED, Options(check=2))
    assert "Attention" not in ops(graph)


def repeated(name: str) -> str:
    """k or v [2, 2, 5, 8] repeated to six heads."""
    return (f"{name}a = Constant<value_ints=[0, 0, 2, 8]>() {name}b = Reshape({name}0, {name}a) "
            f"{name}c = Transpose<perm=[0,2,1,3]>({name}b) "
            f"{name}d = Constant<value_ints=[2]>() {name}e = Unsqueeze({name}c, {name}d) "
            f"{name}f = Constant<value_ints=[2, 2, 3, 5, 8]>() {name}g = Expand({name}e, {name}f) "
            f"{name}h = Constant<value_ints=[2, 6, 5, 8]>() {name} = Reshape({name}g, {name}h) ")  # fmt: skip


@pytest.mark.parametrize("product", [PLAIN + "p = Mul(p0, s) ", TORCH], ids=["plain", "torch"])
def test_grouped_heads(product: str) -> None:
    q = "hs = Constant<value_ints=[0, 0, 6, 8]>() q1 = Reshape(q0, hs) q = Transpose<perm=[0,2,1,3]>(q1) "
    tail = SPLIT[SPLIT.index("s = Constant<value_float") :]
    nodes = q + repeated("k") + repeated("v") + tail + product + "m = Where(keep, zero, low) x = Add(p, m) " + END
    model = parse(nodes, HEADS.replace("[2,5,48]", "[2,5,16]"), 18)
    graph = load_model(model).graph
    run_passes(graph, SIMPLIFIED, Options(check=1))
    same_numbers(model, graph, heads(0, groups=2))
    assert "Expand" not in ops(graph)
    node = next(n for n in graph.nodes if n.op.name == "Attention")
    assert [v.shape[1] for v in node.inputs[:3]] == [6, 2, 2]


def test_the_whole_pipeline_keeps_the_numbers() -> None:
    model = parse(SPLIT + ATTENTION["torch with -inf"], HEADS, 18)
    graph = load_model(model).graph
    run_passes(graph, default_pipeline(Options()), Options(check=1))
    same_numbers(model, graph, heads(7))
