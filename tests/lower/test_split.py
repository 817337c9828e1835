"""Reductions to few rows in two levels on the CPU, against numpy; which ones are split."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import minicc
from minicc.ir.expr import iteration, load, reduce
from minicc.ir.types import f32
from minicc.lower.body import Write
from minicc.lower.split import ROWS, WORK, split_reductions
from tests.passes.models import parse

NUMPY = {"ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean}


def model_of(op: str, shape: tuple[int, ...], axes: tuple[int, ...], keep: int, symbolic: bool) -> onnx.ModelProto:
    dims = ", ".join(["N" if symbolic and axis == 0 else str(size) for axis, size in enumerate(shape)])
    rank = len(shape) if keep else len(shape) - len(axes)
    result = ", ".join(f"R{i}" for i in range(rank))
    body = f"""
      a = Constant <value_ints: ints = [{", ".join(map(str, axes))}]> ()
      z = Relu(x)
      y = {op} <keepdims: int = {keep}> (z, a)
    """
    return parse(body, f"(float[{dims}] x) => (float[{result}] y)" if rank else f"(float[{dims}] x) => (float y)")


@settings(max_examples=20, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.data())
def test_reductions(data: st.DataObject) -> None:
    op, keep, threads = (data.draw(st.sampled_from(v)) for v in (sorted(NUMPY), (0, 1), (1, 2)))
    long = data.draw(st.sampled_from([240, 1024, 65536, 508 * 128]))
    other = max(1, 2 * WORK // long)
    shape, axes = data.draw(st.sampled_from([
        ((1, long, other), (1,)),
        ((2, long, other), (1,)),
        ((long, other), (0,)),
        ((other, long), (0, 1)),
        ((1, other, long), (1, 2)),
        ((3, 2, long * 2), (2,)),
    ]))  # fmt: skip
    module = minicc.compile(model_of(op, shape, axes, keep, 0 not in axes and data.draw(st.booleans())), threads=threads)
    x = np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal(shape).astype(np.float32)
    x[..., 1::7] = np.nan if op in ("ReduceMax", "ReduceMin") and data.draw(st.booleans()) else 1
    expected = NUMPY[op](np.maximum(x, 0).astype(np.float64), axis=axes, keepdims=bool(keep))
    np.testing.assert_allclose(module(x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("results", "length", "columns", "parts"),
    [
        ((1,), WORK, False, ROWS),
        ((1,), WORK + 1, False, 0),  # no divisor
        ((1,), WORK // 2, False, 0),  # too little work
        ((ROWS,), WORK, False, 0),  # enough rows
        ((3,), WORK, False, 2),
        ((1, 64), 1024, True, ROWS),
        ((1, 512), 508, True, 4),
        ((ROWS, 64), 1024, True, 0),
    ],
)
def test_what_is_split(results: tuple[int, ...], length: int, columns: bool, parts: int) -> None:
    *_rows, width = results if columns else (*results, 1)
    i, j, k = iteration(0), iteration(1), iteration(100)
    place = (i * length + k) * width + j if columns else i * length + k
    value = reduce("max", (100,), (length,), load("x", f32, (place,)))
    made: list[tuple[int, ...]] = []

    def emit(_dtype: object, shape: object, _value: object) -> int:
        made.append(tuple(shape))  # type: ignore[arg-type]
        return 7

    offset = i * width + j if columns else i
    split_reductions([Write("y", f32, offset, value)], results, emit, device=False)
    assert made == ([(parts, *results)] if parts else [])
