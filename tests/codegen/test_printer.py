"""Generated loops against the interpreter of expressions: functions, casts, reductions, kinds of access."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from minicc.codegen.objects import compile_object
from minicc.codegen.source import kernel_source
from minicc.ir import expr as ex
from minicc.ir.dims import Dim, evaluate, product, symbol
from minicc.ir.expr import Expr, binary, cast, compare, const, iteration, reduce, select, unary
from minicc.ir.types import (
    BY_NAME,
    KERNEL_DTYPES,
    DType,
    bf16,
    boolean,
    f16,
    f32,
    f64,
    i8,
    i32,
    i64,
    u8,
    u16,
    u64,
)
from minicc.lower.affine import linearise
from minicc.lower.body import Write, normalise
from minicc.lower.kernel import LoopKernel
from minicc.runtime.objects import LoadedObjects, load_objects
from minicc.targets.cpu import host_target
from tests.expr_interpreter import Interpreter, compute_type

Array = np.ndarray[Any, Any]
Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
N = 96


def element(name: str, dtype: DType, index: Sequence[Expr], shape: Sequence[Dim]) -> Expr:
    """A load as the composer makes it: of a flat array, at one offset."""
    return ex.load(name, dtype, (linearise(index, shape),))


@cache
def _function(kernel: LoopKernel) -> tuple[Any, LoadedObjects]:
    target = host_target()
    loaded = load_objects({"k": compile_object(kernel_source(kernel, target), "k", target)})
    return Entry(loaded.address("k")), loaded


def run(
    values: list[Expr],
    extents: tuple[Dim, ...],
    arrays: dict[str, Array],
    sizes: dict[str, int] | None = None,
    cuts: tuple[float, ...] = (0.3,),
) -> list[Array]:
    """The values at every point, by a kernel with one store each whose domain is cut at some fractions."""
    sizes = sizes or {}
    index = [iteration(a) for a in range(len(extents))]
    offset = linearise(index, extents)
    shape = tuple(evaluate(d, sizes) for d in extents)
    results = [np.zeros(shape, v.dtype.numpy) for v in values]
    normal = normalise([Write(f"out{i}", v.dtype, offset, v) for i, v in enumerate(values)], extents)
    kernel = LoopKernel(len(normal.extents), normal.body)
    memory = {**arrays, **{f"out{i}": r for i, r in enumerate(results)}}
    words = [evaluate(d, sizes) for d in normal.extents]
    for word in normal.words:
        at = evaluate(word.value, sizes)
        words.append(at if word.array is None else memory[word.array].ctypes.data + at * memory[word.array].itemsize)
    block = np.array(words, np.int64)
    count = len(normal.extents)
    units = 1 if count == 0 else evaluate(normal.extents[0] if count == 1 else product(normal.extents[:-1]), sizes)
    function, _ = _function(kernel)
    marks = sorted({0, units, *(int(cut * units) for cut in cuts)})
    for begin, end in itertools.pairwise(marks):
        function(block.ctypes.data, begin, end)
    return results


def check(
    values: list[Expr],
    extents: tuple[Dim, ...],
    arrays: dict[str, Array],
    sizes: dict[str, int] | None = None,
    rtol: float = 4e-6,
    atol: float = 1e-6,
    **options: Any,
) -> None:
    """Results of a kernel and of the interpreter agree; `rtol` and `atol` are for float32."""
    results = run(values, extents, arrays, sizes, **options)
    interpreter = Interpreter({name: a.reshape(-1) for name, a in arrays.items()}, sizes)
    shape = tuple(evaluate(d, sizes or {}) for d in extents)
    problems = []
    for value, result in zip(values, results):
        with np.errstate(all="ignore"):
            want = interpreter.run(value, shape).astype(value.dtype.numpy)
            if value.dtype.is_float:
                relative = {16: 1e-2, 32: rtol, 64: 1e-13}[value.dtype.bits]
                absolute = {16: 1e-3, 32: atol, 64: 1e-14}[value.dtype.bits]
                a, b = result.astype(np.float64), want.astype(np.float64)
                right = np.isclose(a, b, rtol=relative, atol=absolute, equal_nan=True)
            else:
                right = result == want
        for place in np.argwhere(~right)[:3]:
            at = tuple(int(p) for p in place)
            given = [str(interpreter.run(a, shape)[at]) for a in value.args] if value.op != "reduce" else value.arg
            problems.append(f"{value.op}({given}) of {value.dtype} at {at} is {result[at]}, should be {want[at]}")
    assert not problems, "\n".join(problems)


def test_products_of_dequantised_values_round_before_the_sum() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-(1 << 20), 1 << 20, N).astype(np.int32)
    scale, bias = rng.standard_normal(N).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    index, shape = [iteration(0)], (N,)
    parts = [element(n, d, index, shape) for n, d in (("x", i32), ("scale", f32), ("bias", f32))]
    value = binary("add", binary("mul", cast(parts[0], f32), parts[1]), parts[2])
    (result,) = run([value], shape, {"x": x, "scale": scale, "bias": bias})
    separate = x.astype(np.float32) * scale + bias
    fused = (x.astype(np.float64) * scale + bias).astype(np.float32)
    assert (separate != fused).any()  # the data tells the two apart
    np.testing.assert_array_equal(result, separate)


def numbers(dtype: DType, count: int, seed: int, *, special: bool = True) -> Array:
    """Ordinary numbers, with the extremes of the type among them."""
    rng = np.random.default_rng(seed)
    if dtype == boolean:
        return rng.random(count) < 0.5
    if dtype.is_integer:
        info = np.iinfo(dtype.numpy)
        out = rng.integers(max(info.min, -100), min(info.max, 100), count).astype(dtype.numpy)
        extremes = [info.min, info.max, 0, 1, info.max - 1, info.min + 1]
    else:
        out = (rng.standard_normal(count) * 3).astype(dtype.numpy)
        extremes = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-3, 60000.0, 0.5, 1.5, 2.5, -2.5]
    if special:
        places = rng.permutation(count)[: len(extremes) * 2]
        out[places] = np.resize(np.array(extremes, dtype=dtype.numpy), len(places))
    return out


UNARY_FLOAT = (
    "neg", "abs", "floor", "ceil", "round", "trunc", "sqrt", "exp", "log", "sin", "cos", "tan", "asin",
    "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "sigmoid", "sign",
)  # fmt: skip
BINARY_FLOAT = (
    "add", "sub", "mul", "div", "mod", "fmod", "pow", "min", "max", "atan2",
)  # fmt: skip
BINARY_INTEGER = (
    "add", "sub", "mul", "div", "floordiv", "mod", "fmod", "min", "max", "bitand", "bitor", "bitxor",
)  # fmt: skip
COMPARISONS = (
    "lt", "le", "gt", "ge", "eq", "ne",
)  # fmt: skip
TYPES = [f32, f64, f16, bf16, i8, u8, u16, i32, i64, u64, boolean]


def rare(*values: Any) -> Any:
    """Parameters of the slow run."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scalar_functions(dtype):
    """Every function of one and two arguments, comparisons, and choices; one kernel."""
    i = [iteration(0)]
    arrays = {"a": numbers(dtype, N, 1), "b": numbers(dtype, N, 2), "c": numbers(boolean, N, 3)}
    a, b = (element(name, dtype, i, (N,)) for name in "ab")
    c = element("c", boolean, i, (N,))
    values = [compare(op, a, b) for op in COMPARISONS] + [select(c, a, b), select(compare("ne", a, a), b, a)]
    if dtype == boolean:
        values += [unary("not", a), *(binary(op, a, b) for op in ("and", "or", "xor"))]
    elif dtype.is_float:
        values += [unary(op, a) for op in UNARY_FLOAT] + [binary(op, a, b) for op in BINARY_FLOAT]
        values += [a * 0.1 + b, binary("max", a, const(0, dtype)), binary("min", const(6, dtype), a)]
    else:
        values += [unary(op, a) for op in ("neg", "abs", "sign", "bitnot")]
        values += [binary(op, a, b) for op in BINARY_INTEGER]
        count = binary("bitand", b, const(dtype.bits - 1, dtype))
        values += [binary(op, a, count) for op in ("shl", "shr")]
        values += [binary("pow", a, binary("bitand", b, const(7, dtype)))]
        three = const(3, dtype)
        values += [binary(op, *pair) for op in ("div", "floordiv", "mod", "fmod") for pair in ((a, three), (three, b))]
        values += [a * 3 + b * b - 7]
        # LLVM may assume that int64, which indices are made of, does not wrap before a comparison.
        if dtype != i64:
            values += [binary("floordiv", a * b, b), (a + b) < a]
    check(values, (N,), arrays)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_casts(dtype):
    """To every type; floats that the integer type cannot hold are undefined and left out."""
    i = [iteration(0)]
    plain = numbers(dtype, N, 4, special=not dtype.is_float)
    if dtype.is_float:
        plain = np.abs(plain).astype(dtype.numpy)
    arrays = {"a": plain, "b": numbers(dtype, N, 5)}
    a, b = (element(name, dtype, i, (N,)) for name in "ab")
    targets = sorted(KERNEL_DTYPES - {dtype}, key=str)
    values = [cast(a, t) for t in targets] + [cast(b, t) for t in targets if t.is_float or t == boolean]
    if dtype.is_float or (dtype.bits == 8 and dtype != boolean):  # there and back
        values += [cast(cast(a, t) * 2, dtype) for t in (f16, bf16, i32) if t != dtype]
    check(values, (N,), arrays)


