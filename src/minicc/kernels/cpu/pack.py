"""Packs a computed right operand into panels [ceil(N / NR)][TAPS][C][NR] at run time.

A matrix product has one tap and C = K. Element (tap, c, n) is read at any strides; where c lies side by side, in square tiles
that are transposed in registers. Each batch is followed by TAIL zeros (a convolution uses them as the row that stands for
padding). One unit is one panel of one batch.
"""

import numpy as np

from minicc.kernels.cpu.intrinsics import arg, ld, off, ptr_f32, st
from minicc.kernels.cpu.transposed import transpose_tile

# Constants: columns of a panel, vector width.
NR = 16
VW = 8

# Words. Strides count elements.
SOURCE = 0
TARGET = 1
N = 2
C = 3
TAPS = 4
S_N = 5
S_C = 6
S_TAP = 7
S_B0 = 8
S_B1 = 9
T_B0 = 10
T_B1 = 11
B0 = 12
B1 = 13
TAIL = 14


def kernel(args, begin, end):
    n = arg(args, N)
    c = arg(args, C)
    taps = arg(args, TAPS)
    s_n = arg(args, S_N)
    panels = (n + NR - 1) // NR
    for unit in range(begin, end):
        batch = unit // panels
        p = unit - batch * panels
        b0 = batch // arg(args, B1)
        b1 = batch - b0 * arg(args, B1)
        source = off(ptr_f32(arg(args, SOURCE)), b0 * arg(args, S_B0) + b1 * arg(args, S_B1) + p * NR * s_n)
        target = off(
            ptr_f32(arg(args, TARGET)), b0 * arg(args, T_B0) + b1 * arg(args, T_B1) + p * taps * c * NR
        )
        zero = np.float32(0)
        columns = min(NR, n - p * NR)
        for t in range(taps):
            whole = 0
            if columns == NR and arg(args, S_C) == 1:
                whole = c // VW * VW
                for k in range(0, whole, VW):
                    for v in range(0, NR, VW):
                        tile = off(source, t * arg(args, S_TAP) + v * s_n + k)
                        transpose_tile(VW, tile, s_n, VW, VW, off(target, (t * c + k) * NR + v), NR)
            for k in range(whole, c):
                row = off(source, t * arg(args, S_TAP) + k * arg(args, S_C))
                packed = off(target, (t * c + k) * NR)
                if columns == NR:
                    for j in range(NR):
                        st(packed, j, ld(row, j * s_n))
                else:
                    for j in range(columns):
                        st(packed, j, ld(row, j * s_n))
                    for j in range(columns, NR):
                        st(packed, j, zero)
        if p == panels - 1:
            for j in range(arg(args, TAIL)):
                st(target, taps * c * NR + j, zero)
