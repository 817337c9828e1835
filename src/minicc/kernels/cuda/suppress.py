"""Non-maximum suppression of boxes, one batch and class at a time: greedy, best score first.

Scores above the threshold become int64 keys that order them (score first, then the lower position). A block finds the
best key, and in the next pass over all keys drops the boxes that overlap the one just chosen, until there are enough or
none is left. Nothing is joined here.
"""

import numpy as np

from minicc.kernels.cuda.intrinsics import (
    arg,
    block,
    blocks,
    helper,
    ld,
    ld_out,
    off,
    ptr_f32,
    ptr_i32,
    ptr_i64,
    st,
    thread,
    threads,
)
from minicc.kernels.cuda.scalar import block_max_i64

# Constant: whether boxes are centre and size, or two corners.
CENTER = False
THREADS = 512

# Words. Boxes are [batch, N, 4], scores [batch, CLASSES, N]; scalars are addresses, or 0 where they are left out.
BOXES = 0
SCORES = 1
LIMIT = 2  # int64: boxes chosen at most per class
OVERLAP = 3  # float32: a larger intersection over union drops a box
LEAST = 4  # float32: scores must be larger
CHOSEN = 5  # int64 [batch, CLASSES, MOST]: positions
COUNTS = 6  # int64 [batch, CLASSES]
KEYS = 7  # int64 [batch, CLASSES, N], scratch
KEPT = 8  # not used
BATCHES = 9
CLASSES = 10
N = 11
MOST = 12
WORDS = 13

# Below every key: the key of a box that is out.
GONE = -(1 << 62) * 2


@helper
def side(boxes, box, axis):
    """Lower and upper end of a box along one of its two axes."""
    first = ld(boxes, 4 * box + axis)
    second = ld(boxes, 4 * box + axis + 2)
    if CENTER:
        return first - second * np.float32(0.5), first + second * np.float32(0.5)
    return min(first, second), max(first, second)


@helper
def overlap(boxes, kept, box, limit):
    """Whether the intersection of two boxes is more than `limit` of their union; an empty union never is."""
    a, b = side(boxes, kept, 0)
    c, d = side(boxes, kept, 1)
    low_y, high_y = side(boxes, box, 0)
    low_x, high_x = side(boxes, box, 1)
    zero = np.float32(0)
    common = max(min(b, high_y) - max(a, low_y), zero) * max(min(d, high_x) - max(c, low_x), zero)
    union = (b - a) * (d - c) + (high_y - low_y) * (high_x - low_x) - common
    return (union > zero) & (common / union > limit)


@helper
def key_of(args, scores, bits, i, n):
    """The key of box i: GONE when its score is not above the threshold."""
    score = ld(scores, i)
    taken = score == score
    if arg(args, LEAST) != 0:
        taken = score > ld(ptr_f32(arg(args, LEAST)), 0)
    # The bits of a float order as an integer does, once those of negative ones are turned around.
    order = np.int64(ld(bits, i)) if score != 0 else np.int64(0)
    if order < 0:
        order = order ^ 0x7FFFFFFF
    return order * 4294967296 + (n - 1 - i) if taken else GONE


def kernel(args):
    n = arg(args, N)
    classes = arg(args, CLASSES)
    most = 0
    if arg(args, LIMIT) != 0:
        most = min(ld(ptr_i64(arg(args, LIMIT)), 0), arg(args, MOST))
    limit = np.float32(0)
    if arg(args, OVERLAP) != 0:
        limit = ld(ptr_f32(arg(args, OVERLAP)), 0)
    for unit in range(block(), arg(args, BATCHES) * classes, blocks()):
        boxes = off(ptr_f32(arg(args, BOXES)), unit // classes * n * 4)
        scores = off(ptr_f32(arg(args, SCORES)), unit * n)
        bits = off(ptr_i32(arg(args, SCORES)), unit * n)
        keys = off(ptr_i64(arg(args, KEYS)), unit * n)
        chosen = off(ptr_i64(arg(args, CHOSEN)), unit * arg(args, MOST))
        best = GONE
        for i in range(thread(), n, threads()):
            key = key_of(args, scores, bits, i, n)
            st(keys, i, key)
            best = max(best, key)
        best = block_max_i64(best)
        count = 0
        while (best != GONE) & (count < most):
            kept = n - 1 - (best & 0xFFFFFFFF)
            if thread() == 0:
                st(chosen, count, kept)
            count += 1
            best = GONE
            for i in range(thread(), n, threads()):
                key = ld_out(keys, i)
                if key != GONE:
                    if (i == kept) | overlap(boxes, kept, i, limit):
                        st(keys, i, GONE)
                    else:
                        best = max(best, key)
            best = block_max_i64(best)
        if thread() == 0:
            st(ptr_i64(arg(args, COUNTS)), unit, count)
