"""Random calls of pointwise, index and reduction ops: compute and infer against eval, in all types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicc.ir.types import f16, f32, i32, i64, u8
from tests.ops.onnx_cases import check_call

HALVES = [np.float16, ml_dtypes.bfloat16]
FLOATS = [np.float32, np.float64, *HALVES]
SIGNED = [np.int8, np.int16, np.int32, np.int64]
UNSIGNED = [np.uint8, np.uint16, np.uint32, np.uint64]
NUMBERS = FLOATS + SIGNED + UNSIGNED
ALL = [*NUMBERS, np.bool_]
quick = settings(max_examples=8, deadline=None, database=None)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@st.composite
def shapes(draw: st.DrawFn, least: int = 0, most: int = 3) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, 4), min_size=least, max_size=most)))


@st.composite
def broadcastable(draw: st.DrawFn, count: int) -> list[tuple[int, ...]]:
    full = draw(shapes())
    out = []
    for _ in range(count):
        kept = draw(st.integers(0, len(full)))
        out.append(tuple(1 if draw(st.booleans()) else d for d in full[kept:]))
    return out


def numbers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: type, low: float = -9, high: float = 9
) -> np.ndarray:
    kind = np.dtype(dtype).kind
    if kind == "b":
        return rng.random(shape) < 0.5
    if kind in "ui":
        return rng.integers(0 if kind == "u" else int(low), int(high) + 1, shape).astype(dtype)
    return np.asarray(rng.uniform(low, high, shape)).astype(dtype)


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)

UNARY = {
    **dict.fromkeys(["Exp", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Erf", "Floor",
    "Ceil", "Round", "Sigmoid", "Softplus", "Softsign"], FLOATS),
    **dict.fromkeys(["Mish", "Gelu", "HardSwish", "HardSigmoid", "Elu", "Selu", "Celu", "Swish",
    "LeakyRelu", "ThresholdedRelu", "Shrink"], FLOATS),
    **dict.fromkeys(["IsNaN", "IsInf", "Reciprocal"], FLOATS), **dict.fromkeys(["Abs", "Sign"], NUMBERS),
    **dict.fromkeys(["Neg", "Relu"], FLOATS + SIGNED), "BitwiseNot": SIGNED + UNSIGNED, "Not": [np.bool_],
    "Identity": ALL,
}  # fmt: skip
POSITIVE = {
    "Sqrt": (0, 9),
    "Log": (0.01, 9),
    "Acosh": (1, 9),
    "Asin": (-1, 1),
    "Acos": (-1, 1),
    "Atanh": (-0.99, 0.99),
}


@pytest.mark.parametrize(("op", "dtype"), [(op, d) for op, ds in UNARY.items() for d in ds])
def test_unary(op: str, dtype: type) -> None:
    @quick
    @given(seeds, shapes())
    def agrees(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        check_call(op, [numbers(rng, shape, dtype)], {}, None, **TOLERANCE)

    agrees()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", POSITIVE)
def test_unary_on_its_domain(op: str, dtype: type) -> None:
    x = numbers(np.random.default_rng(1), (3, 5), dtype, *POSITIVE[op])
    check_call(op, [x], {}, None, **TOLERANCE)


def test_special_values() -> None:
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 0.5, 1.5, 2.5, -0.5, -2.5], np.float32)
    for op in (
        "Abs",
        "Neg",
        "Floor",
        "Ceil",
        "Round",
        "Sqrt",
        "Exp",
        "IsNaN",
        "IsInf",
        "Relu",
        "Sigmoid",
        "Sign",
    ):
        check_call(op, [x], {}, None)
    pairs = np.array([[a, b] for a in x for b in x], np.float32)
    for op in ("Max", "Min", "Add", "Mul", "Div", "Less", "Equal", "GreaterOrEqual"):
        check_call(op, [pairs[:, 0].copy(), pairs[:, 1].copy()], {}, None)


BINARY = {
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "Greater", "LessOrEqual",
    "GreaterOrEqual"], NUMBERS),
    "Equal": ALL, "And": [np.bool_], "Or": [np.bool_], "Xor": [np.bool_], "Mean": FLOATS, "Sum": FLOATS,
    **dict.fromkeys(["BitwiseAnd", "BitwiseOr", "BitwiseXor"], SIGNED + UNSIGNED), "Mod": NUMBERS,
}  # fmt: skip


@pytest.mark.parametrize(("op", "dtype"), [(op, d) for op, ds in BINARY.items() for d in ds])
def test_binary(op: str, dtype: type) -> None:
    @quick
    @given(seeds, broadcastable(2))
    def agrees(rng: np.random.Generator, both: list[tuple[int, ...]]) -> None:
        x, y = (numbers(rng, shape, dtype) for shape in both)
        if op in ("Div", "Mod"):
            y = np.where(y == 0, np.ones((), y.dtype), y)
        check_call(
            op, [x, y], {"fmod": 1} if op == "Mod" and x.dtype.kind not in "iu" else {}, None, **TOLERANCE
        )

    agrees()


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_integer_overflow_wraps(dtype: type) -> None:
    info = np.iinfo(dtype)
    x = np.array([info.max, info.min, info.max, info.min, 3], dtype)
    y = np.array([1, 1, info.max, info.max, 2], dtype)
    for op in ("Add", "Sub", "Mul", "Div", "Abs", "Neg"):
        if op != "Neg" or info.min < 0:
            check_call(op, [x] if op in ("Abs", "Neg") else [x, y], {}, None)


@pytest.mark.parametrize(("base", "exponent"), [
    (np.float32, np.float32), (np.float32, np.int64), (np.int32, np.int32), (np.int64, np.float32),
    (np.float64, np.int32),
    (np.float16, np.float32), (np.int32, np.int64), (np.uint8, np.int32),
])  # fmt: skip
def test_pow(base: type, exponent: type) -> None:
    rng = np.random.default_rng(0)
    x, y = numbers(rng, (4, 6), base, 1, 4), numbers(rng, (6,), exponent, 0, 3)
    check_call("Pow", [x, y], {}, None, **TOLERANCE)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", UNSIGNED)
def test_shift(dtype: type, direction: str) -> None:
    bits = np.dtype(dtype).itemsize * 8
    x = np.array([1, 255, 77, 128, 3], dtype)
    check_call("BitShift", [x, np.array([0, 1, 3, bits - 1, bits], dtype)], {"direction": direction}, None)


CASTS = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    np.int8,
    np.int32,
    np.int64,
    np.uint8,
    np.bool_,
]


@pytest.mark.parametrize("source", CASTS)
@pytest.mark.parametrize("target", ["f32", "f64", "f16", "bf16", "i8", "i32", "i64", "u8", "bool"])
def test_cast(source: type, target: str) -> None:
    from minicc.ir.types import BY_NAME

    low = 0 if target == "u8" else -9
    check_call(
        "Cast", [numbers(np.random.default_rng(0), (4, 5), source, low)], {"to": BY_NAME[target]}, None
    )


@pytest.mark.parametrize("dtype", ALL)
def test_where_and_clip(dtype: type) -> None:
    @quick
    @given(seeds, broadcastable(3))
    def agrees(rng: np.random.Generator, three: list[tuple[int, ...]]) -> None:
        condition, x, y = (numbers(rng, s, d) for s, d in zip(three, (np.bool_, dtype, dtype)))
        check_call("Where", [condition, x, y], {}, None)
        if np.dtype(dtype).kind != "b":
            low, high = np.array(2, dtype), np.array(5, dtype)
            for bounds in ((low, high), (None, high), (low, None), (low,), ()):
                check_call("Clip", [x, *bounds], {}, None)

    agrees()


# -- index ops

MOVED = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


@pytest.mark.parametrize("dtype", MOVED)
def test_views(dtype: type) -> None:
    @quick
    @given(seeds, shapes(1, 4), st.data())
    def agrees(rng: np.random.Generator, shape: tuple[int, ...], data: st.DataObject) -> None:
        x = numbers(rng, shape, dtype)
        rank = len(shape)
        check_call("Transpose", [x], {"perm": tuple(data.draw(st.permutations(range(rank))))}, None)
        check_call("Flatten", [x], {"axis": data.draw(st.integers(-rank, rank))}, None)
        axis = data.draw(st.integers(-rank - 1, rank))
        check_call("Unsqueeze", [x, np.array([axis])], {}, None)
        check_call("Squeeze", [np.expand_dims(x, axis), np.array([axis])], {}, None)
        target = (
            data.draw(st.integers(0, 3)),
            *(d if data.draw(st.booleans()) or d != 1 else 3 for d in shape),
        )
        check_call("Expand", [x, np.array(target)], {}, None)
        check_call("Tile", [x, np.array([data.draw(st.integers(0, 3)) for _ in shape])], {}, None)

    agrees()


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 5]), max_size=5), st.data())
def test_reshape(factors: list[int], data: st.DataObject) -> None:
    """Two groupings of the same factors, in every way they may overlap, with ones in between."""

    def grouped() -> tuple[int, ...]:
        out = [1]
        for factor in factors:
            if data.draw(st.booleans()):
                out.append(1)
            out[-1] *= factor
        return tuple(out) + (1,) * data.draw(st.integers(0, 1))

    source, target = grouped(), list(grouped())
    if data.draw(st.booleans()):
        target[data.draw(st.integers(0, len(target) - 1))] = -1
    x = np.arange(np.prod(source), dtype=np.int64).reshape(source)
    check_call("Reshape", [x, np.array(target)], {}, None)


@settings(max_examples=80, deadline=None, database=None)
@given(seeds, shapes(1, 3), st.data())
def test_slice(rng: np.random.Generator, shape: tuple[int, ...], data: st.DataObject) -> None:
    x = numbers(rng, shape, np.float32)
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    bound = st.one_of(st.integers(-6, 6), st.sampled_from([2**63 - 1, -(2**63), 2**31 - 1, -(2**31)]))
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
    signed = [a - len(shape) if data.draw(st.booleans()) else a for a in axes]
    check_call("Slice", [x, *(np.array(v, np.int64) for v in (starts, ends, signed, steps))], {}, None)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.bool_])
def test_pad(mode: str, dtype: type) -> None:
    @quick
    @given(seeds, shapes(1, 3), st.data())
    def agrees(rng: np.random.Generator, shape: tuple[int, ...], data: st.DataObject) -> None:
        assume(mode == "constant" or 0 not in shape)
        x = numbers(rng, shape, dtype)
        pads = [data.draw(st.integers(0 if mode != "constant" or d < 2 else -1, 4)) for d in shape * 2]
        value = numbers(rng, (), dtype)
        check_call("Pad", [x, np.array(pads), value], {"mode": mode}, None)
        if mode != "constant":
            result = np.pad(x, list(zip(pads[: len(shape)], pads[len(shape) :])), mode=mode)
            check_call("Pad", [x, np.array(pads)], {"mode": mode}, [result])

    agrees()


@quick
@given(seeds, shapes(1, 3), st.data())
def test_concat_and_split(rng: np.random.Generator, shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    parts = [numbers(rng, (*shape[:axis], n, *shape[axis + 1 :]), np.float32) for n in sizes]
    check_call("Concat", parts, {"axis": axis - len(shape)}, None)
    whole = np.concatenate(parts, axis)
    check_call("Split", [whole, np.array(sizes)], {"axis": axis}, parts)
    check_call("Split", [whole], {"axis": axis, "num_outputs": len(sizes)}, None)


@pytest.mark.parametrize("dtype", MOVED)
@pytest.mark.parametrize("index_type", [np.int32, np.int64])
def test_gathers(dtype: type, index_type: type) -> None:
    @quick
    @given(seeds, st.integers(1, 3), st.integers(0, 2), st.data())
    def agrees(rng: np.random.Generator, rank: int, index_rank: int, data: st.DataObject) -> None:
        shape = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
        x = numbers(rng, shape, dtype)
        axis = data.draw(st.integers(-rank, rank - 1))
        indices = rng.integers(-shape[axis], shape[axis], (2,) * index_rank).astype(index_type)
        check_call("Gather", [x, indices], {"axis": axis}, None)
        small = tuple(data.draw(st.integers(0, d)) for d in shape)
        elements = rng.integers(-shape[axis], shape[axis], small).astype(index_type)
        check_call("GatherElements", [x, elements], {"axis": axis}, None)

    agrees()


@quick
@given(seeds, st.data())
def test_gather_nd(rng: np.random.Generator, data: st.DataObject) -> None:
    batch, depth, rest, lead = (data.draw(st.integers(low, 2)) for low in (0, 1, 0, 0))
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(batch + depth + rest))
    x = numbers(rng, shape, np.float32)
    where = (*shape[:batch], *(3,) * lead)
    limits = np.array(shape[batch : batch + depth])
    indices = rng.integers(-limits, limits, (*where, depth))
    check_call("GatherND", [x, indices], {"batch_dims": batch}, None)


def test_out_of_range_positions_raise_in_eval_and_are_clamped_in_kernels() -> None:
    from tests.expr_interpreter import make_node, run_compute

    x, indices = np.arange(4, dtype=np.float32), np.array([7, -9, 3])
    node, _ = make_node("Gather", [x, indices])
    with pytest.raises(IndexError):
        node.op.eval(x, indices, axis=0)
    assert run_compute(node, [x, indices])[0].tolist() == [3, 0, 3]


@quick
@given(seeds, shapes(0, 2), st.data())
def test_one_hot(rng: np.random.Generator, shape: tuple[int, ...], data: st.DataObject) -> None:
    indices = rng.integers(-6, 6, shape)
    depth = data.draw(st.sampled_from([np.array(4), np.array([3]), np.array(2.0, np.float32)]))
    values = numbers(rng, (2,), data.draw(st.sampled_from(MOVED)))
    check_call(
        "OneHot",
        [indices, depth, values],
        {"axis": data.draw(st.integers(-len(shape) - 1, len(shape)))},
        None,
    )


# -- reductions

REDUCTIONS = ["Sum", "Prod", "Max", "Min", "Mean", "SumSquare", "L1", "L2", "LogSum", "LogSumExp"]


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int32, np.int64]
)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduce(name: str, dtype: type) -> None:
    @quick
    @given(seeds, shapes(0, 3), st.data())
    def agrees(rng: np.random.Generator, shape: tuple[int, ...], data: st.DataObject) -> None:
        assume(np.dtype(dtype).kind == "f" or dtype is ml_dtypes.bfloat16 or 0 not in shape)
        x = numbers(rng, shape, dtype, 1 if name == "LogSum" else -4, 4)
        attrs = {
            "keepdims": data.draw(st.integers(0, 1)),
            "noop_with_empty_axes": data.draw(st.integers(0, 1)),
        }
        axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True)) if shape else []
        signed = [a - len(shape) if data.draw(st.booleans()) else a for a in axes]
        check_call(f"Reduce{name}", [x, np.array(signed, np.int64)], attrs, None, **TOLERANCE)
        check_call(f"Reduce{name}", [x], attrs, None, **TOLERANCE)

    agrees()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.uint8])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_arg_extremum(op: str, dtype: type) -> None:
    @quick
    @given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
    def agrees(rng: np.random.Generator, shape: list[int], data: st.DataObject) -> None:
        x = numbers(rng, tuple(shape), dtype, 0, 3).round() if np.dtype(dtype).kind == "f" else numbers(
            rng, tuple(shape), dtype, 0, 3)  # fmt: skip
        attrs = {"axis": data.draw(st.integers(-len(shape), len(shape) - 1)),
        "keepdims": data.draw(st.integers(0, 1)),
                 "select_last_index": data.draw(st.integers(0, 1))}  # fmt: skip
        check_call(op, [x], attrs, None)

    agrees()


def test_log_sum_exp_does_not_overflow() -> None:
    x = np.array([[1000.0, 1000.0], [-1000.0, -1000.0], [-np.inf, -np.inf], [np.inf, 1.0]], np.float32)
    expected = np.array([1000 + np.log(2), -1000 + np.log(2), -np.inf, np.inf], np.float32)
    check_call("ReduceLogSumExp", [x, np.array([1])], {"keepdims": 0}, [expected])


# -- tensors from nothing


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(-5, 5), st.integers(-9, 9), st.integers(-3, 3).filter(bool))
def test_range(start: int, limit: int, delta: int) -> None:
    for dtype in (np.int64, np.int32, np.float32, np.float64, np.float16):
        expected = np.arange(start, limit, delta, dtype=dtype)
        check_call("Range", [np.array(v, dtype) for v in (start, limit, delta)], {}, [expected])


@pytest.mark.parametrize("dtype", [f32, f16, i32, i64, u8])
def test_constant_of_shape_and_eye(dtype: object) -> None:
    value = np.array([3], dtype.numpy)
    check_call(
        "ConstantOfShape", [np.array([2, 0, 3])], {"value": value}, [np.full((2, 0, 3), 3, dtype.numpy)]
    )
    check_call("ConstantOfShape", [np.array([], np.int64)], {"value": value}, [np.array(3, dtype.numpy)])
    for k in (-1, 0, 2):
        eye = np.eye(3, 4, k=k).astype(dtype.numpy)
        check_call("EyeLike", [np.zeros((3, 4), np.float32)], {"dtype": dtype, "k": k}, [eye])


def test_random_ops_fit_their_types_and_repeat_with_a_seed() -> None:
    from minicc.ir.opdef import get_op

    like = np.full((3, 4), 0.5, np.float32)
    calls = {
        "RandomNormal": ([], {"shape": (3, 4), "dtype": f16}), "RandomUniform": ([], {"shape": (3, 4),
        "low": 2.0, "high": 3.0}),
        "RandomNormalLike": ([like], {}), "RandomUniformLike": ([like], {"dtype": i64}),
        "Bernoulli": ([like], {"dtype": i32}),
        "Multinomial": ([like], {"sample_size": 5}),
    }  # fmt: skip
    for name, (inputs, attrs) in calls.items():
        op = get_op(name)
        assert not op.deterministic
        full = {**op.attrs, **attrs, "seed": 1.5}
        first, again = op.eval(*inputs, **full), op.eval(*inputs, **full)
        np.testing.assert_array_equal(first, again)
        check_call(name, inputs, {**attrs, "seed": 1.5}, None)
    uniform = get_op("RandomUniform").eval(shape=(1000,), dtype=f32, low=2.0, high=3.0, seed=None)
    assert uniform.min() >= 2 and uniform.max() <= 3 and abs(uniform.mean() - 2.5) < 0.1


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, -1.0, 0.5, -0.5, 1.5])
def test_pow_by_a_literal(exponent: float) -> None:
    from minicc.ir import expr as ex
    from minicc.ir.opdef import get_op
    from tests.expr_interpreter import Interpreter

    x = np.linspace(0.5, 4, 9).astype(np.float32)
    root = get_op("Pow").compute(ex.load(0, f32, [ex.iteration(0)]), ex.const(exponent, f32))
    assert (root.op == "pow") == (exponent == 1.5)
    np.testing.assert_allclose(Interpreter({0: x}).run(root, (9,)), x**exponent, rtol=1e-6)


@pytest.mark.parametrize(
    ("position", "size", "expected"), [(0, 4, 0), (2, 4, 2), (-1, 4, 3), (9, 4, 3), (-9, 4, 0)]
)
def test_literal_positions_are_wrapped_and_clamped(position: int, size: int, expected: int) -> None:
    from minicc.ir import expr as ex
    from minicc.ir.dims import evaluate, symbol
    from minicc.ops.index import safe_position

    assert safe_position(ex.const(position, i32), size) == ex.const(expected, i64)
    symbolic = safe_position(ex.const(position, i64), symbol("S"))
    assert symbolic.op in ("dim", "const")
    assert (evaluate(symbolic.arg, {"S": size}) if symbolic.op == "dim" else symbolic.arg) == expected
