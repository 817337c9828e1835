"""The sequential part of LSTM, GRU and RNN, float32: what depends on the previous hidden state.

A matrix product made GATES [direction][T][B][gates * H] before: the input's share with all biases (for a GRU
that is linear before reset, without the recurrent bias of the hidden gate: that is RB). Here every step adds
hidden * R, applies the cell and stores the state. Gates are in ONNX's order: i o f c; z r h. A sequence of
length L takes L steps; the steps of Y behind it are zero, and a reversed direction begins at its last
element. One unit is a block of up to MR sequences of one direction, from the first step to the last.

Where that leaves threads without work, STAGE is not 0 and the call goes in stages: the beginning, for each step the
product with R (of a GRU also what comes between it and the product with R2, and this one) and the cell, and the end.
Unit `stage * STAGE + i` is one panel of one block's product, or one block. Stages run in order, each shared out.
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

# Constants: tile of MR rows by NR columns, vector width, MR * NR.
MR = 6
NR = 16
VW = 8
TILE = 96
ADDRESSES = 16  # at least 2 * MR

# Words. Strides count elements; an address of 0 means that the array is absent.
GATES = 0
R = 1  # packed [H, gates * H]; of a GRU only z and r
R2 = 2  # packed [H, H], the hidden gate of a GRU
RB = 3  # [direction][H]
P = 4  # peepholes [direction][3 * H]: i o f
H0 = 5
C0 = 6
LENGTHS = 7  # int32 [B]
Y = 8
Y_H = 9
Y_C = 10
SCRATCH = 11  # float32 [units][7][ROWS][H]
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
def product(left, rows, packed, h, begin, end, n, result, width, addresses, tile):
    """result[r, j] += sum over k < h of left[r, k] * packed[k, j], j < n, for panels begin..end; rows of h and `width`."""
    for r in range(rows + MR - 1):
        st_scratch(addresses, r, left + 4 * min(r, rows - 1) * h)
    for p in range(begin, end):
        i = 0
        while i < rows:
            height = tile_height(MR, rows - i)
            panel = off(packed, p * h * NR)
            product_tile(MR, NR, VW, height, off(addresses, i), panel, tile, h, 1, True)
            for r in range(min(height, rows - i)):
                row = off(result, (i + r) * width + p * NR)
                for j in range(min(n - p * NR, NR)):
                    st_scratch(row, j, ld_scratch(row, j) + ld_scratch(tile, r * NR + j))
            i += height


@helper
def reset(args, d, rows, gates, hidden, spare):
    """A GRU between its products: what the second one adds to, or its left operand reset * hidden."""
    h = arg(args, H)
    bias = arg(args, RB)
    for r in range(rows):
        for j in range(h):
            if LINEAR_BEFORE_RESET:
                st_scratch(spare, r * h + j, ld(ptr_f32(bias), d * h + j) if bias != 0 else np.float32(0))
            else:
                part = act_f(ld_scratch(gates, r * 3 * h + h + j))
                st_scratch(spare, r * h + j, part * ld_scratch(hidden, r * h + j))


@helper
def lstm(args, d, rows, active, gates, hidden, cell, spare):
    """The cell: gates [rows][4 * H] -> hidden, cell, for rows whose `active` is not 0."""
    h = arg(args, H)
    peepholes = arg(args, P)
    for r in range(rows):
        if ld_scratch(active, r) != 0:
            g = off(gates, r * 4 * h)
            c = off(cell, r * h)
            if peepholes != 0:
                p = off(ptr_f32(peepholes), d * 3 * h)
                for j in range(h):
                    old = ld_scratch(c, j)
                    st_scratch(g, j, ld_scratch(g, j) + ld(p, j) * old)
                    st_scratch(g, 2 * h + j, ld_scratch(g, 2 * h + j) + ld(p, 2 * h + j) * old)
            for j in range(h):
                i = act_f(ld_scratch(g, j))
                f = np.float32(1) - i if INPUT_FORGET else act_f(ld_scratch(g, 2 * h + j))
                st_scratch(c, j, f * ld_scratch(c, j) + i * act_g(ld_scratch(g, 3 * h + j)))
            if peepholes != 0:
                p = off(ptr_f32(peepholes), d * 3 * h + h)
                for j in range(h):
                    st_scratch(g, h + j, ld_scratch(g, h + j) + ld(p, j) * ld_scratch(c, j))
            for j in range(h):
                st_scratch(hidden, r * h + j, act_f(ld_scratch(g, h + j)) * act_h(ld_scratch(c, j)))


@helper
def gru(args, d, rows, active, gates, hidden, cell, spare):
    """The cell: gates [rows][3 * H] -> hidden."""
    h = arg(args, H)
    for r in range(rows):
        if ld_scratch(active, r) != 0:
            g = off(gates, r * 3 * h)
            for j in range(h):
                pre = ld_scratch(g, 2 * h + j)
                if LINEAR_BEFORE_RESET:
                    pre += act_f(ld_scratch(g, h + j)) * ld_scratch(spare, r * h + j)
                z = act_f(ld_scratch(g, j))
                old = ld_scratch(hidden, r * h + j)
                st_scratch(hidden, r * h + j, (np.float32(1) - z) * act_g(pre) + z * old)


@helper
def rnn(args, d, rows, active, gates, hidden, cell, spare):
    """The cell: gates [rows][H] -> hidden."""
    h = arg(args, H)
    for r in range(rows):
        if ld_scratch(active, r) != 0:
            for j in range(r * h, r * h + h):
                st_scratch(hidden, j, act_f(ld_scratch(gates, j)))


# Constants: the cell and the number of its gates.
CELL = lstm
COUNT = 4


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
def load_gates(args, d, b_begin, rows, t, backwards, gates):
    """Copy the input's share of step t, if there is one."""
    if t < arg(args, T):
        width = COUNT * arg(args, H)
        for r in range(rows):
            at = step_place(args, b_begin + r, t, backwards) * arg(args, G_T) + (b_begin + r) * arg(args, G_B)
            source = off(ptr_f32(arg(args, GATES)), d * arg(args, G_D) + at)
            for j in range(width):
                st_scratch(gates, r * width + j, ld(source, j))


