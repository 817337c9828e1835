"""Attention: Y[b, h, i] = sum over t of softmax_t(scale * Q[b, h, i] . K[b, g, t] + mask) * V[b, g, t], float32.

Heads of queries that share a head g of keys and values (GROUP of them) count as more rows of it. The work is
done transposed, with one query per vector lane: a panel of NR queries, packed as [D][NR], is the right operand of the
scores [keys][NR], and these are, as they lie, the right operand of the sums [DV][NR]. So keys and values are read
in place, at any distance between rows, and maxima and sums of the softmax need no step across lanes.

Keys pass in blocks; sums of earlier blocks are scaled down when a larger score turns up (online softmax), so no
array of all scores is ever made. One unit is a block of panels of one head of keys, which share each block of keys
while it is in cache. A query that may attend no key gets zeros.

A last panel of few queries would leave most lanes idle; its queries are taken one by one, with lanes along the rows of
keys and values. One costs about a sixth of a panel of 16 (measured, AVX2), so this pays for up to a third of the lanes.
"""

import numpy as np

from minicc.kernels.cpu.columns import (
    add_to_rows,
    column_maxima,
    column_sums,
    columns_from_lines,
    find_lines,
    forbid_beyond,
    lines_from_columns,
    multiply_row,
    subtract_row,
)
from minicc.kernels.cpu.intrinsics import (
    arg,
    f32_of_bits,
    helper,
    ld,
    ld_scratch,
    off,
    ptr_f32,
    st,
    st_scratch,
    stack_f32,
    stack_i32,
    stack_i64,
)
from minicc.kernels.cpu.single_rows import add_weighted_rows, row_dots
from minicc.kernels.cpu.tiles import strided_product
from minicc.kernels.cpu.vector_math import exp_f32

# Constants: tile of MR rows by NR columns, vector width.
MR = 6
NR = 16
VW = 8
# As in kernels/domain.py: panels of a unit, floats of all its packed queries (and of its sums), keys of a block.
MOST_PANELS = 8
QUERIES = 8192
BLOCK = 256
LANES = 320  # MOST_PANELS or a third of NR, whichever is more, * the widest NR
SCORES = 8192  # BLOCK * 2 * the widest VW

# Words. Strides count elements; the last axes of K, V and Y are contiguous. MASK may be 0.
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
PANELS = 31  # panels per unit
KEYS = 32  # keys per block
PARTIALS = 33  # not used here

LOWEST = np.float32(-np.inf)
ZERO = np.float32(0)
ONE = np.float32(1)
# Not literals, for which Numba would compile functions anew: what has one largest score.
EACH_COLUMN = np.int64(0)
ALL_COLUMNS = np.int64(1)


@helper
def transpose_in(lines, step, count, factor, panel, add):
    """panel[k, j] = line(j)[k * step] * factor for k < count, or that added to it (`add` is 1)."""
    whole = count // VW * VW if step == 1 else 0
    for v in range(0, NR, VW):
        for k in range(0, whole, VW):
            columns_from_lines(NR, VW, off(lines, v), k, factor, off(panel, k * NR + v), add)
    for k in range(whole, count):
        for j in range(NR):
            x = ld(ptr_f32(ld_scratch(lines, j)), k * step) * factor
            st_scratch(panel, k * NR + j, x + ld_scratch(panel, k * NR + j) if add else x)


