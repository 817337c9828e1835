"""The sequential part of LSTM, GRU and RNN, float32: what depends on the previous hidden state.

A matrix product made GATES [direction][T][B][gates * H] before: the input's share with all biases (for a GRU
that is linear before reset, without the recurrent bias of the hidden gate: that is RB). Here every step adds
hidden * R, applies the cell and stores the state. Gates are in ONNX's order: i o f c; z r h. A sequence of
length L takes L steps; the steps of Y behind it are zero, and a reversed direction begins at its last element.

A step goes through the hidden units NR at a time: the products of all gates for these units, into tiles, and the cell on
the tiles. The state it reads and the one it writes are two buffers in turn, so that no other units wait. A GRU that is not
linear before reset has two rounds a step, as its hidden gate needs all reset gates. One unit is a block of up to ROWS sequences
of one direction, from the first step to the last.

Where that leaves threads without work, STAGE is not 0 and the call goes in stages: the beginning, each round of each step,
and the end. Unit `stage * STAGE + i` is NR hidden units of one block's round, or one block. Stages run in order, each shared out.
"""

# ruff: noqa: ARG001  (activations and cells share one signature each)

import numpy as np

from minicc.kernels.cpu.intrinsics import (
    address,
    arg,
    helper,
    ld,
    ld_scratch,
    off,
    ptr_f32,
    ptr_i32,
    st,
    st_scratch,
    stack_f32,
    stack_i64,
)
from minicc.kernels.cpu.tiles import product_tile, tile_height
from minicc.kernels.cpu.vector_math import exp_f32, sigmoid_f32, softplus_f32, tanh_f32

# Constants: tile of MR rows by NR columns, vector width.
MR = 6
NR = 16
VW = 8
# Rows of a gate's tiles: the sequences of a block (kernels/recurrent.py), and more, as a last tile may be higher than its rows.
TILE_ROWS = 5 * MR

# Words. Strides count elements; an address of 0 means that the array is absent.
GATES = 0
R = 1  # panels [NR hidden units][gate][H][NR]; of a GRU with two rounds only z and r
R2 = 2  # the same of the hidden gate of such a GRU
RB = 3  # [direction][H]
P = 4  # peepholes [direction][3 * H]: i o f
H0 = 5
C0 = 6
LENGTHS = 7  # int32 [B]
Y = 8
Y_H = 9
Y_C = 10
SCRATCH = 11  # float32 [units][5][ROWS][H]
T = 12
B = 13
H = 14
DIRECTIONS = 15
REVERSE = 16  # 1 when direction 0 runs backwards
G_D = 17
G_T = 18
G_B = 19
R_D = 20
R2_D = 21
Y_D = 22
Y_T = 23
Y_B = 24
S_D = 25  # of H0, C0, Y_H, Y_C
S_B = 26
ROWS = 27  # sequences per block
STAGE = 28  # units per stage, or 0


@helper
def sigmoid(x, alpha, beta):
    return sigmoid_f32(x)


@helper
def tanh(x, alpha, beta):
    return tanh_f32(x)


@helper
def relu(x, alpha, beta):
    return max(x, np.float32(0))


@helper
def affine(x, alpha, beta):
    return alpha * x + beta


@helper
def leaky_relu(x, alpha, beta):
    return x if x >= np.float32(0) else alpha * x


@helper
def thresholded_relu(x, alpha, beta):
    return x if x >= alpha else np.float32(0)


@helper
def scaled_tanh(x, alpha, beta):
    return alpha * tanh_f32(beta * x)


@helper
def hard_sigmoid(x, alpha, beta):
    return min(max(alpha * x + beta, np.float32(0)), np.float32(1))


@helper
def elu(x, alpha, beta):
    return x if x >= np.float32(0) else alpha * (exp_f32(x) - np.float32(1))


@helper
def softsign(x, alpha, beta):
    return x / (np.float32(1) + abs(x))


@helper
def softplus(x, alpha, beta):
    return softplus_f32(x)


