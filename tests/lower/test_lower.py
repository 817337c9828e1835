"""Compiled graphs against their evaluation in numpy: every op with loops or a template, and random graphs.

The cases of an op are ONNX's own. They run as they are, and in company: inputs come as transposed views and
from computed values, outputs go into further ops, and fusion has its way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from minicc.ir.dims import symbol
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Value
from minicc.ir.opdef import Kind, find_op
from minicc.ir.types import KERNEL_DTYPES, TensorType, boolean, dtype_of, f32
from minicc.lower.templates import is_anchor
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.fuse import fuse
from minicc.passes.manager import PassContext, run_passes
from tests.compiling import Array, add_call, compile_graph, expected, host_ops
from tests.ops.onnx_cases import Case, all_cases
from tests.random_graphs import random_graph

KINDS = (Kind.POINTWISE, Kind.INDEX, Kind.REDUCE, Kind.CONTRACT)
# Their numbers come from a generator of their own, or nobody defines them.
UNDEFINED = frozenset(("RandomNormalLike", "RandomUniformLike", "Bernoulli"))
PER_GRAPH = 24


def compiled_cases() -> list[Case]:
    """Cases that generated loops compute, on types that kernels load and store, in order of their op."""
    found = []
    for case in all_cases():
        op = find_op(case.op, case.domain)
        arrays = [a for a in (*case.inputs, *case.outputs) if a is not None]
        known = all(a.dtype != object and dtype_of(a.dtype) in KERNEL_DTYPES for a in arrays)
        if op is not None and op.kind in KINDS and op.deterministic and case.op not in UNDEFINED and known:
            found.append(case)
    return sorted(found, key=lambda c: c.op)


def batches(cases: Sequence[Case]) -> list[list[Case]]:
    return [list(cases[i : i + PER_GRAPH]) for i in range(0, len(cases), PER_GRAPH)]


def one_of_each() -> list[Case]:
    """The case of each op with the most inputs and elements."""

    def weight(case: Case) -> tuple[int, int]:
        return len(case.inputs), sum(a.size for a in case.inputs if a is not None and a.size < 5000)

    groups = itertools.groupby(compiled_cases(), key=lambda c: c.op)
    return [max(group, key=weight) for _, group in groups]


def assert_close(got: Array, want: Array, what: str) -> None:
    """Equal for integers; for floats within a few roundings of the largest element."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype} instead of {want.dtype}"
    assert got.shape == want.shape, f"{what}: {got.shape} instead of {want.shape}"
    if want.dtype.kind in "biu":
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    a, b = got.astype(np.float64), want.astype(np.float64)
    scale = np.abs(b[np.isfinite(b)]).max(initial=0)
    rtol, atol = (1e-2, 2e-3) if want.dtype.itemsize == 2 else (1e-4, 1e-5)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * (1 + scale), err_msg=what)


def check(graph: Graph, feeds: Sequence[Array], want: Sequence[Array], names: Sequence[str]) -> None:
    module = compile_graph(graph)
    for got, right, name in zip(module.run_items(feeds), want, names):
        assert_close(got, right, name)


def name_of(batch: list[Case]) -> str:
    return f"{batch[0].op}-{batch[-1].op}"


def as_it_is(cases: Sequence[Case], *, symbolic: bool) -> None:
    graph = Graph("cases")
    feeds: list[Array] = []
    want, names = [], []
    for case in cases:
        _, fed = add_call(graph, case.op, case.inputs, case.attrs, outputs=len(case.outputs),
                          domain=case.domain, symbolic=symbolic)  # fmt: skip
        feeds += fed
        results = expected(case.op, case.inputs, case.attrs, case.domain)
        want += [None if array is None else result for array, result in zip(case.outputs, results)]
        names += [case.name] * len(case.outputs)
    used = [i for i, array in enumerate(want) if array is not None]
    graph.outputs = [graph.outputs[i] for i in used]
    check(graph, feeds, [want[i] for i in used], [names[i] for i in used])


