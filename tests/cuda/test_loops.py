"""Generated CUDA loops against numpy: frames, types, reductions, on the PTX interpreter; and what ptxas says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from minicc.codegen.cuda import compile_cubin, find_tool
from minicc.codegen.cuda_loops import frame
from minicc.codegen.source import kernel_source
from minicc.ir.expr import Expr, binary, cast, const, iteration, reduce, unary
from minicc.ir.types import BY_NAME, f32, i64
from tests.cuda.loop_kernels import TARGET, Array, element, loop_kernel, run


def numbers(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def softmax(shape: tuple[int, int]) -> Expr:
    i, j, k, m = (iteration(a) for a in (0, 1, 100, 101))
    largest = reduce("max", (100,), (shape[1],), element("x", f32, (i, k), shape))
    total = reduce("sum", (101,), (shape[1],), unary("exp", element("x", f32, (i, m), shape) - largest))
    return unary("exp", element("x", f32, (i, j), shape) - largest) / total


def column_sum(shape: tuple[int, int]) -> Expr:
    return reduce("sum", (100,), (shape[0],), element("x", f32, (iteration(100), iteration(0)), shape))


def row_sum(shape: tuple[int, int]) -> Expr:
    return reduce("sum", (100,), (shape[1],), element("x", f32, (iteration(0), iteration(100)), shape))


def test_frames() -> None:
    shape = (5, 70)
    assert frame(loop_kernel(softmax(shape), shape)[0]) == "rows"
    assert frame(loop_kernel(row_sum(shape), (5,))[0]) == "blocks"
    assert frame(loop_kernel(column_sum(shape), (70,))[0]) == "elements"
    assert frame(loop_kernel(element("x", f32, (iteration(0),), (9,)), (9,))[0]) == "elements"


def test_pointwise_of_a_transposed_and_a_broadcast_operand() -> None:
    x, y = numbers(7, 45), numbers(7)
    i, j = iteration(0), iteration(1)
    value = binary("max", element("x", f32, (j, i), x.shape) * element("y", f32, (j,), y.shape), const(0.0, f32))
    found = run(value, (45, 7), {"x": x, "y": y})
    np.testing.assert_array_equal(found, np.maximum(x.T * y, 0))


@pytest.mark.parametrize("schedule", ["together", "warps"])
@pytest.mark.parametrize("columns", [1, 31, 200])
def test_a_row_reduced_twice(columns: int, schedule: str) -> None:
    x = numbers(3, columns)
    exact = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    found = run(softmax(x.shape), x.shape, {"x": x}, schedule)
    np.testing.assert_allclose(found, exact / exact.sum(1, keepdims=True), rtol=2e-6)


def test_sums_over_either_axis() -> None:
    x = numbers(6, 150)
    np.testing.assert_allclose(run(row_sum(x.shape), (6,), {"x": x}), x.sum(1, dtype=np.float64), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(column_sum(x.shape), (150,), {"x": x}), x.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["f16", "bf16", "f64", "i8", "u8", "i32", "i64", "u64", "bool"])
def test_types_are_loaded_and_stored(name: str) -> None:
    dtype = BY_NAME[name]
    kind = ml_dtypes.bfloat16 if name == "bf16" else dtype.numpy
    x = (np.random.default_rng(1).integers(0, 2 if name == "bool" else 100, 300)).astype(kind)
    np.testing.assert_array_equal(run(element("x", dtype, (iteration(0),), x.shape), x.shape, {"x": x}), x)


def test_a_cast_that_rounds() -> None:
    x = numbers(100)
    found = run(cast(element("x", f32, (iteration(0),), x.shape), BY_NAME["f16"]), x.shape, {"x": x})
    np.testing.assert_array_equal(found, x.astype(np.float16))


def test_integer_division_floors() -> None:
    x, y = np.arange(-50, 50), np.resize(np.array([-7, 3, 5, -1]), 100)
    load = {n: element(n, i64, (iteration(0),), (100,)) for n in "xy"}
    found = run(binary("floordiv", load["x"], load["y"]), (100,), {"x": x, "y": y})
    np.testing.assert_array_equal(found, x // y)


def test_the_compiler_spills_nothing() -> None:
    if find_tool("ptxas") is None:
        pytest.skip("ptxas is not installed (extra cuda)")
    pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")
    kernel, _ = loop_kernel(softmax((8, 1000)), (8, 1000))
    cubin = compile_cubin(kernel_source(kernel, TARGET), "softmax", TARGET)
    assert cubin.data.startswith(b"\x7fELF") and b"softmax" in cubin.data
    assert cubin.spills == 0 and 0 < cubin.registers <= 64
