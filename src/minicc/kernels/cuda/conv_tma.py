"""Convolution on Hopper GPUs whose operands are brought by the copy engine, channels last, one group, one or two spatial axes.

Rows are the output pixels of all images, k runs over taps, then channels, whose number is a multiple of BK; W is [N][k]. For a
tap and BK channels the engine finds the windows of a tile's rows by itself, with zeros outside of the images. Words are those
of kernels/cuda/conv.py, the rest is as in kernels/cuda/gemm_tma.py.

The words X and W are addresses of tensor maps, see `cuda_tiles.launch_conv`.
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
    copy_windows,
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
ROW_TILES = 30  # ceil(IMAGES * M / (BM * CLUSTER))
PANELS = 31  # ceil(N / BN)
EPILOGUE = 32
WORDS = 33  # those of the epilogue included


@helper
def epilogue(args, b0, b1, i, j, acc):
    """Stand-in for the generated epilogue: stores to a dense [image][pixel][channel of all groups]."""
    pixel = b0 * arg(args, M) + i
    st(ptr_f32(arg(args, EPILOGUE)), (pixel * arg(args, GROUPS) + b1) * arg(args, N) + j, acc)


@helper
def place(args, unit):
    """(first row, first column) of this block's tile, by the number that the tiles of a cluster have together."""
    panels = int32(arg(args, PANELS))
    rest = unit // panels
    return int32((rest * CLUSTER + block() % CLUSTER) * BM), int32((unit - rest * panels) * BN)


@helper
def pixel_of(args, row):
    """(image, pixel) of a row."""
    image = int32(row // int32(arg(args, M)))
    return image, int32(row - image * int32(arg(args, M)))


@helper
def next_pixel(args, image, pixel):
    if pixel + int32(1) == int32(arg(args, M)):
        return int32(image + int32(1)), int32(0)
    return image, int32(pixel + int32(1))


@helper
def bring(args, shared, units):
    """Asks for the tiles of all results of this block, one after the other; of one thread."""
    x, w = arg(args, X), arg(args, W)
    channels, columns = int32(arg(args, C)), int32(arg(args, OW))
    across, down = int32(arg(args, KW) * arg(args, DW)), int32(arg(args, KH) * arg(args, DH))
    map_ready(x)
    map_ready(w)
    part = int32(block() % CLUSTER)
    slot = int32(0)
    parity = int32(1)
    unit = int32(block() // CLUSTER)
    while unit < units:
        i0, j0 = place(args, unit)
        image, pixel = pixel_of(args, i0)
        line = int32(pixel // columns)
        top = int32(line * arg(args, SH) - arg(args, PH))
        left = int32((pixel - line * columns) * arg(args, SW) - arg(args, PW))
        k = int32(0)
        y = int32(0)
        while y < down:
            z = int32(0)
            while z < across:
                channel = int32(0)
                while channel < channels:
                    full = shared + int32(FULL) + slot * int32(8)
                    tile = shared + slot * int32(STAGE_BYTES)
                    phase_wait(shared + int32(EMPTY) + slot * int32(8), parity)
                    phase_announce(full, int32(STAGE_BYTES))
                    copy_windows(tile, x, full, channel, left, top, image, z, y)
                    tile = tile + int32(A_BYTES) + part * int32(PART_BYTES)
                    copy_box(CLUSTER, tile, w, full, k, j0 + part * int32(PART_ROWS), int32(0), int32(0))
                    slot = int32(slot + int32(1))
                    if slot == int32(STAGES):
                        slot = int32(0)
                        parity = int32(parity ^ int32(1))
                    k = int32(k + int32(BK))
                    channel = int32(channel + int32(BK))
                z = int32(z + arg(args, DW))
            y = int32(y + arg(args, DH))
        unit = int32(unit + blocks() // CLUSTER)


@helper
def finish(args, sums_at, lane, i0, j0, height, sums):
    """Gives a warp's sums, 16 rows from i0 of which `height` are there, to the epilogue."""
    n = int32(arg(args, N))
    first_image, first_pixel = pixel_of(args, i0)
    part = int32(0)
    while part < int32(BN // PART):
        store_columns(ELEMENT, BN, PART, PITCH, sums_at, part, lane, sums)
        warp_barrier()
        # Neighbouring lanes take neighbouring columns; four rows at once, so that what an epilogue reads comes together.
        j = j0 + part * int32(PART) + lane
        parts = (sums_at,)
        image0, pixel0 = first_image, first_pixel
        r = int32(0)
        if j < n:
            while r + int32(3) < height:
                acc0 = load_sum(ELEMENT, 1, parts, r * int32(PITCH) + lane)
                acc1 = load_sum(ELEMENT, 1, parts, (r + int32(1)) * int32(PITCH) + lane)
                acc2 = load_sum(ELEMENT, 1, parts, (r + int32(2)) * int32(PITCH) + lane)
                acc3 = load_sum(ELEMENT, 1, parts, (r + int32(3)) * int32(PITCH) + lane)
                image1, pixel1 = next_pixel(args, image0, pixel0)
                image2, pixel2 = next_pixel(args, image1, pixel1)
                image3, pixel3 = next_pixel(args, image2, pixel2)
                epilogue(args, image0, int32(0), pixel0, j, acc0)
                epilogue(args, image1, int32(0), pixel1, j, acc1)
                epilogue(args, image2, int32(0), pixel2, j, acc2)
                epilogue(args, image3, int32(0), pixel3, j, acc3)
                image0, pixel0 = next_pixel(args, image3, pixel3)
                r = int32(r + int32(4))
            while r < height:
                acc = load_sum(ELEMENT, 1, parts, r * int32(PITCH) + lane)
                epilogue(args, image0, int32(0), pixel0, j, acc)
                image0, pixel0 = next_pixel(args, image0, pixel0)
                r = int32(r + int32(1))
        warp_barrier()
        part = int32(part + int32(1))


def kernel(args):
    shared = shared_memory()
    tid = thread()
    lane = int32(tid & 31)
    warp = int32(tid >> 5)
    units = int32(arg(args, PANELS) * arg(args, ROW_TILES))
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
        rows = int32(arg(args, IMAGES) * arg(args, M))
        k = int32(arg(args, KH) * arg(args, KW) * arg(args, C))
        sums_at = shared + int32(SUMS) + warp * int32(SUMS_BYTES)
        row = warp * int32(16)
        slot = int32(0)
        parity = int32(0)
        unit = int32(block() // CLUSTER)
        while unit < units:
            i0, j0 = place(args, unit)
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
            finish(args, sums_at, lane, first, j0, min(rows - first, int32(16)), sums)
            unit = int32(unit + blocks() // CLUSTER)
    if CLUSTER > 1:
        cluster_barrier(CLUSTER)  # others may still bring tiles to this block, or arrive at its barriers