@helper
def store_step(args, d, b_begin, rows, t, backwards, hidden):
    """Copy the states after step t out, if anybody wants them."""
    h = arg(args, H)
    y = arg(args, Y)
    if y != 0:
        for r in range(rows):
            length = sequence_length(args, b_begin + r)
            s = length - 1 - t if backwards and t < length else t
            at = d * arg(args, Y_D) + s * arg(args, Y_T) + (b_begin + r) * arg(args, Y_B)
            for j in range(h):
                value = ld_scratch(hidden, r * h + j)
                st(ptr_f32(y), at + j, value if t < length else np.float32(0))


def kernel(args, begin, end):
    h = arg(args, H)
    batch = arg(args, B)
    block = arg(args, ROWS)
    blocks = (batch + block - 1) // block
    per_step = 4 if COUNT == 3 else 2
    stages = 2 + per_step * arg(args, T)
    first_columns = 2 * h if COUNT == 3 else COUNT * h
    width = arg(args, STAGE)
    addresses = stack_i64(ADDRESSES)
    active = stack_i64(MR)
    tile = stack_f32(TILE)
    for unit in range(begin, end):
        stage = unit // width if width > 0 else 0
        last = stage + 1 if width > 0 else stages
        index = unit - stage * width
        while stage < last:
            t = (stage - 1) // per_step
            kind = stage - 1 - t * per_step
            inside = stage > 0 and stage < stages - 1
            n = 0  # columns of a product
            if inside and kind == 0:
                n = first_columns
            if inside and kind == 2:
                n = h
            p_begin = 0
            p_end = (n + NR - 1) // NR
            place = index
            if width > 0 and n > 0:
                place = index // p_end
                p_begin = index - place * p_end
                p_end = p_begin + 1
            if place >= arg(args, DIRECTIONS) * blocks:
                break  # a stage may have fewer units than STAGE
            d = place // blocks
            b_begin = (place - d * blocks) * block
            rows = min(block, batch - b_begin)
            backwards = (d + arg(args, REVERSE)) % 2
            hidden = off(ptr_f32(arg(args, SCRATCH)), place * 7 * block * h)
            cell = off(hidden, block * h)
            spare = off(cell, block * h)
            gates = off(spare, block * h)
            if stage == 0:
                for r in range(rows):
                    at = d * arg(args, S_D) + (b_begin + r) * arg(args, S_B)
                    load_state(arg(args, H0), at, off(hidden, r * h), h)
                    load_state(arg(args, C0), at, off(cell, r * h), h)
                load_gates(args, d, b_begin, rows, 0, backwards, gates)
            elif stage == stages - 1:
                for r in range(rows):
                    at = d * arg(args, S_D) + (b_begin + r) * arg(args, S_B)
                    store_state(off(hidden, r * h), arg(args, Y_H), at, h)
                    store_state(off(cell, r * h), arg(args, Y_C), at, h)
            elif n > 0:
                packed = off(ptr_f32(arg(args, R)), d * arg(args, R_D))
                left = address(hidden)
                result = gates
                columns = COUNT * h
                if COUNT == 3 and kind == 2:
                    packed = off(ptr_f32(arg(args, R2)), d * arg(args, R2_D))
                    if LINEAR_BEFORE_RESET:
                        result = spare
                        columns = h
                    else:
                        left = address(spare)
                        result = off(gates, 2 * h)
                product(left, rows, packed, h, p_begin, p_end, n, result, columns, addresses, tile)
            elif COUNT == 3 and kind == 1:
                reset(args, d, rows, gates, hidden, spare)
            else:
                for r in range(rows):
                    st_scratch(active, r, 1 if t < sequence_length(args, b_begin + r) else 0)
                CELL(args, d, rows, active, gates, hidden, cell, spare)
                store_step(args, d, b_begin, rows, t, backwards, hidden)
                load_gates(args, d, b_begin, rows, t + 1, backwards, gates)
            stage += 1
