"""The leaf that each row of features reaches in each tree of an ensemble.

A row walks many trees at a time, a step in each: loads of one tree then wait for each other, those of all trees do not. A leaf
leads to itself, so that trees of any depth go on together until none moves; no step branches on what it compares. The places
are kept in the result. One unit is one row; trees are walked in blocks whose nodes stay in cache for all rows of a chunk.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cpu.intrinsics import arg, helper, ld, ld_out, off, ptr_f32, ptr_f64, ptr_i32, st

# Trees that are walked together.
BLOCK = 32

# Constants: memory access of the features; whether some node sends NaN below; whether some node asks for equality.
POINTER = ptr_f32
LOAD = ld
NANS = False
EQUALS = False

# Words. Features [ROWS, WIDTH]; nodes are rows of four int32: feature, split (float32), below, above.
X = 0
NODES = 1
ROOTS = 2  # int32 [TREES]
NUMBERS = 3  # int32 by node: the result for a leaf
Y = 4  # int32 [ROWS, TREES]
ROWS = 5
TREES = 6
WIDTH = 7
NEEDED = 8  # features that the nodes ask for
DEPTH = 9  # steps from a root to a leaf at most

# Marks of a feature, as in ops/trees.py.
FEATURE_MASK = (1 << 28) - 1
NAN_BELOW = 1 << 28
IS_EQUAL = 1 << 29


@helper
def step(x, nodes, splits, at):
    """The node that follows another."""
    feature = ld(nodes, 4 * at)
    split = ld(splits, 4 * at + 1)
    value = LOAD(x, feature & FEATURE_MASK) if NANS or EQUALS else LOAD(x, feature)
    below = value <= split
    if EQUALS:
        below = (value == split) if (feature & IS_EQUAL) != 0 else below
    if NANS:
        below |= (value != value) & ((feature & NAN_BELOW) != 0)
    return ld(nodes, 4 * at + (2 if below else 3))


def kernel(args, begin, end):
    nodes = ptr_i32(arg(args, NODES))
    splits = ptr_f32(arg(args, NODES))
    roots = ptr_i32(arg(args, ROOTS))
    numbers = ptr_i32(arg(args, NUMBERS))
    trees = arg(args, TREES)
    first = 0
    while first < trees:
        count = min(trees - first, BLOCK)
        for row in range(begin, end):
            x = off(POINTER(arg(args, X)), row * arg(args, WIDTH))
            y = off(ptr_i32(arg(args, Y)), row * trees + first)
            for t in range(count):
                st(y, t, ld(roots, first + t))
            moved = True
            left = arg(args, DEPTH)
            while moved and left > 0:
                moved = False
                left -= 1
                for t in range(count):
                    at = np.int64(ld_out(y, t))
                    following = step(x, nodes, splits, at)
                    moved |= following != at
                    st(y, t, following)
            for t in range(count):
                st(y, t, ld(numbers, np.int64(ld_out(y, t))))
        first += BLOCK
