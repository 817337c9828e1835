"""Random inputs for a module, where the user gave none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicc.errors import InputError
from minicc.ir.dims import bare_symbol, evaluate, symbols_of
from minicc.ir.samples import random_array
from minicc.ir.types import TensorType
from minicc.runtime.signature import Port

# Sizes for symbols nobody gave: 1 where one leads a shape (a batch), else this.
USUAL_SIZE = 16


def symbol_sizes(inputs: Sequence[Port], given: Mapping[str, int] | None = None) -> dict[str, int]:
    """A size for every symbol of the inputs. Raises InputError for a given name that is none of them."""
    sizes: dict[str, int] = {}
    for port in inputs:
        shape = port.type.shape if isinstance(port.type, TensorType) else None
        for axis, dim in enumerate(shape or ()):
            for name in symbols_of(dim):
                leads = axis == 0 and not isinstance(dim, int) and bare_symbol(dim) == name
                sizes[name] = 1 if leads or sizes.get(name) == 1 else USUAL_SIZE
    unknown = sorted(set(given or ()) - set(sizes))
    if unknown:
        known = ", ".join(sorted(sizes)) or "none"
        raise InputError(
            f"no dimension is called {', '.join(unknown)}", hint=f"the model's dimensions are: {known}"
        )
    return {**sizes, **(given or {})}


def random_inputs(inputs: Sequence[Port], given: Mapping[str, int] | None = None, seed: int = 0) -> list[Any]:
    """Arrays for all inputs: normal floats, integers of 0 and 1. Raises InputError for an unknown rank."""
    sizes = symbol_sizes(inputs, given)
    rng = np.random.default_rng(seed)
    arrays: list[Any] = []
    for port in inputs:
        if not isinstance(port.type, TensorType) or port.type.shape is None:
            raise InputError(
                f"input {port.name!r} has type {port.type}, for which there are no random values",
                hint="give it",
            )
        arrays.append(random_array(rng, port.type, [max(evaluate(d, sizes), 0) for d in port.type.shape]))
    return arrays
