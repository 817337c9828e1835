"""Transposed convolution, channels last, float32: one ordinary convolution per phase of the strides.

Output positions that are equal modulo the stride see the same taps, at steps of one input pixel. Such a
phase is a stride-1 convolution with few taps, computed as an implicit matrix product (see conv). Weights are
packed phase by phase, so that the taps of one are neighbours. One unit is a block of row tiles of one phase
of one image times a block of panels of one group; phases with fewer pixels than the first leave some units
empty.
"""

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
from minicc.kernels.cpu.tiles import product_tile, tile_height
from minicc.kernels.cpu.windows import (
    DD,
    DH,
    DW,
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
)  # fmt: skip

# Constants: tile of MR rows by NR columns, vector width, MR * NR. Then the entries of the address table and
# the taps in it at once.
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
    pixel = (b0 * arg(args, M) + i) * arg(args, GROUPS) + b1
    st(ptr_f32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


@helper
def axis_of_phase(phase, stride, dilation, pad, taps, outputs):
    """(taps, taps of earlier phases, input position of the first tap, its decrease per tap, outputs)."""
    count = 0
    earlier = 0
    start = 0
    step = 0
    for k in range(taps):
        p = (k * dilation - pad) % stride
        if p < phase:
            earlier += 1
        if p == phase:
            position = (phase + pad - k * dilation) // stride
            if count == 0:
                start = position
            if count == 1:
                step = start - position
            count += 1
    return count, earlier, start, step, (outputs - phase + stride - 1) // stride


@helper
def store_tile(args, b0, b1, places, j0, rows, columns, tile):
    """The epilogue for the first `rows` x `columns` elements of a tile; places: output pixel of each row."""
    for r in range(rows):
        i = ld_scratch(places, r)
        if columns >= NR:
            for j in range(NR):
                epilogue(args, b0, b1, i, j0 + j, ld_scratch(tile, r * NR + j))
        else:
            for j in range(columns):
                epilogue(args, b0, b1, i, j0 + j, ld_scratch(tile, r * NR + j))


def kernel(args, begin, end):
    n = arg(args, N)
    c = arg(args, C)
    groups = arg(args, GROUPS)
    sd = arg(args, SD)
    sh = arg(args, SH)
    sw = arg(args, SW)
    oh = arg(args, OH)
    ow = arg(args, OW)
    all_taps = arg(args, KD) * arg(args, KH) * arg(args, KW)
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    most_rows = ((arg(args, OD) + sd - 1) // sd) * ((oh + sh - 1) // sh) * ((ow + sw - 1) // sw)
    row_blocks = (most_rows + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    panel_size = all_taps * c * NR
    zeros = arg(args, W) + 4 * groups * panels * panel_size  # packing ends in a row of zeros
    table = stack_i64(TABLE)
    places = stack_i64(TABLE)
    tile = stack_f32(TILE)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i_begin = (unit - rest * row_blocks) * block_rows
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        image = batch // (sd * sh * sw)
        phase = batch - image * (sd * sh * sw)
        phase_d = phase // (sh * sw)
        phase_h = phase // sw % sh
        phase_w = phase % sw
        b0 = image // groups
        b1 = image - b0 * groups
        taps_d, before_d, start_d, step_d, rows_d = axis_of_phase(
            phase_d, sd, arg(args, DD), arg(args, PD), arg(args, KD), arg(args, OD)
        )
        taps_h, before_h, start_h, step_h, rows_h = axis_of_phase(
            phase_h, sh, arg(args, DH), arg(args, PH), arg(args, KH), oh
        )
        taps_w, before_w, start_w, step_w, rows_w = axis_of_phase(
            phase_w, sw, arg(args, DW), arg(args, PW), arg(args, KW), ow
        )
        taps = taps_d * taps_h * taps_w
        before = (before_d * arg(args, KH) + taps_d * before_h) * arg(args, KW) + taps_d * taps_h * before_w
        i_end = min(i_begin + block_rows, rows_d * rows_h * rows_w)
        x = arg(args, X) + 4 * (b0 * arg(args, X_IMAGE) + b1 * c)
        weights = off(ptr_f32(arg(args, W)), b1 * panels * panel_size + before * c * NR)
        first = 0
        passes = max((taps + TAPS - 1) // TAPS, 1) if i_begin < i_end else 0
        for _ in range(passes):
            count = min(taps - first, TAPS)
            # Entry (row tile, tap, row of tile); a last tile repeats its last pixel.
            for inner in range((i_end - i_begin + MR - 1) // MR * MR):
                i = min(i_begin + inner, i_end - 1)
                line = i // rows_w
                at_w = i - line * rows_w
                at_d = line // rows_h
                at_h = line - at_d * rows_h
                q = inner // MR
                entries = off(table, q * MR * count + inner - q * MR)
                pixel = ((at_d * sd + phase_d) * oh + at_h * sh + phase_h) * ow + at_w * sw + phase_w
                st_scratch(places, inner, pixel)
                for t in range(count):
                    tap = first + t
                    line_t = tap // taps_w
                    plane_t = line_t // taps_h
                    d = at_d + start_d - plane_t * step_d
                    h = at_h + start_h - (line_t - plane_t * taps_h) * step_h
                    w = at_w + start_w - (tap - line_t * taps_w) * step_w
                    # Unsigned, so that negative positions are too large.
                    inside = (
                        (np.uint64(d) < np.uint64(arg(args, ID)))
                        & (np.uint64(h) < np.uint64(arg(args, IH)))
                        & (np.uint64(w) < np.uint64(arg(args, IW)))
                    )
                    address = x + 4 * (d * arg(args, X_D) + h * arg(args, X_H) + w * arg(args, X_W))
                    st_scratch(entries, t * MR, address if inside else zeros)
            for p in range(p_begin, p_end):
                panel = off(weights, p * panel_size + first * c * NR)
                i = i_begin
                while i < i_end:
                    row = (i - i_begin) % MR  # not 0 only in the low tiles of the last rows
                    height = tile_height(MR, i_end - i)
                    rows = min(height, i_end - i)
                    entries = off(table, (i - i_begin - row) * count + row)
                    part = off(tile, row * NR)
                    product_tile(MR, NR, VW, height, entries, panel, part, c, count, first == 0)
                    if first + count == taps:
                        store_tile(args, b0, b1, off(places, i - i_begin), p * NR, rows, n - p * NR, part)
                    i += rows
            first += count
