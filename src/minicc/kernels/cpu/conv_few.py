"""Convolution of few input channels, float32: the first of a network. Up to two spatial axes, the channels and the taps of
a line known when it is compiled and not dilated. The image is read as it lies, channels last or in planes.

y[image, h, w, j] = sum over taps (kh, kw) and c < CHANNELS of
                    x[image, h * SH + kh * DH - PH, w * STEP + kw - PW, c] * weights[kh, kw, c, j],
PIXELS neighbours of a line by a panel of output channels at a time. One unit is some lines of output of an image times a
block of panels.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

from minicc.kernels.cpu.depthwise import first_inside
from minicc.kernels.cpu.intrinsics import arg, helper, ld_scratch, off, ptr_f32, st, stack_f32
from minicc.kernels.cpu.line_tiles import few_tile
from minicc.kernels.cpu.windows import DH, IH, IW, KH, OH, OW, PH, PW, SH, X_H, X_IMAGE, M, N, W, X

# Constants: tile of a product (MR x NR), vector width; taps and positions between pixels along a line;
# input channels; whether they are planes.
MR = 6
NR = 16
VW = 8
LINE_TAPS = 3
STEP = 1
CHANNELS = 3
PLANES = 0
# A tile has as many sums as a product's also where a panel is one vector.
PIXELS = MR * 2 if NR == VW else MR
FLOATS = PIXELS * NR

# Words, after those of windows.
X_C = 29  # from plane to plane
LINES = 30  # lines of output per unit
PANELS = 31  # panels per unit
EPILOGUE = 32


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
    x_w = 4 if PLANES else 4 * CHANNELS
    lines = arg(args, LINES)
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    panel_blocks = (panels + block_panels - 1) // block_panels
    line_blocks = (oh + lines - 1) // lines
    weights = ptr_f32(arg(args, W))
    zeros = arg(args, W) + 4 * panels * kh * LINE_TAPS * CHANNELS * NR  # packing ends in a row of zeros
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
                w0 = pixel * STEP - arg(args, PW)
                inside = 1 if (w0 >= 0) & (w0 + (PIXELS - 1) * STEP + LINE_TAPS <= iw) else 0
                at = image + (h0 + low * dh) * x_h + w0 * x_w
                facts = (at, dh * x_h, 4 * arg(args, X_C), w0, iw, zeros, inside)
                for p in range(p_begin, p_end):
                    under = off(weights, (p * kh + low) * LINE_TAPS * CHANNELS * NR)
                    few_tile(PIXELS, NR, VW, LINE_TAPS, STEP, CHANNELS, PLANES, facts, under, tile, count)
                    store_tile(args, b0, line * ow + pixel, p * NR, rows, n - p * NR, tile)
                pixel += rows