# Constants: three activations with their parameters, and the cell's variants.
ACT_F = sigmoid
ACT_G = tanh
ACT_H = tanh
ALPHA_F = 0.0
BETA_F = 0.0
ALPHA_G = 0.0
BETA_G = 0.0
ALPHA_H = 0.0
BETA_H = 0.0
CLIP = 0.0  # bound of what goes into the gates' activations, 0 for none
INPUT_FORGET = 0
LINEAR_BEFORE_RESET = 0


@helper
def clipped(x):
    return min(max(x, np.float32(-CLIP)), np.float32(CLIP)) if CLIP > 0 else x


@helper
def act_f(x):
    return ACT_F(clipped(x), np.float32(ALPHA_F), np.float32(BETA_F))


@helper
def act_g(x):
    return ACT_G(clipped(x), np.float32(ALPHA_G), np.float32(BETA_G))


@helper
def act_h(x):
    return ACT_H(x, np.float32(ALPHA_H), np.float32(BETA_H))


@helper
def lstm(args, d, r, row, first, width, gates, share, old, hidden, cell, spare):
    """The cell on `width` units from `first` on, of row r of a block: gates [gate][TILE_ROWS][NR] -> hidden, cell.

    row: offset of the block's row in the states. share: the input's share of all gates, for those that are not in `gates`.
    """
    g = off(gates, r * NR)
    c = off(cell, row)
    y = off(hidden, row)
    peepholes = arg(args, P)
    h = arg(args, H)
    if peepholes != 0:
        p = off(ptr_f32(peepholes), d * 3 * h + first)
        for j in range(width):
            st_scratch(g, j, ld_scratch(g, j) + ld(p, j) * ld_scratch(c, j))
            st_scratch(g, 2 * GATE + j, ld_scratch(g, 2 * GATE + j) + ld(p, 2 * h + j) * ld_scratch(c, j))
    for j in range(width):
        i = act_f(ld_scratch(g, j))
        f = np.float32(1) - i if INPUT_FORGET else act_f(ld_scratch(g, 2 * GATE + j))
        st_scratch(c, j, f * ld_scratch(c, j) + i * act_g(ld_scratch(g, 3 * GATE + j)))
    if peepholes != 0:
        p = off(ptr_f32(peepholes), d * 3 * h + h + first)
        for j in range(width):
            st_scratch(g, GATE + j, ld_scratch(g, GATE + j) + ld(p, j) * ld_scratch(c, j))
    for j in range(width):
        st_scratch(y, j, act_f(ld_scratch(g, GATE + j)) * act_h(ld_scratch(c, j)))


@helper
def gru(args, d, r, row, first, width, gates, share, old, hidden, cell, spare):
    """The same of a GRU. With two rounds the first left z in `cell`, and the hidden gate is the only one in `gates`."""
    g = off(gates, r * NR)
    x = off(old, row)
    y = off(hidden, row)
    if LINEAR_BEFORE_RESET:
        own = off(share, 2 * arg(args, H) + first)
        for j in range(width):
            pre = ld(own, j) + act_f(ld_scratch(g, GATE + j)) * ld_scratch(g, 2 * GATE + j)
            z = act_f(ld_scratch(g, j))
            st_scratch(y, j, (np.float32(1) - z) * act_g(pre) + z * ld_scratch(x, j))
    else:
        kept = off(cell, row)
        for j in range(width):
            z = ld_scratch(kept, j)
            st_scratch(y, j, (np.float32(1) - z) * act_g(ld_scratch(g, j)) + z * ld_scratch(x, j))


@helper
def rnn(args, d, r, row, first, width, gates, share, old, hidden, cell, spare):
    """The same of a plain layer."""
    g = off(gates, r * NR)
    y = off(hidden, row)
    for j in range(width):
        st_scratch(y, j, act_f(ld_scratch(g, j)))


