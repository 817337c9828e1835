"""Convolution on CUDA, channels last, 1 to 3 spatial axes, as a matrix product whose left operand is gathered.

Rows are the output pixels of all images, k runs over taps, then channels of the group; W is [group][N][k padded with
zeros to 16 bytes]. Copies into shared memory look positions up in a table of the rows' windows, and what lies
outside the input becomes 0. The rest is as in kernels/cuda/gemm.py.
"""

from minicc.kernels.cuda.intrinsics import arg, helper, ptr_f32, st
from minicc.kernels.cuda.tiles import (
    barrier,
    block,
    copies_commit,
    copies_wait,
    copy_tile,
    copy_windows,
    int32,
    load_sum,
    product,
    shared_memory,
    store_sums,
    store_window,
    thread,
    zeros,
)

# Constants. PIECE: the largest power of two up to 16 that divides the bytes of X, its strides and of C.
ELEMENT = "f16"
SIZE = 2
PIECE = 16
BM = 128
BN = 128
WM = 64
WN = 64
THREADS = 128
STAGES = 3
IN_FLIGHT = 1  # STAGES - 2
BK = 64  # 128 / SIZE
A_BYTES = 16384  # 128 * BM
STAGE_BYTES = 32768  # 128 * (BM + BN)
PITCH = 132  # BN + 4
TABLE = 98304  # where the table of windows begins: behind the ring and the sums

# Words. Strides count elements.
X = 0
W = 1
IMAGES = 2
GROUPS = 3
M = 4
N = 5
C = 6
X_IMAGE = 7
X_D = 8
X_H = 9
X_W = 10
ID = 11
IH = 12
IW = 13
OD = 14
OH = 15
OW = 16
KD = 17
KH = 18
KW = 19
SD = 20
SH = 21
SW = 22
DD = 23
DH = 24
DW = 25
PD = 26
PH = 27
PW = 28
MERGED = 29  # unused: rows always run through all images
ROW_TILES = 30  # ceil(IMAGES * M / BM)
PANELS = 31  # ceil(N / BN)
EPILOGUE = 32
WORDS = 33  # those of the epilogue included


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense [image][pixel][channel of all groups]."""
    pixel = b0 * arg(args, M) + i
    st(ptr_f32(arg(args, EPILOGUE)), (pixel * arg(args, GROUPS) + b1) * arg(args, N) + j, acc)


@helper
def note_windows(args, table, i0, group, tid):
    """Fills the table for the block's rows; the windows of rows behind the last one lie outside every input."""
    rows = arg(args, IMAGES) * arg(args, M)
    r = tid
    while r < BM:
        row = i0 + r
        if row < rows:
            image = row // arg(args, M)
            pixel = row - image * arg(args, M)
            outer = pixel // arg(args, OW)
            depth = outer // arg(args, OH)
            z = depth * arg(args, SD) - arg(args, PD)
            y = (outer - depth * arg(args, OH)) * arg(args, SH) - arg(args, PH)
            x = (pixel - outer * arg(args, OW)) * arg(args, SW) - arg(args, PW)
            place = image * arg(args, X_IMAGE) + z * arg(args, X_D) + y * arg(args, X_H) + x * arg(args, X_W)
            store_window(table, r, arg(args, X) + SIZE * (place + group * arg(args, C)), z, y, x)
        else:
            store_window(table, r, arg(args, X), -(1 << 30), 0, 0)
        r += THREADS


def kernel(args):
    m = int32(arg(args, IMAGES) * arg(args, M))
    n = int32(arg(args, N))
    channels = int32(arg(args, C))
    k = int32(arg(args, KD) * arg(args, KH) * arg(args, KW) * arg(args, C))
    row_tiles = int32(arg(args, ROW_TILES))
    panels = int32(arg(args, PANELS))
    tid = thread()
    lane = tid & int32(31)
    warp = tid >> int32(5)
    unit = block()
    rest = unit // panels
    j0 = (unit - rest * panels) * int32(BN)
    group = rest // row_tiles
    i0 = (rest - group * row_tiles) * int32(BM)
    x = arg(args, X)
    w_stride = (SIZE * k + 15) // 16 * 16
    w = arg(args, W) + group * arg(args, N) * w_stride
    extents = (arg(args, ID), arg(args, IH), arg(args, IW))
    taps = (arg(args, KD), arg(args, KH), arg(args, KW))
    dilations = (arg(args, DD), arg(args, DH), arg(args, DW))
    strides = (SIZE * arg(args, X_D), SIZE * arg(args, X_H), SIZE * arg(args, X_W))
    shared = shared_memory()
    table = shared + int32(TABLE)
    row = warp // int32(BN // WN) * int32(WM)
    column = warp % int32(BN // WN) * int32(WN)
    steps = (k + int32(BK - 1)) // int32(BK)

    note_windows(args, table, i0, group, tid)
    barrier()
    for s in range(STAGES - 1):
        at = int32(s) * int32(BK)
        tile = shared + int32(s) * int32(STAGE_BYTES)
        copy_windows(BM, THREADS, SIZE, PIECE, tile, table, x, at, channels, extents, taps, dilations, strides, tid)
        copy_tile(BN, THREADS, SIZE, 16, tile + int32(A_BYTES), w, w_stride, j0, n, at, k, tid)
        copies_commit()
    sums = zeros(ELEMENT, WM, WN)
    reading = int32(0)
    writing = int32(STAGES - 1)
    for s in range(steps):
        copies_wait(IN_FLIGHT)
        barrier()
        tile = shared + writing * int32(STAGE_BYTES)
        ahead = (int32(s) + int32(STAGES - 1)) * int32(BK)
        if ahead < k:
            copy_windows(BM, THREADS, SIZE, PIECE, tile, table, x, ahead, channels, extents, taps, dilations, strides, tid)
            copy_tile(BN, THREADS, SIZE, 16, tile + int32(A_BYTES), w, w_stride, j0, n, ahead, k, tid)
        copies_commit()
        tile = shared + reading * int32(STAGE_BYTES)
        sums = product(ELEMENT, WM, WN, sums, tile, tile + int32(A_BYTES), row, column, lane)
        writing = reading
        reading = int32(0) if reading == int32(STAGES - 1) else reading + int32(1)

    copies_wait(0)
    barrier()
    store_sums(ELEMENT, WM, WN, PITCH, shared, row, column, lane, sums)
    barrier()
    # Consecutive threads take consecutive columns.
    j = tid % int32(BN)
    r = tid // int32(BN)
    if j0 + j < n:
        height = min(m - i0, int32(BM))
        image = (i0 + r) // arg(args, M)
        pixel = i0 + r - image * arg(args, M)
        while r < height:
            acc = load_sum(ELEMENT, shared, r * int32(PITCH) + j)
            epilogue(args, image, group, pixel, j0 + j, acc)
            r += int32(THREADS // BN)
            pixel += THREADS // BN
            while pixel >= arg(args, M):
                pixel -= arg(args, M)
                image += 1