@pytest.mark.parametrize("dtype", [f32, f16, i8, i64, boolean, *map(rare, (f64, bf16, u8, i32, u64))], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "all"])
def test_reductions(dtype, layout):
    """Along the last axis, along the first (blocks of accumulators), and of everything."""
    rows, columns = 70, 67
    arrays = {"x": numbers(dtype, rows * columns, 6, special=dtype != boolean)}
    if dtype.is_float:  # sums with infinities and NaN in few places
        clean = numbers(dtype, rows * columns, 7, special=False)
        clean[[5, 400, 4000]] = arrays["x"][[5, 400, 4000]] = np.array([np.nan, np.inf, -np.inf]).astype(dtype.numpy)
        arrays["x"] = clean
    r, s = iteration(100), iteration(101)
    if layout == "rows":
        x, axes, sizes, extents = (
            element("x", dtype, [iteration(0), r], (rows, columns)),
            (100,),
            (columns,),
            (rows,),
        )
    elif layout == "columns":
        x, axes, sizes, extents = (
            element("x", dtype, [r, iteration(0)], (rows, columns)),
            (100,),
            (rows,),
            (columns,),
        )
    else:
        x, axes, sizes, extents = (
            element("x", dtype, [r, s], (rows, columns)),
            (100, 101),
            (rows, columns),
            (),
        )
    kinds = ["max", "min", "sum"] + (["prod"] if dtype.is_integer else [])
    computed = compare("ne", x, const(1, dtype)) if dtype == boolean else x + const(1, dtype)
    values = [reduce(kind, axes, sizes, e) for kind in kinds for e in (x, computed)]
    values += [reduce(kind, axes, sizes, compare("lt", x, const(2, dtype))) for kind in ("max", "min")]
    if layout != "all" and dtype != boolean:
        values += [reduce(kind, axes, sizes, x) for kind in ("argmax", "argmin", "argmax_last", "argmin_last")]
    if dtype.is_float and layout != "all":  # rows computed from their own reductions
        top = reduce("max", axes, sizes, x)
        values += [reduce("sum", axes, sizes, unary("exp", x - top)), top - reduce("min", axes, sizes, x * x)]
    check(values, extents, arrays, rtol=2e-5, atol=1e-5 * rows)


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "symbolic"])
@pytest.mark.parametrize("layout", ["rows", "columns", "both"])
def test_long_sums_are_accurate(layout, is_known):
    """Sums of positive numbers of one size, whose error grows with the terms that one accumulator takes up."""
    rows, columns = (3, 200_000) if layout == "rows" else (200_000, 5)
    x = np.random.default_rng(0).uniform(0.1, 1.1, (rows, columns)).astype(np.float32)
    sizes = {} if is_known else {"n": rows, "m": columns}
    n, m = (rows, columns) if is_known else (symbol("n"), symbol("m"))
    r, s = iteration(100), iteration(101)
    index, axes, limits, extents, numpy_axis = {
        "rows": ([iteration(0), r], (100,), (m,), (n,), 1),
        "columns": ([r, iteration(0)], (100,), (n,), (m,), 0),
        "both": ([r, s], (100, 101), (n, m), (), (0, 1)),
    }[layout]
    value = reduce("sum", axes, limits, element("x", f32, index, (n, m)))
    (result,) = run([value], extents, {"x": x}, sizes)
    exact = x.sum(numpy_axis, dtype=np.float64)
    one_chain = np.abs(np.cumsum(x, axis=0, dtype=np.float32)[-1] / x.sum(0, dtype=np.float64) - 1).max()
    assert layout == "rows" or one_chain > 4e-6  # the data tells the two apart
    np.testing.assert_allclose(result, exact, rtol=2e-6)


