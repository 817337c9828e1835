"""Outputs of a 3x3 convolution out of Winograd's form on CUDA: y of tiles of OUT x OUT from P[position, tile, j], float32.

The last of three steps (kernels/cuda_winograd.py), which ends in the generated epilogue. A thread makes one channel of a tile, so
that neighbouring threads read and give neighbouring channels. Its outputs pass through its own places in shared memory, where a
loop can take them row after row: the epilogue is in the kernel OUT times rather than OUT * OUT.
"""

from minicc.kernels.cuda.intrinsics import all_threads, arg, divide, first_element, helper, ptr_f32, st
from minicc.kernels.cuda.sums import cluster_memory, load_sum
from minicc.kernels.cuda.tiles import int32, shared_memory, thread
from minicc.kernels.cuda.winograd_tiles import winograd_output

# Constants.
OUT = 2
THREADS = 256
BLOCKS = 3  # of a multiprocessor at least: at most 80 registers

# Words.
P = 0
IMAGES = 1
N = 2
OH = 3
OW = 4
EPILOGUE = 5
WORDS = 6  # those of the epilogue included


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to dense channels-last memory."""
    pixel = (b0 + b1) * arg(args, OH) * arg(args, OW) + i
    st(ptr_f32(arg(args, EPILOGUE)), pixel * arg(args, N) + j, acc)


def kernel(args):
    n = arg(args, N)
    down = (arg(args, OH) + OUT - 1) // OUT
    across = (arg(args, OW) + OUT - 1) // OUT
    tiles = arg(args, IMAGES) * down * across
    tid = thread()
    own = cluster_memory(1, shared_memory())
    unit = first_element()
    while unit < tiles * n:
        tile = divide(unit, n)
        j = unit - tile * n
        line = divide(tile, across)
        image = divide(line, down)
        y = (line - image * down) * OUT
        x = (tile - line * across) * OUT
        place = shared_memory() + int32(4) * tid
        winograd_output(OUT, arg(args, P) + 4 * unit, 4 * tiles * n, place, int32(4 * THREADS))
        rows = min(arg(args, OH) - y, OUT)
        columns = arg(args, OW) - x
        i = y * arg(args, OW) + x
        at = tid
        while rows > 0:
            acc0 = load_sum("f32", 1, own, at)
            acc1 = load_sum("f32", 1, own, at + int32(THREADS))
            epilogue(args, image, 0, i, j, acc0)
            if columns > 1:
                epilogue(args, image, 0, i + 1, j, acc1)
            if OUT > 2:
                acc2 = load_sum("f32", 1, own, at + int32(2 * THREADS))
                acc3 = load_sum("f32", 1, own, at + int32(3 * THREADS))
                if columns > 2:
                    epilogue(args, image, 0, i + 2, j, acc2)
                if columns > 3:
                    epilogue(args, image, 0, i + 3, j, acc3)
            at = int32(at + int32(OUT * THREADS))
            i += arg(args, OW)
            rows -= 1
        unit += all_threads()
