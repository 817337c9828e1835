"""How long a core of a machine takes for what the ways of computing a convolution consist of.

Plain data that estimates are made with (`lower/templates/winograd.py`, `fft.py`); `runtime/rates.py` measures it.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Rates:
    """Times in that of one float32 operation of a product on one core: a multiply-add is two.

    memory: of a byte of weights from memory, while all cores read there.
    cache:  of a byte of weights read again, from caches that the cores share or have beyond the first.
    value:  of a value into Winograd's form or out of it.

    The defaults are those of the machine that the kernels were written on (Zen 4, 2 cores), where they were found by timing
    convolutions.
    """

    memory: float = 9.0
    cache: float = 4.0
    value: float = 16.0

    def are_valid(self) -> bool:
        """Whether estimates can be made with them, wherever they come from: finite numbers above zero."""
        return all(type(rate) is float and 0 < rate < math.inf for rate in astuple(self))
