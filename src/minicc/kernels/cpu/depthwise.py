"""Depthwise convolution, channels last, float32: every channel has its own window of weights.

y[image, pixel, c] = sum over taps of x[image, position(pixel, tap), c] * w[tap, c], vectors over channels, MR pixels at a
time so that weights stay in registers. One unit is a block of pixels of one image times a block of channel panels.
"""

from minicc.kernels.cpu.intrinsics import (
    arg,
    helper,
    ld_scratch,
    off,
    ptr_f32,
    st,
    stack_f32,
    stack_i64,
)
from minicc.kernels.cpu.tiles import weighted_window
from minicc.kernels.cpu.windows import KD, KH, KW, M, N, X_IMAGE, W, X, fill_table

# Constants: tile of MR pixels by NR channels, vector width, MR * NR. Then entries of the address table, and taps in
# the table at once.
MR = 6
NR = 16
VW = 8
TILE = 96
TABLE = 4096
TAPS = 512

# Words, after those of windows.
ROW_TILES = 29  # row tiles per unit
PANELS = 30  # panels per unit
EPILOGUE = 31


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    st(ptr_f32(arg(args, EPILOGUE)), (b0 * arg(args, M) + i) * arg(args, N) + j, acc)


@helper
def store_tile(args, b0, i0, j0, rows, columns, tile):
    """The epilogue for the first `rows` x `columns` elements of a tile."""
    if columns >= NR:
        for r in range(rows):
            for j in range(NR):
                epilogue(args, b0, 0, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))
    else:
        for r in range(rows):
            for j in range(columns):
                epilogue(args, b0, 0, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    taps = arg(args, KD) * arg(args, KH) * arg(args, KW)
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    zeros = arg(args, W) + 4 * panels * taps * NR  # packing ends in a row of zeros
    table = stack_i64(TABLE)
    tile = stack_f32(TILE)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i_begin = (unit - rest * row_blocks) * block_rows
        i_end = min(i_begin + block_rows, m)
        b0 = rest // panel_blocks
        p_begin = (rest - b0 * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        x = arg(args, X) + 4 * b0 * arg(args, X_IMAGE)
        first = 0
        # One pass; several when there are more taps than the table holds, and then a unit is a single tile.
        while first < taps:
            count = min(taps - first, TAPS)
            fill_table(args, x, zeros, MR, i_begin, i_end, arg(args, KW), first, count, table)
            for i in range(i_begin, i_end, MR):
                entries = off(table, (i - i_begin) * count)
                for p in range(p_begin, p_end):
                    weights = off(ptr_f32(arg(args, W)), (p * taps + first) * NR)
                    weighted_window(
                        MR, NR, VW, entries, p * NR, n - p * NR, weights, tile, count, first == 0
                    )
                    if first + count == taps:
                        store_tile(args, b0, i, p * NR, min(i_end - i, MR), n - p * NR, tile)
            first += count
