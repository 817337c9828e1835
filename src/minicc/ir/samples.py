"""Random arrays of a given type, for checks and for inputs that nobody gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicc.ir.types import TensorType


def random_array(rng: np.random.Generator, type_: TensorType, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Normal floats, integers and booleans of 0 and 1, empty strings."""
    if type_.dtype.kind == "s":
        return np.full(shape, "", dtype=object)
    if type_.dtype.kind in "fc":
        return rng.standard_normal(shape).astype(type_.dtype.numpy)
    return rng.integers(0, 2, shape).astype(type_.dtype.numpy)
