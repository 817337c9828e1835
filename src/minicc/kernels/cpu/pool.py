"""Max and average pooling, channels last, float32: vectors over channels, MR pixels at a time.

W is the address of N floats that stand for padding: minus infinity for max, zero for average. A NaN in the
window of a maximum comes out. The average divides by the number of taps inside the input, or inside the
padded input when COUNT_PAD is 1. One unit is a block of pixels of one image times a block of channel panels.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

import numpy as np

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
from minicc.kernels.cpu.tiles import max_tile, sum_tile
from minicc.kernels.cpu.windows import (
    DD,
    DH,
    DW,
    ID,
    IH,
    IW,
    KD,
    KH,
    KW,
    OH,
    OW,
    PD,
    PH,
    PW,
    SD,
    SH,
    SW,
    X_IMAGE,
    M,
    N,
    W,
    X,
    fill_table,
)  # fmt: skip

# Constants: tile of MR pixels by NR channels, vector width, MR * NR. Then entries of the address table, and
# taps in the table at once.
MR = 6
NR = 16
VW = 8
TILE = 96
TABLE = 4096
TAPS = 512
FACTORS = 4096  # pixels of a unit, at most TABLE
AVERAGE = 0

# Words, after those of windows.
E_D = 29  # pads after the last element (for COUNT_PAD)
E_H = 30
E_W = 31
COUNT_PAD = 32
ROW_TILES = 33  # row tiles per unit
PANELS = 34  # panels per unit
EPILOGUE = 35


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    st(ptr_f32(arg(args, EPILOGUE)), (b0 * arg(args, M) + i) * arg(args, N) + j, acc)


@helper
def taps_inside(position, stride, pad, taps, dilation, extent, end, count_pad):
    """How many taps of one axis are inside the input (or the padded input)."""
    start = position * stride - pad
    high = extent + end if count_pad else extent
    inside = 0
    for k in range(taps):
        place = start + k * dilation
        if (count_pad or place >= 0) and place < high:
            inside += 1
    return inside


@helper
def fill_factors(args, i_begin, i_end, factors):
    """1 / (number of taps that count) for some pixels."""
    count_pad = arg(args, COUNT_PAD) != 0
    for i in range(i_begin, i_end):
        line = i // arg(args, OW)
        d = taps_inside(
            line // arg(args, OH), arg(args, SD), arg(args, PD), arg(args, KD), arg(args, DD), arg(args, ID),
            arg(args, E_D), count_pad,
        )  # fmt: skip
        h = taps_inside(
            line % arg(args, OH), arg(args, SH), arg(args, PH), arg(args, KH), arg(args, DH), arg(args, IH),
            arg(args, E_H), count_pad,
        )  # fmt: skip
        w = taps_inside(
            i % arg(args, OW), arg(args, SW), arg(args, PW), arg(args, KW), arg(args, DW), arg(args, IW),
            arg(args, E_W), count_pad,
        )  # fmt: skip
        st_scratch(factors, i - i_begin, np.float32(1) / np.float32(max(d * h * w, 1)))


@helper
def finish(value, factor):
    """The reduced value as the result."""
    return value * factor if AVERAGE else value


@helper
def store_tile(args, b0, i0, j0, rows, columns, tile, factors):
    """The epilogue for the first `rows` x `columns` elements of a tile."""
    for r in range(rows):
        factor = ld_scratch(factors, r)
        if columns >= NR:
            for j in range(NR):
                epilogue(args, b0, 0, i0 + r, j0 + j, finish(ld_scratch(tile, r * NR + j), factor))
        else:
            for j in range(columns):
                epilogue(args, b0, 0, i0 + r, j0 + j, finish(ld_scratch(tile, r * NR + j), factor))


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    taps = arg(args, KD) * arg(args, KH) * arg(args, KW)
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    factors = stack_f32(FACTORS)
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
            fill_table(args, x, 4, arg(args, W), MR, i_begin, i_end, arg(args, KW), first, count, table)
            if AVERAGE:
                fill_factors(args, i_begin, i_end, factors)
            for i in range(i_begin, i_end, MR):
                entries = off(table, (i - i_begin) * count)
                for p in range(p_begin, p_end):
                    if AVERAGE:
                        sum_tile(MR, NR, VW, entries, p * NR, n - p * NR, tile, count, first == 0)
                    else:
                        max_tile(MR, NR, VW, entries, p * NR, n - p * NR, tile, count, first == 0)
                    if first + count == taps:
                        store_tile(
                            args,
                            b0,
                            i,
                            p * NR,
                            min(i_end - i, MR),
                            n - p * NR,
                            tile,
                            off(factors, i - i_begin),
                        )
            first += count
