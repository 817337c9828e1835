"""Matrix product: C[b0, b1, i, j] = sum over k of A[b0, b1, i, k] * B[b0, b1, k, j], float32.

A is read in place (rows of contiguous k, any row stride). B is packed in panels [ceil(N / NR)][K][NR],
zero-padded in N. One unit is a block of row tiles times a block of panels of one batch; inside it the panel
is the outer loop, so that a panel stays in cache while the rows pass. K is never cut: C is touched once, in
the epilogue.
"""

from minicc.kernels.cpu.intrinsics import (
    arg,
    helper,
    ld_scratch,
    off,
    ptr_f32,
    st,
    st_scratch,
    stack_f32,
    stack_i64,
)
from minicc.kernels.cpu.tiles import product_tile, tile_height

# Constants: tile of MR rows by NR columns, vector width, MR * NR.
MR = 6
NR = 16
VW = 8
TILE = 96

# Words. Strides count elements; those of the batch axes may be 0.
A = 0
B = 1
M = 2
N = 3
K = 4
A_ROW = 5
A_B0 = 6
A_B1 = 7
B_ROW = 8  # only where panels are not packed: on CUDA
B_B0 = 9
B_B1 = 10
B0 = 11
B1 = 12
ROW_TILES = 13  # row tiles per unit
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
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    addresses = stack_i64(MR)
    tile = stack_f32(TILE)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i_begin = (unit - rest * row_blocks) * block_rows
        i_end = min(i_begin + block_rows, m)
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = batch // arg(args, B1)
        b1 = batch - b0 * arg(args, B1)
        a = arg(args, A) + 4 * (b0 * arg(args, A_B0) + b1 * arg(args, A_B1))
        b = off(ptr_f32(arg(args, B)), b0 * arg(args, B_B0) + b1 * arg(args, B_B1))
        for p in range(p_begin, p_end):
            i = i_begin
            while i < i_end:
                for r in range(MR):
                    st_scratch(addresses, r, a + 4 * min(i + r, m - 1) * arg(args, A_ROW))
                height = tile_height(MR, i_end - i)
                product_tile(MR, NR, VW, height, addresses, off(b, p * k * NR), tile, k, 1, True)
                rows = min(height, i_end - i)
                store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, tile)
                i += rows
