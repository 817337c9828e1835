"""Convolution, channels last, float32: an implicit matrix product by indirection (as XNNPACK's IGEMM).

y[image, group, pixel, j] = sum over (tap, c) of x[image, position(pixel, tap), group * C + c] * w[group, tap, c, j].
Rows of the left operand are never copied to a matrix: per output pixel and tap a table holds the address of C input
channels, or of a row of zeros where the tap lies in the padding. Up to three spatial axes (D, H, W; unused ones are 1).

MERGED: a run of KW * C input values is one row when W is contiguous and undilated, which gives few channels a long inner
loop. Runs that reach into the padding are then copied, with their zeros, to scratch.
One unit is a block of row tiles of one image times a block of panels of one group.
"""

import numpy as np

from minicc.kernels.cpu.intrinsics import (
    address,
    arg,
    helper,
    ld,
    ld_scratch,
    off,
    ptr_f32,
    st,
    st_scratch,
    stack_f32,
    stack_i64,
)
from minicc.kernels.cpu.tiles import product_tile, tile_height

# Constants: tile of MR rows by NR columns, vector width, MR * NR; entries of the address table, floats of scratch.
MR = 6
NR = 16
VW = 8
TILE = 96
TABLE = 4096
SCRATCH = 8192

# Words. X_* are strides in elements; I*, O*, K*, S*, D*, P* are input and output extents, kernel extents, strides,
# dilations and leading pads of the axes.
X = 0
W = 1
IMAGES = 2
GROUPS = 3
M = 4  # output pixels of an image
N = 5  # output channels of a group
C = 6  # input channels of a group
X_IMAGE = 7
X_D = 8
X_H = 9
X_W = 10
ID = 11
IH = 12
IW = 13
OD = 14
OH = 15
OW = 16
KD = 17
KH = 18
KW = 19
SD = 20
SH = 21
SW = 22
DD = 23
DH = 24
DW = 25
PD = 26
PH = 27
PW = 28
MERGED = 29
ROW_TILES = 30  # row tiles per unit
PANELS = 31  # panels per unit
TAP_BLOCK = 32  # taps whose addresses are in the table at once
EPILOGUE = 33


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    pixel = (b0 * arg(args, M) + i) * arg(args, GROUPS) + b1
    st(ptr_f32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


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


@helper
def fill_addresses(args, x, zeros, i, table, first, count):
    """The addresses of taps first .. first + count of the MR pixels from i on; pixels past the end repeat the last."""
    ow = i % arg(args, OW)
    rest = i // arg(args, OW)
    oh = rest % arg(args, OH)
    od = rest // arg(args, OH)
    last = arg(args, M) - 1
    area = arg(args, KH) * arg(args, KW)
    for r in range(MR):
        d0 = od * arg(args, SD) - arg(args, PD)
        h0 = oh * arg(args, SH) - arg(args, PH)
        w0 = ow * arg(args, SW) - arg(args, PW)
        kd = first // area
        kh = (first - kd * area) // arg(args, KW)
        kw = first - kd * area - kh * arg(args, KW)
        for t in range(count):
            d = d0 + kd * arg(args, DD)
            h = h0 + kh * arg(args, DH)
            w = w0 + kw * arg(args, DW)
            inside = (
                (np.uint64(d) < np.uint64(arg(args, ID)))
                & (np.uint64(h) < np.uint64(arg(args, IH)))
                & (np.uint64(w) < np.uint64(arg(args, IW)))
            )
            at = x + 4 * (d * arg(args, X_D) + h * arg(args, X_H) + w * arg(args, X_W))
            st_scratch(table, t * MR + r, at if inside else zeros)
            kw += 1
            if kw == arg(args, KW):
                kw = 0
                kh += 1
                if kh == arg(args, KH):
                    kh = 0
                    kd += 1
        if i + r < last:
            ow += 1
            if ow == arg(args, OW):
                ow = 0
                oh += 1
                if oh == arg(args, OH):
                    oh = 0
                    od += 1


@helper
def fill_runs(args, x, zeros, i, table, scratch):
    """As fill_addresses for whole runs of (kw, c); runs cut by the padding are assembled in scratch."""
    ow = i % arg(args, OW)
    rest = i // arg(args, OW)
    oh = rest % arg(args, OH)
    od = rest // arg(args, OH)
    last = arg(args, M) - 1
    run = arg(args, KW) * arg(args, C)
    for r in range(MR):
        w = ow * arg(args, SW) - arg(args, PW)
        # The part of the run inside the input, in elements.
        start = min(max(-w, 0), arg(args, KW)) * arg(args, C)
        stop = max(min(arg(args, IW) - w, arg(args, KW)), 0) * arg(args, C)
        t = 0
        for kd in range(arg(args, KD)):
            d = od * arg(args, SD) - arg(args, PD) + kd * arg(args, DD)
            for kh in range(arg(args, KH)):
                h = oh * arg(args, SH) - arg(args, PH) + kh * arg(args, DH)
                inside = (np.uint64(d) < np.uint64(arg(args, ID))) & (np.uint64(h) < np.uint64(arg(args, IH)))
                at = zeros
                if inside & (start < stop):
                    at = x + 4 * (d * arg(args, X_D) + h * arg(args, X_H) + w * arg(args, X_W))
                    if stop - start < run:
                        source = ptr_f32(at)
                        copy = off(scratch, (t * MR + r) * run)
                        for k in range(start):
                            st_scratch(copy, k, np.float32(0))
                        for k in range(start, stop):
                            st_scratch(copy, k, ld(source, k))
                        for k in range(stop, run):
                            st_scratch(copy, k, np.float32(0))
                        at = address(copy)
                st_scratch(table, t * MR + r, at)
                t += 1
        if i + r < last:
            ow += 1
            if ow == arg(args, OW):
                ow = 0
                oh += 1
                if oh == arg(args, OH):
                    oh = 0
                    od += 1


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    c = arg(args, C)
    merged = arg(args, MERGED)
    all_taps = arg(args, KD) * arg(args, KH) * arg(args, KW)
    # Rows of the left operand: `taps` of `depth` values.
    taps = arg(args, KD) * arg(args, KH) if merged else all_taps
    depth = arg(args, KW) * c if merged else c
    tap_block = arg(args, TAP_BLOCK)
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    panel_size = all_taps * c * NR
    zeros = arg(args, W) + 4 * arg(args, GROUPS) * panels * panel_size  # packing ends in a row of zeros
    table = stack_i64(TABLE)
    scratch = stack_f32(SCRATCH)
    tile = stack_f32(TILE)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i_begin = (unit - rest * row_blocks) * block_rows
        i_end = min(i_begin + block_rows, m)
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = batch // arg(args, GROUPS)
        b1 = batch - b0 * arg(args, GROUPS)
        x = arg(args, X) + 4 * (b0 * arg(args, X_IMAGE) + b1 * c)
        weights = off(ptr_f32(arg(args, W)), b1 * panels * panel_size)
        if tap_block == taps:
            for i in range(i_begin, i_end, MR):
                at = (i - i_begin) * taps
                if merged:
                    fill_runs(args, x, zeros, i, off(table, at), off(scratch, at * depth))
                else:
                    fill_addresses(args, x, zeros, i, off(table, at), 0, taps)
        for p in range(p_begin, p_end):
            panel = off(weights, p * panel_size)
            i = i_begin
            while i < i_end:
                # Tiles of the last rows may be lower than MR, but the table has MR pixels for each MR rows.
                q = (i - i_begin) // MR * MR
                height = tile_height(MR, i_end - i)
                rows = min(height, i_end - i)
                if tap_block == taps:
                    inner = i - i_begin - q
                    product_tile(
                        MR, NR, VW, height, off(table, q * taps + inner), panel, tile, depth, taps, 1
                    )
                else:
                    first = 0
                    while first < taps:
                        count = min(tap_block, taps - first)
                        fill_addresses(args, x, zeros, i, table, first, count)
                        part = off(panel, first * c * NR)
                        product_tile(MR, NR, VW, height, table, part, tile, c, count, 1 - min(first, 1))
                        first += count
                store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, tile)
                i += rows