@helper
def reset(r, row, width, gates, old, kept, spare):
    """The first of a GRU's two rounds: z is kept, and the left operand of the second product is reset * hidden."""
    g = off(gates, r * NR)
    for j in range(width):
        st_scratch(kept, row + j, act_f(ld_scratch(g, j)))
        st_scratch(spare, row + j, act_f(ld_scratch(g, GATE + j)) * ld_scratch(old, row + j))


# Constants: the cell and the number of its gates.
CELL = lstm
COUNT = 4
# Rounds of a step, gates of a round (the last one's, where there are two), elements of a gate's tiles.
ROUNDS = 2 if COUNT == 3 and not LINEAR_BEFORE_RESET else 1
LAST_GATES = 1 if ROUNDS == 2 else COUNT
GATE = TILE_ROWS * NR
GATES_SIZE = COUNT * GATE


@helper
def load_state(source, offset, target, count):
    """Copy an initial state row, or zeros when there is none."""
    for j in range(count):
        st_scratch(target, j, ld(ptr_f32(source), offset + j) if source != 0 else np.float32(0))


@helper
def store_state(source, target, offset, count):
    """Copy a state row out, if anybody wants it."""
    if target != 0:
        for j in range(count):
            st(ptr_f32(target), offset + j, ld_scratch(source, j))


@helper
def sequence_length(args, b):
    """How many steps sequence b takes."""
    if arg(args, LENGTHS) == 0:
        return arg(args, T)
    return min(max(np.int64(ld(ptr_i32(arg(args, LENGTHS)), b)), 0), arg(args, T))


@helper
def step_place(args, b, t, backwards):
    """The element of sequence b that step t takes, within the array."""
    length = sequence_length(args, b)
    return min(max(length - 1 - t if backwards else t, 0), arg(args, T) - 1)


@helper
def gates_at(args, d, b, t, backwards):
    """The input's share of step t of a sequence, all gates."""
    at = step_place(args, b, t, backwards) * arg(args, G_T) + b * arg(args, G_B)
    return off(ptr_f32(arg(args, GATES)), d * arg(args, G_D) + at)


@helper
def load_tile(args, d, b, t, backwards, gate, first, width, target):
    """What a product is added to, `width` units of a gate of one sequence: the input's share, or a bias where it comes later."""
    h = arg(args, H)
    if LINEAR_BEFORE_RESET and COUNT == 3 and gate == 2:
        for j in range(width):
            st_scratch(target, j, ld(ptr_f32(arg(args, RB)), d * h + first + j) if arg(args, RB) != 0 else np.float32(0))
    else:
        source = off(gates_at(args, d, b, t, backwards), gate * h + first)
        for j in range(width):
            st_scratch(target, j, ld(source, j))


@helper
def store_step(args, d, b, t, backwards, first, width, hidden):
    """Copy some units of a state after step t out, if anybody wants them; behind the end of a sequence zeros."""
    y = arg(args, Y)
    if y != 0:
        length = sequence_length(args, b)
        s = length - 1 - t if backwards and t < length else t
        at = d * arg(args, Y_D) + s * arg(args, Y_T) + b * arg(args, Y_B) + first
        for j in range(width):
            st(ptr_f32(y), at + j, ld_scratch(hidden, j) if t < length else np.float32(0))


@helper
def products(args, d, b_begin, rows, t, backwards, panels, first_gate, count, first, width, left, addresses, gates):
    """Input's share plus left * R for `width` hidden units from `first` on, `count` gates from `first_gate` on, into `gates`."""
    h = arg(args, H)
    for r in range(rows + MR - 1):
        st_scratch(addresses, r, left + 4 * min(r, rows - 1) * h)
    for g in range(count):
        tiles = off(gates, g * GATE)
        for r in range(rows):
            load_tile(args, d, b_begin + r, t, backwards, first_gate + g, first, width, off(tiles, r * NR))
        panel = off(panels, g * h * NR)
        i = 0
        while i < rows:
            height = tile_height(MR, rows - i)
            product_tile(MR, NR, VW, height, off(addresses, i), panel, off(tiles, i * NR), h, 1, False)
            i += height


