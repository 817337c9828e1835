"""Matrix product on Hopper GPUs whose operands are brought by the copy engine: as kernels/cuda/gemm.py, with the same words.

A block has one group of four warps that brings tiles and others that multiply. One thread of the first asks for tiles of A and
of B, as soon as a place in the ring of STAGES is free, and announces their bytes at the place's FULL barrier; a multiplying
warp arrives at its EMPTY barrier when its products have read the tile. Blocks take result tiles in turn, so that the ring
fills for the next one while warps finish theirs: each warp's sums pass through a matrix of its own in shared memory to the
generated epilogue, 32 columns at a time.

The blocks of a cluster make tiles one below the other, which need the same B: each brings its part of B to all of them, and
waits until all have read what was there before.

The words A and B are addresses of tensor maps, see `cuda_tiles.launch_gemm`.
"""

from minicc.kernels.cuda.intrinsics import arg, helper, ptr_f32, st
from minicc.kernels.cuda.sums import cluster_barrier, load_sum
from minicc.kernels.cuda.tiles import (
    block,
    blocks,
    int32,
    product,
    products_wait,
    shared_memory,
    thread,
    zeros,
)
from minicc.kernels.cuda.tma import (
    copy_box,
    map_ready,
    phase_announce,
    phase_arrive,
    phase_begin,
    phase_wait,
    phases_ready,
    registers,
    store_columns,
    warp_barrier,
)

