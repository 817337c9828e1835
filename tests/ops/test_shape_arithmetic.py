"""Shape arithmetic on symbols: what is inferred and propagated once holds for every size.

Each graph is built with symbolic input shapes and evaluated for many sizes. At every node the inferred
shape, the known content and, where there is one, the compiled form must agree with what numpy computes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicc.ops  # noqa: F401  registers the ops
from minicc.errors import ShapeError
from minicc.ir.dims import SymbolicDim, symbol
from minicc.ir.dims import evaluate as evaluate_dim
from minicc.ir.evaluate import Evaluation
from minicc.ir.graph import Builder, Graph, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import TensorType, boolean, f32, i32, i64
from tests.expr_interpreter import run_compute

N, S, T = symbol("N"), symbol("S"), symbol("T")
COMPUTED = (Kind.POINTWISE, Kind.INDEX, Kind.REDUCE)


def ints(b: Builder, *values: int) -> Value:
    return b.constant(np.array(values, dtype=np.int64))


def number(b: Builder, value: int) -> Value:
    return b.constant(np.array(value, dtype=np.int64))


def size(b: Builder, x: Value, axis: int) -> Value:
    """Shape -> Gather, as exporters read one size (rank 0)."""
    return b.op("Gather", b.op("Shape", x), number(b, axis))


def vector(b: Builder, *scalars: Value) -> Value:
    return b.op("Concat", *(b.op("Unsqueeze", s, ints(b, 0)) for s in scalars), axis=0)


def check(graph: Graph, sizes: dict[str, int]) -> None:
    """Run the graph and compare every node with what is known about it."""
    rng = np.random.default_rng(0)
    feeds = []
    for value in graph.inputs:
        shape = [evaluate_dim(d, sizes) for d in value.tensor.dims]
        feeds.append(np.asarray(rng.integers(-3, 9, shape)).astype(value.tensor.dtype.numpy))
    arrays = dict(zip(graph.inputs, feeds))
    run = Evaluation(dict(sizes), None, 1 << 30, 1000)
    for node in graph.nodes:
        inputs = [None if v is None else v.data if v.data is not None else arrays[v] for v in node.inputs]
        outputs = run.node(node, inputs)
        for value, array in zip(node.outputs, outputs):
            arrays[value] = array
            known = dict(sizes)
            for dim, actual in zip(value.tensor.dims, array.shape):
                if str(dim) in node.symbols:
                    known[str(dim)] = actual
            assert tuple(evaluate_dim(d, known) for d in value.tensor.dims) == array.shape, value
            assert value.tensor.dtype.numpy == array.dtype
            if value.content is not None:
                assert value.content.shape == array.shape
                found = [
                    evaluate_dim(v, sizes) if isinstance(v, SymbolicDim) else v for v in value.content.flat
                ]
                assert found == array.reshape(-1).tolist(), f"{node}: {value.content}"
        if node.op.kind in COMPUTED and node.op.refuse is not None and node.op.refuse(node) is None:
            for computed, array in zip(run_compute(node, inputs, sizes), outputs):
                np.testing.assert_allclose(computed, array, rtol=1e-6, err_msg=str(node))


def graph_of(build: Callable[[Builder, Graph], Value], **shapes: tuple) -> Graph:
    graph = Graph()
    for name, shape in shapes.items():
        graph.input(name, TensorType(f32, shape))
    graph.outputs = [build(Builder(graph), graph)]
    return graph


def view(b: Builder, g: Graph) -> Value:
    """x.view(N, S, 4, -1).transpose(1, 2)"""
    x = g.inputs[0]
    shape = vector(b, size(b, x, 0), size(b, x, 1), number(b, 4), number(b, -1))
    return b.op("Transpose", b.op("Reshape", x, shape), perm=(0, 2, 1, 3))


def merge(b: Builder, g: Graph) -> Value:
    x = g.inputs[0]
    flat = b.op("Mul", size(b, x, 0), size(b, x, 1))
    return b.op("Reshape", x, vector(b, flat, number(b, -1)))


def expand_as(b: Builder, g: Graph) -> Value:
    """torch.expand: -1 keeps a size, written with ConstantOfShape, Equal and Where."""
    x, y = g.inputs
    wanted = vector(b, number(b, -1), size(b, y, 1), number(b, -1))
    ones = b.op("ConstantOfShape", b.op("Shape", wanted), value=np.array([1]))
    keep = b.op("Equal", wanted, b.op("Mul", ones, number(b, -1)))
    return b.op("Expand", x, b.op("Where", keep, ones, wanted))


def halve(b: Builder, g: Graph) -> Value:
    """Sizes through floats: floor(size * 0.5), as the exporters of interpolation write it."""
    x = g.inputs[0]
    spatial = b.op("Slice", b.op("Shape", x), ints(b, 1), ints(b, 3))
    scaled = b.op("Mul", b.op("Cast", spatial, to=f32), b.constant(np.array([0.5, 2.0], np.float32)))
    sizes = b.op("Cast", b.op("Floor", scaled), to=i64)
    return b.op("ConstantOfShape", sizes)


def truncate(b: Builder, g: Graph) -> Value:
    x = g.inputs[0]
    half = b.op("Div", b.op("Cast", size(b, x, 1), to=f32), b.constant(np.array(3, np.float32)))
    count = b.op("Cast", half, to=i64)
    return b.op("Slice", x, ints(b, 0), vector(b, count), ints(b, 1))


def positions(b: Builder, g: Graph) -> Value:
    """torch.arange(past, past + length)"""
    x, y = g.inputs
    past = size(b, y, 1)
    return b.op("Range", past, b.op("Add", past, size(b, x, 1)), number(b, 1))


def split_rest(b: Builder, g: Graph) -> Value:
    x = g.inputs[0]
    half = b.op("Div", size(b, x, 1), number(b, 2))
    rest = b.op("Sub", size(b, x, 1), half)
    first, second = b.ops("Split", x, vector(b, half, rest), outputs=2, axis=1)
    return b.op("Concat", second, first, axis=1)


def split_even(b: Builder, g: Graph) -> Value:
    parts = b.ops("Split", g.inputs[0], outputs=2, axis=2, num_outputs=2)
    return b.op("Concat", *parts, axis=2)


def causal_mask(b: Builder, g: Graph) -> Value:
    x = g.inputs[0]
    length = size(b, x, 1)
    square = b.op("ConstantOfShape", vector(b, length, length), value=np.array([1.0], np.float32))
    return b.op("Trilu", square, number(b, 1), upper=1)


def tail(b: Builder, g: Graph) -> Value:
    """x[:, -size(y):]"""
    x, y = g.inputs
    start = b.op("Neg", size(b, y, 1))
    return b.op("Slice", x, vector(b, start), ints(b, 2**63 - 1), ints(b, 1))


def window(b: Builder, g: Graph) -> Value:
    """x[:, size(x) - size(y) : size(x) - 1], whose sign nobody knows before the sizes are there."""
    x, y = g.inputs
    start = b.op("Sub", size(b, x, 1), size(b, y, 1))
    end = b.op("Sub", size(b, x, 1), number(b, 1))
    return b.op("Slice", x, vector(b, start), vector(b, end), ints(b, 1))


def backwards(b: Builder, g: Graph) -> Value:
    return b.op("Slice", g.inputs[0], ints(b, -2), ints(b, -(2**63)), ints(b, 1), ints(b, -2))


def strided(b: Builder, g: Graph) -> Value:
    return b.op("Slice", g.inputs[0], ints(b, 1, 2), ints(b, 5, 2**31), ints(b, 2, 1), ints(b, 2, 3))


def repeat(b: Builder, g: Graph) -> Value:
    x, y = g.inputs
    return b.op("Tile", x, vector(b, number(b, 1), size(b, y, 1), number(b, 2)))


def pad_to(b: Builder, g: Graph) -> Value:
    """Pads at the end up to a multiple of 4."""
    x = g.inputs[0]
    length = size(b, x, 1)
    over = b.op("Mod", b.op("Sub", number(b, 4), b.op("Mod", length, number(b, 4))), number(b, 4))
    zero = number(b, 0)
    return b.op("Pad", x, vector(b, zero, zero, zero, zero, over, zero), b.constant(np.array(7, np.float32)))


def crop(b: Builder, g: Graph) -> Value:
    x, y = g.inputs
    return b.graph.add("CenterCropPad", [x, vector(b, size(b, y, 1), number(b, 5))], {"axes": (1, 2)}).output


def count(b: Builder, g: Graph) -> Value:
    x, y = g.inputs
    total = b.op("ReduceProd", b.op("Shape", x), keepdims=0)
    largest = b.op("ReduceMax", b.op("Concat", b.op("Shape", x), b.op("Shape", y), axis=0), keepdims=0)
    same = b.op("Equal", b.op("Size", x), total)
    return b.op("Where", same, total, largest)


def limits(b: Builder, g: Graph) -> Value:
    x, y = g.inputs
    least = b.op("Min", size(b, x, 1), size(b, y, 1), number(b, 3))
    most = b.op("Max", size(b, x, 0), size(b, y, 1))
    clipped = b.op("Clip", most, number(b, 1), number(b, 4))
    return b.op("Cast", vector(b, least, most, clipped), to=i32)


def flags(b: Builder, g: Graph) -> Value:
    x = g.inputs[0]
    n = size(b, x, 0)
    grown = b.op("Add", n, number(b, 1))
    certain = b.op("And", b.op("Less", n, grown), b.op("GreaterOrEqual", grown, number(b, 1)))
    never = b.op("Or", b.op("Greater", n, grown), b.op("Equal", grown, number(b, 0)))
    return b.op("Where", b.op("And", certain, b.op("Not", never)), grown, n)


CASES = {
    view: ((N, S, 24),), merge: ((N, S, 3),), expand_as: ((N, 1, 2), (N, S, 2)), halve: ((N, S, T),),
    truncate: ((N, S, 2),), positions: ((N, S, 1), (N, T, 1)), split_rest: ((N, S, 2),), split_even: ((N,
    S, 6),),
    causal_mask: ((N, S, 1),), tail: ((N, S, 2), (1, T, 1)), window: ((N, S, 2), (1, T, 1)),
    backwards: ((N, S, 2),), strided: ((N, S, 4),), repeat: ((N, S, 2), (1, T, 1)), pad_to: ((N, S, 2),),
    crop: ((N, S, T), (1, T, 1)), count: ((N, S, 2), (1, T, 1)), limits: ((N, S, 2), (1, T, 1)),
    flags: ((N, S, 2),),
}  # fmt: skip
# A free size (-1) of an empty tensor is anything, so nothing can be compared.
FREE_SIZE = {view, merge}
# Graphs whose every shape-valued node must have a content: these patterns must fold away.
FOLDED = list(CASES)


@pytest.mark.parametrize("build", CASES, ids=lambda f: f.__name__)
def test_holds_for_every_size(build: Callable) -> None:
    graph = graph_of(build, **dict(zip("xy", CASES[build])))
    assert not any(node.symbols for node in graph.nodes), "a size was given up"

    smallest = 1 if build in FREE_SIZE else 0

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.integers(smallest, 3), st.integers(smallest, 9), st.integers(0, 6))
    def holds(n: int, s: int, t: int) -> None:
        check(graph, {"N": n, "S": s, "T": t})

    holds()


@pytest.mark.parametrize("build", FOLDED, ids=lambda f: f.__name__)
def test_integers_are_all_known(build: Callable) -> None:
    graph = graph_of(build, **dict(zip("xy", CASES[build])))
    unknown = [
        node for node in graph.nodes
        for v in node.outputs
        if v.tensor.dtype in (i64,
        boolean) and v.tensor.rank < 2 and v.content is None and v is not graph.outputs[0]
    ]  # fmt: skip
    assert not unknown


def test_known_forms() -> None:
    assert str(graph_of(view, x=(N, S, 24)).outputs[0].type) == "f32[N,4,S,6]"
    assert str(graph_of(merge, x=(N, S, 3)).outputs[0].type) == "f32[N*S,3]"
    assert str(graph_of(expand_as, x=(N, 1, 2), y=(N, S, 2)).outputs[0].type) == "f32[N,S,2]"
    assert str(graph_of(halve, x=(N, S, T)).outputs[0].type) == "f32[(S // 2),2*T]"
    assert str(graph_of(positions, x=(N, S, 1), y=(N, T, 1)).outputs[0].type) == "i64[S]"
    assert str(graph_of(split_rest, x=(N, S, 2)).outputs[0].type) == "f32[N,S,2]"
    assert str(graph_of(split_even, x=(N, S, 6)).outputs[0].type) == "f32[N,S,6]"


def test_unknown_shapes_get_fresh_symbols_and_run_on_the_host() -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (N, 6)))
    shape = graph.input("shape", TensorType(i64, (3,)))
    b = Builder(graph)
    for op in ("Reshape", "Expand", "ConstantOfShape"):
        out = b.op(op, shape) if op == "ConstantOfShape" else b.op(op, x, shape)
        assert out.tensor.rank == 3
        assert all(str(d) in out.producer.symbols for d in out.tensor.dims)
        assert "data-dependent" in out.producer.op.refuse(out.producer)


@pytest.mark.parametrize(("op", "inputs", "attrs", "message"), [
    ("Reshape", ((2, 3), [4, 2]), {}, "cannot reshape 6 elements"),
    ("Reshape", ((2, 3), [-1, 4]), {}, "does not divide"),
    ("Reshape", ((2, 3), [-1, -1]), {}, "no shape"),
    ("Concat", ((2, 3), (2, 4)), {"axis": 0}, "differ along axis 1"),
    ("Transpose", ((2, 3),), {"perm": (0, 0)}, "no permutation"),
    ("Squeeze", ((2, 3), [0]), {}, "size 1"),
    ("Unsqueeze", ((2, 3), [0, 0]), {}, "twice"),
    ("Add", ((2, 3), (2, 4)), {}, "broadcast"),
    ("Gather", ((2, 3), [0]), {"axis": 2}, "out of range"),
    ("Pad", ((2, 3), [1, 1]), {}, "pads"),
    ("Split", ((4, 3), [1, 1]), {}, "sum up"),
    ("Expand", ((2, 3), [2, 4]), {}, "broadcast"),
    ("TopK", ((2, 3), [4]), {}, "cannot take"),
])  # fmt: skip
def test_what_does_not_fit_is_a_shape_error(op: str, inputs: tuple, attrs: dict, message: str) -> None:
    graph = Graph()
    values = [
        graph.constant(np.array(shape))
        if isinstance(shape, list)
        else graph.input(f"x{i}", TensorType(f32, shape))
        for i, shape in enumerate(inputs)
    ]
    with pytest.raises(ShapeError, match=message) as caught:
        graph.add(op, values, attrs, origin=("the_node",))
    assert "the_node" in str(caught.value) or op in str(caught.value)
