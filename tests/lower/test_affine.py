"""Index arithmetic against numpy: reshapes, linear offsets, and the split into affine part and rest."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minicc.ir.dims import evaluate, symbol
from minicc.ir.expr import Expr, const, iteration, load
from minicc.ir.types import i64
from minicc.lower.affine import affine, as_dim, delinearise, linearise, reshape_index


def value_of(expr: Expr, variables: dict[int, int], sizes: dict[str, int]) -> int:
    """The integer an index expression stands for."""
    known = as_dim(expr)
    if known is not None:
        return evaluate(known, sizes)
    if expr.op == "iter":
        return variables[expr.arg]
    a, b = (value_of(e, variables, sizes) for e in expr.args)
    return {"add": a + b, "sub": a - b, "mul": a * b, "floordiv": a // b if b else 0, "mod": a % b if b else 0}[expr.op]


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=5))

    def grouping() -> list[int]:
        out: list[int] = []
        for f in factors:
            if out and draw(st.booleans()):
                out[-1] *= f
            else:
                out.append(f)
        for _ in range(draw(st.integers(0, 2))):
            out.insert(draw(st.integers(0, len(out))), 1)
        return out

    return grouping(), grouping()


@given(reshapes())
def test_reshape_index_reads_the_same_element(shapes: tuple[list[int], list[int]]) -> None:
    new, old = shapes
    data = np.arange(np.prod(old)).reshape(old)
    index = reshape_index([iteration(a) for a in range(len(new))], new, old)
    for at in np.ndindex(*new):
        found = tuple(value_of(e, dict(enumerate(at)), {}) for e in index)
        assert data[found] == data.reshape(new)[at]


@given(reshapes())
def test_reshape_index_with_symbols(shapes: tuple[list[int], list[int]]) -> None:
    new, old = ([symbol("n"), *s] for s in shapes)
    index = reshape_index([iteration(a) for a in range(len(new))], new, old)
    assert affine(index[0]).strides == {0: 1}
    sizes = {"n": 2}
    shape_new, shape_old = ([evaluate(d, sizes) for d in s] for s in (new, old))
    data = np.arange(np.prod(shape_old)).reshape(shape_old)
    for at in np.ndindex(*shape_new):
        found = tuple(value_of(e, dict(enumerate(at)), sizes) for e in index)
        assert data[found] == data.reshape(shape_new)[at]


def test_splitting_an_axis_stays_affine() -> None:
    heads, width = 12, 64
    index = reshape_index([iteration(a) for a in range(4)], [symbol("b"), symbol("s"), heads, width],
                          [symbol("b"), symbol("s"), heads * width])  # fmt: skip
    form = affine(linearise(index, [symbol("b"), symbol("s"), heads * width]))
    assert form.rest is None
    assert form.strides == {0: symbol("s") * heads * width, 1: heads * width, 2: width, 3: 1}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_delinearise_inverts_linearise(shape: list[int]) -> None:
    flat = linearise([iteration(a) for a in range(len(shape))], shape)
    back = delinearise(flat, shape)
    for at in np.ndindex(*shape):
        assert tuple(value_of(e, dict(enumerate(at)), {}) for e in back) == at


def test_data_dependent_part_is_the_rest() -> None:
    picked = load("index", i64, [iteration(0)])
    form = affine(picked * 64 + iteration(1) + const(3, i64))
    assert form.strides == {1: 1}
    assert form.constant == 3
    assert form.rest == picked * 64
