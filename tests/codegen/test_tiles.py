"""Loops over several rows at once, against numpy: tiles of operands that lie along another axis than the result, short rows."""

from __future__ import annotations

import mmap
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.codegen.objects import assembly, compile_object
from minicc.codegen.source import kernel_source
from minicc.codegen.tiles import COLUMNS, LINES, staged_loads
from minicc.errors import ArtifactError
from minicc.ir.dims import symbol
from minicc.ir.graph import Graph, Value
from minicc.ir.types import TensorType, dtype_of
from minicc.lower.kernel import LoopKernel
from minicc.lower.program import Word
from minicc.options import Options
from minicc.runtime.module import CompiledModule
from minicc.runtime.validate import check_program
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


# -- short rows


def boxes(sides: int, dtype: str) -> Graph:
    """x[..., :sides] * scale - x[..., sides:] of rows of twice as many elements, as detectors decode boxes."""
    graph = Graph()
    x = graph.input("x", TensorType(dtype_of(np.dtype(dtype)), (symbol("a"), symbol("b"), 2 * sides)))
    scale = graph.constant(np.arange(1, sides + 1).astype(dtype))

    def part(first: int) -> Value:
        bounds = [graph.constant(np.array([n], np.int64)) for n in (first, first + sides, 2)]
        return graph.add("Slice", [x, *bounds]).output

    scaled = graph.add("Mul", [part(0), scale]).output
    graph.outputs = [graph.add("Sub", [scaled, part(sides)]).output]
    return graph


@settings(max_examples=60, deadline=None)
@given(
    sides=st.integers(1, 9), dtype=st.sampled_from(["float32", "float64", "int64", "int8", "float16"]),
    a=st.integers(0, 5), b=st.integers(0, 40), threads=st.integers(1, 2),
)  # fmt: skip
def test_short_rows(sides, dtype, a, b, threads):
    graph = boxes(sides, dtype)
    optimise(graph, Options(check=2))
    module = compile_graph(graph, threads=threads)
    short = [k.short for k in module.program.kernels if isinstance(k, LoopKernel)]
    assert short == ([sides] if 1 < sides < 9 else [0])
    x = np.random.default_rng(a).integers(0, 9, (a, b, 2 * sides)).astype(dtype)
    want = x[..., :sides] * np.arange(1, sides + 1).astype(dtype) - x[..., sides:]
    np.testing.assert_array_equal(module.run_items([x])[0], want)


@pytest.mark.parametrize("sides", [2, 3, 4])
def test_short_rows_are_computed_in_vectors(sides):
    """Where a row alone has no vector in it."""
    graph = boxes(sides, "float32")
    optimise(graph, Options(check=1))
    machine = target_of("cpu:avx512")
    (kernel,) = compile_graph(graph).program.kernels
    text = assembly(kernel_source(kernel, machine), "kernel", machine)
    assert len(re.findall(r"vf?n?m?(?:mul|sub|add)\w*ps\b", text)) > len(re.findall(r"vf?n?m?(?:mul|sub|add)\w*ss\b", text))


def test_a_call_with_other_rows_is_refused():
    """A file that claims longer rows than its kernel walks."""
    graph = boxes(3, "float32")
    optimise(graph, Options(check=1))
    program = compile_graph(graph).program
    (step,) = program.steps
    words = [*step.words]
    words[1] = Word(2)
    with pytest.raises(ArtifactError, match="not valid"):
        check_program(replace(program, steps=(replace(step, words=tuple(words)),)))
