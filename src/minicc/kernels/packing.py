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


def pack_conv(weights: Array, groups: int, columns: int) -> Array:
    """Convolution weights [M, C / group, *kernel] as flat panels [group][ceil(N / NR)][taps][C / group][NR], then zeros.

    N = M / group; `columns` is NR. The zeros, one run of kernel[-1] * C / group, stand for the padding.
    """
    m, c, *kernel = weights.shape
    taps = int(np.prod(kernel, dtype=np.int64))
    matrices = weights.reshape(groups, m // groups, c, taps).transpose(0, 3, 2, 1).reshape(groups, taps * c, -1)
    packed = pack_b(matrices, columns)
    zeros = np.zeros((kernel[-1] if kernel else 1) * c, weights.dtype)
    return np.concatenate([packed.reshape(-1), zeros])
