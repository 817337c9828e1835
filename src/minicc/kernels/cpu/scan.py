"""Running sums and products along one axis: CumSum and CumProd, over arrays seen as [outer, axis, inner].

Half types accumulate in float32, integers modulo 2**64 (which gives their own wrap-around when stored). One
unit is one row of the last axis, or one block of inner elements, whose accumulators are a small array.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cpu.intrinsics import (
    arg,
    helper,
    ld,
    ld_bf16,
    ld_f16,
    ld_scratch,
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
    st_scratch,
    stack_f32,
    stack_f64,
    stack_i64,
)


@helper
def add(total, x):
    """One step of a running sum."""
    return total + x


@helper
def multiply(total, x):
    """One step of a running product."""
    return total * x


# Constants: memory access of the element type, type and stack of the accumulators, the step and what it
# starts from, whether an element leaves itself out, lanes per unit.
POINTER = ptr_f32
LOAD = ld
STORE = st
TYPE = np.float32
LANES = stack_f32
COMBINE = add
INITIAL = 0
EXCLUSIVE = False
BLOCK = 64

# Words. A scan from the end starts at the last position and has a negative step.
X = 0
Y = 1
OUTER = 2
COUNT = 3  # extent of the axis
INNER = 4
START = 5  # element offset of the first position
STEP = 6  # from one position to the next


def kernel(args, begin, end):
    count = arg(args, COUNT)
    inner = arg(args, INNER)
    step = arg(args, STEP)
    blocks = (inner + BLOCK - 1) // BLOCK
    lanes = LANES(BLOCK)
    for unit in range(begin, end):
        outer = unit // blocks
        first = (unit - outer * blocks) * BLOCK
        at = outer * count * inner + first + arg(args, START)
        x = off(POINTER(arg(args, X)), at)
        y = off(POINTER(arg(args, Y)), at)
        width = min(BLOCK, inner - first)
        if width == 1:
            total = TYPE(INITIAL)
            for s in range(count):
                if EXCLUSIVE:
                    STORE(y, s * step, total)
                    total = COMBINE(total, TYPE(LOAD(x, s * step)))
                else:
                    total = COMBINE(total, TYPE(LOAD(x, s * step)))
                    STORE(y, s * step, total)
        else:
            for j in range(width):
                st_scratch(lanes, j, TYPE(INITIAL))
            for s in range(count):
                for j in range(width):
                    old = ld_scratch(lanes, j)
                    new = COMBINE(old, TYPE(LOAD(x, s * step + j)))
                    STORE(y, s * step + j, old if EXCLUSIVE else new)
                    st_scratch(lanes, j, new)
