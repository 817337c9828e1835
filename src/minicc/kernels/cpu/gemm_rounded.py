"""Matrix product of rounded rows with weights of few bits: C[b0, b1, i, j] = sum over k of X[b0, b1, i, k] * B[k, j].

X is A rounded to 8 bits by `round_rows`, dense; B as in gemm_bits.py, its words filled up to whole blocks of K. Products and
sums of a block are exact integers. One unit is up to ROWS rows times a block of panels of one batch.
"""

from minicc.kernels.cpu.intrinsics import arg, helper, ld_scratch, off, ptr_f32, ptr_i32, st, stack_f32
from minicc.kernels.cpu.rounded_tiles import rounded_product

# Constants: tile of MR rows by NR columns, vector width, MR * NR; the bits of a number; 1 where all zero points are the
# middle of the range; 1 where the target has VNNI.
MR = 6
NR = 16
VW = 8
TILE = 96
BITS = 4
CENTRED = 1
VNNI = 0

# As in kernels/domain.py: rows of a unit that is not cut further. Floats on the stack, for panels of up to 32 columns.
ROWS = 64
SUMS = 2048

# Words.
X = 0
X_SCALES = 1
X_SUMS = 2
W = 3
S = 4
Z = 5
M = 6
N = 7
K = 8
B0 = 9
B1 = 10
SIZE = 11  # numbers of a block
HEIGHT = 12  # rows per unit
PANELS = 13  # panels per unit
EPILOGUE = 14


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense C."""
    row = ((b0 * arg(args, B1) + b1) * arg(args, M) + i) * arg(args, N)
    st(ptr_f32(arg(args, EPILOGUE)), row + j, acc)


@helper
def store_tile(args, b0, b1, i0, j0, rows, columns, tile):
    """The epilogue for the first `rows` x `columns` elements of a tile."""
    if columns >= NR:
        for r in range(rows):
            for j in range(NR):
                epilogue(args, b0, b1, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))
    else:
        for r in range(rows):
            for j in range(columns):
                epilogue(args, b0, b1, i0 + r, j0 + j, ld_scratch(tile, r * NR + j))


def kernel(args, begin, end):
    m = arg(args, M)
    n = arg(args, N)
    k = arg(args, K)
    size = arg(args, SIZE)
    height = arg(args, HEIGHT)
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + height - 1) // height
    panel_blocks = (panels + block_panels - 1) // block_panels
    blocks = (k + size - 1) // size
    words = blocks * (size * BITS // 32) * NR
    sums = stack_f32(SUMS)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i = (unit - rest * row_blocks) * height
        rows = min(height, m - i)
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = batch // arg(args, B1)
        b1 = batch - b0 * arg(args, B1)
        first = batch * m + i
        x = off(ptr_i32(arg(args, X)), first * blocks * (size // 4))
        x_scales = off(ptr_f32(arg(args, X_SCALES)), first * blocks)
        x_sums = off(ptr_f32(arg(args, X_SUMS)), first * blocks)
        for p in range(p_begin, p_end):
            w = off(ptr_i32(arg(args, W)), p * words)
            s = off(ptr_f32(arg(args, S)), p * blocks * NR)
            z = off(ptr_f32(arg(args, Z)), p * blocks * NR)
            rounded_product(MR, NR, VW, BITS, CENTRED, VNNI, x, x_scales, x_sums, w, s, z, sums, rows, blocks, size)
            store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, sums)
