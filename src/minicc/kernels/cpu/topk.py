"""The K first elements of every row in descending (or ascending) order, and their positions: TopK.

A heap of the K best so far, worst at the root, is kept in the result itself; most elements of a long row cost
one comparison with the root. The heap is then sorted in place (heapsort: no recursion, no memory, n log K in
the worst case). Equal elements are ordered by position, lower first; NaN counts as larger than every number,
as in numpy (ONNX leaves it open, ONNX Runtime's order is arbitrary then). One unit is one row.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

from minicc.kernels.cpu.intrinsics import (
    arg,
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

# Elements that are compared with the root at once where they lie side by side.
BLOCK = 32

# Constants: memory access of the element type, and the order.
POINTER = ptr_f32
LOAD = ld
LOAD_OLD = ld_out
STORE = st
LARGEST = True

# Words. Arrays are [outer, N or K, inner].
X = 0
VALUES = 1
POSITIONS = 2
OUTER = 3
N = 4
K = 5
INNER = 6


@helper
def above(a, b):
    """Whether a is larger than b, NaN being larger than all numbers."""
    return (a > b) | ((a != a) & (b == b))


@helper
def precedes(a, i, b, j):
    """Whether element a at position i comes before b at j in the result."""
    if above(a, b):
        return LARGEST
    if above(b, a):
        return not LARGEST
    return i < j


@helper
def better(value, worst):
    """Whether a later element of the row belongs before the worst of the heap; equals stay behind."""
    return above(value, worst) if LARGEST else above(worst, value)


@helper
def none_better(x, worst):
    """Whether no element of a block is better: one pass without branches, in vector registers."""
    found = False
    for j in range(BLOCK):
        found |= better(LOAD(x, j), worst)
    return not found


@helper
def settle(values, positions, stride, size, hole, value, position):
    """Put an element into the heap at a free place, moving those below that come later in the result up."""
    child = 2 * hole + 1
    while child < size:
        v = LOAD_OLD(values, child * stride)
        p = ld_out(positions, child * stride)
        if child + 1 < size:
            w = LOAD_OLD(values, (child + 1) * stride)
            q = ld_out(positions, (child + 1) * stride)
            if precedes(v, p, w, q):
                v = w
                p = q
                child += 1
        if precedes(v, p, value, position):
            break
        STORE(values, hole * stride, v)
        st(positions, hole * stride, p)
        hole = child
        child = 2 * hole + 1
    STORE(values, hole * stride, value)
    st(positions, hole * stride, position)


def kernel(args, begin, end):
    n = arg(args, N)
    k = arg(args, K)
    inner = arg(args, INNER)
    for unit in range(begin, end):
        outer = unit // inner
        lane = unit - outer * inner
        x = off(POINTER(arg(args, X)), outer * n * inner + lane)
        values = off(POINTER(arg(args, VALUES)), outer * k * inner + lane)
        positions = off(ptr_i64(arg(args, POSITIONS)), outer * k * inner + lane)
        for i in range(k):
            STORE(values, i * inner, LOAD(x, i * inner))
            st(positions, i * inner, i)
        parent = k // 2 - 1
        while parent >= 0:
            value = LOAD_OLD(values, parent * inner)
            settle(values, positions, inner, k, parent, value, ld_out(positions, parent * inner))
            parent -= 1
        worst = LOAD_OLD(values, 0)
        block = k
        while block < n:
            after = min(block + BLOCK, n)
            if inner != 1 or after - block < BLOCK or not none_better(off(x, block), worst):
                for i in range(block, after):
                    value = LOAD(x, i * inner)
                    if better(value, worst):
                        settle(values, positions, inner, k, 0, value, i)
                        worst = LOAD_OLD(values, 0)
            block = after
        size = k - 1
        while size > 0:
            value = LOAD_OLD(values, size * inner)
            position = ld_out(positions, size * inner)
            STORE(values, size * inner, LOAD_OLD(values, 0))
            st(positions, size * inner, ld_out(positions, 0))
            settle(values, positions, inner, size, 0, value, position)
            size -= 1
