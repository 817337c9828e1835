"""Scatters against a plain loop over the updates, in order."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.errors import ShapeError
from tests.compiling import Array, expected, run_call
from tests.ops.onnx_cases import assert_same

# Element type and reduction; the others differ in nothing but the type of a load.
KINDS = [
    *((t, "none") for t in ("float32", "float64", "bool", "bfloat16")),
    *(("float32", r) for r in ("add", "mul", "max", "min")),
    *(("float16", "add"), ("bfloat16", "max"), ("int8", "mul"), ("uint64", "add")),
    ("bool", "add"),
]  # fmt: skip


def combine(old: Any, new: Any, reduction: str) -> Any:
    """One step, in the element type (half types: in float32, rounded once per step)."""
    if reduction == "none":
        return new
    if old.dtype == bool:
        return bool(old) | bool(new) if reduction in ("add", "max") else bool(old) & bool(new)
    kind = old.dtype
    wide = np.float32 if kind.itemsize == 2 and kind.kind in "fV" else kind
    a, b = (np.asarray(v).astype(wide) for v in (old, new))
    function = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    with np.errstate(all="ignore"):
        return function(a, b).astype(kind)


def scatter_elements(data: Array, indices: Array, updates: Array, axis: int, reduction: str) -> Array:
    out = data.copy()
    for position in itertools.product(*map(range, indices.shape)):
        place = list(position)
        place[axis] = int(indices[position])
        out[tuple(place)] = combine(out[tuple(place)], updates[position], reduction)
    return out


def scatter_nd(data: Array, indices: Array, updates: Array, reduction: str) -> Array:
    out = data.copy()
    for position in itertools.product(*map(range, indices.shape[:-1])):
        place = tuple(int(i) for i in indices[position])
        for inside in itertools.product(*map(range, data.shape[len(place) :])):
            at = place + inside
            out[at] = combine(out[at], updates[position + inside], reduction)
    return out


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        return rng.integers(0, 120, shape).astype(dtype)
    found = (rng.integers(-8, 9, shape) / 4).astype(dtype)
    return np.where(rng.random(shape) < 0.03, np.asarray(np.nan, dtype), found)


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=SHAPES,
    kind=st.sampled_from(KINDS),
    symbolic=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_scatter_elements(data, shape, kind, symbolic, threads):
    dtype, reduction = kind
    axis = data.draw(st.integers(0, len(shape) - 1))
    smaller = data.draw(st.booleans())
    extent = [data.draw(st.integers(0, s)) if smaller else s for s in shape]
    extent[axis] = data.draw(st.integers(0, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    x, u = values(rng, shape, dtype), values(rng, tuple(extent), dtype)
    index_type = np.int32 if dtype in ("float32", "bool") else np.int64
    indices = rng.integers(-shape[axis], shape[axis], extent).astype(index_type)
    attrs = {"axis": axis - data.draw(st.sampled_from([0, len(shape)])), "reduction": reduction}
    want = scatter_elements(x, indices, u, axis, reduction)
    assert_same(expected("ScatterElements", (x, indices, u), attrs)[0], want)
    (got,) = run_call("ScatterElements", (x, indices, u), attrs, symbolic=symbolic, threads=threads)
    assert_same(got, want)


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=SHAPES,
    kind=st.sampled_from(KINDS),
    wide=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_scatter_nd(data, shape, kind, wide, threads):
    dtype, reduction = kind
    depth = data.draw(st.integers(1, len(shape)))
    shape = (*shape, 150) if wide else shape
    lead = tuple(data.draw(st.lists(st.integers(0, 4), max_size=2)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    indices = np.stack([rng.integers(-s, s, lead) for s in shape[:depth]], axis=-1)
    x, u = values(rng, shape, dtype), values(rng, (*lead, *shape[depth:]), dtype)
    want = scatter_nd(x, indices, u, reduction)
    (got,) = run_call("ScatterND", (x, indices, u), {"reduction": reduction}, threads=threads)
    assert_same(got, want)


def test_the_last_of_several_updates_stays():
    x, u = np.zeros((3, 200), np.float32), np.arange(800, dtype=np.float32).reshape(4, 200)
    (got,) = run_call("ScatterND", (x, np.array([[1], [0], [1], [1]]), u))
    np.testing.assert_array_equal(got, [u[1], u[3], x[2]])
    (got,) = run_call("ScatterElements", (x, np.full((4, 200), 2), u))
    np.testing.assert_array_equal(got, [x[0], x[1], u[3]])


@pytest.mark.parametrize("far", [9, -9, 1 << 62, -(1 << 62)])
def test_indices_out_of_range_stay_inside(far):
    """Their place is clamped: nothing but the first or last row changes."""
    x, u = np.zeros((3, 4), np.float32), np.ones((1, 4), np.float32)
    row = 2 if far > 0 else 0
    for op, indices in (("ScatterND", np.array([[far]])), ("ScatterElements", np.full((1, 4), far))):
        (got,) = run_call(op, (x, indices, u))
        np.testing.assert_array_equal(got[row], u[0])
        assert not np.delete(got, row, axis=0).any()


def test_updates_that_do_not_fit_are_refused():
    """Sizes known only when shapes are bound are still compared."""
    x, two, three = np.zeros((4, 6), np.float32), np.ones((2, 6), np.float32), np.ones((3, 6), np.float32)
    with pytest.raises(ShapeError):
        run_call("ScatterND", (x, np.zeros((2, 1), np.int64), three), symbolic=True)
    with pytest.raises(ShapeError):
        run_call("ScatterElements", (x, np.zeros((3, 6), np.int64), two), symbolic=True)
    with pytest.raises(ShapeError):
        wide = np.ones((2, 7), np.float32)
        run_call("ScatterElements", (x, wide.astype(np.int64), wide), symbolic=True)
