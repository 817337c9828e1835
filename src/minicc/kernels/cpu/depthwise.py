"""Depthwise convolution, channels last, float32: every channel has its own window of weights.

y[image, pixel, c] = sum over taps of x[image, position(pixel, tap), c] * w[tap, c], vectors over channels,
MR pixels at a time (of one line of output) so that weights stay in registers. One unit is a block of pixels
of one image times a block of channel panels.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

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
from minicc.kernels.cpu.tiles import depthwise_tile
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
    X_D,
    X_H,
    X_IMAGE,
    X_W,
    M,
    N,
    W,
    X,
)  # fmt: skip

# Constants: tile of MR pixels by NR channels, vector width, MR * NR. Then how many taps are placed at once,
# and twice that.
MR = 6
NR = 16
VW = 8
TILE = 96
TAPS = 512
TAPS_AT = 1024

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


@helper
def place_taps(args, first, count, taps_at):
    """Byte offset and position along W of taps first .. first + count of one (KH, KW) window."""
    kw = arg(args, KW)
    h = first // kw
    w = first - h * kw
    for t in range(count):
        st_scratch(
            taps_at, 2 * t, 4 * (h * arg(args, DH) * arg(args, X_H) + w * arg(args, DW) * arg(args, X_W))
        )
        st_scratch(taps_at, 2 * t + 1, w * arg(args, DW))
        w += 1
        if w == kw:
            w = 0
            h += 1


@helper
def first_inside(start, dilation):
    """The first tap at or behind position 0."""
    return max((dilation - 1 - start) // dilation, 0)


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    kd = arg(args, KD)
    kh = arg(args, KH)
    kw = arg(args, KW)
    dd = arg(args, DD)
    dh = arg(args, DH)
    ow = arg(args, OW)
    sw = arg(args, SW)
    iw = arg(args, IW)
    x_w = arg(args, X_W)
    area = kh * kw
    taps = kd * area
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    w = ptr_f32(arg(args, W))
    zeros = arg(args, W) + 4 * panels * taps * NR  # packing ends in a row of zeros
    reach = (MR - 1) * sw + (kw - 1) * arg(args, DW)  # from the first to the last position of a tile
    taps_at = stack_i64(TAPS_AT)
    tile = stack_f32(TILE)
    if area <= TAPS:
        place_taps(args, 0, area, taps_at)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i = (unit - rest * row_blocks) * block_rows
        i_end = min(i + block_rows, m)
        b0 = rest // panel_blocks
        p_begin = (rest - b0 * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        x = arg(args, X) + 4 * b0 * arg(args, X_IMAGE)
        while i < i_end:
            line = i // ow
            plane = line // arg(args, OH)
            d0 = plane * arg(args, SD) - arg(args, PD)
            h0 = (line - plane * arg(args, OH)) * arg(args, SH) - arg(args, PH)
            # Planes and lines of taps inside the input.
            d_low = first_inside(d0, dd)
            d_high = min(first_inside(d0 - arg(args, ID), dd), kd)
            low = min(first_inside(h0, dh), kh) * kw
            high = min(first_inside(h0 - arg(args, IH), dh), kh) * kw
            line_end = min((line + 1) * ow, i_end)
            w0 = (i - line * ow) * sw - arg(args, PW)
            while i < line_end:
                rows = min(line_end - i, MR)
                inside = 1 if (w0 >= 0) & (w0 + reach < iw) else 0
                at = x + 4 * (h0 * arg(args, X_H) + w0 * x_w)
                for p in range(p_begin, p_end):
                    left = n - p * NR
                    fresh = True
                    for d in range(d_low, max(d_high, d_low + 1)):
                        # One pass over the taps of a plane; several when there are more than taps_at holds.
                        first = 0
                        while first < area:
                            count = min(area - first, TAPS)
                            if area > TAPS:
                                place_taps(args, first, count, taps_at)
                            begin_tap = max(low, first)
                            end_tap = min(high, first + count) if d < d_high else 0
                            start = at + 4 * ((d0 + d * dd) * arg(args, X_D) + p * NR)
                            facts = (start, 4 * sw * x_w, w0, sw, iw, zeros + 4 * p * NR, inside)
                            places = off(taps_at, 2 * (begin_tap - first))
                            weights = off(w, (p * taps + d * area + begin_tap) * NR)
                            depthwise_tile(
                                MR, NR, VW, facts, places, left, weights, tile, end_tap - begin_tap, fresh
                            )
                            fresh = False
                            first += count
                    store_tile(args, b0, i, p * NR, rows, left, tile)
                i += MR
                w0 += MR * sw
            i = line_end
