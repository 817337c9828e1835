"""MatMul onto its template where the rows of the left operand lie far apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from minicc.lower.lower import lower
from minicc.lower.program import KernelStep
from minicc.options import Options
from minicc.targets.parse import target_of
from minicc.walk import optimise
from tests.compiling import compile_graph


def windows(images: int, across: int, down: int, side: int, channels: int) -> Graph:
    """A product of the pixels of the windows of an image, as in Swin: [images * windows, side * side, channels] by a matrix."""
    graph = Graph()
    x = graph.input("x", TensorType(f32, (images, across * side, down * side, channels)))
    split = graph.add("Reshape", [x, graph.constant(np.array([images, across, side, down, side, channels]))]).output
    moved = graph.add("Transpose", [split], {"perm": (0, 1, 3, 2, 4, 5)}).output
    rows = graph.add("Reshape", [moved, graph.constant(np.array([images * across * down, side * side, channels]))]).output
    rng = np.random.default_rng(channels)
    w, b = rng.standard_normal((channels, 24)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    product = graph.add("MatMul", [rows, graph.constant(w)]).output
    graph.outputs = [graph.add("Add", [product, graph.constant(b)]).output]
    return graph


@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 2), across=st.integers(1, 3), down=st.integers(1, 3), side=st.integers(1, 4),
       channels=st.sampled_from([1, 8, 20]), threads=st.integers(1, 2))  # fmt: skip
def test_windows(images, across, down, side, channels, threads):
    graph = windows(images, across, down, side, channels)
    optimise(graph, Options(check=2))
    module = compile_graph(graph, threads=threads)
    x = np.random.default_rng(0).standard_normal(graph.inputs[0].shape).astype(np.float32)
    np.testing.assert_allclose(module.run_items([x])[0], evaluate(graph, [x])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["cpu:sse", "cpu:avx2", "cpu:avx512", "cpu:neon", "cuda:sm_80", "cuda:sm_90"])
def test_rows_of_windows_are_copied(target):
    graph = windows(1, 4, 4, 7, 32)
    machine = target_of(target)
    optimise(graph, Options(check=1), target=machine)
    program = lower(graph, machine, Options())
    names = [program.kernels[s.kernel].name for s in program.steps if isinstance(s, KernelStep)]
    assert any(name.startswith("gemm") for name in names)
    assert not any("matmul" in name and not name.startswith("gemm") for name in names)
