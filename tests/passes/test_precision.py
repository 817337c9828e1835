"""reduced-precision: what is narrowed and what is not, where the casts are, and how far the numbers move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minicc
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Node
from minicc.ir.opdef import find_op
from minicc.ir.types import DType, TensorType, bf16, f16, f32
from minicc.lower.templates import is_anchor
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import PassContext, run_passes
from minicc.passes.precision import EXACT_INPUTS, FOLLOWERS, NARROW, PRODUCTS, RISKS, WIDE_INPUTS, reduced_precision
from tests.compiling import compile_graph
from tests.passes.models import graph_of, ops, parse, walk
from tests.random_graphs import Sketch

PRECISIONS = pytest.mark.parametrize("precision", sorted(NARROW))
SEEDS = st.integers(0, 2**32 - 1)
UNIT_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}
WEIGHTS = "float[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}"
ROWS = "(float[n,4] x) => (float[n,4] y)"


def narrowed(graph: Graph, precision: str = "fp16") -> PassContext:
    """The pass alone, applied to a graph."""
    context = PassContext(Options(precision=precision))
    reduced_precision(graph, context)
    return context


def optimised(graph: Graph, precision: str, check: int = 1) -> None:
    options = Options(precision=precision, check=check)
    run_passes(graph, default_pipeline(options), options, context=PassContext(options, is_anchor=is_anchor))


def types(graph: Graph) -> dict[str, list[str]]:
    """Element types of the results, by op."""
    found: dict[str, list[str]] = {}
    for node in walk(graph):
        found.setdefault(node.op.name, []).append(node.output.tensor.dtype.name)
    return found


def test_every_listed_operator_exists_and_is_in_one_list() -> None:
    for key in (*PRODUCTS, *FOLLOWERS, *RISKS, *WIDE_INPUTS, *EXACT_INPUTS):
        assert find_op(key[1], key[0]) is not None, key
    assert not (PRODUCTS & FOLLOWERS or PRODUCTS & RISKS.keys() or FOLLOWERS & RISKS.keys())


@PRECISIONS
def test_casts_stand_at_the_borders_of_a_region_only(precision: str) -> None:
    graph = graph_of("a = MatMul(x, w) b = Relu(a) c = Transpose(b) d = Add(c, c) y = MatMul(w, d)",
                     f"(float[4,4] x) => (float[4,4] y) <{WEIGHTS}>")  # fmt: skip
    narrowed(graph, precision)
    narrow = NARROW[precision].name
    assert types(graph) == {
        "Cast": [narrow, "f32"], "MatMul": [narrow] * 2, "Relu": [narrow], "Transpose": [narrow], "Add": [narrow],
    }  # fmt: skip
    assert [v.name for v in graph.outputs] == ["y"]
    assert {v.tensor.dtype for v in graph.constants()} == {NARROW[precision]}
    assert narrowed(graph, precision).rules == {}  # nothing is left to do


def test_what_leads_in_or_out_of_a_region_stays_float32() -> None:
    graph = graph_of("a = Tanh(x) b = Abs(x) c = Add(a, b) d = MatMul(c, w) e = MatMul(d, w) f = Relu(e) y = Tanh(f)",
                     f"{ROWS} <{WEIGHTS}>")  # fmt: skip
    narrowed(graph)
    found = types(graph)
    assert found["MatMul"] == ["f16", "f16"]
    assert found["Tanh"] == ["f32", "f32"] and found["Relu"] == ["f32"] and found["Cast"] == ["f16", "f32"]


def test_tables_read_only_by_products_are_stored_in_16_bits() -> None:
    table = WEIGHTS.replace("w =", "t =")
    graph = graph_of("a = Gather(t, x) b = Gather(t, z) c = Add(a, b) y = MatMul(c, w)",
                     f"(int64[n] x, int64[n] z) => (float[n,4] y) <{WEIGHTS}, {table}>")  # fmt: skip
    narrowed(graph)
    assert types(graph) == {"Gather": ["f16", "f16"], "Add": ["f16"], "MatMul": ["f16"], "Cast": ["f32"]}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_32_bit_precisions_change_nothing(precision: str) -> None:
    graph = graph_of("a = MatMul(x, w) y = MatMul(a, w)", f"{ROWS} <{WEIGHTS}>")
    assert narrowed(graph, precision).rules == {} and ops(graph) == {"MatMul": 2}


@pytest.mark.parametrize(
    ("between", "op", "reason"),
    [
        ("b = Exp(a)", "Exp", "the result may overflow"),
        ("b = Softplus(a)", "Softplus", "the result may overflow"),
        ("d = Tanh(a) b = Mul(d, d)", "Mul", "the square of a value may overflow"),
        ("b = Div(a, x)", "Div", "the result may overflow"),
        ("b = CumSum(a, axis)", "CumSum", "a sum or product of many terms"),
        ("b = Cos(a)", "Cos", "large angles lose their meaning"),
        ("b = LogSoftmax(a)", "LogSoftmax", "a loss"),
        ("b = Add(a, tiny)", "Add", "a constant that becomes zero in 16 bits"),
    ],
)
def test_nodes_at_risk_stay_float32_and_are_named(between: str, op: str, reason: str) -> None:
    constants = f"{WEIGHTS}, float tiny = {{1e-12}}, int64 axis = {{0}}"
    graph = graph_of(f"a = MatMul(x, w) {between} y = MatMul(b, w)", f"{ROWS} <{constants}>")
    (risky,) = [node for node in graph.nodes if node.op.name == op]
    context = narrowed(graph)
    assert types(graph)["MatMul"] == ["f16", "f16"] and risky.output.tensor.dtype == f32
    assert context.refusals == {(f"{op} {risky.origin[0]}", reason): 1}


def test_numbers_beyond_16_bits_stay_float32_until_a_bounded_function() -> None:
    graph = graph_of("a = MatMul(x, w) b = Add(a, low) c = MatMul(b, w) d = Tanh(b) e = MatMul(d, w) y = Add(c, e)",
                     f"{ROWS} <{WEIGHTS}, float low = {{-1e5}}>")  # fmt: skip
    context = narrowed(graph)
    assert types(graph)["MatMul"] == ["f16", "f32", "f16"] and types(graph)["Tanh"] == ["f32"]
    beyond = "a number beyond the 16-bit range"
    assert [(name.split()[0], reason) for name, reason in context.refusals] == [
        ("Add", beyond), ("MatMul", beyond), ("Tanh", beyond), ("Add", beyond),
    ]  # fmt: skip


@PRECISIONS
def test_masks_of_the_lowest_float_do_not_become_infinite(precision: str) -> None:
    """-3.4e38 is finite, its 16-bit form is not: a row with nothing but masked keys would give NaN."""
    body = """s = MatMul(x, w) bias = Where(m, zero, low) masked = Add(s, bias) p = Softmax(masked) y = MatMul(p, w)"""
    constants = f"{WEIGHTS}, float zero = {{0}}, float low = {{-3.4028234663852886e38}}"
    graph = graph_of(body, f"(float[n,4] x, bool[n,4] m) => (float[n,4] y) <{constants}>")
    feeds = [np.ones((2, 4), np.float32), np.array([[True, False, True, False], [False] * 4])]
    (want,) = evaluate(graph, feeds)
    narrowed(graph, precision)
    assert types(graph)["Add"] == ["f32"] and types(graph)["Where"] == ["f32"]
    np.testing.assert_allclose(evaluate(graph, feeds)[0], want, rtol=4 * UNIT_ROUNDOFF[precision])


def test_recognised_attention_reads_its_mask_in_float32() -> None:
    graph = Graph()
    q, mask = graph.input("q", TensorType(f32, (1, 2, 4, 8))), graph.input("m", TensorType(f32, (1, 1, 4, 4)))
    graph.outputs = [graph.add("Attention", [q, q, q, mask], {"scale": 0.3}, domain="minicc").output]
    feeds = [np.random.default_rng(0).standard_normal((1, 2, 4, 8)).astype(np.float32),
             np.triu(np.full((1, 1, 4, 4), np.finfo(np.float32).min), 1)]  # fmt: skip
    (want,) = evaluate(graph, feeds)
    narrowed(graph)
    assert types(graph) == {"Cast": ["f16", "f32"], "Attention": ["f16"]}
    np.testing.assert_allclose(evaluate(graph, feeds)[0], want, atol=8 * UNIT_ROUNDOFF["fp16"])
    module = compile_graph(expanded(graph))
    np.testing.assert_allclose(module.run_items(feeds)[0], want, atol=8 * UNIT_ROUNDOFF["fp16"])


def expanded(graph: Graph) -> Graph:
    optimised(graph, "fp32")
    return graph


def test_positions_keep_their_digits() -> None:
    graph = graph_of("a = MatMul(x, w) b = Mul(a, k) c = Add(b, k) i = Cast<to=7>(c) d = MatMul(c, w) y = Cast<to=1>(i)",
                     f"(float[n,4] x) => (float[n,4] y, float[n,4] d) <{WEIGHTS}, float k = {{1.5}}>")  # fmt: skip
    context = narrowed(graph)
    assert types(graph)["MatMul"] == ["f16", "f16"]
    assert types(graph)["Mul"] == types(graph)["Add"] == ["f32"]
    assert set(context.refusals) == {
        (f"{node.op.name} {node.origin[0]}", "positions or sizes are computed from it")
        for node in graph.nodes if node.op.name in ("Mul", "Add")
    }  # fmt: skip


def test_spectra_before_a_logarithm_keep_their_small_numbers() -> None:
    """Mel filters of a power spectrum span more decades than float16 has; a bounded function in between ends that."""
    graph = graph_of("a = MatMul(x, w) b = Clip(a, low) y = Log(b) c = MatMul(x, w) d = Sigmoid(c) e = Log(d) z = MatMul(e, w)",
                     f"(float[n,4] x) => (float[n,4] y, float[n,4] z) <{WEIGHTS}, float low = {{1e-7}}>")  # fmt: skip
    x = np.full((1, 4), 3e-8, np.float32)
    (want, _) = evaluate(graph, [x])
    context = narrowed(graph)
    assert types(graph)["MatMul"] == ["f32", "f16", "f16"] and types(graph)["Sigmoid"] == ["f32"]
    np.testing.assert_array_equal(evaluate(graph, [x])[0], want)
    assert {name.split()[0] for name, reason in context.refusals if reason.startswith("its logarithm")} == {
        "MatMul", "Clip", "Sigmoid",
    }  # fmt: skip


def test_products_whose_squares_are_taken_stay_float32() -> None:
    """A Fourier transform written as products overflows float16 for samples that are 16-bit integers."""
    graph = graph_of("a = MatMul(x, w) b = Transpose(a) c = Mul(b, b) y = MatMul(w, c)",
                     f"(float[4,4] x) => (float[4,4] y) <{WEIGHTS}>")  # fmt: skip
    x = np.full((4, 4), 2.0**13, np.float32)
    (want,) = evaluate(graph, [x / 2**13])
    narrowed(graph)
    assert types(graph)["MatMul"] == ["f32", "f16"] and types(graph)["Transpose"] == ["f32"]
    np.testing.assert_allclose(evaluate(graph, [x / 2**13])[0], want, rtol=2 * UNIT_ROUNDOFF["fp16"])


def test_bodies_are_narrowed_behind_their_float32_inputs() -> None:
    branch = "{{ a = MatMul(x, w) b = {}(a) c = MatMul(b, w) }}"
    body = f"y = If(c) <then_branch = t () => (float[n,4] c) {branch.format('Relu')}, " \
           f"else_branch = e () => (float[n,4] c) {branch.format('Tanh')}>"  # fmt: skip
    graph = graph_of(body, f"(float[n,4] x, bool c) => (float[n,4] y) <{WEIGHTS}>")
    narrowed(graph)
    found = types(graph)
    assert found["MatMul"] == ["f16"] * 4 and found["If"] == ["f32"]


# -- numbers


def sketch(seed: int, *, exact: bool, nodes: int = 14) -> tuple[Graph, list[Any]]:
    made = Sketch(seed, exact=exact, symbolic=bool(seed % 2))
    made.grow(nodes, products=4)
    return made.graph, made.feeds(made.sizes)


def magnitude(graph: Graph, feeds: list[Any]) -> float:
    """The largest finite number met while a graph is computed, at least 1."""
    found = [1.0]

    def observe(_: Node, arrays: tuple[Any, ...]) -> None:
        found.extend(float(np.abs(a).max()) for a in arrays if a.dtype.kind == "f" and a.size)

    evaluate(graph, feeds, observe=observe)
    return max(found)


@PRECISIONS
@given(seed=SEEDS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_small_integers_survive_narrowing(seed: int, precision: str) -> None:
    """Sums are float32 and what a kernel stores is clipped to 9, so 16 bits lose nothing."""
    graph, feeds = sketch(seed, exact=True)
    expected = evaluate(graph, feeds)
    optimised(graph, precision)
    for want, got in zip(expected, evaluate(graph, feeds), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


@PRECISIONS
@given(seed=SEEDS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_real_numbers_move_by_the_unit_roundoff(seed: int, precision: str) -> None:
    """One rounding of the largest number for each node bounds the change of every output (a quarter of it was the most seen)."""
    graph, feeds = sketch(seed, exact=False)
    expected = evaluate(graph, feeds)
    allowed = len(graph.nodes) * UNIT_ROUNDOFF[precision] * magnitude(graph, feeds)
    optimised(graph, precision, check=2)
    for want, got in zip(expected, evaluate(graph, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=allowed, strict=True)


@PRECISIONS
@pytest.mark.parametrize("seed", [8, 33])
def test_compiled_kernels_agree_with_the_evaluator(precision: str, seed: int) -> None:
    graph, feeds = sketch(seed, exact=True)
    expected = evaluate(graph, feeds)
    optimised(graph, precision)
    assert NARROW[precision].name in types(graph)["MatMul"]
    for want, got in zip(expected, compile_graph(graph).run_items(feeds), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


@PRECISIONS
@pytest.mark.parametrize("seed", [4, 9])
def test_compiled_kernels_round_where_the_evaluator_does(precision: str, seed: int) -> None:
    """Both hold the same casts; a sum in another order may still round to the neighbouring 16-bit number."""
    graph, feeds = sketch(seed, exact=False)
    optimised(graph, precision)
    expected = evaluate(graph, feeds)
    assert NARROW[precision].name in types(graph)["MatMul"]
    allowed = 2 * UNIT_ROUNDOFF[precision] * magnitude(graph, feeds)
    for want, got in zip(expected, compile_graph(graph).run_items(feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=allowed, strict=True)


# -- the whole walk


@pytest.fixture(scope="module")
def network() -> Callable[[str], minicc.Module]:
    rng = np.random.default_rng(0)
    first, second = (", ".join(f"{v:.3f}" for v in rng.standard_normal(size) / 4) for size in (8 * 3 * 9, 8 * 8 * 9))
    model = parse(
        "a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) "
        "e = Exp(c) d = GlobalAveragePool(e) y = Flatten(d)",
        f"(float[n,3,8,8] x) => (float[n,8] y) <float[8,3,3,3] w = {{{first}}}, float[8,8,3,3] v = {{{second}}}>",
    )
    return lambda precision: minicc.compile(model, precision=precision, strict=True)


@PRECISIONS
def test_a_compiled_model(network: Callable[[str], minicc.Module], precision: str) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    exact, module = network("fp32"), network(precision)
    want, got = exact(x), module(x)
    assert got.dtype == np.float32
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert 0 < error < 8 * UNIT_ROUNDOFF[precision]
    assert [line.split()[0] for line in module.report.kept_in_fp32] == ["Exp"]
    assert "kept in fp32: Exp" in str(module.report)
    assert exact.report.kept_in_fp32 == ()


def test_tf32_on_a_cpu_is_fp32(network: Callable[[str], minicc.Module]) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(network("tf32")(x), network("fp32")(x))


@pytest.mark.parametrize("narrow", [f16, bf16])
def test_every_follower_gives_the_narrow_type(narrow: DType) -> None:
    """Type inference of each unary follower accepts 16 bits and hands them on."""
    for domain, name in sorted(FOLLOWERS):
        graph = Graph()
        x = graph.input("x", TensorType(narrow, (2, 3, 4)))
        definition = find_op(name, domain)
        assert definition is not None
        try:
            node = graph.add(definition, [x], {})
        except minicc.MiniccError:
            continue  # needs more inputs or attributes
        assert node.output.tensor.dtype == narrow, name
