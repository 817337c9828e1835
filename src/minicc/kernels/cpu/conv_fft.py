"""Convolution at stride 1 with any kernel, channels last, float32, by discrete Fourier transforms of overlapping tiles.

A tile of SIDE_H x SIDE_W inputs yields OUT_H x OUT_W outputs, those that a kernel of SIDE - OUT + 1 taps (dilated, if it is)
reaches without going round. Its transform is multiplied by that of the weights, one product over the channels for each
frequency that all tiles share, and the sums are transformed back ("overlap and save"). With 16 x 16 inputs an output of a
7x7 kernel takes 5 multiplications per channel instead of 49, one of 31x31 with 64 x 64 inputs 7 instead of 961.

One unit is a block of tiles (of any images) times a block of panels. It transforms the inputs of its tiles, with zeros where
they lie in the padding; then, panel by panel, makes the products of all frequencies and transforms them back into the
epilogue. Both intermediate forms are on the stack, up to 2.6 MB of it, where they stay in L2 between the steps, and units share
nothing. The weights of a frequency come from memory while those of the one before it are used.

Rounding errs by less than 1e-6 of the largest output, mostly by 3e-7; a direct float32 sum by more. Values that are
not finite spread over a tile.
"""

import numpy as np

from minicc.kernels.cpu.fft_sizes import INPUTS, frequencies, most_tiles
from minicc.kernels.cpu.fft_tiles import fft_columns_back, fft_input, fft_row_back, frequency_tile
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
    stack_i64,
)
from minicc.kernels.cpu.tiles import tile_height

# Constants: rows of a product tile, columns of a panel, vector width (the same); the tile of inputs and of outputs;
# whether there are fewer input channels than lanes.
MR = 8
NR = 16
VW = 16
SIDE_H = 16
SIDE_W = 16
OUT_H = 10
OUT_W = 10
FEW = 0
FREQUENCIES = frequencies(SIDE_H, SIDE_W)

# Frequencies lie this much further apart than their data, so that they are in different sets of the cache.
GAP = 16
# Sizes of stack arrays. The last product tile of a block may be one row too high.
PIXELS = SIDE_H * SIDE_W
INPUT_SIZE = INPUTS + 2 * FREQUENCIES * GAP + INPUTS // FREQUENCIES
PRODUCT_STEP = (most_tiles(SIDE_H, SIDE_W, NR) + 1) * NR + GAP
PRODUCT_SIZE = 2 * FREQUENCIES * PRODUCT_STEP
LINES_SIZE = SIDE_H * (SIDE_W + 2) * NR
RESULT_SIZE = OUT_W * NR

# Words, as in winograd.
X = 0
W = 1
IMAGES = 2
N = 3
C = 4
X_IMAGE = 5
X_H = 6
X_W = 7
IH = 8
IW = 9
OH = 10
OW = 11
PH = 12
PW = 13
TILES = 14  # tiles per unit
PANELS = 15  # panels per unit
EPILOGUE = 16


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    pixel = (b0 + b1) * arg(args, OH) * arg(args, OW) + i
    st(ptr_f32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


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
def fill_pixels(args, image, y, x, zeros, pixels):
    """Addresses of the SIDE_H x SIDE_W inputs from (y, x) on, of zeros outside the image."""
    low = min(max(-x, 0), SIDE_W)
    high = max(min(arg(args, IW) - x, SIDE_W), low)
    step = 4 * arg(args, X_W)
    for r in range(SIDE_H):
        at = arg(args, X) + 4 * (image * arg(args, X_IMAGE) + (y + r) * arg(args, X_H)) + x * step
        line = off(pixels, r * SIDE_W)
        # Unsigned, so that negative positions are too large.
        inside = np.uint64(y + r) < np.uint64(arg(args, IH))
        first = low if inside else SIDE_W
        last = high if inside else SIDE_W
        for s in range(first):
            st_scratch(line, s, zeros)
        for s in range(first, last):
            st_scratch(line, s, at + s * step)
        for s in range(last, SIDE_W):
            st_scratch(line, s, zeros)


def kernel(args, begin, end):
    c = arg(args, C)
    n = arg(args, N)
    oh = arg(args, OH)
    ow = arg(args, OW)
    block = arg(args, TILES)
    block_panels = arg(args, PANELS)
    panels = (n + NR - 1) // NR
    across = (ow + OUT_W - 1) // OUT_W
    per_image = (oh + OUT_H - 1) // OUT_H * across
    tiles = arg(args, IMAGES) * per_image
    blocks = (tiles + block - 1) // block
    panel_size = 2 * FREQUENCIES * c * NR
    zeros = arg(args, W) + 4 * panels * panel_size  # packing ends in a row of zeros
    row = VW if FEW else c
    input_step = block * row + GAP
    pixels = stack_i64(PIXELS)
    inputs = stack_f32(INPUT_SIZE)
    products = stack_f32(PRODUCT_SIZE)
    lines = stack_f32(LINES_SIZE)
    result = stack_f32(RESULT_SIZE)
    for unit in range(begin, end):
        p_block = unit // blocks
        first = (unit - p_block * blocks) * block
        count = min(block, tiles - first)
        p_begin = p_block * block_panels
        p_end = min(p_begin + block_panels, panels)
        for t in range(count):
            image = (first + t) // per_image
            at = first + t - image * per_image
            y = at // across * OUT_H
            x = at % across * OUT_W
            fill_pixels(args, image, y - arg(args, PH), x - arg(args, PW), zeros, pixels)
            fft_input(SIDE_H, SIDE_W, VW, FEW, pixels, c, lines, off(inputs, t * row), input_step)
        for p in range(p_begin, p_end):
            panel = off(ptr_f32(arg(args, W)), p * panel_size)
            for frequency in range(FREQUENCIES):
                left = off(inputs, 2 * frequency * input_step)
                right = off(panel, 2 * frequency * c * NR)
                target = off(products, 2 * frequency * PRODUCT_STEP)
                # Each product tile of this frequency fetches its share of the next one's weights.
                ahead = address(right) + 8 * c * NR
                step = 8 * NR // ((count + MR - 1) // MR)
                t = 0
                while t < count:
                    height = tile_height(MR, count - t)
                    left_rows = off(left, t * row)
                    sums = off(target, t * NR)
                    frequency_tile(MR, VW, height, left_rows, input_step, row, right, c, sums, PRODUCT_STEP, ahead, step)
                    ahead += c * step
                    t += height
            for t in range(count):
                image = (first + t) // per_image
                at = first + t - image * per_image
                y = at // across * OUT_H
                x = at % across * OUT_W
                fft_columns_back(SIDE_H, SIDE_W, OUT_H, VW, off(products, t * NR), PRODUCT_STEP, lines)
                for r in range(min(OUT_H, oh - y)):
                    fft_row_back(SIDE_W, OUT_W, VW, lines, r, result)
                    store_tile(args, image, (y + r) * ow + x, p * NR, min(OUT_W, ow - x), n - p * NR, result)
