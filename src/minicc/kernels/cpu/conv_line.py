"""Convolution of narrow groups along lines, channels last, float32: depthwise, or with as many input as output channels
in a group, a part of a vector. Up to two spatial axes, the taps of a line and their distance known when it is compiled.

y[image, h, w, c] = sum over taps (kh, kw) and g < GROUP of
                    x[image, h * SH + kh * DH - PH, w * STEP + kw * APART - PW, c - c % GROUP + g] * weights[kh, g, kw, c],
vectors over channels, PIXELS neighbours of a line at a time. One unit is some lines of output of an image times a
block of channel panels.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

from minicc.kernels.cpu.depthwise import first_inside
from minicc.kernels.cpu.intrinsics import arg, helper, ld_scratch, off, ptr_f32, st, stack_f32
from minicc.kernels.cpu.line_tiles import line_tile
from minicc.kernels.cpu.windows import DH, IH, IW, KH, OH, OW, PH, PW, SH, X_H, X_IMAGE, X_W, M, N, W, X

# Constants: tiles of NR channels, vector width; taps, positions between pixels and positions between taps along a line;
# channels of a group.
NR = 16
VW = 8
LINE_TAPS = 3
STEP = 1
APART = 1
GROUP = 1
# Pixels of a tile: with as many sums as this, the latency of a multiply-add is hidden, the sums, seven weights and an input
# fit 16 registers, and lines of 7, 14, 28, 56 and 112 pixels have no remainder. Remainders have a smaller tile.
PIXELS = 7
FEW = 4
# Room for a tile: PIXELS times the widest NR.
FLOATS = 224

# Words, after those of windows.
LINES = 29  # lines of output per unit
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
    n = arg(args, N)
    oh = arg(args, OH)
    ow = arg(args, OW)
    kh = arg(args, KH)
    dh = arg(args, DH)
    ih = arg(args, IH)
    iw = arg(args, IW)
    x_h = 4 * arg(args, X_H)
    x_w = 4 * arg(args, X_W)
    lines = arg(args, LINES)
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    panel_blocks = (panels + block_panels - 1) // block_panels
    line_blocks = (oh + lines - 1) // lines
    weights = ptr_f32(arg(args, W))
    zeros = arg(args, W) + 4 * panels * kh * GROUP * LINE_TAPS * NR  # packing ends in a row of zeros
    tile = stack_f32(FLOATS)
    for unit in range(begin, end):
        block = unit // panel_blocks
        p_begin = (unit - block * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = block // line_blocks
        line_begin = (block - b0 * line_blocks) * lines
        line_end = min(line_begin + lines, oh)
        image = arg(args, X) + 4 * b0 * arg(args, X_IMAGE)
        for line in range(line_begin, line_end):
            h0 = line * arg(args, SH) - arg(args, PH)
            low = min(first_inside(h0, dh), kh)
            count = max(min(first_inside(h0 - ih, dh), kh) - low, 0)
            pixel = 0
            while pixel < ow:
                rows = min(ow - pixel, PIXELS)
                size = PIXELS if rows > FEW else FEW
                w0 = pixel * STEP - arg(args, PW)
                inside = 1 if (w0 >= 0) & (w0 + (size - 1) * STEP + (LINE_TAPS - 1) * APART < iw) else 0
                at = image + (h0 + low * dh) * x_h + w0 * x_w
                for p in range(p_begin, p_end):
                    facts = (at + 4 * p * NR, x_w, dh * x_h, w0, iw, zeros + 4 * p * NR, inside)
                    under = off(weights, (p * kh + low) * GROUP * LINE_TAPS * NR)
                    left = n - p * NR
                    if size == PIXELS:
                        line_tile(PIXELS, NR, VW, LINE_TAPS, STEP, APART, GROUP, facts, left, under, tile, count)
                    else:
                        line_tile(FEW, NR, VW, LINE_TAPS, STEP, APART, GROUP, facts, left, under, tile, count)
                    store_tile(args, b0, line * ow + pixel, p * NR, rows, left, tile)
                pixel += rows
