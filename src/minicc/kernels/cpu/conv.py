"""Convolution, channels last, float32: an implicit matrix product by indirection (as XNNPACK's IGEMM).

y[image, group, pixel, j] = sum over (tap, c) of x[image, position(pixel, tap), group * C + c] * w[group,
tap, c, j]. Rows of the left operand are never copied to a matrix: per output pixel and tap a table holds the
address of C input channels, or of a row of zeros where the tap lies in the padding. Up to three spatial axes
(D, H, W; unused ones are 1).

MERGED: a run of KW * C input values is one row when W is contiguous and undilated, which gives few channels
a long inner loop. Runs that reach into the padding are then copied, with their zeros, to scratch.
Taps that are all padding for a tile are left out: of a dilated filter on a small image those are most. One unit
is a block of row tiles of one image times a block of panels of one group.
"""

from minicc.kernels.cpu.intrinsics import arg, helper, ld_scratch, off, ptr_f32, st, stack_f32, stack_i64
from minicc.kernels.cpu.tiles import sparse_product_tile, tile_height
from minicc.kernels.cpu.windows import (
    GROUPS,
    KD,
    KH,
    KW,
    X_IMAGE,
    C,
    M,
    N,
    W,
    X,
    assemble_runs,
    drop_padding,
    fill_table,
)

# Constants: tile of MR rows by NR columns, vector width, MR * NR. Then the sizes of stack arrays: entries
# of the address table and of the numbers of taps, floats of scratch, and taps in the table at once.
MR = 6
NR = 16
VW = 8
TILE = 96
TABLE = 4096
KEPT = 2048
SCRATCH = 8192
TAPS = 512

# Words, after those of windows.
MERGED = 29
ROW_TILES = 30  # row tiles per unit
PANELS = 31  # panels per unit
EPILOGUE = 32


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    pixel = (b0 * arg(args, M) + i) * arg(args, GROUPS) + b1
    st(ptr_f32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


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
    c = arg(args, C)
    groups = arg(args, GROUPS)
    # Rows of the left operand: `taps` of `depth` values.
    merged = arg(args, MERGED)
    columns = 1 if merged else arg(args, KW)
    depth = arg(args, KW) * c if merged else c
    taps = arg(args, KD) * arg(args, KH) * columns
    block_rows = arg(args, ROW_TILES) * MR
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    row_blocks = (m + block_rows - 1) // block_rows
    panel_blocks = (panels + block_panels - 1) // block_panels
    panel_size = taps * depth * NR
    zeros = arg(args, W) + 4 * groups * panels * panel_size  # packing ends in a row of zeros
    table = stack_i64(TABLE)
    kept = stack_i64(KEPT)
    scratch = stack_f32(SCRATCH)
    tile = stack_f32(TILE)
    for unit in range(begin, end):
        rest = unit // row_blocks
        i_begin = (unit - rest * row_blocks) * block_rows
        i_end = min(i_begin + block_rows, m)
        batch = rest // panel_blocks
        p_begin = (rest - batch * panel_blocks) * block_panels
        p_end = min(p_begin + block_panels, panels)
        b0 = batch // groups
        b1 = batch - b0 * groups
        x = arg(args, X) + 4 * (b0 * arg(args, X_IMAGE) + b1 * c)
        weights = off(ptr_f32(arg(args, W)), b1 * panels * panel_size)
        first = 0
        # One pass; several when there are more taps than the table holds, and then a unit is a single tile.
        while first < taps:
            count = min(taps - first, TAPS)
            fill_table(args, x, 4, zeros, MR, i_begin, i_end, columns, first, count, table)
            if merged:
                assemble_runs(args, zeros, MR, i_begin, i_end, count, table, scratch)
            drop_padding(zeros, MR, (i_end - i_begin + MR - 1) // MR, count, table, kept)
            for p in range(p_begin, p_end):
                panel = off(weights, p * panel_size + first * depth * NR)
                i = i_begin
                while i < i_end:
                    row = (i - i_begin) % MR  # not 0 only in the low tiles of the last rows
                    height = tile_height(MR, i_end - i)
                    rows = min(height, i_end - i)
                    entries = off(table, (i - i_begin - row) * count + row)
                    numbers = off(kept, (i - i_begin) // MR * (1 + count))
                    inside = ld_scratch(numbers, 0)
                    part = off(tile, row * NR)
                    sparse_product_tile(
                        MR, NR, VW, height, entries, off(numbers, 1), panel, part, depth, inside, first == 0
                    )
                    if first + count == taps:
                        store_tile(args, b0, b1, i, p * NR, rows, n - p * NR, part)
                    i += rows
            first += count
