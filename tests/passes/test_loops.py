"""loop-values: loops that carry, collect and capture less compute the same, by `evaluate` before and after the pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.passes import CAPTURES, FOLD_SHAPES, LOOPS
from tests.passes.models import apply, graph_of

CARRIED, COLLECTED, NAMES = 4, 3, 6

# What a carried value becomes, of c0 to c3 and the captured value w: unchanged by name or by a copy, or computed.
sources = st.sampled_from([*(f"c{k}" for k in range(CARRIED)), "w"])
updates = st.one_of(
    st.just("same"), st.just("copy"), st.tuples(st.sampled_from(["Add", "Sub", "Mul"]), sources, sources),
)  # fmt: skip


def body_text(becomes: list[Any], collects: list[tuple[str, str, str]], head: str) -> tuple[str, list[str]]:
    """Statements of a body, and the names of its carried and collected results."""
    lines, results = [], []
    for k, update in enumerate(becomes):
        if update == "same":
            results.append(f"c{k}")
        elif update == "copy":
            lines.append(f"r{k} = Identity(c{k})")
            results.append(f"r{k}")
        else:
            op, a, b = update
            lines.append(f"r{k} = {op}({a}, {b})")
            results.append(f"r{k}")
    for k, (op, a, b) in enumerate(collects):
        lines.append(f"s{k} = {op}({a}, {b})")
    return head + "\n".join(lines), [*results, *(f"s{k}" for k in range(len(collects)))]


def loop_of(graph: Graph, name: str) -> object:
    return next((node for node in graph.nodes if node.op.name == name), None)


loops = st.tuples(
    st.lists(updates, min_size=CARRIED, max_size=CARRIED),
    st.lists(st.tuples(st.sampled_from(["Add", "Mul"]), sources, sources), min_size=COLLECTED, max_size=COLLECTED),
    st.sets(st.integers(0, CARRIED + COLLECTED - 1), min_size=1),
    st.integers(0, 3),
)


@given(loops, st.sampled_from(["", "constant", "computed"]))
@settings(max_examples=60, deadline=None)
def test_loops(case: tuple, stops: str) -> None:  # type: ignore[type-arg]
    becomes, collects, read, trips = case
    computed = "t = ReduceSum<keepdims=0>(c0)\ng1 = Less(t, limit)\n"
    going = {"": "g1 = Identity(g)\n", "constant": "g1 = Identity(yes)\n", "computed": computed}
    text, results = body_text(becomes, collects, going[stops])
    inputs = ", ".join(f"float[2] c{k}" for k in range(CARRIED))
    outputs = ", ".join(f"float[2] {name}o" for name in results)
    copies = "\n".join(f"{name}o = Identity({name})" for name in results)
    names = [f"y{k}" for k in range(CARRIED + COLLECTED)]
    model = f"""
      {", ".join(names)} = Loop(m, yes, a0, a1, a2, a3) <
        body = b (int64 i, bool g, {inputs}) => (bool g1, {outputs}) {{ {text} {copies} }}
      >
      {" ".join(f"z{k} = Abs(y{k})" for k in sorted(read))}
    """
    shapes = ["float[2]" if k < CARRIED else "float[t,2]" for k in range(CARRIED + COLLECTED)]
    found = ", ".join(f"{shapes[k]} z{k}" for k in sorted(read))
    head = ", ".join(f"float[2] a{k}" for k in range(CARRIED))
    graph = graph_of(model, f"({head}, int64 m, float[2] w) => ({found}) <bool yes = {{1}}, float limit = {{3}}>")
    starts = [np.array([k + 0.5, 1.5 - k], np.float32) for k in range(CARRIED)]
    compare(graph, [*starts, np.int64(trips), np.array([0.5, 2], np.float32)])
    loop = loop_of(graph, "Loop")
    if loop is not None:
        kept = loop.attrs["n_carried"]  # type: ignore[attr-defined]
        assert kept <= sum(update not in ("same", "copy") for update in becomes)
        assert len(loop.outputs) - kept == len([k for k in read if k >= CARRIED])  # type: ignore[attr-defined]


@given(loops, st.sampled_from([0, 1, -1]), st.lists(st.integers(0, 1), min_size=COLLECTED, max_size=COLLECTED))
@settings(max_examples=60, deadline=None)
def test_scans(case: tuple, axis: int, directions: list[int]) -> None:  # type: ignore[type-arg]
    becomes, collects, read, trips = case
    text, results = body_text(becomes, collects, "")
    inputs = ", ".join(f"float[2] c{k}" for k in range(CARRIED))
    outputs = ", ".join(f"float[2] {name}o" for name in results)
    copies = "\n".join(f"{name}o = Identity({name})" for name in results)
    names = [f"y{k}" for k in range(CARRIED + COLLECTED)]
    axes = ", ".join([str(axis), "0", "1"])
    model = f"""
      {", ".join(names)} = Scan<num_scan_inputs = 1, scan_output_axes = [{axes}],
        scan_output_directions = [{", ".join(map(str, directions))}],
        body = b ({inputs}, float[2] w) => ({outputs}) {{ {text} {copies} }}
      >(a0, a1, a2, a3, x)
      {" ".join(f"z{k} = Abs(y{k})" for k in sorted(read))}
    """
    found = ", ".join(("float[2]" if k < CARRIED else "float[p,q]") + f" z{k}" for k in sorted(read))
    head = ", ".join(f"float[2] a{k}" for k in range(CARRIED))
    graph = graph_of(model, f"({head}, float[n,2] x) => ({found})")
    x = np.arange(2 * trips, dtype=np.float32).reshape(trips, 2) / 4
    compare(graph, [*(np.array([k + 0.5, 1.5 - k], np.float32) for k in range(CARRIED)), x])


def compare(graph: Graph, arrays: list[object]) -> None:
    before = evaluate(graph, arrays)
    apply(graph, FOLD_SHAPES, LOOPS, CAPTURES, FOLD_SHAPES)
    after = evaluate(graph, arrays)
    for x, y in zip(before, after):
        np.testing.assert_array_equal(x, y)


def test_weights_that_are_carried_become_constants_of_the_body() -> None:
    graph = graph_of(
        """
        y, unused, z = Loop(m, yes, x, w) <
          body = b (int64 i, bool g, float[2] h, float[2] v) => (bool g1, float[2] h1, float[2] v1, float[2] s) {
            g1 = Identity(g) v1 = Identity(v) h1 = Mul(h, v) s = Neg(h)
          }
        >
        """,
        "(float[2] x, int64 m) => (float[2] y) <bool yes = {1}, float[2] w = {2, 3}>",
    )
    apply(graph, LOOPS, CAPTURES)
    loop = loop_of(graph, "Loop")
    assert loop is not None
    body = loop.attrs["body"]  # type: ignore[attr-defined]
    assert loop.attrs["n_carried"] == 1 and len(loop.outputs) == 1  # type: ignore[attr-defined]
    assert [v.data is not None for node in body.nodes if node.op.name == "Mul" for v in node.inputs] == [False, True]


def test_the_size_of_an_unread_result_stays_known() -> None:
    """What was computed from the shape of a result needs the result, though only its shape was read."""
    graph = graph_of(
        """
        y, s = Loop(m, yes, x) <
          body = b (int64 i, bool g, float[2] h) => (bool g1, float[2] h1, float[2] t) {
            k = ReduceSum<keepdims=0>(h) g1 = Less(k, limit) h1 = Add(h, h) t = Neg(h)
          }
        >
        n = Shape(s)
        """,
        "(float[2] x, int64 m) => (int64[2] n) <bool yes = {1}, float limit = {30}>",
    )
    compare(graph, [np.ones(2, np.float32), np.int64(20)])
