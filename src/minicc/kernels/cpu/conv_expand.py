"""Depthwise convolution of what a 1x1 convolution makes of its input, channels last, float32: the two steps with which
mobile networks begin a block, without the array between them. Two spatial axes, the taps of a line known when it is compiled.

e[image, h, w, c] = activation(BIAS[c] + sum over k < C of x[image, h, w, k] * expansion[k, c])
y[image, h, w, c] = sum over taps (kh, kw) of e[image, h * SH + kh * DH - PH, w * STEP + kw * APART - PW, c] * weights[kh, kw, c]

One unit is some lines of output of an image for one panel of NR channels. They are computed in bands of a few lines; the
lines of e that a band needs are in scratch memory that stays in cache, and those it shares with the next band move there.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

import numpy as np

from minicc.kernels.cpu.depthwise import first_inside
from minicc.kernels.cpu.intrinsics import (
    address,
    arg,
    helper,
    ld_scratch,
    off,
    ptr_f32,
    st,
    st_scratch,
    stack_f32,
)
from minicc.kernels.cpu.line_tiles import line_tile
from minicc.kernels.cpu.tiles import expanded_rows
from minicc.kernels.cpu.vector_math import sigmoid_f32
from minicc.kernels.cpu.windows import DH, IH, IW, KH, OH, OW, PH, PW, SH, X_H, X_IMAGE, X_W, C, M, N, W, X, copy_floats

f32 = np.float32

# Constants: tile of MR rows by NR columns, vector width; taps, positions between pixels and positions between taps along a
# line; what is done to e: it is held between LOW and HIGH (hundredths, see `expanded_rows`), then ACTIVATION, one of
# those named here.
NONE = 0
HARD_SWISH = 1
SILU = 2
MR = 6
NR = 16
VW = 8
LINE_TAPS = 3
STEP = 1
APART = 1
ACTIVATION = 0
LOW = 0
HIGH = 600
# As in conv_line.py.
PIXELS = 7
FEW = 4
FLOATS = 224
BAND = 65536  # floats of e in scratch memory

# Words, after those of windows.
E = 29  # panels of the expansion
BIAS = 30  # its bias, as long as whole panels
LINES = 31  # lines of output per unit
BAND_LINES = 32  # lines of output per band
EPILOGUE = 33


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
def activate(x):
    """What follows the expansion and its bounds."""
    if ACTIVATION == HARD_SWISH:
        return x * min(max(x * f32(1 / 6) + f32(0.5), f32(0.0)), f32(1.0))
    return x * sigmoid_f32(x)


@helper
def expand(args, image, first, last, panel, bias, target):
    """Lines first .. last of e for one panel, from `target` on."""
    iw = arg(args, IW)
    for line in range(first, last):
        row = ptr_f32(image + 4 * line * arg(args, X_H))
        made = off(target, (line - first) * iw * NR)
        expanded_rows(MR, NR, VW, LOW, HIGH, row, arg(args, X_W), panel, bias, made, iw, arg(args, C))
        if ACTIVATION != NONE:
            for q in range(iw * NR):
                st_scratch(made, q, activate(ld_scratch(made, q)))


def kernel(args, begin, end):
    n = arg(args, N)
    oh = arg(args, OH)
    ow = arg(args, OW)
    kh = arg(args, KH)
    dh = arg(args, DH)
    sh = arg(args, SH)
    ih = arg(args, IH)
    iw = arg(args, IW)
    lines = arg(args, LINES)
    band_lines = arg(args, BAND_LINES)
    panels = (n + NR - 1) // NR
    line_blocks = (oh + lines - 1) // lines
    weights = ptr_f32(arg(args, W))
    zeros = arg(args, W) + 4 * panels * kh * LINE_TAPS * NR  # packing ends in a row of zeros
    tile = stack_f32(FLOATS)
    memory = stack_f32(BAND)
    for unit in range(begin, end):
        block = unit // panels
        p = unit - block * panels
        b0 = block // line_blocks
        line = (block - b0 * line_blocks) * lines
        line_end = min(line + lines, oh)
        image = arg(args, X) + 4 * b0 * arg(args, X_IMAGE)
        panel = off(ptr_f32(arg(args, E)), p * arg(args, C) * NR)
        bias = off(ptr_f32(arg(args, BIAS)), p * NR)
        left = n - p * NR
        base = 0  # the first line of e in memory
        ready = 0  # behind the last
        while line < line_end:
            band_end = min(line + band_lines, line_end)
            top = line * sh - arg(args, PH)
            first = min(max(top, 0), ih)
            last = min(max((band_end - 1) * sh - arg(args, PH) + (kh - 1) * dh + 1, first), ih)
            kept = max(ready - first, 0)
            if kept > 0 and first > base:
                for k in range(kept):
                    source = off(memory, (first - base + k) * iw * NR)
                    copy_floats(off(memory, k * iw * NR), source, iw * NR)
            if first + kept < last:
                expand(args, image, first + kept, last, panel, bias, off(memory, kept * iw * NR))
            base = first
            ready = max(last, first + kept)
            e = address(memory) - 4 * base * iw * NR
            while line < band_end:
                h0 = line * sh - arg(args, PH)
                low = min(first_inside(h0, dh), kh)
                count = max(min(first_inside(h0 - ih, dh), kh) - low, 0)
                under = off(weights, (p * kh + low) * LINE_TAPS * NR)
                pixel = 0
                while pixel < ow:
                    rows = min(ow - pixel, PIXELS)
                    size = PIXELS if rows > FEW else FEW
                    w0 = pixel * STEP - arg(args, PW)
                    inside = 1 if (w0 >= 0) & (w0 + (size - 1) * STEP + (LINE_TAPS - 1) * APART < iw) else 0
                    at = e + 4 * ((h0 + low * dh) * iw + w0) * NR
                    facts = (at, 4 * NR, 4 * dh * iw * NR, w0, iw, zeros, inside)
                    if size == PIXELS:
                        line_tile(PIXELS, NR, VW, LINE_TAPS, STEP, APART, 1, facts, NR, under, tile, count)
                    else:
                        line_tile(FEW, NR, VW, LINE_TAPS, STEP, APART, 1, facts, NR, under, tile, count)
                    store_tile(args, b0, line * ow + pixel, p * NR, rows, left, tile)
                    pixel += rows
                line += 1
