"""Attention on CUDA: Y[b, h, i] = sum over t of softmax_t(SCALE * Q[b, h, i] . K[b, g, t] + mask) * V[b, g, t], 16-bit elements.

Queries of the heads that share a head of keys are rows of one matrix: row i is query i / GROUP of the head i % GROUP. A block
makes BM rows. Tiles of BN keys and their values pass through two stages of shared memory, which asynchronous copies
fill one tile ahead. A warp makes 16 rows; of few rows all SHARERS warps make the same ones, each with its share of every tile's
keys. Scores, weights and sums stay in registers, in float32 (weights are rounded to multiply values): largest scores
and totals are kept per row, and sums scaled down when a larger score turns up (online softmax). A query that may
attend no key gets zeros, as on the CPU.

Where CUT is 1 and rows are few beside the device, blocks share out the keys, KEYS to each; what they find (sums of WIDTH
columns, not divided by the total; the largest score; the total) goes to PARTIALS, and kernels/cuda/attention_join.py joins it.

Heads of D elements are padded with zeros in shared memory to DEPTH; values of DV to WIDTH, a multiple of 16. Rows of keys
that do not exist are zeros too: their weights are 0, and 0 times what lies in memory by chance may be NaN.
"""

import numpy as np

from minicc.kernels.cuda.attention_products import query_fragments, query_rows, scores, weighted_sums
from minicc.kernels.cuda.intrinsics import arg, helper, ptr_f32, st
from minicc.kernels.cuda.softmax_tiles import (
    add_mask,
    clear_rows,
    float_of_bits,
    forbid,
    get_numbers,
    merge,
    power,
    powers,
    put_numbers,
    quotient,
    rescale,
    row_sum,
    row_top,
    store_rows,
    sum_of_four,
)
from minicc.kernels.cuda.tiles import (
    barrier,
    block,
    copies_commit,
    copies_wait,
    copy_tile,
    int32,
    round_tile,
    shared_memory,
    thread,
    tile_rows,
    zeros,
)

# Constants. *_PIECE: the largest power of two up to 16 that divides the bytes of an operand and of its strides.
ELEMENT = "f16"
RESULT = "f16"
SIZE = 2
THREADS = 128
SHARERS = 1  # warps that share rows: all of a block, or 1
BM = 64  # THREADS / 2 / SHARERS
BN = 64
OWN = 64  # BN / SHARERS
PER = 64  # elements of a panel's row
HELD = 1  # whether queries stay in registers
STEPS = 4  # of 32 bytes that a key has
WIDTH = 64
SUMS = 32  # of a thread, WIDTH / 2
D_PANELS = 1
V_PANELS = 1
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
CUT = 1  # whether blocks may share out the keys
KEPT = 4608  # bytes of what a warp has found, 64 * WIDTH + 512
PITCH = 272  # bytes of a row of partial results, 4 * (WIDTH + 4)
SLOT = 64  # rows that each block has there

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
PANELS = 31  # ceil(S * GROUP / BM)
KEYS = 32  # of a block, a multiple of BN
PARTIALS = 33
WORDS = 34

LOWEST = np.float32(-np.inf)
ZERO = np.float32(0)
ONE = np.float32(1)


@helper
def copy_keys(args, k, v, start, tile, tid):
    """Starts the copies of BN keys and their values."""
    t = int32(arg(args, T))
    rows = tile_rows(BN, THREADS, k, SIZE * arg(args, K_ROW), start, t, tid)
    for panel in range(D_PANELS):
        copy_tile(BN, THREADS, SIZE, K_PIECE, tile + panel * K_PANEL, rows, PER * panel, arg(args, D), tid)
    rows = tile_rows(BN, THREADS, v, SIZE * arg(args, V_ROW), start, t, tid)
    for panel in range(V_PANELS):
        place = int32(tile + K_BYTES + panel * K_PANEL)
        copy_tile(BN, THREADS, SIZE, V_PIECE, place, rows, PER * panel, arg(args, DV), tid)
        clear_rows(BN, THREADS, place, rows, tid)


@helper
def round_keys(tile, tid):
    """Rounds what this thread has copied of a tile's keys and values, where they have more bits than are multiplied."""
    for panel in range(D_PANELS + V_PANELS):
        round_tile(ELEMENT, BN, THREADS, tile + panel * K_PANEL, tid)


