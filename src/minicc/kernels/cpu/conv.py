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

# Constants: tile of MR rows by NR columns, vector width, MR * NR. Then the sizes of stack arrays: entries of the
# address table, floats of scratch, taps in the table at once and 3 * TAPS.
MR = 6
NR = 16
VW = 8
TILE = 96
TABLE = 4096
SCRATCH = 8192
TAPS = 512
PLACES = 1536
NO_BOUND = 1 << 40

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
EPILOGUE = 32


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
def place_taps(args, columns, first, count, places):
    """Positions of taps first .. first + count relative to tap 0: places [TAPS][3] along D, H and W."""
    area = arg(args, KH) * columns
    d = first // area
    h = (first - d * area) // columns
    w = first - d * area - h * columns
    for t in range(count):
        st_scratch(places, 3 * t, d * arg(args, DD))
        st_scratch(places, 3 * t + 1, h * arg(args, DH))
        st_scratch(places, 3 * t + 2, w * arg(args, DW))
        w += 1
        if w == columns:
            w = 0
            h += 1
            if h == arg(args, KH):
                h = 0
                d += 1


@helper
def assemble_runs(entries, count, w0, kw, iw, c, zeros, scratch):
    """Replace a pixel's runs, which begin at position w0, by copies with zeros where they leave the row."""
    for t in range(count):
        at = ld_scratch(entries, t * MR)
        if at != zeros:
            row = ptr_f32(at)
            copy = off(scratch, t * MR * kw * c)
            for w in range(kw):
                inside = (w0 + w >= 0) & (w0 + w < iw)
                for k in range(w * c, w * c + c):
                    st_scratch(copy, k, ld(row, k) if inside else np.float32(0))
            st_scratch(entries, t * MR, address(copy))


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    c = arg(args, C)
    kw = arg(args, KW)
    ow = arg(args, OW)
    oh = arg(args, OH)
    id_ = arg(args, ID)
    ih = arg(args, IH)
    iw = arg(args, IW)
    x_d = arg(args, X_D)
    x_h = arg(args, X_H)
    x_w = arg(args, X_W)
    # Rows of the left operand: `taps` of `depth` values. A run has one place along W, checked afterwards.
    merged = arg(args, MERGED)
    columns = 1 if merged else kw
    depth = kw * c if merged else c
    w_bound = NO_BOUND if merged else iw
    w_shift = NO_BOUND // 2 if merged else 0
    taps = arg(args, KD) * arg(args, KH) * columns
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    panel_size = taps * depth * NR
    zeros = arg(args, W) + 4 * arg(args, GROUPS) * panels * panel_size  # packing ends in a row of zeros
    table = stack_i64(TABLE)
    places = stack_i64(PLACES)
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
        first = 0
        # One pass; several when there are more taps than the table holds, and then a unit is a single tile.
        while first < taps:
            count = min(taps - first, TAPS)
            place_taps(args, columns, first, count, places)
            # Entry (row tile, tap, row of tile); a last tile repeats its last pixel.
            for inner in range((i_end - i_begin + MR - 1) // MR * MR):
                i = min(i_begin + inner, i_end - 1)
                q = inner // MR
                entries = off(table, q * MR * count + inner - q * MR)
                o = i // ow
                d0 = o // oh * arg(args, SD) - arg(args, PD)
                h0 = o % oh * arg(args, SH) - arg(args, PH)
                w0 = (i - o * ow) * arg(args, SW) - arg(args, PW)
                for t in range(count):
                    d = d0 + ld_scratch(places, 3 * t)
                    h = h0 + ld_scratch(places, 3 * t + 1)
                    w = w0 + ld_scratch(places, 3 * t + 2)
                    # Unsigned, so that negative positions are too large.
                    inside = (
                        (np.uint64(d) < np.uint64(id_))
                        & (np.uint64(h) < np.uint64(ih))
                        & (np.uint64(w + w_shift) < np.uint64(w_bound))
                    )
                    at = x + 4 * (d * x_d + h * x_h + w * x_w)
                    st_scratch(entries, t * MR, at if inside else zeros)
                if merged and (w0 < 0 or w0 + kw > iw):
                    copies = off(scratch, (q * MR * count + inner - q * MR) * depth)
                    assemble_runs(entries, count, w0, kw, iw, c, zeros, copies)
            for p in range(p_begin, p_end):
                panel = off(weights, p * panel_size + first * depth * NR)
                i = i_begin
                while i < i_end:
                    inner = i - i_begin
                    q = inner // MR
                    row = inner - q * MR
                    height = tile_height(MR, i_end - i)
                    rows = min(height, i_end - i)
                    entries = off(table, q * MR * count + row)
                    part = off(tile, row * NR)
                    product_tile(MR, NR, VW, height, entries, panel, part, depth, count, first == 0)
                    if first + count == taps:
                        store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, part)
                    i += rows
            first += count
