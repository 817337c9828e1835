"""Matrix product of a few rows on CUDA: C[b0, b1, i, j] = sum over k of A[b0, b1, i, k] * B[b0, b1, k, j].

As kernels/cuda/gemm.py, whose words it has, for so few rows that reading B takes the time. A warp makes BM x WN results
with its lanes along k, straight from global memory: B is read once, by loads of 16 bytes where its addresses allow it,
A, which is small, comes from the caches. The warps of a block have columns next to each other, so that neighbouring threads
give neighbouring columns to the epilogue. Where columns are few, the SPLITS blocks of a cluster share out K.
"""

from minicc.kernels.cuda.dots import add_last, add_products, line_addresses, no_sums, store_dots
from minicc.kernels.cuda.intrinsics import arg, helper, ptr_f32, st
from minicc.kernels.cuda.sums import cluster_barrier, cluster_memory, load_sum
from minicc.kernels.cuda.tiles import block, int32, shared_memory, thread

# Constants. PIECE, B_PIECE: the largest powers of two up to 16 that divide the bytes of A, of B and of their strides.
ELEMENT = "f32"
SIZE = 4
PIECE = 16
B_PIECE = 16
BM = 1
BN = 8
WN = 2
THREADS = 128
BLOCKS = 4  # of a multiprocessor at least: at most 128 registers
DEEP = 4  # chunks of a row of k that a lane reads at once
PER = 4  # elements of a chunk
PITCH = 12  # BN + 4
SPLITS = 1  # blocks of a cluster that share out the depth

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
    shared = shared_memory()
    column = (tid >> int32(5)) * int32(WN)

    lefts = line_addresses(BM, a, SIZE * arg(args, A_ROW), i0, m)
    rights = line_addresses(WN, b, SIZE * arg(args, B_ROW), j0 + column, n)
    chunks = k // int32(PER)
    share = (chunks + int32(SPLITS - 1)) // int32(SPLITS)
    end = int32(min(part * share + share, chunks))
    chunk = int32(part * share + lane)
    sums = no_sums(BM, WN)
    while chunk + int32(32 * (DEEP - 1)) < end:
        sums = add_products(ELEMENT, DEEP, PIECE, B_PIECE, sums, lefts, rights, chunk)
        chunk = int32(chunk + int32(32 * DEEP))
    while chunk < end:
        sums = add_products(ELEMENT, 1, PIECE, B_PIECE, sums, lefts, rights, chunk)
        chunk = int32(chunk + int32(32))
    last = int32(chunks * int32(PER) + lane)
    if part == int32(SPLITS - 1) and last < k:
        sums = add_last(ELEMENT, sums, lefts, rights, last)

    store_dots(WN, PITCH, shared, column, lane, sums)
    cluster_barrier(SPLITS)
    parts = cluster_memory(SPLITS, shared)
    r = tid // int32(BN)
    j = tid - r * int32(BN)
    if part == 0 and r < min(int32(BM), m - i0) and j0 + j < n:
        acc = load_sum("f32", SPLITS, parts, r * int32(PITCH) + j)
        epilogue(args, b0, b1, i0 + r, j0 + j, acc)
    if SPLITS > 1:
        cluster_barrier(SPLITS)  # others may still read this block's sums
