"""Convolution on CUDA, channels last, 1 to 3 spatial axes, as a matrix product whose left operand is gathered.

Rows are the output pixels of all images, k runs over taps, then channels of the group; W is [group][N][k padded with
zeros to 16 bytes]. Copies into shared memory look positions up in a table of the rows' windows, and what lies
outside the input becomes 0. The rest is as in kernels/cuda/gemm.py.
"""

from minicc.kernels.cuda.intrinsics import arg, helper, ptr_f32, st
from minicc.kernels.cuda.stream import add_part, last_to_arrive, next_piece, part_of, put_part, share_of
from minicc.kernels.cuda.sums import cluster_barrier, cluster_memory, load_sum, store_sums
from minicc.kernels.cuda.tiles import (
    barrier,
    block,
    copies_commit,
    copies_wait,
    copy_tile,
    int32,
    next_tile,
    product,
    products_wait,
    round_tile,
    shared_memory,
    thread,
    tile_rows,
    tiles_ready,
    zeros,
)
from minicc.kernels.cuda.windows import (
    copy_windows,
    divide,
    inside_taps,
    load_pixel,
    reciprocal,
    store_window,
    window_rows,
    window_taps,
)

# Constants. PIECE: the largest power of two up to 16 that divides the bytes of X, its strides and of C.
UNIT = "mma"
ELEMENT = "f16"
SIZE = 2
PIECE = 16
BM = 128
BN = 128
WM = 64
WN = 64
THREADS = 128
STAGES = 3
PENDING = 0  # products of tiles before that may still be on their way
AHEAD = 2  # STAGES - 1 - PENDING
IN_FLIGHT = 1  # AHEAD - 1
BK = 64  # 128 / SIZE
A_BYTES = 16384  # 128 * BM
STAGE_BYTES = 32768  # 128 * (BM + BN)
PITCH = 132  # BN + 4
SPLITS = 1  # blocks of a cluster that share out the depth of a tile
STEP = 1  # THREADS / BN: rows that the block's threads finish at once
HOP = 1  # STEP * SPLITS: rows that the cluster's threads finish at once
STREAM = 0  # whether all blocks share out the steps of all tiles; SPLITS is 1 then
PART_BYTES = 65536  # 4 * BM * BN
COUNTER_BYTES = 16384
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
WORKSPACE = 0  # with STREAM the last of all words


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense [image][pixel][channel of all groups]."""
    pixel = b0 * arg(args, M) + i
    st(ptr_f32(arg(args, EPILOGUE)), (pixel * arg(args, GROUPS) + b1) * arg(args, N) + j, acc)


@helper
def note_windows(args, table, i0, group, tid):
    """Fills the table for the block's rows; the windows of rows behind the last one lie outside every input."""
    rows = int32(arg(args, IMAGES) * arg(args, M))
    pixels, columns, lines = int32(arg(args, M)), int32(arg(args, OW)), int32(arg(args, OH))
    across, down, deep = int32(arg(args, KW)), int32(arg(args, KH)), int32(arg(args, KD))
    r = tid
    while r < int32(BM):
        row = int32(i0 + r)
        if row < rows:
            image = divide(row, pixels)
            pixel = int32(row - image * pixels)
            line = divide(pixel, columns)
            plane = divide(line, lines)
            z = int32(plane * arg(args, SD) - arg(args, PD))
            y = int32((line - plane * lines) * arg(args, SH) - arg(args, PH))
            x = int32((pixel - line * columns) * arg(args, SW) - arg(args, PW))
            inside = inside_taps(x, int32(arg(args, DW)), across, int32(arg(args, IW)))
            inside = inside | inside_taps(y, int32(arg(args, DH)), down, int32(arg(args, IH))) << across
            inside = inside | inside_taps(z, int32(arg(args, DD)), deep, int32(arg(args, ID))) << across + down
            place = image * arg(args, X_IMAGE) + z * arg(args, X_D) + y * arg(args, X_H) + x * arg(args, X_W)
            address = arg(args, X) + SIZE * (place + group * arg(args, C))
            store_window(table, r, address, image, pixel, int32(inside))
        else:
            store_window(table, r, arg(args, X), int32(0), int32(0), int32(0))
        r = int32(r + THREADS)


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
    if STREAM:
        steps = max(int32(1), (k + int32(BK - 1)) // int32(BK))
        total = int32(row_tiles * panels * int32(arg(args, GROUPS)) * steps)
        share = share_of(total)
        at = int32(block() * share)
        last = int32(min(at + share, total))
    while True:  # once, or with STREAM for each piece of a tile
        if STREAM:
            if at >= last:
                return
            unit, begin, end, first, count = next_piece(at, last, steps, share)
            at = int32(at + end - begin)
            part = int32(0)
        else:
            part = block() % int32(SPLITS)
            unit = block() // int32(SPLITS)
        rest = unit // panels
        j0 = (unit - rest * panels) * int32(BN)
        group = rest // row_tiles
        i0 = (rest - group * row_tiles) * int32(BM)
        w_stride = (SIZE * k + 15) // 16 * 16
        w = arg(args, W) + group * arg(args, N) * w_stride
        across, down = int32(arg(args, KW)), int32(arg(args, KH))
        sizes = (channels, across, down, int32(arg(args, KD)))
        inverses = (reciprocal(channels), reciprocal(across), reciprocal(down))
        strides = (
            int32(SIZE * arg(args, X_W) * arg(args, DW)),
            int32(SIZE * arg(args, X_H) * arg(args, DH)),
            int32(SIZE * arg(args, X_D) * arg(args, DD)),
        )
        shared = shared_memory()
        table = shared + int32(TABLE)
        row = warp // int32(BN // WN) * int32(WM)
        column = warp % int32(BN // WN) * int32(WN)

        note_windows(args, table, i0, group, tid)
        barrier()
        rows = window_rows(BM, THREADS, table, tid)
        inside = window_taps(BM, THREADS, table, tid)
        columns = tile_rows(BN, THREADS, w, w_stride, j0, n, tid)
        if STREAM:
            step = int32(begin * BK)
            end = int32(min(end * BK, k))
        else:
            share = (k + int32(SPLITS * BK - 1)) // int32(SPLITS * BK) * int32(BK)
            step = int32(part * share)
            end = int32(min(step + share, k))
        ahead = step
        writing = int32(0)
        for _ in range(AHEAD):
            tile = shared + writing
            copy_windows(BM, THREADS, SIZE, PIECE, tile, rows, inside, ahead, sizes, inverses, strides, tid)
            copy_tile(BN, THREADS, SIZE, 16, tile + int32(A_BYTES), columns, ahead, k, tid)
            copies_commit()
            ahead = int32(ahead + BK)
            writing = next_tile(writing, STAGE_BYTES, STAGES)
        sums = zeros(ELEMENT, WM, WN)
        reading = int32(0)
        while step < end:
            copies_wait(IN_FLIGHT)
            round_tile(ELEMENT, BM, THREADS, shared + reading, tid)
            tiles_ready(UNIT)
            tile = shared + writing
            if ahead < end:
                copy_windows(BM, THREADS, SIZE, PIECE, tile, rows, inside, ahead, sizes, inverses, strides, tid)
                copy_tile(BN, THREADS, SIZE, 16, tile + int32(A_BYTES), columns, ahead, k, tid)
            copies_commit()
            tile = shared + reading
            sums = product(UNIT, ELEMENT, WM, WN, sums, tile, tile + int32(A_BYTES), row, column, lane)
            products_wait(UNIT, PENDING)
            writing = next_tile(writing, STAGE_BYTES, STAGES)
            reading = next_tile(reading, STAGE_BYTES, STAGES)
            ahead = int32(ahead + BK)
            step = int32(step + BK)

        products_wait(UNIT, 0)
        copies_wait(0)
        if STREAM and count > int32(1):
            # Who comes last adds the parts of all, in the order of the blocks.
            stored = arg(args, WORKSPACE) + COUNTER_BYTES
            put_part(ELEMENT, WM, WN, THREADS, stored + PART_BYTES * part_of(block(), first), tid, sums)
            if last_to_arrive(arg(args, WORKSPACE) + 4 * first, int32(count - 1), tid) == int32(0):
                continue
            sums = zeros(ELEMENT, WM, WN)
            other = first
            while other < first + count:
                sums = add_part(ELEMENT, WM, WN, THREADS, stored + PART_BYTES * part_of(other, first), tid, sums)
                other = int32(other + 1)
        barrier()
        store_sums(ELEMENT, WM, WN, PITCH, shared, row, column, lane, sums)
        cluster_barrier(SPLITS)
        parts = cluster_memory(SPLITS, shared)
        # Consecutive threads take consecutive columns; four rows at once, so that what an epilogue reads comes together.
        j = tid % int32(BN)
        r = int32(tid // int32(BN) + part * int32(STEP))
        if j0 + j < n:
            height = min(m - i0, int32(BM))
            while r + int32(3 * HOP) < height:
                image0, pixel0 = load_pixel(table, r)
                image1, pixel1 = load_pixel(table, r + int32(HOP))
                image2, pixel2 = load_pixel(table, r + int32(2 * HOP))
                image3, pixel3 = load_pixel(table, r + int32(3 * HOP))
                acc0 = load_sum(ELEMENT, SPLITS, parts, r * int32(PITCH) + j)
                acc1 = load_sum(ELEMENT, SPLITS, parts, (r + int32(HOP)) * int32(PITCH) + j)
                acc2 = load_sum(ELEMENT, SPLITS, parts, (r + int32(2 * HOP)) * int32(PITCH) + j)
                acc3 = load_sum(ELEMENT, SPLITS, parts, (r + int32(3 * HOP)) * int32(PITCH) + j)
                epilogue(args, image0, group, pixel0, j0 + j, acc0)
                epilogue(args, image1, group, pixel1, j0 + j, acc1)
                epilogue(args, image2, group, pixel2, j0 + j, acc2)
                epilogue(args, image3, group, pixel3, j0 + j, acc3)
                r += int32(4 * HOP)
            while r < height:
                image, pixel = load_pixel(table, r)
                acc = load_sum(ELEMENT, SPLITS, parts, r * int32(PITCH) + j)
                epilogue(args, image, group, pixel, j0 + j, acc)
                r += int32(HOP)
        if SPLITS > 1:
            cluster_barrier(SPLITS)  # others may still read this block's sums
        if STREAM:
            barrier()  # shared memory is free for the next piece
        else:
            return