@pytest.mark.slow
@pytest.mark.parametrize("batch", batches(compiled_cases()), ids=name_of)
@pytest.mark.parametrize("symbolic", [False, True])
def test_every_case(batch, symbolic):
    as_it_is(batch, symbolic=symbolic)


def in_company(graph: Graph, case: Case, turned: bool) -> tuple[list[Array], list[Value]]:
    """The case behind views and computed inputs and before a further op; (arrays of new inputs, new outputs).

    turned: whether the further op reads the result with its axes in another order.
    """
    op = find_op(case.op, case.domain)
    assert op is not None
    values: list[Value | None] = []
    feeds = []
    for position, array in enumerate(case.inputs):
        if array is None or position in op.static_inputs:
            values.append(None if array is None else graph.constant(array))
            continue
        reversed_ = np.array(array.T, order="C")
        name = f"x{len(graph.inputs)}"
        value = graph.input(name, TensorType(dtype_of(array.dtype), reversed_.shape))
        feeds.append(reversed_)
        value = graph.add("Transpose", [value], {"perm": tuple(range(array.ndim))[::-1]}).output
        if array.dtype == bool:
            value = graph.add("Not", [graph.add("Not", [value]).output]).output
        elif array.dtype.kind == "f":
            value = graph.add("Neg", [graph.add("Neg", [value]).output]).output
        values.append(value)
    outputs = []
    for value in graph.add(op, values, case.attrs, outputs=len(case.outputs)).outputs:
        dtype, rank = value.tensor.dtype, value.tensor.rank
        if turned and rank > 1:
            value = graph.add("Transpose", [value], {"perm": (*range(1, rank), 0)}).output
        if dtype == boolean:
            outputs.append(graph.add("Not", [value]).output)
        else:
            outputs.append(graph.add("Mul", [value, graph.constant(np.array(2, dtype.numpy))]).output)
    return feeds, outputs


def fused_company(cases: Sequence[Case], first: int = 0) -> None:
    graph = Graph("company")
    feeds: list[Array] = []
    names: list[str] = []
    for number, case in enumerate(cases):
        fed, outputs = in_company(graph, case, (number + first) % 2 == 0)
        feeds += fed
        graph.outputs += outputs
        names += [case.name] * len(outputs)
    want = evaluate(graph, feeds)
    fuse(graph, is_anchor)
    check(graph, feeds, want, names)


@pytest.mark.parametrize("batch", batches(one_of_each()), ids=name_of)
def test_ops_in_company(batch):
    fused_company(batch)


@pytest.mark.slow
@pytest.mark.parametrize("batch", batches(compiled_cases()), ids=name_of)
@pytest.mark.parametrize("first", [0, 1])
def test_every_case_in_company(batch, first):
    fused_company(batch, first)


def check_random(seed: int, nodes: int = 12, **overrides: Any) -> None:
    """All passes, lowering, kernels and the runtime on a random graph."""
    graph, rounds = random_graph(seed, nodes)
    wanted = [evaluate(graph, feeds) for feeds in rounds]
    options = Options.from_env().override(**overrides)
    context = PassContext(options, is_anchor=is_anchor)
    run_passes(graph, default_pipeline(options), options, (), context)
    module = compile_graph(graph, **overrides)
    assert not host_ops(module)
    for feeds, want in zip(rounds, wanted):
        for i, (got, right) in enumerate(zip(module.run_items(feeds), want)):
            assert_close(got, right, f"output {i} of graph {seed}")


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(s, marks=pytest.mark.slow) for s in range(6, 150))]
)
def test_random_graphs(seed):
    check_random(seed, nodes=12 if seed % 2 else 30)


@pytest.mark.parametrize(
    "seed", [200, 201, *(pytest.param(s, marks=pytest.mark.slow) for s in range(202, 230))]
)
def test_random_graphs_without_optimisation(seed):
    check_random(seed, opt_level=0)


