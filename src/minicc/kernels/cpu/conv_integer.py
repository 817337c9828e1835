"""Convolution of 8-bit integers with exact 32-bit sums, channels last; a matrix product has one tap.

acc[image, group, pixel, j] = sum over (tap, c) of (x - zero point of x) * (w - zero point of w), modulo
2**32. Rows of the left operand are widened to int16 per row tile, with the zero point taken off, padding as
0 and channels rounded up to an even number; the weights were packed so before. Pairs of int16 products then
sum to int32 in one instruction. One unit is a block of row tiles of one image times a block of panels of one
group.
"""

import numpy as np

from minicc.kernels.cpu.intrinsics import (
    address,
    arg,
    helper,
    ld,
    ld_scratch,
    off,
    ptr_i8,  # noqa: F401  (one of the values of POINTER)
    ptr_i16,
    ptr_i32,
    ptr_u8,
    st,
    stack_i32,
    stack_i64,
    stack_u8,
)
from minicc.kernels.cpu.tiles import integer_tile, tile_height, widen
from minicc.kernels.cpu.windows import GROUPS, KD, KH, KW, X_IMAGE, C, M, N, W, X, fill_table

# Constants: tile of MR rows by NR columns, vector width, MR * NR; type of x: ptr_u8 or ptr_i8. Then entries
# of the address table, taps in it at once, int16 values of a widened row and bytes of all MR of them.
MR = 6
NR = 16
VW = 8
TILE = 96
POINTER = ptr_u8
TABLE = 4096
TAPS = 512
DEPTH = 4096
WIDENED = 65536

# Words, after those of windows. W is packed int16.
X_ZERO = 29  # address of the zero point of x (its type), or 0
ROW_TILES = 30  # row tiles per unit
PANELS = 31  # panels per unit
EPILOGUE = 32


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores int32 to dense channels-last memory."""
    pixel = (b0 * arg(args, M) + i) * arg(args, GROUPS) + b1
    st(ptr_i32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


@helper
def store_tile(args, b0, b1, i0, j0, rows, columns, tile):
    """The epilogue for the first `rows` x `columns` elements of a tile."""
    for r in range(rows):
        if columns >= NR:
            for j in range(NR):
                epilogue(args, b0, b1, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))
        else:
            for j in range(columns):
                epilogue(args, b0, b1, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    c = arg(args, C)
    groups = arg(args, GROUPS)
    taps = arg(args, KD) * arg(args, KH) * arg(args, KW)
    even = (c + 1) // 2 * 2
    # One pass over all taps and channels when they fit; else several, and then a unit has one panel.
    tap_step = max(min(min(DEPTH // max(even, 1), TAPS), taps), 1)
    c_step = min(c, DEPTH)
    row_size = tap_step * ((c_step + 1) // 2 * 2)
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    panel_size = taps * even * NR
    zero = np.int16(0)
    if arg(args, X_ZERO) != 0:
        zero = np.int16(ld(POINTER(arg(args, X_ZERO)), 0))
    table = stack_i64(TABLE)
    widened = ptr_i16(address(stack_u8(WIDENED)))
    tile = stack_i32(TILE)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i_begin = (unit - rest * row_blocks) * block_rows
        i_end = min(i_begin + block_rows, m)
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = batch // groups
        b1 = batch - b0 * groups
        x = arg(args, X) + b0 * arg(args, X_IMAGE) + b1 * c
        weights = off(ptr_i16(arg(args, W)), b1 * panels * panel_size)
        for i in range(i_begin, i_end, MR):
            rows = min(i_end - i, MR)
            first = 0
            while first < taps:
                count = min(tap_step, taps - first)
                fill_table(args, x, 1, 0, MR, i, i + rows, arg(args, KW), first, count, table)
                c_begin = 0
                while c_begin < c:
                    c_end = min(c_begin + c_step, c)
                    widen(MR, table, POINTER(c_begin), count, c_end - c_begin, zero, row_size, widened)
                    fresh = (first == 0) & (c_begin == 0)
                    last = (first + count == taps) & (c_end == c)
                    depth = count * ((c_end - c_begin + 1) // 2 * 2)
                    for p in range(p_begin, p_end):
                        panel = off(weights, p * panel_size + (first * even + c_begin) * NR)
                        row = 0
                        while row < rows:
                            height = tile_height(MR, rows - row)
                            part = off(tile, row * NR)
                            source = off(widened, row * row_size)
                            integer_tile(MR, NR, VW, height, source, row_size, panel, part, depth // 2, fresh)
                            row += height
                        if last:
                            store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, tile)
                    c_begin = c_end
                first += count
