"""Convolution of 8-bit integers with exact 32-bit sums, channels last; a matrix product has one tap.

acc[image, group, pixel, j] = sum over (tap, c) of (x - zero point of x) * (w - zero point of w), modulo
2**32. Rows of the left operand are gathered for a row tile, taps behind each other, as words of two int16 or four bytes, in
which the weights are packed too (integer_tiles.py). One unit is a block of row tiles of one image times a block of panels of one
group.
"""

import numpy as np

from minicc.kernels.cpu.integer_tiles import gather_words, integer_tile
from minicc.kernels.cpu.intrinsics import (
    address,
    arg,
    helper,
    ld,
    ld_scratch,
    off,
    ptr_i8,  # noqa: F401  (one of the values of POINTER)
    ptr_i32,
    ptr_u8,
    st,
    st_scratch,
    stack_i32,
    stack_i64,
    stack_u8,
)
from minicc.kernels.cpu.tiles import tile_height
from minicc.kernels.cpu.windows import (
    GROUPS,
    ID,
    IH,
    IW,
    KD,
    KH,
    KW,
    OD,
    OH,
    OW,
    PD,
    PH,
    PW,
    SD,
    SH,
    SW,
    X_D,
    X_H,
    X_IMAGE,
    X_W,
    C,
    M,
    N,
    W,
    X,
    fill_table,
)

# Constants: tile of MR rows by NR columns, vector width, MR * NR; type of x: ptr_u8 or ptr_i8.
MR = 6
NR = 16
VW = 8
TILE = 96
POINTER = ptr_u8
# Numbers of a word, 2 or 4; what makes x's zero point one of unsigned bytes; 1 when bytes of weights have zero points; 1 when
# the KW pixels of a line are one tap.
NUMBERS = 2
OFFSET = 0
SUMMED = 0
MERGED = 0
# Entries of the address table, and twice MR; taps in it at once; words of a gathered row, and bytes of all MR of them and behind.
TABLE = 4096
BOUNDS = 64
TAPS = 512
WORDS = 2048
GATHERED = 65600

# Words, after those of windows. W is packed words.
X_ZERO = 29  # address of the zero point of x (its type), or 0
TOTALS = 30  # address of int32 [group][panel][1 + SUMMED][NR]: sums of the weights, then zero points; or 0
ROW_TILES = 31  # row tiles per unit
PANELS = 32  # panels per unit
EPILOGUE = 33


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


@helper
def follow_each_other(args):
    """Whether the input pixels under single taps of all output pixels lie in one line, X_W apart."""
    dense = (arg(args, SD) == 1) & (arg(args, SH) == 1) & (arg(args, SW) == 1)
    start = (arg(args, PD) == 0) & (arg(args, PH) == 0) & (arg(args, PW) == 0)
    same = (arg(args, OD) == arg(args, ID)) & (arg(args, OH) == arg(args, IH)) & (arg(args, OW) == arg(args, IW))
    lines = (arg(args, OH) == 1) | (arg(args, X_H) == arg(args, OW) * arg(args, X_W))
    planes = (arg(args, OD) == 1) | (arg(args, X_D) == arg(args, OH) * arg(args, X_H))
    return dense & start & same & lines & planes


@helper
def fill_line(x, step, i, last, table):
    """The addresses of MR pixels that lie `step` apart, of the last one again behind it; `fill_table` is for any window."""
    for r in range(MR):
        st_scratch(table, r, x + min(i + r, last) * step)


@helper
def fill_bounds(args, run, i, last, bounds):
    """Which of a row's `run` channels do not lie in the padding beside a line: bounds [2][MR]; rows behind repeat `last`."""
    for r in range(MR):
        first = 0
        end = run
        if MERGED:
            place = min(i + r, last) % arg(args, OW) * arg(args, SW) - arg(args, PW)
            first = min(max(-place, 0), arg(args, KW)) * arg(args, C)
            end = max(min(arg(args, IW) - place, arg(args, KW)) * arg(args, C), first)
        st_scratch(bounds, r, first)
        st_scratch(bounds, MR + r, end)


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    c = arg(args, C)
    groups = arg(args, GROUPS)
    columns = 1 if MERGED else arg(args, KW)
    run = c * arg(args, KW) if MERGED else c
    taps = arg(args, KD) * arg(args, KH) * columns
    tap_words = (run + NUMBERS - 1) // NUMBERS
    # One pass over all taps and channels when they fit; else several, and then a unit has one panel.
    tap_step = max(min(min(WORDS // max(tap_words, 1), TAPS), taps), 1)
    run_step = min(run, WORDS * NUMBERS)
    row_words = tap_step * ((run_step + NUMBERS - 1) // NUMBERS)
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    panel_words = taps * tap_words * NR
    line = (taps == 1) & (MERGED == 0) & follow_each_other(args)
    zero = np.int32(OFFSET)
    if arg(args, X_ZERO) != 0:
        zero += np.int32(ld(POINTER(arg(args, X_ZERO)), 0))
    table = stack_i64(TABLE)
    bounds = stack_i64(BOUNDS)
    gathered = ptr_i32(address(stack_u8(GATHERED)))
    shifts = stack_i32(BOUNDS)
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
        weights = off(ptr_i32(arg(args, W)), b1 * panels * panel_words)
        totals = off(ptr_i32(arg(args, TOTALS)), b1 * panels * (1 + SUMMED) * NR)
        for i in range(i_begin, i_end, MR):
            rows = min(i_end - i, MR)
            first = 0
            while first < taps:
                count = min(tap_step, taps - first)
                if line:
                    fill_line(x, arg(args, X_W), i, i + rows - 1, table)
                else:
                    fill_table(args, x, 1, 0, MR, i, i + rows, columns, first, count, table)
                c_begin = 0
                while c_begin < run:
                    c_end = min(c_begin + run_step, run)
                    fill_bounds(args, c_end - c_begin, i, i + rows - 1, bounds)
                    gather_words(
                        MR, VW, NUMBERS, SUMMED, table, bounds, POINTER(c_begin), count, c_end - c_begin, zero, row_words,
                        gathered, shifts,
                    )  # fmt: skip
                    fresh = (first == 0) & (c_begin == 0)
                    last = (first + count == taps) & (c_end == run)
                    words = count * ((c_end - c_begin + NUMBERS - 1) // NUMBERS)
                    for p in range(p_begin, p_end):
                        panel = off(weights, p * panel_words + (first * tap_words + c_begin // NUMBERS) * NR)
                        row = 0
                        while row < rows:
                            height = tile_height(MR, rows - row)
                            integer_tile(
                                MR, NR, VW, NUMBERS, SUMMED, height, off(gathered, row * row_words), row_words, panel,
                                off(tile, row * NR), words, fresh, zero, off(totals, p * (1 + SUMMED) * NR), off(shifts, row),
                            )  # fmt: skip
                            row += height
                        if last:
                            store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, tile)
                    c_begin = c_end
                first += count
