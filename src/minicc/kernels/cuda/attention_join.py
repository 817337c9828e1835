"""What blocks of kernels/cuda/attention.py found for the same rows of queries and other keys, joined to their results.

Y = sum over parts of exp(top - largest top) * sums / the same of totals. A block makes one row; its warps share out the parts,
each lane with four columns, and add up through shared memory, in a fixed order. Parts without a permitted key count
nothing; where all are such, the row is zeros.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cuda.intrinsics import arg, ld, ld_vector, ptr_bf16, ptr_f16, ptr_f32, st, st_bf16, st_f16
from minicc.kernels.cuda.softmax_tiles import get_numbers, power, put_numbers, quotient, warp_top
from minicc.kernels.cuda.tiles import barrier, block, int32, shared_memory, thread

# Constants, as in kernels/cuda/attention.py. STORE, POINTER: words that store the result.
STORE = st_f16
POINTER = ptr_f16
SIZE = 2
THREADS = 256
WIDTH = 64
PITCH = 272
SLOT = 64  # also the most rows of a block
KEPT = 640  # bytes of what a warp found, five numbers of each lane

# Words: those of kernels/cuda/attention.py.
Y = 4
B = 5
GROUPS = 6
GROUP = 7
S = 8
T = 9
DV = 11
Y_B = 28
Y_H = 29
Y_ROW = 30
PANELS = 31
KEYS = 32
PARTIALS = 33
WORDS = 34

LOWEST = np.float32(-np.inf)
ZERO = np.float32(0)
ONE = np.float32(1)


def kernel(args):
    t = int32(arg(args, T))
    group = int32(arg(args, GROUP))
    count = int32(arg(args, S)) * group
    keys = int32(arg(args, KEYS))
    parts = quotient(t + keys - int32(1), keys)
    tid = thread()
    lane = tid & int32(31)
    unit = quotient(block(), count)
    row = block() - unit * count
    tile = quotient(row, int32(SLOT))
    tiles = arg(args, PANELS)
    # Where the parts of this row begin: tiles are in the order of the blocks that made them, the last queries first.
    first = ((unit + 1) * tiles - 1 - tile) * parts
    partial = arg(args, PARTIALS) + PITCH * (first * SLOT + (row - tile * int32(SLOT)))

    top = LOWEST
    part = lane
    while part < parts:
        top = max(top, ld(ptr_f32(partial + PITCH * SLOT * part), WIDTH))
        part = int32(part + int32(32))
    top = warp_top(top)
    shift = ZERO if top == LOWEST else top
    total = ZERO
    sums = (ZERO, ZERO, ZERO, ZERO)
    column = int32(lane * int32(4))
    part = tid >> int32(5)
    while part < parts:
        found = ptr_f32(partial + PITCH * SLOT * part)
        factor = power(ld(found, WIDTH) - shift)
        total += factor * ld(found, WIDTH + 1)
        if column < int32(WIDTH):
            more = ld_vector(found, column, 4)
            sums = (
                sums[0] + factor * more[0], sums[1] + factor * more[1], sums[2] + factor * more[2], sums[3] + factor * more[3],
            )  # fmt: skip
        part = int32(part + int32(THREADS // 32))

    shared = shared_memory()
    mine = int32(shared + (tid >> int32(5)) * int32(KEPT))
    put_numbers(mine, lane, sums)
    put_numbers(int32(mine + int32(512)), lane, (total,))
    barrier()
    if tid < arg(args, DV):
        place = int32(shared + (tid & int32(3)) * int32(128))
        result = ZERO
        total = ZERO
        warp = int32(0)
        while warp < int32(THREADS // 32):
            result += get_numbers(1, int32(place + warp * int32(KEPT)), tid >> int32(2))[0]
            total += get_numbers(1, int32(shared + warp * int32(KEPT) + int32(512)), lane)[0]
            warp = int32(warp + int32(1))
        b = quotient(unit, arg(args, GROUPS))
        g = unit - b * arg(args, GROUPS)
        query = quotient(row, group)
        head = g * group + (row - query * group)
        y = arg(args, Y) + SIZE * (b * arg(args, Y_B) + head * arg(args, Y_H) + query * arg(args, Y_ROW))
        STORE(POINTER(y), tid, result / (ONE if total == ZERO else total))
