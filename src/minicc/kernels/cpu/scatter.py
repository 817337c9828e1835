"""Writes updates into an array at indices that are data: ScatterElements and ScatterND, in place.

Updates that may meet in one element differ only in their sequence number, so a unit takes a run of lanes that
never meet and goes through the sequence in order: the last of several updates stays, as if they were done one
after another. A negative index counts from the end; one still outside is clamped, as kernels cannot raise.

ScatterND        lanes are the elements of a slice, all at one place of DEPTH index numbers (SHARED)
ScatterElements  lanes are all positions off the axis, each with its own index; the run lies behind the axis
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cpu.intrinsics import (
    arg,
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
from minicc.kernels.cpu.scalar import maximum, minimum


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

# Words. Strides count elements.
TARGET = 0
INDICES = 1
UPDATES = 2
COUNT = 3  # length of the sequence
I_STEP = 4  # strides of the sequence in indices and updates
U_STEP = 5
RUN = 6  # lanes that lie side by side in all arrays
BLOCK = 7  # lanes per unit
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


@helper
def place(number, extent, stride):
    """Element offset of an index number."""
    at = np.int64(number)
    if at < 0:
        at += extent
    return min(max(at, 0), extent - 1) * stride


def kernel(args, begin, end):
    target = POINTER(arg(args, TARGET))
    indices = INDEX(arg(args, INDICES))
    updates = POINTER(arg(args, UPDATES))
    count = arg(args, COUNT)
    run = arg(args, RUN)
    block = arg(args, BLOCK)
    blocks = (run + block - 1) // block
    for unit in range(begin, end):
        rest = unit // blocks
        first = (unit - rest * blocks) * block
        width = min(block, run - first)
        t = first
        i = first
        u = first
        axis = arg(args, AXES) - 1
        while axis >= 0:
            outer = rest // ld(args, E_0 + axis)
            position = rest - outer * ld(args, E_0 + axis)
            t += position * ld(args, T_0 + axis)
            i += position * ld(args, I_0 + axis)
            u += position * ld(args, U_0 + axis)
            rest = outer
            axis -= 1
        for s in range(count):
            if SHARED:
                at = t
                for d in range(arg(args, DEPTH)):
                    number = ld(indices, s * arg(args, I_STEP) + d)
                    at += place(number, ld(args, N_0 + d), ld(args, M_0 + d))
                for j in range(width):
                    new = COMBINE(LOAD_OLD(target, at + j), LOAD(updates, u + s * arg(args, U_STEP) + j))
                    STORE(target, at + j, new)
            else:
                for j in range(width):
                    number = ld(indices, i + s * arg(args, I_STEP) + j)
                    at = t + j + place(number, arg(args, N_0), arg(args, M_0))
                    new = COMBINE(LOAD_OLD(target, at), LOAD(updates, u + s * arg(args, U_STEP) + j))
                    STORE(target, at, new)
