"""Attention on CUDA: Y[b, h, i] = sum over t of softmax_t(SCALE * Q[b, h, i] . K[b, g, t] + mask) * V[b, g, t], 16-bit elements.

A block makes BM queries of one head, each of its warps 16 of them. Tiles of BN keys and their values pass through two stages
of shared memory, which asynchronous copies fill one tile ahead. Scores, weights and sums stay in registers, in float32
(weights are rounded to multiply values): largest scores and totals are kept per query, and sums scaled down when a
larger score turns up (online softmax). A query that may attend no key gets zeros, as on the CPU.

Heads of D elements are padded with zeros in shared memory to DEPTH, a multiple of 16; values of DV to WIDTH. Rows of
keys that do not exist are zeros too: their weights are 0, and 0 times what lies in memory by chance may be NaN.
"""

import numpy as np

from minicc.kernels.cuda.intrinsics import arg, helper
from minicc.kernels.cuda.softmax_tiles import (
    add_mask,
    clear_rows,
    float_of_bits,
    forbid,
    power,
    powers,
    query_fragments,
    rescale,
    row_sum,
    row_top,
    scores,
    store_rows,
    sum_of_four,
    weighted_sums,
)
from minicc.kernels.cuda.tiles import (
    barrier,
    block,
    copies_commit,
    copies_wait,
    copy_tile,
    int32,
    shared_memory,
    thread,
    tile_rows,
    zeros,
)

# Constants. *_PIECE: the largest power of two up to 16 that divides the bytes of an operand and of its strides.
ELEMENT = "f16"
THREADS = 128
BM = 64  # THREADS / 2
BN = 64
DEPTH = 64
WIDTH = 64
D_PANELS = 1  # DEPTH / 64, rounded up
V_PANELS = 1  # WIDTH / 64, rounded up
Q_PANEL = 8192  # 128 * BM
K_PANEL = 8192  # 128 * BN
Q_BYTES = 8192  # D_PANELS * Q_PANEL
K_BYTES = 8192  # D_PANELS * K_PANEL
STAGE_BYTES = 16384  # (D_PANELS + V_PANELS) * K_PANEL
Q_PIECE = 16
K_PIECE = 16
V_PIECE = 16
MASK_TYPE = "f32"
MASK_SIZE = 4  # 0 without a mask
PAIRS = 1  # whether two neighbours of the result may be stored at once

# Words. Strides count elements; the last axes of Q, K, V and Y are contiguous.
Q = 0
K = 1
V = 2
MASK = 3
Y = 4
B = 5
GROUPS = 6  # heads of keys
GROUP = 7  # heads of queries for each of them
S = 8
T = 9
D = 10
DV = 11
SCALE = 12  # bits of a float32
CAUSAL = 13  # 1: query i attends key t if t <= i + T - S
Q_B = 14
Q_H = 15
Q_ROW = 16
Q_D = 17
K_B = 18
K_H = 19
K_ROW = 20
V_B = 21
V_H = 22
V_ROW = 23
M_B = 24
M_H = 25
M_ROW = 26
M_KEY = 27
Y_B = 28
Y_H = 29
Y_ROW = 30
PANELS = 31  # ceil(S / BM)
KEYS = 32
WORDS = 33

LOWEST = np.float32(-np.inf)
ZERO = np.float32(0)
ONE = np.float32(1)


@helper
def copy_keys(args, k, v, start, tile, tid):
    """Starts the copies of BN keys and their values."""
    t = int32(arg(args, T))
    rows = tile_rows(BN, THREADS, k, 2 * arg(args, K_ROW), start, t, tid)
    for panel in range(D_PANELS):
        copy_tile(BN, THREADS, 2, K_PIECE, tile + panel * K_PANEL, rows, 64 * panel, arg(args, D), tid)
    rows = tile_rows(BN, THREADS, v, 2 * arg(args, V_ROW), start, t, tid)
    for panel in range(V_PANELS):
        place = int32(tile + K_BYTES + panel * K_PANEL)
        copy_tile(BN, THREADS, 2, V_PIECE, place, rows, 64 * panel, arg(args, DV), tid)
        clear_rows(BN, THREADS, place, rows, tid)


@helper
def shift_of(top):
    """What scores are lowered by: a row without any keeps them all -inf."""
    return ZERO if top == LOWEST else top


@helper
def share_of(total):
    return ONE / (ONE if total == ZERO else total)


