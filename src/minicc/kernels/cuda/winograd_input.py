"""Inputs of a 3x3 convolution in Winograd's form on CUDA: V[position, tile, c] of tiles of OUT x OUT outputs, one group.

The first of three steps (kernels/cuda_winograd.py); the second one multiplies V[position] by the weights of that position with
the tiles of kernels/cuda/gemm.py. Tiles run through the lines of all images, channels last. A thread transforms LANES channels
of a tile, so that neighbouring threads read and write neighbouring memory; what lies outside the image is 0. Sums are float32,
rounded when they are stored.
"""

from minicc.kernels.cuda.intrinsics import all_threads, arg, divide, first_element
from minicc.kernels.cuda.winograd_tiles import winograd_input

# Constants. LANES: channels of a thread, at whose bytes X, its strides and C are aligned.
ELEMENT = "f32"
SIZE = 4
OUT = 2
LANES = 4
THREADS = 256

# Words. Strides count elements.
X = 0
V = 1
IMAGES = 2
C = 3
X_IMAGE = 4
X_H = 5
X_W = 6
IH = 7
IW = 8
OH = 9
OW = 10
PH = 11
PW = 12
WORDS = 13


def kernel(args):
    chunks = arg(args, C) // LANES
    down = (arg(args, OH) + OUT - 1) // OUT
    across = (arg(args, OW) + OUT - 1) // OUT
    tiles = arg(args, IMAGES) * down * across
    apart = SIZE * tiles * arg(args, C)
    steps = (SIZE * arg(args, X_H), SIZE * arg(args, X_W))
    extents = (arg(args, IH), arg(args, IW))
    unit = first_element()
    while unit < tiles * chunks:
        tile = divide(unit, chunks)
        channel = (unit - tile * chunks) * LANES
        line = divide(tile, across)
        image = divide(line, down)
        y = (line - image * down) * OUT - arg(args, PH)
        x = (tile - line * across) * OUT - arg(args, PW)
        place = image * arg(args, X_IMAGE) + y * arg(args, X_H) + x * arg(args, X_W) + channel
        target = arg(args, V) + SIZE * (tile * arg(args, C) + channel)
        winograd_input(ELEMENT, OUT, LANES, arg(args, X) + SIZE * place, steps, (y, x), extents, target, apart)
        unit += all_threads()
