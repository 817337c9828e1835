"""Matrix product with weights of few bits: C[b0, b1, i, j] = sum over k of A[b0, b1, i, k] * B[k, j], float32 sums.

B[k, j] is (q[k, j] - Z[k / SIZE, j]) * S[k / SIZE, j] with numbers q of 2, 4 or 8 bits. W holds them in panels [ceil(N / NR)]
[ceil(K * BITS / 32)][NR] of words of 32 bits (see bit_tiles.py), S and Z are panels [ceil(N / NR)][ceil(K / SIZE)][NR].
A is read in place (rows of contiguous k, any row stride). One unit is up to ROWS rows times a block of panels of one batch.

A few rows take the time of reading W: its numbers are taken apart in registers. For more rows DEPTH of them at a time are
written out as floats, once for all rows of the unit.
"""

from minicc.kernels.cpu.bit_tiles import few_bits_tile, unpack_bits
from minicc.kernels.cpu.intrinsics import (
    arg,
    helper,
    ld_scratch,
    off,
    ptr_f32,
    ptr_i32,
    st,
    st_scratch,
    stack_f32,
    stack_i64,
)
from minicc.kernels.cpu.tiles import strided_product, tile_height

# Constants: tile of MR rows by NR columns, vector width, MR * NR; the bits of a number; 1 where all zero points are the
# middle of the range.
MR = 6
NR = 16
VW = 8
TILE = 96
BITS = 4
CENTRED = 1

# As in kernels/domain.py: rows of a unit that is not cut further, those that are few, and how much of K is written out.
ROWS = 64
FEW = 4
DEPTH = 128
# Floats on the stack, for panels of up to 32 columns: of the sums, and of numbers written out to the end of their last word.
SUMS = 2048
PANEL = 4608

# Words. Strides count elements; those of the batch axes may be 0.
A = 0
W = 1
S = 2
Z = 3
M = 4
N = 5
K = 6
A_ROW = 7
A_B0 = 8
A_B1 = 9
B0 = 10
B1 = 11
SIZE = 12  # numbers of a block
HEIGHT = 13  # rows per unit
PANELS = 14  # panels per unit
EPILOGUE = 15


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense C."""
    row = ((b0 * arg(args, B1) + b1) * arg(args, M) + i) * arg(args, N)
    st(ptr_f32(arg(args, EPILOGUE)), row + j, acc)


@helper
def store_tile(args, b0, b1, i0, j0, rows, columns, tile):
    """The epilogue for the first `rows` x `columns` elements of a tile."""
    if columns >= NR:
        for r in range(rows):
            for j in range(NR):
                epilogue(args, b0, b1, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))
    else:
        for r in range(rows):
            for j in range(columns):
                epilogue(args, b0, b1, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    k = arg(args, K)
    size = arg(args, SIZE)
    a_row = arg(args, A_ROW)
    height = arg(args, HEIGHT)
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + height - 1) // height
    panel_blocks = (panels + block_panels - 1) // block_panels
    words = (k * BITS + 31) // 32 * NR
    blocks = (k + size - 1) // size * NR
    addresses = stack_i64(FEW)
    sums = stack_f32(SUMS)
    panel = stack_f32(PANEL)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i = (unit - rest * row_blocks) * height
        rows = min(height, m - i)
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = batch // arg(args, B1)
        b1 = batch - b0 * arg(args, B1)
        start = b0 * arg(args, A_B0) + b1 * arg(args, A_B1) + i * a_row
        a = off(ptr_f32(arg(args, A)), start)
        for p in range(p_begin, p_end):
            w = off(ptr_i32(arg(args, W)), p * words)
            s = off(ptr_f32(arg(args, S)), p * blocks)
            z = off(ptr_f32(arg(args, Z)), p * blocks)
            if rows <= FEW:
                for r in range(FEW):
                    st_scratch(addresses, r, arg(args, A) + 4 * (start + min(r, rows - 1) * a_row))
                few_bits_tile(FEW, NR, VW, BITS, CENTRED, tile_height(FEW, rows), addresses, w, s, z, sums, k, size)
            else:
                first = 0
                while first < k:
                    count = min(DEPTH, k - first)
                    done = 0
                    while done < count:
                        block = (first + done) // size
                        part = min((block + 1) * size - first, count) - done
                        q = off(w, (first + done) * BITS // 32 * NR)
                        unpack_bits(NR, VW, BITS, CENTRED, q, off(s, block * NR), off(z, block * NR), off(panel, done * NR), part)
                        done += part
                    strided_product(MR, NR, VW, off(a, first), a_row, 1, panel, sums, rows, count, first == 0)
                    first += count
            store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, sums)
