"""Rows rounded to 8 bits, block by block, for products with weights of few bits (`gemm_rounded`).

One unit is one row of A. A row becomes words [ceil(K / SIZE) * SIZE / 4] of four bytes each in the order of rounded_tiles.py,
and for each block the scale of its numbers and their sum.
"""

from minicc.kernels.cpu.intrinsics import arg, off, ptr_f32, ptr_i32
from minicc.kernels.cpu.rounded_tiles import round_block

# Constant: bits of the weights.
BITS = 4

# Words. Strides count elements; those of the batch axes may be 0.
A = 0
TARGET = 1
SCALES = 2
SUMS = 3
M = 4
K = 5
A_ROW = 6
A_B0 = 7
A_B1 = 8
B0 = 9
B1 = 10
SIZE = 11  # numbers of a block


def kernel(args, begin, end):
    m = arg(args, M)
    k = arg(args, K)
    size = arg(args, SIZE)
    blocks = (k + size - 1) // size
    for unit in range(begin, end):
        batch = unit // m
        b0 = batch // arg(args, B1)
        b1 = batch - b0 * arg(args, B1)
        start = b0 * arg(args, A_B0) + b1 * arg(args, A_B1) + (unit - batch * m) * arg(args, A_ROW)
        for block in range(blocks):
            source = off(ptr_f32(arg(args, A)), start + block * size)
            place = unit * blocks + block
            target = off(ptr_i32(arg(args, TARGET)), place * (size // 4))
            scale = off(ptr_f32(arg(args, SCALES)), place)
            total = off(ptr_f32(arg(args, SUMS)), place)
            round_block(BITS, source, target, scale, total, min(size, k - block * size), size)
