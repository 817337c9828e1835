"""Sizes that do not fit each other are an error of the call, never a read outside of an array."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

import minicc
from minicc.errors import ShapeError

ONES = np.ones


def compiled(body: str, signature: str) -> Any:
    text = f'<ir_version: 10, opset_import: ["" : 21]>\nmain {signature} {{\n{body}\n}}'
    return minicc.compile(onnx.parser.parse_model(text))


# nodes, signature, shapes that fit, shapes that do not
CASES = [
    ("r = Reshape(t, s) y = Neg(r)", "(float[n,4] t) => (float[2,8] y) <int64[2] s = {2, 8}>", [(4, 4)], [(1, 4)]),
    ("y = Add(a, b)", "(float[n] a, float[8] b) => (float[8] y)", [(8,), (8,)], [(3,), (8,)]),
    ("y = Add(a, b)", "(float[n] a, float[m] b) => (float[k] y)", [(8,), (1,)], [(3,), (8,)]),
    ("y = MatMul(a, b)", "(float[2,n] a, float[m,3] b) => (float[2,3] y)", [(2, 4), (4, 3)], [(2, 4), (5, 3)]),
    ("y = MatMul(a, b)", "(float[n,2,4] a, float[m,4,3] b) => (float[k,2,3] y)", [(2, 2, 4), (1, 4, 3)], [(2, 2, 4), (3, 4, 3)]),
    ("y = Concat<axis=0>(a, b)", "(float[2,n] a, float[2,m] b) => (float[4,k] y)", [(2, 4), (2, 4)], [(2, 4), (2, 3)]),
    ("y = Conv(a, b)", "(float[1,n,5,5] a, float[4,3,2,2] b) => (float[1,4,4,4] y)", [(1, 3, 5, 5), (4, 3, 2, 2)],
     [(1, 2, 5, 5), (4, 3, 2, 2)]),
    ("y = Squeeze(a, s)", "(float[3,n] a) => (float[3] y) <int64[1] s = {1}>", [(3, 1)], [(3, 2)]),
    ("y = Expand(a, s)", "(float[n] a) => (float[2,6] y) <int64[2] s = {2, 6}>", [(6,)], [(5,)]),
    # A table of positions, cut to the sequence.
    ("s = Shape<end=1>(a) q = Slice(b, z, s, z) y = Add(a, q)",
     "(float[n,4] a, float[8,4] b) => (float[n,4] y) <int64[1] z = {0}>",
     [(7, 4), (8, 4)], [(9, 4), (8, 4)]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "signature", "good", "bad"), CASES)
def test_sizes_are_checked_when_a_module_is_called(body: str, signature: str, good: Any, bad: Any) -> None:
    module = compiled(body, signature)
    assert np.isfinite(module(*(ONES(shape, np.float32) for shape in good))).all()
    with pytest.raises(ShapeError):
        module(*(ONES(shape, np.float32) for shape in bad))