@helper
def finish(args, d, b_begin, rows, t, backwards, first, width, gates, old, hidden, cell, spare):
    """The cell on tiles of a block, and the states that are stored."""
    h = arg(args, H)
    for r in range(rows):
        b = b_begin + r
        row = r * h + first
        if t < sequence_length(args, b):
            share = gates_at(args, d, b, t, backwards)
            if width == NR:
                CELL(args, d, r, row, first, NR, gates, share, old, hidden, cell, spare)
            else:
                CELL(args, d, r, row, first, width, gates, share, old, hidden, cell, spare)
        else:
            for j in range(row, row + width):
                st_scratch(hidden, j, ld_scratch(old, j))
        store_step(args, d, b, t, backwards, first, width, off(hidden, row))


def kernel(args, begin, end):
    h = arg(args, H)
    batch = arg(args, B)
    block = arg(args, ROWS)
    blocks = (batch + block - 1) // block
    stages = 2 + ROUNDS * arg(args, T)
    pieces = (h + NR - 1) // NR
    stage_units = arg(args, STAGE)
    addresses = stack_i64(TILE_ROWS)
    gates = stack_f32(GATES_SIZE)
    for unit in range(begin, end):
        stage = unit // stage_units if stage_units > 0 else 0
        last = stage + 1 if stage_units > 0 else stages
        index = unit - stage * stage_units
        while stage < last:
            t = (stage - 1) // ROUNDS
            inside = stage > 0 and stage < stages - 1
            place = index
            p_begin = 0
            p_end = pieces
            if stage_units > 0 and inside:
                place = index // pieces
                p_begin = index - place * pieces
                p_end = p_begin + 1
            if place >= arg(args, DIRECTIONS) * blocks:
                break  # a stage may have fewer units than STAGE
            d = place // blocks
            b_begin = (place - d * blocks) * block
            rows = min(block, batch - b_begin)
            backwards = (d + arg(args, REVERSE)) % 2
            states = off(ptr_f32(arg(args, SCRATCH)), place * 5 * block * h)
            cell = off(states, 2 * block * h)
            spare = off(states, 3 * block * h)
            if stage == 0:
                for r in range(rows):
                    at = d * arg(args, S_D) + (b_begin + r) * arg(args, S_B)
                    load_state(arg(args, H0), at, off(states, r * h), h)
                    load_state(arg(args, C0), at, off(cell, r * h), h)
            elif not inside:
                final = off(states, arg(args, T) % 2 * block * h)
                for r in range(rows):
                    at = d * arg(args, S_D) + (b_begin + r) * arg(args, S_B)
                    store_state(off(final, r * h), arg(args, Y_H), at, h)
                    store_state(off(cell, r * h), arg(args, Y_C), at, h)
            else:
                old = off(states, t % 2 * block * h)
                hidden = off(states, (t + 1) % 2 * block * h)
                for p in range(p_begin, p_end):
                    first = p * NR
                    width = min(h - first, NR)
                    if ROUNDS == 2 and (stage - 1) % 2 == 0:
                        panels = off(ptr_f32(arg(args, R)), d * arg(args, R_D) + p * 2 * h * NR)
                        products(args, d, b_begin, rows, t, backwards, panels, 0, 2, first, width, address(old), addresses, gates)
                        for r in range(rows):
                            reset(r, r * h + first, width, gates, old, cell, spare)
                    else:
                        base = arg(args, R2) if ROUNDS == 2 else arg(args, R)
                        size = arg(args, R2_D) if ROUNDS == 2 else arg(args, R_D)
                        panels = off(ptr_f32(base), d * size + p * LAST_GATES * h * NR)
                        left = address(spare) if ROUNDS == 2 else address(old)
                        products(
                            args, d, b_begin, rows, t, backwards, panels, COUNT - LAST_GATES, LAST_GATES, first, width, left,
                            addresses, gates,
                        )  # fmt: skip
                        finish(args, d, b_begin, rows, t, backwards, first, width, gates, old, hidden, cell, spare)
            stage += 1
