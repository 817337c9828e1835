"""Loops with 128-bit accesses and teams: ragged edges and unaligned arrays in the interpreter, and the machine code."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")

from benchmarks.cuda_build import machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.codegen.cuda_loops import launch_loops, vector_lanes
from minicc.codegen.source import kernel_source
from minicc.ir.expr import Expr, cast, iteration, reduce, unary
from minicc.ir.types import BY_NAME, f32, i8
from minicc.lower.kernel import LoopKernel
from tests.cuda.loop_kernels import TARGET, Array, element, loop_kernel, run
from tests.cuda.ptx_interpreter import Memory
from tests.cuda.ptx_interpreter import run as run_ptx

KINDS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8, "i64": np.int64, "bool": np.bool_}


def numbers(shape: tuple[int, ...], kind: Any) -> Array:
    drawn = np.random.default_rng(sum(shape)).integers(-100, 100, shape)
    return (drawn % 2 if kind is np.bool_ else drawn).astype(kind)


def moved(shape: tuple[int, ...], name: str) -> Expr:
    """Every row of "x", reversed in order along the first axis."""
    i, j = iteration(0), iteration(1)
    return element("x", BY_NAME[name], (shape[0] - 1 - i, j), shape)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(KINDS)), rows=st.integers(1, 5), columns=st.integers(1, 40), step=st.sampled_from([1, 4, 8]))
def test_rows_of_every_type_and_length(name: str, rows: int, columns: int, step: int) -> None:
    shape = (rows, columns * step)
    x = numbers(shape, KINDS[name])
    found = run(moved(shape, name), shape, {"x": x})
    np.testing.assert_array_equal(found.view(x.dtype) if name == "bf16" else found, x[::-1])


@pytest.mark.parametrize("shift", [0, 4, 8])
@pytest.mark.parametrize("count", [3, 515])
def test_arrays_that_begin_anywhere(shift: int, count: int) -> None:
    """Addresses that are no multiples of 16 bytes (the interpreter refuses a vector there), and a last part of a vector."""
    kernel, normal = loop_kernel(unary("neg", element("x", f32, (iteration(0),), (count,))), (count,))
    assert vector_lanes(kernel) == 4
    memory, x = Memory(), np.arange(count, dtype=np.float32)
    places = {"x": memory.place(x, shift), "out": memory.place(np.zeros_like(x), shift)}
    words = [*normal.extents, *(places[w.array] for w in normal.words)]
    launch = launch_loops(kernel, words, TARGET)
    run_ptx(compile_ptx(kernel_source(kernel, TARGET), "k", TARGET), "k", launch.grid, launch.block, 0, words, memory)
    np.testing.assert_array_equal(memory.read(places["out"], x.shape, np.float32), -x)


def normalised(shape: tuple[int, int], name: str = "f32") -> Expr:
    """Rows less their mean, over the root of the mean of their squares."""
    i, j = iteration(0), iteration(1)

    def x(place: Expr) -> Expr:
        return cast(element("x", BY_NAME[name], (i, place), shape), f32)

    def mean(axis: int, value: Expr) -> Expr:
        return reduce("sum", (axis,), (shape[1],), value) / float(shape[1])

    centre = mean(100, x(iteration(100)))
    deviation = x(iteration(101)) - centre
    return (x(j) - centre) / unary("sqrt", mean(101, deviation * deviation) + 1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (3, 64), (3, 301), (2, 5001)])
@pytest.mark.parametrize("schedule", ["together", "warps"])
def test_rows_reduced_by_warps_and_by_blocks(rows: int, columns: int, schedule: str) -> None:
    x = np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(normalised(x.shape), x.shape, {"x": x}, schedule), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("columns", [1, 129, 4096])
def test_rows_summed_to_one_number(columns: int) -> None:
    x = numbers((3, columns), np.float32)
    value = reduce("sum", (100,), (columns,), element("x", f32, (iteration(0), iteration(100)), x.shape))
    np.testing.assert_array_equal(run(value, (3,), {"x": x}), x.sum(1))


# ------------------------------------------------------------------------------------------ machine code


def cubin_of(kernel: LoopKernel) -> tuple[str, Any]:
    if find_tool("ptxas") is None or find_tool("nvdisasm") is None:
        pytest.skip("ptxas or nvdisasm is not installed (extra cuda)")
    cubin = compile_cubin(kernel_source(kernel, TARGET), "k", TARGET)
    return machine_text(cubin.data), cubin


@pytest.mark.parametrize(("name", "lanes"), [("f32", 4), ("f16", 8), ("i64", 2)])
def test_machine_code_of_pointwise_kernels(name: str, lanes: int) -> None:
    x = element("x", BY_NAME[name], (iteration(0),), (64,))
    kernel, _ = loop_kernel(x * x, (64,))
    text, cubin = cubin_of(kernel)
    assert vector_lanes(kernel) == lanes and cubin.spills == 0
    assert "LDG.E.128" in text and "STG.E.128" in text
    assert "CALL" not in text and "I2F" not in text  # no division for loops over contiguous memory


def test_machine_code_of_row_kernels() -> None:
    kernel, _ = loop_kernel(normalised((8, 1000)), (8, 1000))
    text, cubin = cubin_of(kernel)
    assert cubin.spills == 0 and cubin.registers <= 96
    assert {"SHFL.BFLY", "LDG.E.128", "STG.E.128"} <= set(re.findall(r"SHFL\.BFLY|LDG\.E\.128|STG\.E\.128", text))


def test_dequantised_values_are_rounded_operation_by_operation() -> None:
    """A product and a sum of what was quantised are two roundings; elsewhere they are one multiply-add."""
    shape = (4096,)
    x, y, z = (element(n, f32, (iteration(0),), shape) for n in "xyz")
    q = cast(element("q", i8, (iteration(0),), shape), f32)
    exact, fused = loop_kernel(q * y + z, shape)[0], loop_kernel(x * y + z, shape)[0]
    assert "CONTRACT = False" in kernel_source(exact, TARGET)
    assert "FFMA" not in cubin_of(exact)[0] and "FFMA" in cubin_of(fused)[0]
    rng = np.random.default_rng(2)
    arrays = {n: rng.standard_normal(shape).astype(np.float32) for n in "yz"}
    arrays["q"] = rng.integers(-128, 128, shape).astype(np.int8)
    expected = arrays["q"].astype(np.float32) * arrays["y"] + arrays["z"]
    np.testing.assert_array_equal(run(q * y + z, shape, arrays), expected)
