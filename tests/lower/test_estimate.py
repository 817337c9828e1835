"""Estimated work of generated loops against counts by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import minicc
from minicc.ir.dims import evaluate, symbol
from minicc.ir.expr import Expr, iteration, load, reduce
from minicc.ir.types import f32
from minicc.lower.body import Write
from minicc.lower.estimate import (
    HUNDREDTHS_PER_FUNCTION,
    HUNDREDTHS_PER_LOAD,
    HUNDREDTHS_PER_SIMPLE,
    estimate,
)
from minicc.lower.program import KernelStep
from minicc.runtime.executor import chunking

ROW, COLUMN, SUMMED, SUMMED_AGAIN = (iteration(axis) for axis in range(4))
SIZES = st.integers(1, 50)


def row_sum(columns: int, summed: Expr, body: Expr) -> Expr:
    return reduce("sum", (int(str(summed.arg)),), (columns,), body)


@given(rows=SIZES, columns=SIZES)
def test_sums_of_a_row_count_once_for_a_row(rows: int, columns: int) -> None:
    mean = row_sum(columns, SUMMED, load("x", f32, (ROW, SUMMED)))
    apart = load("x", f32, (ROW, SUMMED_AGAIN)) - mean
    spread = row_sum(columns, SUMMED_AGAIN, apart * apart)
    value = (load("x", f32, (ROW, COLUMN)) - mean) * spread
    operations, nanoseconds = estimate([Write("y", f32, ROW, value)], (rows, columns))
    per_row_and_column = 2 + 2  # the last line, and two of the spread
    assert operations == rows * columns * per_row_and_column
    loads = rows * columns * 4  # the mean's, the spread's, the last one, and the store
    assert nanoseconds == (loads * HUNDREDTHS_PER_LOAD + operations * HUNDREDTHS_PER_SIMPLE) // 100


@given(rows=SIZES, columns=SIZES)
def test_what_depends_on_the_inner_loop_is_done_in_all_turns(rows: int, columns: int) -> None:
    value = load("x", f32, (ROW,)) * (load("b", f32, (COLUMN,)) * load("c", f32, (COLUMN,)))
    operations, nanoseconds = estimate([Write("y", f32, ROW, value)], (rows, columns))
    assert operations == 2 * rows * columns
    loads = HUNDREDTHS_PER_LOAD * (3 * rows * columns + rows)
    assert nanoseconds == (loads + operations * HUNDREDTHS_PER_SIMPLE) // 100


@given(rows=SIZES, depth=SIZES)
def test_sizes_may_be_symbols(rows: int, depth: int) -> None:
    left, right = load("x", f32, (ROW, SUMMED)), load("w", f32, (COLUMN, SUMMED))
    body = left * right
    known, named = (
        estimate([Write("y", f32, ROW, reduce("sum", (2,), (d,), body))], (r, 3))
        for r, d in ((rows, depth), (symbol("rows"), symbol("depth")))
    )
    sizes = {"rows": rows, "depth": depth}
    assert known[0] == 3 * rows * depth
    assert known == tuple(evaluate(part, sizes) for part in named)


def test_functions_cost_more() -> None:
    x = load("x", f32, (ROW,))
    value = Expr("exp", f32, (x,))
    assert estimate([Write("y", f32, ROW, value)], (1000,))[1] == 10 * (2 * HUNDREDTHS_PER_LOAD + HUNDREDTHS_PER_FUNCTION)


def test_a_short_normalisation_is_not_shared() -> None:
    """Decomposed, its sums are nested in the expression of every element; threads would do them again."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        helper.make_node("Sub", ["x", "mean"], ["apart"]),
        helper.make_node("Mul", ["apart", "apart"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["variance"], axes=[-1]),
        helper.make_node("Sqrt", ["variance"], ["deviation"]),
        helper.make_node("Div", ["apart", "deviation"], ["y"]),
    ]  # fmt: skip
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 128]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "norm", ports[:1], ports[1:])
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=10).SerializeToString()
    module = minicc.compile(source, threads=2)
    for step in module.program.steps:
        if isinstance(step, KernelStep):
            units, cost = evaluate(step.units, {}), evaluate(step.cost, {})
            assert chunking(units, cost, 2)[1] == 1
    x = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32)
    apart = x.astype(np.float64) - x.mean(dtype=np.float64)
    np.testing.assert_allclose(module.run(None, {"x": x})[0], apart / np.sqrt((apart**2).mean()), rtol=1e-4, atol=1e-5)