@helper
def shift_of(top):
    """What scores are lowered by: a row without any keeps them all -inf."""
    return ZERO if top == LOWEST else top


@helper
def share_of(total):
    return ONE / (ONE if total == ZERO else total)


@helper
def place_of(row, group, by_query, by_head):
    """The distance of a row from the first one."""
    query = quotient(row, group)
    return query * by_query + (row - query * group) * by_head


def kernel(args):
    s = int32(arg(args, S))
    t = int32(arg(args, T))
    group = int32(arg(args, GROUP))
    count = int32(s * group)
    tid = thread()
    lane = tid & int32(31)
    warp = tid >> int32(5)
    share = int32(warp % int32(SHARERS))
    keys = t
    parts = int32(1)
    if CUT:
        keys = int32(arg(args, KEYS))
        parts = int32(max(int32(1), quotient(t + keys - int32(1), keys)))
    tile_number = quotient(block(), parts)
    begin = int32((block() - tile_number * parts) * keys)
    tiles = int32(arg(args, PANELS))
    unit = quotient(tile_number, tiles)
    # The last queries first: where attention is causal they take longest.
    i0 = int32((tiles - int32(1) - (tile_number - unit * tiles)) * int32(BM))
    b = quotient(unit, arg(args, GROUPS))
    g = unit - b * arg(args, GROUPS)
    h = g * group
    q = arg(args, Q) + SIZE * (b * arg(args, Q_B) + h * arg(args, Q_H))
    k = arg(args, K) + SIZE * (b * arg(args, K_B) + g * arg(args, K_H))
    v = arg(args, V) + SIZE * (b * arg(args, V_B) + g * arg(args, V_H))
    scale = float_of_bits(arg(args, SCALE))
    shared = shared_memory()
    ring = int32(shared + int32(Q_BYTES))

    # Keys that the block's last row, the warp's first and last one, and both rows of this thread may attend.
    own = int32(warp // int32(SHARERS) * int32(16))
    row = int32(i0 + own + (lane >> int32(2)))
    end = t
    least = t
    most = t
    first = t
    second = t
    if arg(args, CAUSAL) != 0:
        beyond = t - s + int32(1)
        end = int32(min(t, quotient(i0 + int32(BM - 1), group) + beyond))
        least = int32(min(t, quotient(i0 + own, group) + beyond))
        most = int32(min(t, quotient(i0 + own + int32(15), group) + beyond))
        first = int32(min(t, quotient(row, group) + beyond))
        second = int32(min(t, quotient(row + int32(8), group) + beyond))
    if CUT:
        end = int32(min(end, begin + keys))
    if i0 + own >= count:
        most = int32(0)

    rows = query_rows(BM, THREADS, q, SIZE * arg(args, Q_ROW), SIZE * arg(args, Q_H), group, i0, count, tid)
    for panel in range(D_PANELS):
        copy_tile(BM, THREADS, SIZE, Q_PIECE, shared + panel * Q_PANEL, rows, PER * panel, arg(args, D), tid)
    copy_keys(args, k, v, begin, ring, tid)
    copies_commit()
    copies_wait(0)
    for panel in range(D_PANELS):
        round_tile(ELEMENT, BM, THREADS, shared + panel * Q_PANEL, tid)
    round_keys(ring, tid)
    barrier()
    queries = query_fragments(HELD, STEPS, Q_PANEL, shared, own, lane)
    mask = arg(args, MASK) + MASK_SIZE * (b * arg(args, M_B) + h * arg(args, M_H))
    last = count - int32(1)
    mask_first = mask + MASK_SIZE * place_of(min(row, last), group, arg(args, M_ROW), arg(args, M_H))
    mask_second = mask + MASK_SIZE * place_of(min(row + int32(8), last), group, arg(args, M_ROW), arg(args, M_H))
    sums = zeros(ELEMENT, 16, WIDTH)
    top_first = LOWEST
    top_second = LOWEST
    total_first = ZERO
    total_second = ZERO
    start = begin
    reading = int32(0)
    while start < end:
        tile = int32(ring + reading)
        reading = int32(STAGE_BYTES - reading)
        ahead = int32(start + int32(BN))
        if ahead < end:
            copy_keys(args, k, v, ahead, int32(ring + reading), tid)
        copies_commit()
        here = int32(start + share * int32(OWN))
        if here < most:
            tile = int32(tile + share * int32(128 * OWN))
            found = scores(ELEMENT, HELD, OWN, K_PANEL, scale, queries, tile, lane)
            if MASK_SIZE:
                step = MASK_SIZE * arg(args, M_KEY)
                found = add_mask(MASK_TYPE, OWN, found, mask_first, mask_second, step, here, t - int32(1), lane)
            if here + int32(OWN) > least:
                found = forbid(OWN, found, here, first, second, lane)
            next_first = row_top(OWN, 0, found, top_first)
            next_second = row_top(OWN, 1, found, top_second)
            shift_first = shift_of(next_first)
            shift_second = shift_of(next_second)
            factor_first = power(top_first - shift_first)
            factor_second = power(top_second - shift_second)
            top_first = next_first
            top_second = next_second
            found = powers(OWN, found, shift_first, shift_second)
            total_first = total_first * factor_first + row_sum(OWN, 0, found)
            total_second = total_second * factor_second + row_sum(OWN, 1, found)
            sums = rescale(WIDTH, sums, factor_first, factor_second)
            sums = weighted_sums(ELEMENT, OWN, WIDTH, K_PANEL, sums, found, tile + int32(K_BYTES), lane)
        copies_wait(0)
        if ahead < end:
            round_keys(int32(ring + reading), tid)
        barrier()
        start = ahead

    if SHARERS > 1:
        # What the warps have found, through shared memory, which holds no tile any more.
        place = int32(shared + share * int32(KEPT))
        put_numbers(place, lane, sums)
        put_numbers(int32(place + int32(64 * WIDTH)), lane, (top_first, top_second, total_first, total_second))
        barrier()
        other = int32(0)
        while share == int32(SHARERS - 1) and other < share:
            place = int32(shared + other * int32(KEPT))
            their_first, their_second, more_first, more_second = get_numbers(4, int32(place + int32(64 * WIDTH)), lane)
            next_first = max(top_first, their_first)
            next_second = max(top_second, their_second)
            shift_first = shift_of(next_first)
            shift_second = shift_of(next_second)
            factor_first = power(top_first - shift_first)
            factor_second = power(top_second - shift_second)
            their_first = power(their_first - shift_first)
            their_second = power(their_second - shift_second)
            top_first = next_first
            top_second = next_second
            total_first = total_first * factor_first + more_first * their_first
            total_second = total_second * factor_second + more_second * their_second
            their_sums = get_numbers(SUMS, place, lane)
            sums = merge(sums, factor_first, factor_second, their_sums, their_first, their_second)
            other = int32(other + int32(1))
        if share < int32(SHARERS - 1):
            row = count  # only the last one stores

    total_first = sum_of_four(total_first)
    total_second = sum_of_four(total_second)
    if parts > int32(1):
        partial = arg(args, PARTIALS) + PITCH * (block() * int32(SLOT) + (row - i0))
        first_row = partial if row < count else 0
        second_row = partial + 8 * PITCH if row + int32(8) < count else 0
        store_rows("f32", WIDTH, 1, sums, first_row, second_row, WIDTH, lane)
        if lane & int32(3) == 0:
            if first_row != 0:
                st(ptr_f32(first_row), WIDTH, top_first)
                st(ptr_f32(first_row), WIDTH + 1, total_first)
            if second_row != 0:
                st(ptr_f32(second_row), WIDTH, top_second)
                st(ptr_f32(second_row), WIDTH + 1, total_second)
        return
    sums = rescale(WIDTH, sums, share_of(total_first), share_of(total_second))
    y = arg(args, Y) + SIZE * (b * arg(args, Y_B) + h * arg(args, Y_H))
    y_first = y + SIZE * place_of(row, group, arg(args, Y_ROW), arg(args, Y_H)) if row < count else 0
    row = int32(row + int32(8))
    y_second = y + SIZE * place_of(row, group, arg(args, Y_ROW), arg(args, Y_H)) if row < count else 0
    store_rows(RESULT, WIDTH, PAIRS, sums, y_first, y_second, arg(args, DV), lane)
