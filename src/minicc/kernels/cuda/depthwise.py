"""Depthwise convolution, channels last, float32: every channel has its own window of weights.

y[image, pixel, c] = sum over taps of x[image, position(pixel, tap), c] * w[tap, c]. A thread makes four neighbours
along W of one channel with each weight it reads.
"""

# ruff: noqa: ARG001  (epilogues share one signature)

import numpy as np

from minicc.kernels.cuda.intrinsics import all_threads, arg, first_element, helper, ld, off, ptr_f32, st
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
    W,
    X,
    place,
    tap,
    work,
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
    st(ptr_f32(arg(args, EPILOGUE)), (b0 * arg(args, M) + i) * arg(args, N) + j, acc)


def kernel(args):
    kw = arg(args, KW)
    iw = arg(args, IW)
    x_w = arg(args, X_W)
    step = arg(args, SW) * x_w
    taps = arg(args, KD) * arg(args, KH) * kw
    zero = np.float32(0)
    total = work(args)
    unit = first_element()
    while unit < total:
        image, plane, line, column, j = place(args, unit)
        x = off(ptr_f32(arg(args, X)), image * arg(args, X_IMAGE) + j)
        w = off(ptr_f32(arg(args, W)), j // NR * taps * NR + j % NR)
        w0 = column * arg(args, SW) - arg(args, PW)
        a = zero
        b = zero
        c = zero
        d = zero
        for kd in range(arg(args, KD)):
            at_d = plane * arg(args, SD) - arg(args, PD) + kd * arg(args, DD)
            for kh in range(arg(args, KH)):
                at_h = line * arg(args, SH) - arg(args, PH) + kh * arg(args, DH)
                if (at_d >= 0) & (at_d < arg(args, ID)) & (at_h >= 0) & (at_h < arg(args, IH)):
                    weights = off(w, (kd * arg(args, KH) + kh) * kw * NR)
                    row = off(x, at_d * arg(args, X_D) + at_h * arg(args, X_H))
                    for k in range(kw):
                        weight = ld(weights, k * NR)
                        at_w = w0 + k * arg(args, DW)
                        at = at_w * x_w
                        a += weight * tap(row, at, at_w, iw, zero)
                        b += weight * tap(row, at + step, at_w + arg(args, SW), iw, zero)
                        c += weight * tap(row, at + 2 * step, at_w + 2 * arg(args, SW), iw, zero)
                        d += weight * tap(row, at + 3 * step, at_w + 3 * arg(args, SW), iw, zero)
        i = (plane * arg(args, OH) + line) * arg(args, OW) + column
        left = arg(args, OW) - column
        epilogue(args, image, 0, i, j, a)
        if left > 1:
            epilogue(args, image, 0, i + 1, j, b)
        if left > 2:
            epilogue(args, image, 0, i + 2, j, c)
        if left > 3:
            epilogue(args, image, 0, i + 3, j, d)
        unit += all_threads()
