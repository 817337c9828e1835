"""The operators: importing this package registers every one of them, one family per module."""

from minicc.ops import (
    activations,
    cast,
    control,
    conv,
    einsum,
    fused,
    matmul,
    pointwise,
    pool,
    rearrange,
    shape,
)

__all__ = [
    "activations",
    "cast",
    "control",
    "conv",
    "einsum",
    "fused",
    "matmul",
    "pointwise",
    "pool",
    "rearrange",
    "shape",
]
