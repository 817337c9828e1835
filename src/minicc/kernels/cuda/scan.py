"""Running sums and products along one axis: CumSum and CumProd, over arrays seen as [outer, axis, inner].

Half types accumulate in float32, integers modulo 2**64 (which gives their own wrap-around when stored). A thread
goes along one row of the axis.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cuda.intrinsics import (
    all_threads,
    arg,
    first_element,
    helper,
    ld,
    ld_bf16,
    ld_f16,
    off,
    ptr_bf16,
    ptr_f16,
    ptr_f32,
    ptr_f64,
    ptr_i8,
    ptr_i16,
    ptr_i32,
    ptr_i64,
    ptr_u8,
    ptr_u16,
    ptr_u32,
    ptr_u64,
    st,
    st_bf16,
    st_f16,
)


@helper
def add(total, x):
    """One step of a running sum."""
    return total + x


@helper
def multiply(total, x):
    """One step of a running product."""
    return total * x


# Constants: memory access of the element type, type of the accumulator, the step and what it starts from, whether
# an element leaves itself out.
POINTER = ptr_f32
LOAD = ld
STORE = st
TYPE = np.float32
COMBINE = add
INITIAL = 0
EXCLUSIVE = False
THREADS = 256

# Words. A scan from the end starts at the last position and has a negative step.
X = 0
Y = 1
OUTER = 2
COUNT = 3  # extent of the axis
INNER = 4
START = 5  # element offset of the first position
STEP = 6  # from one position to the next
WORDS = 7


def kernel(args):
    count = arg(args, COUNT)
    inner = arg(args, INNER)
    step = arg(args, STEP)
    for row in range(first_element(), arg(args, OUTER) * inner, all_threads()):
        outer = row // inner
        at = outer * count * inner + (row - outer * inner) + arg(args, START)
        x = off(POINTER(arg(args, X)), at)
        y = off(POINTER(arg(args, Y)), at)
        total = TYPE(INITIAL)
        for s in range(count):
            new = COMBINE(total, TYPE(LOAD(x, s * step)))
            STORE(y, s * step, total if EXCLUSIVE else new)
            total = new
