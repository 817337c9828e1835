"""Loops over tiles: operands that lie along another axis than the result, alone and beside others, against numpy."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.codegen.objects import compile_object
from minicc.codegen.source import kernel_source
from minicc.codegen.tiles import COLUMNS, LINES, staged_loads
from minicc.ir.dims import symbol
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, dtype_of
from minicc.lower.kernel import LoopKernel
from minicc.options import Options
from minicc.runtime.module import CompiledModule
from minicc.targets.parse import target_of
from minicc.walk import optimise
from tests.compiling import compile_graph

Array = np.ndarray[Any, Any]
TYPES = ("float32", "float64", "float16", "int64", "int32", "uint32", "uint8", "int8", "bool")
ORDERS = ((1, 0), (0, 2, 1), (2, 1, 0), (2, 0, 1), (0, 3, 1, 2), (3, 2, 1, 0), (1, 3, 0, 2))


def transposed(dtype: str, order: tuple[int, ...], others: int) -> Graph:
    """transpose(x), with `others` operands added: in turn transposed by themselves, and as the result lies."""
    graph = Graph()
    own = TensorType(dtype_of(np.dtype(dtype)), tuple(symbol(f"d{i}") for i in range(len(order))))
    moved = TensorType(own.dtype, tuple(own.dims[axis] for axis in order))
    y = graph.add("Transpose", [graph.input("x", own)], {"perm": order}).output
    for number in range(others):
        other = graph.input(f"x{number}", own if number % 2 else moved)
        if number % 2:
            other = graph.add("Transpose", [other], {"perm": order}).output
        y = graph.add("Add", [y, other]).output
    graph.outputs = [y]
    return graph


def tiled(module: CompiledModule) -> list[int]:
    """How many loads each kernel reads in tiles."""
    return [len(staged_loads(k)) for k in module.program.kernels if isinstance(k, LoopKernel)]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(TYPES), order=st.sampled_from(ORDERS), others=st.integers(0, 3), threads=st.integers(1, 2),
    sizes=st.lists(st.integers(0, 9) | st.sampled_from([15, 16, 17, 33, 64, 70]), min_size=4, max_size=4),
    fused=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_order_and_type(dtype, order, others, threads, sizes, fused, seed):
    others = 0 if dtype == "bool" else others
    graph = transposed(dtype, order, others)
    if fused:
        optimise(graph, Options(check=2))
    module = compile_graph(graph, threads=threads)
    rng = np.random.default_rng(seed)
    shape = sizes[: len(order)]
    arrays = [rng.integers(0, 2 if dtype == "bool" else 20, shape).astype(dtype)]
    for number in range(others):
        own = shape if number % 2 else [shape[axis] for axis in order]
        arrays.append(rng.integers(0, 20, own).astype(dtype))
    want = arrays[0].transpose(order)
    for number, other in enumerate(arrays[1:]):
        want = want + (other.transpose(order) if number % 2 else other)
    np.testing.assert_array_equal(module.run_items(arrays)[0], want)


@pytest.mark.parametrize("order", ORDERS)
def test_read_in_tiles(order):
    module = compile_graph(transposed("float32", order, 0))
    assert tiled(module) == [1]


def test_every_transposed_operand_is_read_in_tiles():
    graph = transposed("float32", (0, 2, 1), 3)
    optimise(graph, Options(check=2))
    assert tiled(compile_graph(graph)) == [2]  # x and x1, of one kernel


@pytest.mark.parametrize(("rows", "columns"), [(LINES, COLUMNS), (LINES + 1, COLUMNS - 1), (3 * LINES + 5, 2 * COLUMNS + 9)])
def test_whole_and_partial_tiles(rows, columns):
    module = compile_graph(transposed("float32", (1, 0), 0), threads=2)
    x = np.arange(rows * columns, dtype=np.float32).reshape(columns, rows)
    np.testing.assert_array_equal(module.run_items([x])[0], x.T)


def test_nothing_is_read_behind_an_operand():
    """The last lines of an array that ends where its page does."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    x = np.frombuffer(memory, np.float32, 15 * 17, page * 2 - 15 * 17 * 4).reshape(15, 17)
    x[...] = np.arange(15 * 17, dtype=np.float32).reshape(15, 17)
    module = compile_graph(transposed("float32", (1, 0), 0))
    np.testing.assert_array_equal(module.run_items([x])[0], x.T)


def test_short_axes_are_not():
    graph = Graph()
    x = graph.input("x", TensorType(dtype_of(np.dtype("float32")), (symbol("n"), 3)))
    graph.outputs = [graph.add("Transpose", [x], {"perm": (1, 0)}).output]
    assert tiled(compile_graph(graph)) == [0]


@pytest.mark.parametrize("target", ["cpu:sse", "cpu:avx2", "cpu:avx512", "cpu:neon"])
def test_compiles_for_other_machines(target):
    module = compile_graph(transposed("float32", (1, 0), 0))
    machine = target_of(target)
    (kernel,) = module.program.kernels
    source = kernel_source(kernel, machine)
    assert f"transpose_tile({machine.vector_width}, " in source
    assert compile_object(source, "kernel", machine)