@pytest.mark.parametrize("dtype", [f32, f16, i64, u8, boolean], ids=str)
def test_access(dtype):
    """Operands transposed, reversed, broadcast, strided and gathered over three axes, sizes as words."""
    n, m = symbol("n"), symbol("m")
    sizes = {"n": 5, "m": 9}
    arrays = {
        "x": numbers(dtype, 5 * 9 * 4, 8),
        "y": numbers(dtype, 9 * 4, 9),
        "i": np.random.default_rng(0).integers(0, 9, 5),
    }
    a, b, c = (iteration(axis) for axis in range(3))
    shape = (n, m, 4)
    plain = element("x", dtype, [a, b, c], shape)
    turned = element("x", dtype, [c, b, a], (4, m, n))
    mirrored = element("x", dtype, [ex.dim(n) - a - 1, b, const(3, i64) - c], shape)
    row, column = element("y", dtype, [b, c], (m, 4)), element("y", dtype, [b, const(2, i64)], (m, 4))
    picked = element("y", dtype, [element("i", i64, [a], (n,)), c], (m, 4))
    merged = element("x", dtype, [(b * 4 + c) // 4, a % 3], (m, 4))
    position = cast(a * 100 + b * 10 + c, i32)
    values = [plain, turned, mirrored, row, column, picked, merged, position]
    if dtype != boolean:
        values += [
            plain + row,
            reduce("max", (100,), (m,), element("x", dtype, [a, iteration(100), c], shape)),
        ]
    check(values, shape, arrays, sizes, cuts=(0.2, 0.7))


def random_expression(rng: np.random.Generator, dtype: DType, depth: int, leaves: dict[str, Expr]) -> Expr:
    """A tree whose result is exact: integers, or floats that hold small integers."""
    if depth == 0 or rng.random() < 0.1:
        names = [name for name, leaf in leaves.items() if leaf.dtype == dtype]
        return leaves[names[int(rng.integers(len(names)))]] if rng.random() < 0.85 else const(int(rng.integers(0, 3)), dtype)
    below = lambda t=dtype: random_expression(rng, t, depth - 1, leaves)  # noqa: E731
    other = (f32, f64, i8, u8, i32, i64, boolean)[int(rng.integers(7))]
    if dtype == boolean:
        if rng.random() < 0.4:
            return compare(COMPARISONS[int(rng.integers(6))], a := below(f32), random_expression(rng, a.dtype, 1, leaves))
        return binary(("and", "or", "xor")[int(rng.integers(3))], below(), below())
    pick = rng.random()
    if pick < 0.15:
        return select(below(boolean), below(), below())
    if pick < 0.3 and (other == boolean or other.is_integer or dtype.is_float):
        value = below(other)
        # Only what both types hold: no negative number may become unsigned float arithmetic's problem.
        return cast(value, dtype)
    if pick < 0.4:
        return unary("abs" if dtype.kind != "u" else "bitnot", below())
    op = ("add", "sub", "mul", "min", "max")[int(rng.integers(5))]
    out = binary(op, below(), below())
    return binary("max", binary("min", out, const(50, dtype)), const(0, dtype)) if dtype.is_float else out


@pytest.mark.parametrize("seed", [*range(5), *map(rare, range(5, 60))])
def test_random_expressions(seed):
    """Trees over all types at once, some with sums over a third axis: every part named and placed right."""
    rng = np.random.default_rng(seed)
    shape = (6, 37)
    arrays: dict[str, Array] = {}
    leaves: dict[str, Expr] = {}
    a, b, r = iteration(0), iteration(1), iteration(100)
    for dtype in (f32, f64, i8, u8, i32, i64, boolean):
        for kind, index, sizes in (("full", [a, b], shape), ("row", [b], (37,)), ("column", [a], (6,))):
            name = f"{kind}_{dtype}"
            count = int(np.prod(sizes))
            arrays[name] = rng.integers(0, 2 if dtype == boolean else 5, count).astype(dtype.numpy)
            leaves[name] = element(name, dtype, index, sizes)
    inner = random_expression(rng, i32, 2, leaves)
    other = element("full_i32", i32, [a, r], shape)
    leaves["sum"] = reduce("sum", (100,), (37,), other * inner if rng.random() < 0.5 else other)
    leaves["top"] = reduce("max", (100,), (37,), element("full_f32", f32, [a, r], shape))
    values = [random_expression(rng, BY_NAME[t], 4, leaves) for t in ("f32", "i8", "i32", "i64", "u8", "bool", "f64")]
    check(values, shape, arrays, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (0, 3), (3, 0), (1, 5, 1), (2, 1, 3, 1, 2)])
def test_odd_shapes(shape):
    """Rank 0, axes of one element, no elements."""
    index = [iteration(axis) for axis in range(len(shape))]
    arrays = {"x": numbers(f32, max(1, int(np.prod(shape))), 1, special=False)[: int(np.prod(shape))]}
    x = element("x", f32, index, shape)
    check([x + 1, cast(x, f64)], shape, arrays)


def test_types_of_computation():
    """The interpreter and the printer agree which type half numbers are computed in."""
    assert compute_type(f16) == compute_type(bf16) == np.float32
