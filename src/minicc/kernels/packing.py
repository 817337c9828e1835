"""Weights in the order in which kernels read them, made once at compile time with numpy.

Everything here is a permutation with zero padding; the same layouts can be made at run time by the template "pack".
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def pack_b(weights: Array, columns: int) -> Array:
    """Right operands [..., K, N] as panels [..., ceil(N / NR), K, NR], zero-padded in N; `columns` is NR."""
    *batch, k, n = weights.shape
    panels = -(-n // columns)
    padded = np.zeros((*batch, k, panels * columns), weights.dtype)
    padded[..., :n] = weights
    split = padded.reshape(*batch, k, panels, columns)
    return np.ascontiguousarray(np.moveaxis(split, -2, -3))
