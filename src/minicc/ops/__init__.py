"""The operators: importing this package registers every one of them, one family per module."""

from minicc.ops import activations, cast, pointwise

__all__ = ["activations", "cast", "pointwise"]