@helper
def add_mask(args, b, g, row, rows, start, count, scores, lines):
    """The mask of `count` keys from `start` on is added to the scores of a panel."""
    s = arg(args, S)
    key = arg(args, M_KEY)
    head = arg(args, M_H)
    base = arg(args, MASK) + 4 * (b * arg(args, M_B) + g * arg(args, GROUP) * head + start * key)
    first = row // s
    if arg(args, M_ROW) == 0 and (head == 0 or first == (min(row + NR, rows) - 1) // s):
        add_to_rows(NR, VW, scores, count, ptr_f32(base + 4 * first * head), key)
    else:
        find_lines(NR, lines, base, row, rows, s, head, arg(args, M_ROW))
        transpose_in(lines, key, count, ONE, scores, 1)


@helper
def forbid_later(args, row, start, count, scores, limits):
    """-inf for keys after those that a causal query may attend."""
    s = arg(args, S)
    i = row - row // s * s
    for j in range(NR):
        st_scratch(limits, j, np.int32(max(0, min(count, i + arg(args, T) - s + 1 - start))))
        i += 1
        if i == s:
            i = 0
    forbid_beyond(NR, VW, scores, count, limits)


@helper
def weigh(scores, count, tops, totals, factors, shifts, scope):
    """Scores become powers; the largest scores and the sums of powers so far are brought up to date.

    scope: EACH_COLUMN or ALL_COLUMNS.
    factors: what earlier sums must be multiplied by; returns whether any is not 1.
    """
    for j in range(NR):
        st_scratch(shifts, j, ld_scratch(tops, j))
    column_maxima(NR, VW, scores, count, shifts)
    if scope == ALL_COLUMNS:
        largest = LOWEST
        for j in range(NR):
            largest = max(largest, ld_scratch(shifts, j))
        for j in range(NR):
            st_scratch(shifts, j, largest)
    changed = False
    for j in range(NR):
        top = ld_scratch(shifts, j)
        shift = ZERO if top == LOWEST else top
        factor = exp_f32(ld_scratch(tops, j) - shift)
        changed |= factor != ONE
        st_scratch(factors, j, factor)
        st_scratch(tops, j, top)
        st_scratch(shifts, j, shift)
        st_scratch(totals, j, ld_scratch(totals, j) * factor)
    subtract_row(NR, VW, scores, count, shifts)
    for e in range(count * NR):
        st_scratch(scores, e, exp_f32(ld_scratch(scores, e)))
    for j in range(NR):
        st_scratch(shifts, j, ZERO)
    column_sums(NR, VW, scores, count, shifts)
    for j in range(NR):
        st_scratch(totals, j, ld_scratch(totals, j) + ld_scratch(shifts, j))
    return changed


@helper
def store_rows(args, b, g, row, rows, sums, totals, lines):
    """The rows of a panel's sums, divided by their totals, to Y."""
    dv = arg(args, DV)
    base = arg(args, Y) + 4 * (b * arg(args, Y_B) + g * arg(args, GROUP) * arg(args, Y_H))
    find_lines(NR, lines, base, row, rows, arg(args, S), arg(args, Y_H), arg(args, Y_ROW))
    for j in range(NR):
        total = ld_scratch(totals, j)
        st_scratch(totals, j, ONE / (ONE if total == ZERO else total))
    count = min(NR, rows - row)
    for v in range(0, NR, VW):
        whole = dv // VW * VW if count - v >= VW else 0
        for k in range(0, whole, VW):
            lines_from_columns(NR, VW, off(sums, k * NR + v), off(totals, v), off(lines, v), k)
        for j in range(v, min(v + VW, count)):
            y = ptr_f32(ld_scratch(lines, j))
            for k in range(whole, dv):
                st(y, k, ld_scratch(sums, k * NR + j) * ld_scratch(totals, j))


@helper
def row_of(args, array, strides, b, g, row):
    """A pointer to one row of the heads that share head g of keys; array, strides: words, of B, H and ROW in order."""
    head = row // arg(args, S)
    at = b * arg(args, strides) + (g * arg(args, GROUP) + head) * arg(args, strides + 1)
    return off(ptr_f32(arg(args, array)), at + (row - head * arg(args, S)) * arg(args, strides + 2))


@helper
def attend_singly(args, b, g, row, count, k, v, queries, sums, scores, tops, totals, factors, shifts):
    """The results of the last `count` queries from `row` on, one by one within each block of keys.

    The scores of one query lie in rows of NR; all columns get the same largest score, each its share of the total.
    """
    d = arg(args, D)
    dv = arg(args, DV)
    keys = arg(args, T)
    scale = f32_of_bits(np.int32(arg(args, SCALE)))
    for r in range(count):
        q = row_of(args, Q, Q_B, b, g, row + r)
        for i in range(d):
            st_scratch(queries, r * d + i, ld(q, i * arg(args, Q_D)) * scale)
    for j in range(count * NR):
        st_scratch(tops, j, LOWEST)
        st_scratch(totals, j, ZERO)
    for i in range(count * dv):
        st_scratch(sums, i, ZERO)
    start = 0
    while start < keys:
        end = min(start + arg(args, KEYS), keys)
        for r in range(count):
            length = end - start
            if arg(args, CAUSAL) != 0:
                length = min(end, (row + r) % arg(args, S) + keys - arg(args, S) + 1) - start
            if length > 0:
                row_dots(VW, off(queries, r * d), off(k, start * arg(args, K_ROW)), arg(args, K_ROW), length, d, scores)
                if arg(args, MASK) != 0:
                    mask = off(row_of(args, MASK, M_B, b, g, row + r), start * arg(args, M_KEY))
                    for t in range(length):
                        st_scratch(scores, t, ld_scratch(scores, t) + ld(mask, t * arg(args, M_KEY)))
                lines = (length + NR - 1) // NR
                for t in range(length, lines * NR):
                    st_scratch(scores, t, LOWEST)
                own = off(sums, r * dv)
                if weigh(scores, lines, off(tops, r * NR), off(totals, r * NR), factors, shifts, ALL_COLUMNS):
                    for i in range(dv):
                        st_scratch(own, i, ld_scratch(own, i) * ld_scratch(factors, 0))
                add_weighted_rows(VW, scores, off(v, start * arg(args, V_ROW)), arg(args, V_ROW), length, dv, own)
        start = end
    for r in range(count):
        total = ZERO
        for j in range(NR):
            total += ld_scratch(totals, r * NR + j)
        share = ONE / (ONE if total == ZERO else total)
        y = row_of(args, Y, Y_B, b, g, row + r)
        for i in range(dv):
            st(y, i, ld_scratch(sums, r * dv + i) * share)


def kernel(args, begin, end):
    d = arg(args, D)
    dv = arg(args, DV)
    keys = arg(args, T)
    groups = arg(args, GROUPS)
    rows = arg(args, GROUP) * arg(args, S)
    panels = (rows + NR - 1) // NR
    unit_panels = arg(args, PANELS)
    blocks = (panels + unit_panels - 1) // unit_panels
    step = arg(args, KEYS)
    queries = stack_f32(QUERIES)
    sums = stack_f32(QUERIES)
    scores = stack_f32(SCORES)
    tops = stack_f32(LANES)
    totals = stack_f32(LANES)
    factors = stack_f32(NR)
    shifts = stack_f32(NR)
    lines = stack_i64(NR)
    limits = stack_i32(NR)
    scale = f32_of_bits(np.int32(arg(args, SCALE)))
    for unit in range(begin, end):
        batch = unit // blocks
        first = (unit - batch * blocks) * unit_panels
        count = min(unit_panels, panels - first)
        b = batch // groups
        g = batch - b * groups
        k = off(ptr_f32(arg(args, K)), b * arg(args, K_B) + g * arg(args, K_H))
        v = off(ptr_f32(arg(args, V)), b * arg(args, V_B) + g * arg(args, V_H))
        last = rows - (panels - 1) * NR
        if first + count == panels and last <= NR // 3:
            count -= 1
            attend_singly(args, b, g, rows - last, last, k, v, queries, sums, scores, tops, totals, factors, shifts)
        q = arg(args, Q) + 4 * (b * arg(args, Q_B) + g * arg(args, GROUP) * arg(args, Q_H))
        for p in range(count):
            find_lines(NR, lines, q, (first + p) * NR, rows, arg(args, S), arg(args, Q_H), arg(args, Q_ROW))
            transpose_in(lines, arg(args, Q_D), d, scale, off(queries, p * d * NR), 0)
        for j in range(count * NR):
            st_scratch(tops, j, LOWEST)
            st_scratch(totals, j, ZERO)
        if keys == 0:
            for j in range(count * dv * NR):
                st_scratch(sums, j, ZERO)
        for block in range((keys + step - 1) // step if count > 0 else 0):
            start = block * step
            length = min(step, keys - start)
            block_k = off(k, start * arg(args, K_ROW))
            block_v = off(v, start * arg(args, V_ROW))
            for p in range(count):
                row = (first + p) * NR
                strided_product(
                    MR, NR, VW, block_k, arg(args, K_ROW), 1, off(queries, p * d * NR), scores, length, d, True
                )
                if arg(args, MASK) != 0:
                    add_mask(args, b, g, row, rows, start, length, scores, lines)
                if arg(args, CAUSAL) != 0:
                    forbid_later(args, row, start, length, scores, limits)
                panel = off(sums, p * dv * NR)
                changed = weigh(scores, length, off(tops, p * NR), off(totals, p * NR), factors, shifts, EACH_COLUMN)
                if changed and start > 0:
                    multiply_row(NR, VW, panel, dv, factors)
                strided_product(MR, NR, VW, block_v, 1, arg(args, V_ROW), scores, panel, dv, length, start == 0)
        for p in range(count):
            store_rows(args, b, g, (first + p) * NR, rows, off(sums, p * dv * NR), off(totals, p * NR), lines)
