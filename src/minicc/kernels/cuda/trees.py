"""The leaf that each row of features reaches in each tree of an ensemble: a thread for each pair of them.

A leaf leads to itself, which ends the walk.
"""

# ruff: noqa: F401  (constants name what a kernel uses)

import numpy as np

from minicc.kernels.cuda.intrinsics import all_threads, arg, first_element, helper, ld, off, ptr_f32, ptr_f64, ptr_i32, st

# Constants: memory access of the features; whether some node sends NaN below; whether some node asks for equality.
POINTER = ptr_f32
LOAD = ld
NANS = False
EQUALS = False
THREADS = 256

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
WORDS = 10

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


def kernel(args):
    nodes = ptr_i32(arg(args, NODES))
    splits = ptr_f32(arg(args, NODES))
    trees = arg(args, TREES)
    for place in range(first_element(), arg(args, ROWS) * trees, all_threads()):
        row = place // trees
        x = off(POINTER(arg(args, X)), row * arg(args, WIDTH))
        at = np.int64(ld(ptr_i32(arg(args, ROOTS)), place - row * trees))
        following = np.int64(step(x, nodes, splits, at))
        while following != at:
            at = following
            following = np.int64(step(x, nodes, splits, at))
        st(ptr_i32(arg(args, Y)), place, ld(ptr_i32(arg(args, NUMBERS)), at))