# Constants.
ELEMENT = "bf16"
BM = 128
BN = 256
THREADS = 384
WORKERS = 256  # threads that multiply
STAGES = 4
BK = 64  # elements of k of a tile, 128 bytes
A_BYTES = 16384  # 128 * BM
STAGE_BYTES = 49152  # 128 * (BM + BN)
FULL = 196608  # STAGES * STAGE_BYTES: where the barriers are, 8 bytes each, first those of full places
EMPTY = 196640  # FULL + 8 * STAGES
SUMS = 196672  # EMPTY + 8 * STAGES: where the matrices of sums are
SUMS_BYTES = 2304  # 4 * 16 * PITCH, of a warp
PART = 32  # columns of sums that a warp gives to the epilogue at a time
PITCH = 36
CLUSTER = 1  # blocks of a cluster
PART_ROWS = 256  # BN / CLUSTER: rows of B that a block brings
PART_BYTES = 32768  # 128 * PART_ROWS
FEW = 40  # registers of the threads that bring tiles, and of those that multiply
MANY = 232

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
ROW_TILES = 13  # ceil(M / (BM * CLUSTER))
PANELS = 14  # ceil(N / BN)
EPILOGUE = 15
WORDS = 16  # those of the epilogue included


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense C."""
    row = ((b0 * arg(args, B1) + b1) * arg(args, M) + i) * arg(args, N)
    st(ptr_f32(arg(args, EPILOGUE)), row + j, acc)


@helper
def place(args, unit):
    """(b0, b1, first row, first column) of this block's tile, by the number that the tiles of a cluster have together."""
    panels, row_tiles = int32(arg(args, PANELS)), int32(arg(args, ROW_TILES))
    rest = int32(unit // panels)
    batch = int32(rest // row_tiles)
    b0 = int32(batch // int32(arg(args, B1)))
    b1 = int32(batch - b0 * int32(arg(args, B1)))
    row_tile = (rest - batch * row_tiles) * CLUSTER + block() % CLUSTER
    return b0, b1, int32(row_tile * BM), int32((unit - rest * panels) * BN)


@helper
def bring(args, shared, units):
    """Asks for the tiles of all results of this block, one after the other; of one thread."""
    k = int32(arg(args, K))
    a, b = arg(args, A), arg(args, B)
    # A batch axis of stride 0 has one element in the map.
    a_b0, a_b1 = int32(min(arg(args, A_B0), 1)), int32(min(arg(args, A_B1), 1))
    b_b0, b_b1 = int32(min(arg(args, B_B0), 1)), int32(min(arg(args, B_B1), 1))
    map_ready(a)
    map_ready(b)
    part = int32(block() % CLUSTER)
    slot = int32(0)
    parity = int32(1)
    unit = int32(block() // CLUSTER)
    while unit < units:
        b0, b1, i0, j0 = place(args, unit)
        step = int32(0)
        while step < k:
            full = shared + int32(FULL) + slot * int32(8)
            tile = shared + slot * int32(STAGE_BYTES)
            phase_wait(shared + int32(EMPTY) + slot * int32(8), parity)
            phase_announce(full, int32(STAGE_BYTES))
            copy_box(1, tile, a, full, step, i0, b1 * a_b1, b0 * a_b0)
            tile = tile + int32(A_BYTES) + part * int32(PART_BYTES)
            copy_box(CLUSTER, tile, b, full, step, j0 + part * int32(PART_ROWS), b1 * b_b1, b0 * b_b0)
            slot = int32(slot + int32(1))
            if slot == int32(STAGES):
                slot = int32(0)
                parity = int32(parity ^ int32(1))
            step = int32(step + int32(BK))
        unit = int32(unit + blocks() // CLUSTER)


@helper
def finish(args, sums_at, lane, b0, b1, i0, j0, height, sums):
    """Gives a warp's sums, 16 rows from i0 of which `height` are there, to the epilogue."""
    n = int32(arg(args, N))
    part = int32(0)
    while part < int32(BN // PART):
        store_columns(ELEMENT, BN, PART, PITCH, sums_at, part, lane, sums)
        warp_barrier()
        # Neighbouring lanes take neighbouring columns; four rows at once, so that what an epilogue reads comes together.
        j = j0 + part * int32(PART) + lane
        parts = (sums_at,)
        r = int32(0)
        if j < n:
            while r + int32(3) < height:
                acc0 = load_sum(ELEMENT, 1, parts, r * int32(PITCH) + lane)
                acc1 = load_sum(ELEMENT, 1, parts, (r + int32(1)) * int32(PITCH) + lane)
                acc2 = load_sum(ELEMENT, 1, parts, (r + int32(2)) * int32(PITCH) + lane)
                acc3 = load_sum(ELEMENT, 1, parts, (r + int32(3)) * int32(PITCH) + lane)
                epilogue(args, b0, b1, i0 + r, j, acc0)
                epilogue(args, b0, b1, i0 + r + int32(1), j, acc1)
                epilogue(args, b0, b1, i0 + r + int32(2), j, acc2)
                epilogue(args, b0, b1, i0 + r + int32(3), j, acc3)
                r = int32(r + int32(4))
            while r < height:
                acc = load_sum(ELEMENT, 1, parts, r * int32(PITCH) + lane)
                epilogue(args, b0, b1, i0 + r, j, acc)
                r = int32(r + int32(1))
        warp_barrier()
        part = int32(part + int32(1))


def kernel(args):
    shared = shared_memory()
    tid = thread()
    lane = int32(tid & 31)
    warp = int32(tid >> 5)
    units = int32(arg(args, PANELS) * arg(args, ROW_TILES) * arg(args, B0) * arg(args, B1))
    if tid == int32(0):
        for slot in range(STAGES):
            phase_begin(shared + int32(FULL + 8 * slot), int32(1))
            phase_begin(shared + int32(EMPTY + 8 * slot), int32(WORKERS // 32 * CLUSTER))
        phases_ready()
    cluster_barrier(CLUSTER)
    if tid >= int32(WORKERS):
        registers(FEW, 0)
        if tid == int32(WORKERS):
            bring(args, shared, units)
    else:
        registers(MANY, 1)
        m = int32(arg(args, M))
        k = int32(arg(args, K))
        sums_at = shared + int32(SUMS) + warp * int32(SUMS_BYTES)
        row = warp * int32(16)
        slot = int32(0)
        parity = int32(0)
        unit = int32(block() // CLUSTER)
        while unit < units:
            b0, b1, i0, j0 = place(args, unit)
            sums = zeros(ELEMENT, 16, BN)
            read = int32(-1)  # the place that products on their way still read
            step = int32(0)
            while step < k:
                tile = shared + slot * int32(STAGE_BYTES)
                phase_wait(shared + int32(FULL) + slot * int32(8), parity)
                sums = product("wgmma", ELEMENT, 16, BN, sums, tile, tile + int32(A_BYTES), row, int32(0), lane)
                products_wait("wgmma", 1)
                if lane < int32(CLUSTER) and read >= int32(0):
                    phase_arrive(CLUSTER, shared + int32(EMPTY) + read * int32(8), lane)
                read = slot
                slot = int32(slot + int32(1))
                if slot == int32(STAGES):
                    slot = int32(0)
                    parity = int32(parity ^ int32(1))
                step = int32(step + int32(BK))
            products_wait("wgmma", 0)
            if lane < int32(CLUSTER) and read >= int32(0):
                phase_arrive(CLUSTER, shared + int32(EMPTY) + read * int32(8), lane)
            first = i0 + row
            finish(args, sums_at, lane, b0, b1, first, j0, min(m - first, int32(16)), sums)
            unit = int32(unit + blocks() // CLUSTER)
    if CLUSTER > 1:
        cluster_barrier(CLUSTER)  # others may still bring tiles to this block, or arrive at its barriers