def kernel(args):
    s = int32(arg(args, S))
    t = int32(arg(args, T))
    tid = thread()
    lane = tid & int32(31)
    tiles = int32(arg(args, PANELS))
    unit = block() // tiles
    # The last queries first: where attention is causal they take longest.
    i0 = int32((tiles - int32(1) - (block() - unit * tiles)) * int32(BM))
    heads = arg(args, GROUPS) * arg(args, GROUP)
    b = unit // heads
    h = unit - b * heads
    g = h // arg(args, GROUP)
    q = arg(args, Q) + 2 * (b * arg(args, Q_B) + h * arg(args, Q_H))
    k = arg(args, K) + 2 * (b * arg(args, K_B) + g * arg(args, K_H))
    v = arg(args, V) + 2 * (b * arg(args, V_B) + g * arg(args, V_H))
    scale = float_of_bits(arg(args, SCALE))
    shared = shared_memory()
    ring = int32(shared + int32(Q_BYTES))

    # Keys that the block's last row, the warp's first and last one, and both rows of this thread may attend.
    own = int32((tid >> int32(5)) * int32(16))
    row = int32(i0 + own + (lane >> int32(2)))
    end = t
    least = t
    most = t
    first = t
    second = t
    if arg(args, CAUSAL) != 0:
        beyond = t - s + int32(1)
        end = int32(min(t, i0 + int32(BM - 1) + beyond))
        least = int32(min(t, i0 + own + beyond))
        most = int32(min(t, i0 + own + int32(15) + beyond))
        first = int32(min(t, row + beyond))
        second = int32(min(t, row + int32(8) + beyond))

    rows = tile_rows(BM, THREADS, q, 2 * arg(args, Q_ROW), i0, s, tid)
    for panel in range(D_PANELS):
        copy_tile(BM, THREADS, 2, Q_PIECE, shared + panel * Q_PANEL, rows, 64 * panel, arg(args, D), tid)
    copy_keys(args, k, v, int32(0), ring, tid)
    copies_commit()
    copies_wait(0)
    barrier()
    queries = query_fragments(DEPTH, Q_PANEL, shared, own, lane)
    mask = arg(args, MASK) + MASK_SIZE * (b * arg(args, M_B) + h * arg(args, M_H))
    mask_first = mask + MASK_SIZE * (min(row, s - int32(1)) * arg(args, M_ROW))
    mask_second = mask + MASK_SIZE * (min(row + int32(8), s - int32(1)) * arg(args, M_ROW))
    sums = zeros(ELEMENT, 16, WIDTH)
    top_first = LOWEST
    top_second = LOWEST
    total_first = ZERO
    total_second = ZERO
    start = int32(0)
    reading = int32(0)
    while start < end:
        tile = int32(ring + reading)
        reading = int32(STAGE_BYTES - reading)
        ahead = int32(start + int32(BN))
        if ahead < end:
            copy_keys(args, k, v, ahead, int32(ring + reading), tid)
        copies_commit()
        if start < most:
            found = scores(ELEMENT, DEPTH, BN, scale, queries, tile, lane)
            if MASK_SIZE:
                step = MASK_SIZE * arg(args, M_KEY)
                found = add_mask(MASK_TYPE, BN, found, mask_first, mask_second, step, start, t - int32(1), lane)
            if ahead > least:
                found = forbid(BN, found, start, first, second, lane)
            next_first = row_top(BN, 0, found, top_first)
            next_second = row_top(BN, 1, found, top_second)
            shift_first = shift_of(next_first)
            shift_second = shift_of(next_second)
            factor_first = power(top_first - shift_first)
            factor_second = power(top_second - shift_second)
            top_first = next_first
            top_second = next_second
            found = powers(BN, found, shift_first, shift_second)
            total_first = total_first * factor_first + row_sum(BN, 0, found)
            total_second = total_second * factor_second + row_sum(BN, 1, found)
            sums = rescale(WIDTH, sums, factor_first, factor_second)
            sums = weighted_sums(ELEMENT, BN, WIDTH, sums, found, tile + int32(K_BYTES), lane)
        copies_wait(0)
        barrier()
        start = ahead

    sums = rescale(WIDTH, sums, share_of(sum_of_four(total_first)), share_of(sum_of_four(total_second)))
    y = arg(args, Y) + 2 * (b * arg(args, Y_B) + h * arg(args, Y_H) + row * arg(args, Y_ROW))
    y_first = y if row < s else 0
    y_second = y + 16 * arg(args, Y_ROW) if row + int32(8) < s else 0
    store_rows(ELEMENT, WIDTH, PAIRS, sums, y_first, y_second, arg(args, DV), lane)
