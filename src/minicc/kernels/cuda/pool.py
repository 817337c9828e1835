"""Max and average pooling, channels last, float32: a thread makes four neighbours along W of one channel.

A NaN in the window of a maximum comes out. The average divides by the number of taps inside the input, or inside the
padded input when COUNT_PAD is 1.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

import numpy as np

from minicc.kernels.cuda.intrinsics import all_threads, arg, first_element, helper, off, ptr_f32, st
from minicc.kernels.cuda.scalar import maximum
from minicc.kernels.cuda.sliding import (
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
    X,
    place,
    tap,
    work,
)  # fmt: skip

# Constants.
AVERAGE = 0
THREADS = 256

# Words, after those of windows, and two for the CPU's blocking.
E_D = 29  # pads after the last element (for COUNT_PAD)
E_H = 30
E_W = 31
COUNT_PAD = 32
EPILOGUE = 35
WORDS = 36


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    st(ptr_f32(arg(args, EPILOGUE)), (b0 * arg(args, M) + i) * arg(args, N) + j, acc)


@helper
def taps_inside(start, taps, dilation, extent, end, count_pad):
    """How many taps of one axis are inside the input (or the padded input)."""
    high = extent + end if count_pad else extent
    inside = 0
    for k in range(taps):
        at = start + k * dilation
        if (count_pad | (at >= 0)) & (at < high):
            inside += 1
    return inside


@helper
def step(total, x):
    """One step of a pool."""
    return total + x if AVERAGE else maximum(total, x)


@helper
def finish(args, total, lines, start):
    """The result at the window that begins at column `start`; lines: taps of the other axes that count."""
    if AVERAGE:
        count_pad = arg(args, COUNT_PAD) != 0
        columns = taps_inside(start, arg(args, KW), arg(args, DW), arg(args, IW), arg(args, E_W), count_pad)
        return total * (np.float32(1) / np.float32(max(lines * columns, 1)))
    return total


def kernel(args):
    kw = arg(args, KW)
    iw = arg(args, IW)
    sw = arg(args, SW)
    x_w = arg(args, X_W)
    first = np.float32(0) if AVERAGE else np.float32(-np.inf)
    total = work(args)
    unit = first_element()
    while unit < total:
        image, plane, line, column, j = place(args, unit)
        x = off(ptr_f32(arg(args, X)), image * arg(args, X_IMAGE) + j)
        d0 = plane * arg(args, SD) - arg(args, PD)
        h0 = line * arg(args, SH) - arg(args, PH)
        w0 = column * sw - arg(args, PW)
        a = first
        b = first
        c = first
        d = first
        for kd in range(arg(args, KD)):
            at_d = d0 + kd * arg(args, DD)
            for kh in range(arg(args, KH)):
                at_h = h0 + kh * arg(args, DH)
                if (at_d >= 0) & (at_d < arg(args, ID)) & (at_h >= 0) & (at_h < arg(args, IH)):
                    row = off(x, at_d * arg(args, X_D) + at_h * arg(args, X_H))
                    for k in range(kw):
                        at = w0 + k * arg(args, DW)
                        a = step(a, tap(row, at * x_w, at, iw, first))
                        b = step(b, tap(row, (at + sw) * x_w, at + sw, iw, first))
                        c = step(c, tap(row, (at + 2 * sw) * x_w, at + 2 * sw, iw, first))
                        d = step(d, tap(row, (at + 3 * sw) * x_w, at + 3 * sw, iw, first))
        lines = 1
        if AVERAGE:
            pad = arg(args, COUNT_PAD) != 0
            lines = taps_inside(d0, arg(args, KD), arg(args, DD), arg(args, ID), arg(args, E_D), pad) * taps_inside(
                h0, arg(args, KH), arg(args, DH), arg(args, IH), arg(args, E_H), pad
            )
        i = (plane * arg(args, OH) + line) * arg(args, OW) + column
        left = arg(args, OW) - column
        epilogue(args, image, 0, i, j, finish(args, a, lines, w0))
        if left > 1:
            epilogue(args, image, 0, i + 1, j, finish(args, b, lines, w0 + sw))
        if left > 2:
            epilogue(args, image, 0, i + 2, j, finish(args, c, lines, w0 + 2 * sw))
        if left > 3:
            epilogue(args, image, 0, i + 3, j, finish(args, d, lines, w0 + 3 * sw))
        unit += all_threads()
