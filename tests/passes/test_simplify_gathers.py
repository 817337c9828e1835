"""Gathers of computed positions: those that are views become views, all others stay; numbers by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Value
from minicc.ir.types import TensorType, i64
from minicc.options import Options
from minicc.passes.fold import fold_constants, fold_shape_values
from minicc.passes.manager import Pass, Repeat, run_passes
from minicc.passes.simplify import simplify
from minicc.passes.simplify_gathers import positions_of
from tests.passes.models import ops, run_reference

FOLDING = (Pass("fold-shape-values", fold_shape_values), Pass("fold-constants", fold_constants), Pass("simplify", simplify))


class Writer:
    """An ONNX graph over `x`, written node by node; numbers become constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> str:
        names = []
        for value in inputs:
            if not isinstance(value, str):
                self.constants.append(numpy_helper.from_array(np.asarray(value, np.int64), f"c{len(self.constants)}"))
                value = self.constants[-1].name
            names.append(value)
        self.nodes.append(helper.make_node(op, names, [f"t{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def size(self, axis: int) -> str:
        """The size of an axis of x, as a vector."""
        return self("Shape", "x", start=axis, end=axis + 1)

    def line(self, axis: int, along: int, rank: int, start: int = 0, step: int = 1) -> str:
        """start, start + step.. as often as x is long along `axis`, along an axis of `rank`."""
        limit = self("Add", self("Mul", self("Squeeze", self.size(axis)), step), start)
        return self("Reshape", self("Range", start, limit, step), [-1 if a == along else 1 for a in range(rank)])

    def left(self, result: str, x: np.ndarray[Any, Any], rank: int, kind: str = "Gather", known: bool = False) -> dict[str, int]:
        """What the passes leave of the gathers of a graph with this result, after its numbers were compared.

        kind: how the ops begin that are counted. known: whether the shape of x is.
        """
        self.nodes.append(helper.make_node("Neg", [result], ["y"]))
        shape = x.shape if known else [f"s{axis}" for axis in range(x.ndim)]
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"d{axis}" for axis in range(rank)])
        graph = helper.make_graph(self.nodes, "gathers", [given], [made], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        imported = load_model(model).graph
        run_passes(imported, [Repeat(FOLDING)], Options())
        np.testing.assert_array_equal(evaluate(imported, [x])[0], run_reference(model, {"x": x})[0], strict=True)
        return {name: count for name, count in ops(imported).items() if name.startswith(kind)}


def sample(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def gather_nd(write: Writer, sizes: Sequence[int], axes: Sequence[int], rank: int, **line: int) -> str:
    """x at positions that count along `axes` of an output of `rank` axes (those of size 2 that x lacks)."""
    lengths: list[Any] = [[2]] * rank
    for number, axis in enumerate(axes):
        lengths[axis] = write.size(number)
    full = write("Concat", *lengths, axis=0)
    columns = [write("Unsqueeze", write("Expand", write.line(i, a, rank, **line), full), [-1]) for i, a in enumerate(axes)]
    return write("GatherND", "x", write("Concat", *columns, axis=-1))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_positions_that_count_along_axes_are_a_view(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    rank = len(sizes) + data.draw(st.integers(0, 2))
    axes = data.draw(st.permutations(range(rank)))[: len(sizes)]
    rest = data.draw(st.lists(st.integers(1, 3), max_size=1))
    write = Writer()
    result = gather_nd(write, sizes, axes, rank)
    assert write.left(result, sample([*sizes, *rest]), rank + len(rest)) == {}


@pytest.mark.parametrize(("start", "step"), [(-1, 1), (-3, 1)])
def test_positions_that_start_elsewhere_stay(start: int, step: int) -> None:
    write = Writer()
    result = gather_nd(write, [3, 3], [0, 1], 2, start=start, step=step)
    assert write.left(result, sample([3, 3]), 2) == {"GatherND": 1}


def test_a_diagonal_stays() -> None:
    write = Writer()
    line = write("Unsqueeze", write.line(0, 0, 1), [-1])
    result = write("GatherND", "x", write("Concat", line, line, axis=-1))
    assert write.left(result, sample([3, 3]), 1) == {"GatherND": 1}


def test_fewer_positions_than_there_are_stay() -> None:
    """Rows of x by a range as long as its columns: sizes that only happen to be equal."""
    write = Writer()
    result = write("GatherND", "x", write("Unsqueeze", write.line(1, 0, 1), [-1]))
    assert write.left(result, sample([3, 3]), 2) == {"GatherND": 1}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_strided_view_of_the_flat_array(data: st.DataObject) -> None:
    """In its own order it is a reshape; with axes exchanged, or one position again and again, it stays a gather."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    order, same, constant = data.draw(st.permutations(range(len(sizes)))), data.draw(st.booleans()), data.draw(st.booleans())
    write, rank = Writer(), len(sizes)
    step, steps = write("Constant", value_int=1), [""] * rank
    for axis in reversed(range(rank)):
        steps[axis] = step
        step = write("Mul", step, write("Squeeze", write.size(axis)))
    parts = [write("Mul", write.line(axis, place, rank), steps[axis]) for place, axis in enumerate(order)]
    if constant:  # as exporters write positions along an axis of a known size
        parts.append(write("Add", np.zeros([1] * rank, np.int64), [0]))
    total = parts[0]
    for part in parts[1:]:
        total = write("Add", total, part)
    result = write("Gather", write("Reshape", "x", [-1]), write("Mul", total, 0) if same else total)
    assert write.left(result, sample(sizes), rank) == ({"Gather": 1} if same or order != sorted(order) else {})


@given(
    start=st.integers(-9, 9), steps=st.lists(st.integers(-9, 9), min_size=0, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=3), place=st.integers(0, 63), change=st.integers(-1, 1),
)  # fmt: skip
def test_an_array_of_positions_is_understood_exactly(
    start: int, steps: list[int], sizes: list[int], place: int, change: int
) -> None:
    shape = sizes[: len(steps)]
    array = np.asarray(start + sum(np.indices(shape)[a] * step for a, step in enumerate(steps)), np.int64).reshape(shape)
    array.reshape(-1)[place % array.size] += change
    found = positions_of(Value("i", TensorType(i64, tuple(shape)), data=array))
    if found is not None:
        again = found.start + sum(np.indices(shape)[a] * step for a, step in enumerate(found.steps))
        np.testing.assert_array_equal(np.broadcast_to(again, shape), array)
    else:
        assert change != 0


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 6), first=st.integers(0, 5), count=st.integers(1, 6), step=st.sampled_from([1, 1, 1, 2]))
def test_rows_written_over_a_range(size: int, first: int, count: int, step: int) -> None:
    """They are put between the others where they are half of them or more; numbers are those of ONNX Runtime."""
    places = first + step * np.arange(count)
    if places[-1] >= size:
        return
    write = Writer()
    write.constants.append(numpy_helper.from_array(np.float32(np.arange(3 * count)).reshape(count, 3), "rows"))
    left = write.left(write("ScatterND", "x", places[:, np.newaxis], "rows"), sample([size, 3]), 2, "Scatter", known=True)
    dense = 2 * count >= size and (step == 1 or count == 1)
    assert left.get("ScatterND", 0) == (0 if dense else 1)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), axis=st.integers(0, 1), start=st.integers(-12, 12),
    end=st.integers(-12, 12), step=st.sampled_from([1, 1, 2]),
)  # fmt: skip
def test_slices_of_values_side_by_side(sizes: list[int], axis: int, start: int, end: int, step: int) -> None:
    if len(range(*slice(start, end, step).indices(sum(sizes)))) == 0:
        return
    write = Writer()
    shapes = [(size, 3) if axis == 0 else (3, size) for size in sizes]
    for number, shape in enumerate(shapes):
        write.constants.append(numpy_helper.from_array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), f"p{number}"))
    parts = [write("Mul", "x", f"p{number}") for number in range(len(shapes))]
    joined = write("Concat", *parts, axis=axis)
    ones = np.ones((1, 1), np.float32)
    left = write.left(write("Slice", joined, [start], [end], [axis], [step]), ones, 2, "Concat", known=True)
    edges = np.cumsum([0, *sizes])
    bounds = slice(start, end).indices(sum(sizes))
    within = step == 1 and any(a <= bounds[0] and bounds[1] <= b for a, b in pairwise(edges))
    assert left.get("Concat", 0) == (0 if within or len(sizes) == 1 else 1)
