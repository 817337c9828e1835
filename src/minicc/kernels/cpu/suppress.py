"""Non-maximum suppression of boxes, one batch and class at a time: greedy, best score first.

Scores above the threshold become int64 keys that order them (score first, then the lower position), in a heap in
scratch memory. The best is taken off the heap and stays unless it overlaps a box already chosen, until there are
enough: an image with few chosen boxes never sorts the rest. One unit is one batch and class; nothing is joined here.
"""

import numpy as np

from minicc.kernels.cpu.intrinsics import (
    arg,
    helper,
    ld,
    ld_scratch,
    off,
    ptr_f32,
    ptr_i32,
    ptr_i64,
    st,
    st_scratch,
)

# Constant: whether boxes are centre and size, or two corners.
CENTER = False

# Words. Boxes are [batch, N, 4], scores [batch, CLASSES, N]; scalars are addresses, or 0 where they are left out.
BOXES = 0
SCORES = 1
LIMIT = 2  # int64: boxes chosen at most per class
OVERLAP = 3  # float32: a larger intersection over union drops a box
LEAST = 4  # float32: scores must be larger
CHOSEN = 5  # int64 [batch, CLASSES, MOST]: positions
COUNTS = 6  # int64 [batch, CLASSES]
KEYS = 7  # int64 [batch, CLASSES, N], scratch
KEPT = 8  # float32 [batch, CLASSES, 4, MOST], scratch: ends of the chosen boxes
BATCHES = 9
CLASSES = 10
N = 11
MOST = 12


@helper
def sink(keys, size, hole, key):
    """Put a key into a heap (largest at the root) at a free place, moving larger ones below it up."""
    child = 2 * hole + 1
    while child < size:
        other = ld_scratch(keys, child)
        if child + 1 < size:
            right = ld_scratch(keys, child + 1)
            if right > other:
                other = right
                child += 1
        if other <= key:
            break
        st_scratch(keys, hole, other)
        hole = child
        child = 2 * hole + 1
    st_scratch(keys, hole, key)


@helper
def side(boxes, box, axis):
    """Lower and upper end of a box along one of its two axes."""
    first = ld(boxes, 4 * box + axis)
    second = ld(boxes, 4 * box + axis + 2)
    if CENTER:
        return first - second * np.float32(0.5), first + second * np.float32(0.5)
    return min(first, second), max(first, second)


@helper
def overlaps(kept, count, most, low_y, high_y, low_x, high_x, limit):
    """Whether the intersection with one of `count` kept boxes is more than `limit` of their union; an empty union never is.

    One pass over all of them without branches, in vector registers.
    """
    area = (high_y - low_y) * (high_x - low_x)
    zero = np.float32(0)
    found = False
    for k in range(count):
        a = ld_scratch(kept, k)
        b = ld_scratch(kept, most + k)
        c = ld_scratch(kept, 2 * most + k)
        d = ld_scratch(kept, 3 * most + k)
        common = max(min(b, high_y) - max(a, low_y), zero) * max(min(d, high_x) - max(c, low_x), zero)
        union = (b - a) * (d - c) + area - common
        found |= (union > zero) & (common / union > limit)
    return found


def kernel(args, begin, end):
    n = arg(args, N)
    classes = arg(args, CLASSES)
    most = 0
    if arg(args, LIMIT) != 0:
        most = min(ld(ptr_i64(arg(args, LIMIT)), 0), arg(args, MOST))
    limit = np.float32(0)
    if arg(args, OVERLAP) != 0:
        limit = ld(ptr_f32(arg(args, OVERLAP)), 0)
    for unit in range(begin, end):
        boxes = off(ptr_f32(arg(args, BOXES)), unit // classes * n * 4)
        scores = off(ptr_f32(arg(args, SCORES)), unit * n)
        bits = off(ptr_i32(arg(args, SCORES)), unit * n)
        keys = off(ptr_i64(arg(args, KEYS)), unit * n)
        kept = off(ptr_f32(arg(args, KEPT)), unit * 4 * arg(args, MOST))
        chosen = off(ptr_i64(arg(args, CHOSEN)), unit * arg(args, MOST))
        size = 0
        for i in range(n):
            score = ld(scores, i)
            taken = score == score
            if arg(args, LEAST) != 0:
                taken = score > ld(ptr_f32(arg(args, LEAST)), 0)
            if taken:
                # The bits of a float order as an integer does, once those of negative ones are turned around.
                order = ld(bits, i) if score != 0 else 0
                if order < 0:
                    order = order ^ 0x7FFFFFFF
                st_scratch(keys, size, order * 4294967296 + (n - 1 - i))
                size += 1
        parent = size // 2 - 1
        while parent >= 0:
            sink(keys, size, parent, ld_scratch(keys, parent))
            parent -= 1
        count = 0
        while (size > 0) & (count < most):
            box = n - 1 - (ld_scratch(keys, 0) & 0xFFFFFFFF)
            size -= 1
            if size > 0:
                sink(keys, size, 0, ld_scratch(keys, size))
            low_y, high_y = side(boxes, box, 0)
            low_x, high_x = side(boxes, box, 1)
            if not overlaps(kept, count, most, low_y, high_y, low_x, high_x, limit):
                st_scratch(kept, count, low_y)
                st_scratch(kept, most + count, high_y)
                st_scratch(kept, 2 * most + count, low_x)
                st_scratch(kept, 3 * most + count, high_x)
                st(chosen, count, box)
                count += 1
        st(ptr_i64(arg(args, COUNTS)), unit, count)
