"""Matrix product on CUDA: C[b0, b1, i, j] = sum over k of A[b0, b1, i, k] * B[b0, b1, k, j].

Both operands hold elements of ELEMENT (see kernels/cuda/tiles.py), B as rows of k, [N][K]. A block makes one tile of
BM x BN, each of its warps WM x WN of it, from a ring of STAGES tiles of A and of B in shared memory that asynchronous
copies fill ahead. Sums then pass through the same memory, so that neighbouring threads give neighbouring columns to
the epilogue. Where tiles are few, the SPLITS blocks of a cluster share out K and add each other's sums, in order; or
all blocks share out the steps of all tiles (STREAM, kernels/cuda/stream.py).
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

# Constants. PIECE: the largest power of two up to 16 that divides the bytes of A and of its strides.
UNIT = "mma"
ELEMENT = "f16"
SIZE = 2
PIECE = 16
B_PIECE = 16  # the same of B
B_ROUNDS = 0  # whether B has not been rounded to the precision of products when it was packed
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

# Words. Strides count elements; those of the batch axes may be 0.
A = 0
B = 1
M = 2
N = 3
K = 4
A_ROW = 5
A_B0 = 6
A_B1 = 7
B_ROW = 8
B_B0 = 9
B_B1 = 10
B0 = 11
B1 = 12
ROW_TILES = 13  # ceil(M / BM)
PANELS = 14  # ceil(N / BN)
EPILOGUE = 15
WORDS = 16  # those of the epilogue included
WORKSPACE = 0  # with STREAM the last of all words


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense C."""
    row = ((b0 * arg(args, B1) + b1) * arg(args, M) + i) * arg(args, N)
    st(ptr_f32(arg(args, EPILOGUE)), row + j, acc)


def kernel(args):
    m = int32(arg(args, M))
    n = int32(arg(args, N))
    k = int32(arg(args, K))
    row_tiles = int32(arg(args, ROW_TILES))
    panels = int32(arg(args, PANELS))
    tid = thread()
    lane = tid & int32(31)
    warp = tid >> int32(5)
    if STREAM:
        steps = max(int32(1), (k + int32(BK - 1)) // int32(BK))
        total = int32(row_tiles * panels * int32(arg(args, B0) * arg(args, B1)) * steps)
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
        batch = rest // row_tiles
        i0 = (rest - batch * row_tiles) * int32(BM)
        b0 = batch // arg(args, B1)
        b1 = batch - b0 * arg(args, B1)
        a = arg(args, A) + SIZE * (b0 * arg(args, A_B0) + b1 * arg(args, A_B1))
        b = arg(args, B) + SIZE * (b0 * arg(args, B_B0) + b1 * arg(args, B_B1))
        a_stride = SIZE * arg(args, A_ROW)
        b_stride = SIZE * arg(args, B_ROW)
        shared = shared_memory()
        row = warp // int32(BN // WN) * int32(WM)
        column = warp % int32(BN // WN) * int32(WN)

        rows = tile_rows(BM, THREADS, a, a_stride, i0, m, tid)
        columns = tile_rows(BN, THREADS, b, b_stride, j0, n, tid)
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
            copy_tile(BM, THREADS, SIZE, PIECE, tile, rows, ahead, k, tid)
            copy_tile(BN, THREADS, SIZE, B_PIECE, tile + int32(A_BYTES), columns, ahead, k, tid)
            copies_commit()
            ahead = int32(ahead + BK)
            writing = next_tile(writing, STAGE_BYTES, STAGES)
        sums = zeros(ELEMENT, WM, WN)
        reading = int32(0)
        while step < end:
            copies_wait(IN_FLIGHT)
            round_tile(ELEMENT, BM, THREADS, shared + reading, tid)
            if B_ROUNDS:
                round_tile(ELEMENT, BN, THREADS, shared + reading + int32(A_BYTES), tid)
            tiles_ready(UNIT)
            tile = shared + writing
            if ahead < end:
                copy_tile(BM, THREADS, SIZE, PIECE, tile, rows, ahead, k, tid)
                copy_tile(BN, THREADS, SIZE, B_PIECE, tile + int32(A_BYTES), columns, ahead, k, tid)
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
                acc0 = load_sum(ELEMENT, SPLITS, parts, r * int32(PITCH) + j)
                acc1 = load_sum(ELEMENT, SPLITS, parts, (r + int32(HOP)) * int32(PITCH) + j)
                acc2 = load_sum(ELEMENT, SPLITS, parts, (r + int32(2 * HOP)) * int32(PITCH) + j)
                acc3 = load_sum(ELEMENT, SPLITS, parts, (r + int32(3 * HOP)) * int32(PITCH) + j)
                epilogue(args, b0, b1, i0 + r, j0 + j, acc0)
                epilogue(args, b0, b1, i0 + r + int32(HOP), j0 + j, acc1)
                epilogue(args, b0, b1, i0 + r + int32(2 * HOP), j0 + j, acc2)
                epilogue(args, b0, b1, i0 + r + int32(3 * HOP), j0 + j, acc3)
                r += int32(4 * HOP)
            while r < height:
                acc = load_sum(ELEMENT, SPLITS, parts, r * int32(PITCH) + j)
                epilogue(args, b0, b1, i0 + r, j0 + j, acc)
                r += int32(HOP)
        if SPLITS > 1:
            cluster_barrier(SPLITS)  # others may still read this block's sums
        if STREAM:
            barrier()  # shared memory is free for the next piece
        else:
            return
