"""Where a program's constants lie."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.ir.graph import Builder, Graph
from minicc.ir.types import TensorType, f32
from minicc.kernels.packing import CACHE_LINE
from minicc.lower.context import HUGE_BYTES
from minicc.lower.lower import lower
from minicc.options import Options
from minicc.targets.parse import parse_target
from tests.compiling import Array, compile_graph


def chain(width: int, count: int) -> tuple[Graph, list[Array]]:
    """x @ w @ w ... of that many matrices, with one bias that all layers share."""
    rng = np.random.default_rng(0)
    graph = Graph()
    b = Builder(graph)
    weights = [(rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32) for _ in range(count)]
    value = graph.input("x", TensorType(f32, (3, width)))
    bias = b.constant(rng.standard_normal(width).astype(np.float32))
    for w in weights:
        value = b.op("Add", b.op("MatMul", value, b.constant(w)), bias)
    graph.outputs = [value]
    return graph, [*weights, bias.data]  # type: ignore[list-item]


def owner(array: Array) -> int:
    """Which array's memory this is."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return id(array)


@pytest.mark.parametrize(("width", "count", "one"), [(500, 6, True), (500, 2, False), (1100, 2, False)])
def test_many_small_constants_lie_together(width: int, count: int, one: bool) -> None:
    graph, arrays = chain(width, count)
    program = lower(graph, parse_target("cpu"), Options())
    constants = [b.data for b in program.buffers if b.kind == "constant" and b.data is not None]
    assert all(data.ctypes.data % CACHE_LINE == 0 for data in constants)
    assert sum(data.nbytes for data in constants) >= HUGE_BYTES or count == 2
    assert (len({owner(data) for data in constants}) == 1) == one
    x = np.random.default_rng(1).standard_normal((3, width)).astype(np.float32)
    want = x.astype(np.float64)
    for w in arrays[:-1]:
        want = want @ w + arrays[-1]
    graph, _ = chain(width, count)
    np.testing.assert_allclose(compile_graph(graph).run_items([x])[0], want, rtol=1e-3, atol=1e-3)