def data_dependent(graph: Graph) -> None:
    """Ops whose output sizes depend on data, each followed by kernels over those sizes."""
    n = symbol("n")
    x = graph.input("x", TensorType(f32, (n, 4)))
    boxes = graph.input("boxes", TensorType(f32, (1, n, 4)))
    scores = graph.input("scores", TensorType(f32, (1, 2, n)))
    zero = graph.constant(np.zeros((), np.float32))
    half = graph.constant(np.array(0.5, np.float32))

    def op(name: str, *inputs: Value | None, outputs: int = 1, **attrs: Any) -> Value:
        return graph.add(name, inputs, attrs, outputs=outputs).output

    def ints(*items: int) -> Value:
        return graph.constant(np.array(items))

    places = op("Transpose", op("NonZero", op("Relu", x)), perm=(1, 0))
    found = op("GatherND", x, places)
    kept = op("Compress", x, op("Greater", op("ReduceMax", x, ints(1), keepdims=0), half), axis=0)
    different = op("Unique", op("Floor", x), outputs=4)
    top = op("TopK", different, op("Min", op("Shape", different), ints(3)), outputs=2)
    chosen = op("NonMaxSuppression", boxes, scores, ints(5), half, zero)
    columns = op("Squeeze", op("Slice", chosen, ints(2), ints(3), ints(1)), ints(1))
    best = op("Gather", op("Squeeze", boxes, ints(0)), columns, axis=0)
    graph.outputs = [
        op("Mul", found, half), op("ReduceSum", found, ints(0)), op("Softmax", op("Add", kept, half), axis=1),
        op("Neg", different), op("Mul", top, half), op("Concat", best, best, axis=0),
        op("Expand", half, op("Shape", found)), op("Reshape", kept, ints(-1)),
    ]  # fmt: skip


@pytest.mark.parametrize("opt_level", [0, 2])
def test_sizes_known_when_a_node_has_run(opt_level):
    options = Options.from_env().override(opt_level=opt_level)
    graph = Graph()
    data_dependent(graph)
    optimised = graph.copy()
    run_passes(optimised, default_pipeline(options), options, (), PassContext(options, is_anchor=is_anchor))
    module = compile_graph(optimised, opt_level=opt_level)
    reasons = dict(host_ops(module))
    assert {"NonZero", "Compress", "Unique", "JoinBoxes", "TopK"} >= reasons.keys()
    assert all("data-dependent" in reason for reason in reasons.values()), reasons
    for seed, n in enumerate((3, 8, 1, 8)):
        rng = np.random.default_rng(seed)
        corners = rng.random((1, n, 4)).astype(np.float32)
        feeds = [
            rng.standard_normal((n, 4)).astype(np.float32),
            corners,
            rng.random((1, 2, n)).astype(np.float32),
        ]
        if seed == 2:
            feeds[0] = -np.abs(feeds[0])  # nothing is found
        for i, (got, want) in enumerate(zip(module.run_items(feeds), evaluate(graph, feeds))):
            assert_close(got, want, f"output {i}, n={n}")


def test_views_of_operands_are_not_overwritten():
    """A host step and a branch return their operand itself, which later kernels could have reused in place."""
    graph, branch = Graph(), Graph("branch")
    branch.outputs = [branch.input("a", TensorType(f32, (64,)))]
    x, condition = graph.input("x", TensorType(f32, (64,))), graph.input("c", TensorType(boolean, ()))
    a = graph.add("Sin", [x]).output
    dropped = graph.add("Dropout", [a]).output  # no kernel: the pass `expand` has not run
    b = graph.add("Cos", [a]).output
    chosen = graph.add("If", [condition, b], {"then_branch": branch, "else_branch": branch.copy()}).output
    graph.outputs = [dropped, chosen, graph.add("Exp", [b]).output]
    feeds = [np.linspace(0, 1, 64, dtype=np.float32), np.array(True)]
    check(graph, feeds, evaluate(graph, feeds), ["host step", "branch", "kernel"])
