"""Transposed convolution, channels last, float32: every output gathers what the taps would scatter to it.

Tap k of an axis meets output o when o + pad - k * dilation is a multiple of the stride; the quotient is the input
position. A thread makes four outputs of one channel that lie a stride apart along W and so meet the same taps, with
each weight it reads. Weights are packed with taps in their own order.
"""



import numpy as np

from minicc.kernels.cuda.intrinsics import all_threads, arg, divide, first_element, helper, ld, off, ptr_f32, st
from minicc.kernels.cuda.sliding import (
    DD,
    DH,
    DW,
    GROUPS,
    ID,
    IH,
    IMAGES,
    IW,
    KD,
    KH,
    KW,
    OD,
    OH,
    OW,
    PD,
    PH,
    PIXELS,
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
    tap,
)  # fmt: skip

# Columns of a panel of weights.
NR = 32
THREADS = 256

# Words, after those of windows and two for the CPU's blocking.
EPILOGUE = 31
WORDS = 32


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    pixel = (b0 * arg(args, M) + i) * arg(args, GROUPS) + b1
    st(ptr_f32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


@helper
def source(output, pad, k, dilation, stride, extent):
    """The input position under a tap of an output, or -1."""
    distance = output + pad - k * dilation
    position = distance // stride
    return position if (position * stride == distance) & (position >= 0) & (position < extent) else -1


def kernel(args):
    c = arg(args, C)
    n = arg(args, N)
    kw = arg(args, KW)
    iw = arg(args, IW)
    ow = arg(args, OW)
    sw = arg(args, SW)
    x_w = arg(args, X_W)
    taps = arg(args, KD) * arg(args, KH) * kw
    panel = taps * c * NR
    panels = (n + NR - 1) // NR
    # Columns of one phase of the stride along W, in pieces of four.
    pieces = divide(divide(ow + sw - 1, sw) + (PIXELS - 1), PIXELS)
    zero = np.float32(0)
    total = arg(args, IMAGES) * arg(args, GROUPS) * arg(args, OD) * arg(args, OH) * sw * pieces * n
    unit = first_element()
    while unit < total:
        rest = divide(unit, n)
        j = unit - rest * n
        phases = divide(rest, pieces)
        piece = rest - phases * pieces
        lines = divide(phases, sw)
        column = phases - lines * sw + piece * (PIXELS * sw)
        planes = divide(lines, arg(args, OH))
        line = lines - planes * arg(args, OH)
        batch = divide(planes, arg(args, OD))
        plane = planes - batch * arg(args, OD)
        b0 = divide(batch, arg(args, GROUPS))
        b1 = batch - b0 * arg(args, GROUPS)
        x = off(ptr_f32(arg(args, X)), b0 * arg(args, X_IMAGE) + b1 * c)
        w = off(ptr_f32(arg(args, W)), (b1 * panels + j // NR) * panel + j % NR)
        s0 = zero
        s1 = zero
        s2 = zero
        s3 = zero
        for kd in range(arg(args, KD)):
            at_d = source(plane, arg(args, PD), kd, arg(args, DD), arg(args, SD), arg(args, ID))
            for kh in range(arg(args, KH)):
                at_h = source(line, arg(args, PH), kh, arg(args, DH), arg(args, SH), arg(args, IH))
                if (at_d >= 0) & (at_h >= 0):
                    row = off(x, at_d * arg(args, X_D) + at_h * arg(args, X_H))
                    for k in range(kw):
                        distance = column + arg(args, PW) - k * arg(args, DW)
                        at_w = distance // sw
                        if at_w * sw == distance:
                            weights = off(w, ((kd * arg(args, KH) + kh) * kw + k) * c * NR)
                            for channel in range(c):
                                weight = ld(weights, channel * NR)
                                at = at_w * x_w + channel
                                s0 += weight * tap(row, at, at_w, iw, zero)
                                s1 += weight * tap(row, at + x_w, at_w + 1, iw, zero)
                                s2 += weight * tap(row, at + 2 * x_w, at_w + 2, iw, zero)
                                s3 += weight * tap(row, at + 3 * x_w, at_w + 3, iw, zero)
        i = (plane * arg(args, OH) + line) * ow + column
        if column < ow:
            epilogue(args, b0, b1, i, j, s0)
        if column + sw < ow:
            epilogue(args, b0, b1, i + sw, j, s1)
        if column + 2 * sw < ow:
            epilogue(args, b0, b1, i + 2 * sw, j, s2)
        if column + 3 * sw < ow:
            epilogue(args, b0, b1, i + 3 * sw, j, s3)
        unit += all_threads()
