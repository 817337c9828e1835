"""Dimensions against integer arithmetic: building an expression and evaluating it give the same number."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicc.errors import ShapeError
from minicc.ir import dims
from minicc.ir.dims import SymbolicDim, broadcast, ceil_divide, compare, evaluate, floor_divide, symbol

SIZES = st.fixed_dictionaries({name: st.integers(0, 40) for name in "nmk"})
N, M, K = (symbol(name) for name in "nmk")


@st.composite
def expressions(draw, depth=4):
    """A dimension built by arithmetic, and a function that computes it from sizes."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        if draw(st.booleans()):
            number = draw(st.integers(-3, 9))
            return number, lambda sizes: number
        name = draw(st.sampled_from("nmk"))
        return symbol(name), lambda sizes: sizes[name]
    a, fa = draw(expressions(depth=depth - 1))
    kind = draw(st.sampled_from(("+", "-", "*", "//", "%", "min", "max", "ceil")))
    if kind in ("//", "%", "ceil"):
        divisor = draw(st.integers(1, 7))
        if kind == "//":
            return floor_divide(a, divisor), lambda sizes: fa(sizes) // divisor
        if kind == "ceil":
            return ceil_divide(a, divisor), lambda sizes: math.ceil(fa(sizes) / divisor)
        return dims.modulo(a, divisor), lambda sizes: fa(sizes) % divisor
    b, fb = draw(expressions(depth=depth - 1))
    if kind == "+":
        return a + b, lambda sizes: fa(sizes) + fb(sizes)
    if kind == "-":
        return a - b, lambda sizes: fa(sizes) - fb(sizes)
    if kind == "*":
        return a * b, lambda sizes: fa(sizes) * fb(sizes)
    if kind == "min":
        return dims.minimum(a, b), lambda sizes: min(fa(sizes), fb(sizes))
    return dims.maximum(a, b), lambda sizes: max(fa(sizes), fb(sizes))


@settings(max_examples=300, deadline=None)
@given(expressions(), SIZES)
def test_arithmetic(expression, sizes):
    dim, number = expression
    assert evaluate(dim, sizes) == number(sizes)


@settings(max_examples=200, deadline=None)
@given(expressions(), expressions(), SIZES)
def test_substitution_is_evaluation_of_the_parts(outer, inner, sizes):
    replaced = dims.substitute(outer[0], {"n": inner[0]})
    value = inner[1](sizes)
    assume(value >= 0)  # symbols stand for sizes
    assert evaluate(replaced, sizes) == outer[1]({**sizes, "n": value})


@settings(max_examples=200, deadline=None)
@given(expressions(), expressions(), SIZES)
def test_compare_and_bounds_are_certain(first, second, sizes):
    a, b = evaluate(first[0], sizes), evaluate(second[0], sizes)
    order = compare(first[0], second[0])
    assert order is None or (order <= 0 and a <= b) or (order >= 0 and a >= b)
    low = dims.lower_bound(first[0])
    assert low is None or low <= a


@given(SIZES)
def test_equal_polynomials_are_equal_objects(sizes):
    left, right = (N + M) * (N - M), N * N - M * M
    assert left == right
    assert hash(left) == hash(right)
    assert evaluate(left, sizes) == sizes["n"] ** 2 - sizes["m"] ** 2


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (N + 0, "n"),
        (N - N, "0"),
        (2 * N // 2, "n"),
        ((4 * N + 3) // 4, "n"),
        (N // 2 // 3, "(n // 6)"),
        (N * M // M, "n"),
        ((N * N - M * M) // (N + M), "-m + n"),
        (broadcast(N, 1), "n"),
        (dims.minimum(N, dims.maximum(M, N)), "n"),
        (dims.maximum(dims.minimum(M, N), M), "m"),
        (broadcast(N, 5), "5"),
        (broadcast(broadcast(N, M), N), "broadcast(m, n)"),
        (broadcast(M, broadcast(broadcast(N, M), K)), "broadcast(broadcast(m, n), k)"),
    ],
)
def test_canonical_forms(dim, text):
    assert str(dim) == text


@given(st.integers(1, 5), st.integers(1, 5))
def test_broadcast(a, b):
    dim = broadcast(N, M)
    assert isinstance(dim, SymbolicDim)
    if a == b or 1 in (a, b):
        assert evaluate(dim, {"n": a, "m": b}) == max(a, b)
    else:
        with pytest.raises(ShapeError):
            evaluate(dim, {"n": a, "m": b})
        with pytest.raises(ShapeError):
            broadcast(a, b)


def test_division_by_zero_is_an_error():
    with pytest.raises(ShapeError):
        floor_divide(3, 0)
    with pytest.raises(ShapeError):
        dims.modulo(3, 0)


def test_a_capped_size_broadcasts_with_the_size_itself():
    capped = dims.minimum(N, 512)
    assert broadcast(capped, N) == N and broadcast(N, capped) == N
    assert broadcast(dims.minimum(N, 1), N) != N  # 1 broadcasts with anything
    assert broadcast(dims.minimum(N, M), N) != N


def test_requirements_raise_when_they_are_not_met():
    assert dims.equal(N, N) == N and dims.fits(N, N) == N and dims.fits(1, N) == 1
    required = dims.equal(2 * N, M)
    assert evaluate(required, {"n": 3, "m": 6}) == 6
    with pytest.raises(ShapeError, match="sizes 8 and 6 must be equal"):
        evaluate(required, {"n": 4, "m": 6})
    required = dims.fits(N, M)
    assert [evaluate(required, {"n": n, "m": 6}) for n in (1, 6)] == [1, 6]
    with pytest.raises(ShapeError, match="sizes 4 and 6 cannot be broadcast"):
        evaluate(required, {"n": 4, "m": 6})
