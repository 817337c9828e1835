"""Writes updates into an array at indices that are data: ScatterElements and ScatterND, in place.

Updates of one lane that meet in one element are done in the order of their sequence, as if one after another: the
thread of the first of them does all. A negative index counts from the end; one still outside is clamped, as
kernels cannot raise.

ScatterND        lanes are the elements of a slice, all at one place of DEPTH index numbers (SHARED)
ScatterElements  lanes are all positions off the axis, each with its own index; the run lies behind the axis
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cuda.intrinsics import (
    all_threads,
    arg,
    arg_of,
    first_element,
    helper,
    ld,
    ld_bf16,
    ld_f16,
    ld_out,
    ld_out_bf16,
    ld_out_f16,
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
from minicc.kernels.cuda.scalar import maximum, minimum


@helper
def replace(old, new):  # noqa: ARG001
    """The update itself."""
    return new


@helper
def add(old, new):
    """The sum, wrapping around for integers."""
    return old + new


@helper
def multiply(old, new):
    """The product, wrapping around for integers."""
    return old * new


# Constants: memory access of the element type (by width where elements only move), pointer of the indices,
# whether all lanes of a run share their indices, and the reduction (one of the helpers).
POINTER = ptr_f32
LOAD = ld
LOAD_OLD = ld_out
STORE = st
INDEX = ptr_i64
SHARED = True
COMBINE = replace
THREADS = 256

# Words. Strides count elements.
TARGET = 0
INDICES = 1
UPDATES = 2
COUNT = 3  # length of the sequence
I_STEP = 4  # strides of the sequence in indices and updates
U_STEP = 5
RUN = 6  # lanes that lie side by side in all arrays
BLOCK = 7  # positions of the sequence that have a thread: COUNT, or 1 when that takes all
AXES = 8  # further axes of lanes
DEPTH = 9  # numbers that make an index
# E: extents of the axes of lanes; T, I, U: their strides in target, indices and updates.
E_0 = 12
T_0 = 20
I_0 = 28
U_0 = 36
# N: extents of the target that index numbers count through; M: their strides.
N_0 = 52
M_0 = 60
WORDS = 68


@helper
def place(number, extent, stride):
    """Element offset of an index number."""
    at = np.int64(number)
    if at < 0:
        at += extent
    return min(max(at, 0), extent - 1) * stride


@helper
def place_of(args, indices, at):
    """Element offset of the index that begins at element `at` of the indices."""
    if SHARED:
        total = 0
        for d in range(arg(args, DEPTH)):
            total += place(ld(indices, at + d), arg_of(args, N_0, d), arg_of(args, M_0, d))
        return total
    return place(ld(indices, at), arg(args, N_0), arg(args, M_0))


@helper
def met_before(args, indices, at, count, wanted):
    """Whether one of the first `count` indices of a lane has the same place."""
    s = 0
    while s < count and place_of(args, indices, at + s * arg(args, I_STEP)) != wanted:
        s += 1
    return s < count


def kernel(args):
    target = POINTER(arg(args, TARGET))
    indices = INDEX(arg(args, INDICES))
    updates = POINTER(arg(args, UPDATES))
    count = arg(args, COUNT)
    run = arg(args, RUN)
    block = arg(args, BLOCK)
    i_step = arg(args, I_STEP)
    u_step = arg(args, U_STEP)
    lanes = run
    for axis in range(arg(args, AXES)):
        lanes *= arg_of(args, E_0, axis)
    for unit in range(first_element(), lanes * block, all_threads()):
        first = unit // lanes
        lane = unit - first * lanes
        rest = lane // run
        j = lane - rest * run
        t = j
        i = 0 if SHARED else j
        u = j
        axis = arg(args, AXES) - 1
        while axis >= 0:
            outer = rest // arg_of(args, E_0, axis)
            position = rest - outer * arg_of(args, E_0, axis)
            t += position * arg_of(args, T_0, axis)
            i += position * arg_of(args, I_0, axis)
            u += position * arg_of(args, U_0, axis)
            rest = outer
            axis -= 1
        own = place_of(args, indices, i + first * i_step)
        if not met_before(args, indices, i, first, own):
            for s in range(first, count):
                at = place_of(args, indices, i + s * i_step)
                if (block == 1) | (at == own):
                    STORE(target, t + at, COMBINE(LOAD_OLD(target, t + at), LOAD(updates, u + s * u_step)))
