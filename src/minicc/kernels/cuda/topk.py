"""The K first elements of every row in descending (or ascending) order, and their positions: TopK.

A thread counts how many elements of the row come before its own: that is where it belongs in the result, and with
K of them it belongs nowhere. Equal elements are ordered by position, lower first; NaN counts as larger than every
number, as in numpy. The count ends early for most elements of a long row.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

from minicc.kernels.cuda.intrinsics import (
    all_threads,
    arg,
    first_element,
    helper,
    ld,
    ld_bf16,
    ld_f16,
    ld_out,
    ld_out_bf16,
    ld_out_f16,
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

# Elements that are compared before the count is looked at.
BLOCK = 8

# Constants: memory access of the element type, and the order.
POINTER = ptr_f32
LOAD = ld
LOAD_OLD = ld_out
STORE = st
LARGEST = True
THREADS = 256

# Words. Arrays are [outer, N or K, inner].
X = 0
VALUES = 1
POSITIONS = 2
OUTER = 3
N = 4
K = 5
INNER = 6
WORDS = 7


@helper
def above(a, b):
    """Whether a is larger than b, NaN being larger than all numbers."""
    return (a > b) | ((a != a) & (b == b))


@helper
def precedes(a, i, b, j):
    """Whether element a at position i comes before b at j in the result."""
    before = above(a, b) if LARGEST else above(b, a)
    behind = above(b, a) if LARGEST else above(a, b)
    return before | ((i < j) & (not behind))


def kernel(args):
    n = arg(args, N)
    k = arg(args, K)
    inner = arg(args, INNER)
    for at in range(first_element(), arg(args, OUTER) * n * inner, all_threads()):
        line = at // inner
        lane = at - line * inner
        outer = line // n
        own = line - outer * n
        x = off(POINTER(arg(args, X)), outer * n * inner + lane)
        value = LOAD(x, own * inner)
        rank = 0
        i = 0
        while (i + BLOCK <= n) & (rank < k):
            for b in range(BLOCK):
                rank += 1 if precedes(LOAD(x, (i + b) * inner), i + b, value, own) else 0
            i += BLOCK
        while (i < n) & (rank < k):
            rank += 1 if precedes(LOAD(x, i * inner), i, value, own) else 0
            i += 1
        if rank < k:
            place = (outer * k + rank) * inner + lane
            STORE(POINTER(arg(args, VALUES)), place, value)
            st(ptr_i64(arg(args, POSITIONS)), place, own)
