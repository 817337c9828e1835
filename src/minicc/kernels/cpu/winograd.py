"""Convolution with 3 or 5 taps along two axes or one, channels last, float32, by Winograd's minimal filtering.

y = A^T [ (G w G^T) * (B^T x B) ] A per tile of OUT_H x OUT_W outputs: its SIDE_H x SIDE_W inputs become as many
positions, each a product over the channels that all tiles share the weights of. The 3 multiplications of an output
along an axis become 2 (OUT = 2) or 1.5 (OUT = 4); with stride 2, where outputs share fewer inputs, 2.5 (OUT = 2). Of 5
multiplications 3 are left (OUT = 2).

One unit is a block of tiles (of any images) times a block of panels. It transforms the inputs of its tiles,
with zeros where they lie in the padding; then, panel by panel, makes the products of all positions and
transforms them back into the epilogue. Both intermediate forms are on the stack, 1.4 MB of it, where they stay
in L2 between the steps, and units share nothing. The weights of a position come from memory while those of
the one before it are used.

The error of float32 sums grows: to about 1e-6 (4 positions along an axis) and 3e-6 (6 of them) of the largest output.
"""

import numpy as np

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
from minicc.kernels.cpu.winograd_tiles import position_tile, winograd_input, winograd_output
from minicc.kernels.winograd_axes import side

# Constants: product tile of MR rows by NR columns, vector width; then the tile of outputs, how far apart they are, and the
# taps of an axis that has some.
MR = 8
NR = 32
VW = 16
OUT_H = 4
OUT_W = 4
STRIDE = 1
TAPS = 3
SIDE_H = side(OUT_H, STRIDE, TAPS)
SIDE_W = side(OUT_W, STRIDE, TAPS)
POSITIONS = SIDE_H * SIDE_W

# Tiles in a block, and floats of their inputs in Winograd's form (without gaps).
BLOCK = 32
INPUTS = 294912
# Positions lie this much further apart than their data, so that they are in different sets of the cache.
GAP = 16
# Sizes of stack arrays. The last product tile of a block may be a little too high.
ROWS = BLOCK + MR
INPUT_SIZE = INPUTS + POSITIONS * GAP + INPUTS // POSITIONS
PRODUCT_STEP = ROWS * NR + GAP
PRODUCT_SIZE = POSITIONS * PRODUCT_STEP
RESULT_SIZE = OUT_H * OUT_W * NR

# Words, as in conv.
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
    for r in range(SIDE_H):
        row = arg(args, X) + 4 * (image * arg(args, X_IMAGE) + (y + r) * arg(args, X_H))
        # Unsigned, so that negative positions are too large.
        in_rows = np.uint64(y + r) < np.uint64(arg(args, IH))
        for s in range(SIDE_W):
            inside = in_rows & (np.uint64(x + s) < np.uint64(arg(args, IW)))
            at = row + 4 * (x + s) * arg(args, X_W)
            st_scratch(pixels, r * SIDE_W + s, at if inside else zeros)


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
    panel_size = POSITIONS * c * NR
    zeros = arg(args, W) + 4 * panels * panel_size  # packing ends in a row of zeros
    input_step = block * c + GAP
    pixels = stack_i64(POSITIONS)
    inputs = stack_f32(INPUT_SIZE)
    products = stack_f32(PRODUCT_SIZE)
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
            fill_pixels(args, image, y * STRIDE - arg(args, PH), x * STRIDE - arg(args, PW), zeros, pixels)
            winograd_input(OUT_H, OUT_W, STRIDE, TAPS, VW, pixels, c, off(inputs, t * c), input_step)
        for p in range(p_begin, p_end):
            panel = off(ptr_f32(arg(args, W)), p * panel_size)
            for position in range(POSITIONS):
                left = off(inputs, position * input_step)
                right = off(panel, position * c * NR)
                target = off(products, position * PRODUCT_STEP)
                # Each product tile of this position fetches its share of the next one's weights.
                ahead = address(right) + 4 * c * NR
                step = 4 * NR // ((count + MR - 1) // MR)
                t = 0
                while t < count:
                    height = tile_height(MR, count - t)
                    position_tile(
                        MR, NR, VW, height, off(left, t * c), c, right, c, off(target, t * NR), ahead, step
                    )
                    ahead += c * step
                    t += height
            for t in range(count):
                image = (first + t) // per_image
                at = first + t - image * per_image
                y = at // across * OUT_H
                x = at % across * OUT_W
                winograd_output(OUT_H, OUT_W, STRIDE, TAPS, NR, VW, off(products, t * NR), PRODUCT_STEP, result)
                for r in range(min(OUT_H, oh - y)):
                    line = off(result, r * OUT_W * NR)
                    store_tile(args, image, (y + r) * ow + x, p * NR, min(OUT_W, ow - x), n - p * NR, line)
