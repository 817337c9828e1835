"""Running sums and products against a loop over the axis in float64 or Python integers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiling import Array, run_call
from tests.ops.onnx_cases import assert_same

KINDS = [
    *(("CumSum", t) for t in ("float32", "float64", "int32", "uint64", "bfloat16", "float16")),
    *(("CumProd", t) for t in ("float32", "int32")),
]  # fmt: skip


def scan(op: str, x: Array, axis: int, exclusive: bool, reverse: bool) -> Array:
    """Exact values, wrapped around for integers."""
    exact = x.astype(object if x.dtype.kind in "iu" else np.float64)
    rows = np.moveaxis(exact, axis, 0)
    out = np.empty_like(rows)
    total = np.full(rows.shape[1:], 1 if op == "CumProd" else 0, dtype=rows.dtype)
    order = range(len(rows))
    for i in reversed(order) if reverse else order:
        after = total * rows[i] if op == "CumProd" else total + rows[i]
        out[i] = total if exclusive else after
        total = after
    result = np.moveaxis(out, 0, axis)
    if x.dtype.kind not in "iu":
        return result.astype(x.dtype)
    wrapped = np.array([int(v) % 2**64 for v in result.flat], np.uint64).reshape(x.shape)
    return wrapped.astype(x.dtype)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 70]), min_size=1, max_size=3).map(tuple),
    data=st.data(),
    exclusive=st.booleans(),
    reverse=st.booleans(),
    symbolic=st.booleans(),
)
def test_scan(kind, shape, data, exclusive, reverse, symbolic):
    op, name = kind
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    if dtype.kind in "iu":
        x = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)  # sums wrap around
    elif op == "CumProd":
        x = rng.choice([0.5, 1, -1, 2], shape).astype(dtype)
    else:
        x = (rng.integers(-8, 9, shape) / 4).astype(dtype)  # exact in float32
    attrs = {"exclusive": int(exclusive), "reverse": int(reverse)}
    (got,) = run_call(op, (x, np.array(axis)), attrs, symbolic=symbolic)
    assert_same(got, scan(op, x, axis, exclusive, reverse))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("axis", [0, -1])
def test_empty(shape, axis):
    (got,) = run_call("CumSum", (np.zeros(shape, np.float32), np.array(axis)))
    assert got.shape == shape


def test_half_types_add_in_single_precision():
    """3000 ones in float16, whose own sums stop at 2048."""
    x = np.ones(3000, np.float16)
    (got,) = run_call("CumSum", (x, np.array(0)))
    np.testing.assert_array_equal(got, np.arange(1, 3001).astype(np.float16))
