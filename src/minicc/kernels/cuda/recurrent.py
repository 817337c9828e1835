"""The sequential part of LSTM, GRU and RNN, float32: what depends on the previous hidden state.

GATES [direction][T][B][gates * H] holds the input's share with all biases (for a GRU that is linear before reset,
without the recurrent bias of the hidden gate: that is RB). A block goes through the steps of one sequence of one
direction: its threads share out the columns of hidden * R, then the elements of the state, which is in memory. Gates
are in ONNX's order: i o f c; z r h. A sequence of length L takes L steps; the steps of Y behind it are zero, and a
reversed direction begins at its last element.
"""

# ruff: noqa: ARG001  (activations and cells share one signature each)

import numpy as np

from minicc.kernels.cuda.intrinsics import (
    arg,
    barrier,
    block,
    blocks,
    helper,
    ld,
    ld_out,
    off,
    ptr_f32,
    ptr_i32,
    st,
    thread,
    threads,
)
from minicc.kernels.cuda.vector_math import exp_f32, sigmoid_f32, softplus_f32, tanh_f32

# Columns of a panel of R.
NR = 32
THREADS = 768

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
SCRATCH = 11  # float32 [units][7][H]
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
WORDS = 28


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
def product(left, packed, h, j):
    """Sum over k < h of left[k] * packed[k, j], in four parts that go on side by side."""
    panel = off(packed, j // NR * h * NR + j % NR)
    a = np.float32(0)
    b = np.float32(0)
    c = np.float32(0)
    d = np.float32(0)
    for k in range(0, h - 3, 4):
        a += ld_out(left, k) * ld(panel, k * NR)
        b += ld_out(left, k + 1) * ld(panel, (k + 1) * NR)
        c += ld_out(left, k + 2) * ld(panel, (k + 2) * NR)
        d += ld_out(left, k + 3) * ld(panel, (k + 3) * NR)
    for k in range(h // 4 * 4, h):
        a += ld_out(left, k) * ld(panel, k * NR)
    return (a + b) + (c + d)


@helper
def lstm(args, d, source, gates, hidden, cell, spare):
    """One step: the input's share of the gates + hidden * R -> hidden, cell."""
    h = arg(args, H)
    peepholes = arg(args, P)
    recurrent = off(ptr_f32(arg(args, R)), d * arg(args, R_D))
    for j in range(thread(), 4 * h, threads()):
        st(gates, j, ld(source, j) + product(hidden, recurrent, h, j))
    barrier()
    for j in range(thread(), h, threads()):
        old = ld_out(cell, j)
        gate_i = ld_out(gates, j)
        gate_o = ld_out(gates, h + j)
        gate_f = ld_out(gates, 2 * h + j)
        if peepholes != 0:
            p = off(ptr_f32(peepholes), d * 3 * h)
            gate_i += ld(p, j) * old
            gate_f += ld(p, 2 * h + j) * old
        i = act_f(gate_i)
        f = np.float32(1) - i if INPUT_FORGET else act_f(gate_f)
        new = f * old + i * act_g(ld_out(gates, 3 * h + j))
        if peepholes != 0:
            gate_o += ld(ptr_f32(peepholes), d * 3 * h + h + j) * new
        st(cell, j, new)
        st(hidden, j, act_f(gate_o) * act_h(new))


@helper
def gru(args, d, source, gates, hidden, cell, spare):
    """One step: the input's share of the gates -> hidden. spare: what the hidden gate multiplies or adds."""
    h = arg(args, H)
    bias = arg(args, RB)
    recurrent = off(ptr_f32(arg(args, R)), d * arg(args, R_D))
    hidden_gate = off(ptr_f32(arg(args, R2)), d * arg(args, R2_D))
    for j in range(thread(), 2 * h, threads()):
        st(gates, j, ld(source, j) + product(hidden, recurrent, h, j))
    if LINEAR_BEFORE_RESET:
        for j in range(thread(), h, threads()):
            added = ld(ptr_f32(bias), d * h + j) if bias != 0 else np.float32(0)
            st(spare, j, added + product(hidden, hidden_gate, h, j))
    barrier()
    if not LINEAR_BEFORE_RESET:
        for j in range(thread(), h, threads()):
            st(spare, j, act_f(ld_out(gates, h + j)) * ld_out(hidden, j))
        barrier()
    for j in range(thread(), h, threads()):
        pre = ld(source, 2 * h + j)
        if LINEAR_BEFORE_RESET:
            pre += act_f(ld_out(gates, h + j)) * ld_out(spare, j)
        else:
            pre += product(spare, hidden_gate, h, j)
        z = act_f(ld_out(gates, j))
        st(hidden, j, (np.float32(1) - z) * act_g(pre) + z * ld_out(hidden, j))


@helper
def rnn(args, d, source, gates, hidden, cell, spare):
    """One step: the input's share of the gates + hidden * R -> hidden."""
    h = arg(args, H)
    recurrent = off(ptr_f32(arg(args, R)), d * arg(args, R_D))
    for j in range(thread(), h, threads()):
        st(gates, j, act_f(ld(source, j) + product(hidden, recurrent, h, j)))
    barrier()
    for j in range(thread(), h, threads()):
        st(hidden, j, ld_out(gates, j))


# Constants: the cell and the number of its gates.
CELL = lstm
COUNT = 4


@helper
def load_state(source, offset, target, count):
    """Copy an initial state row, or zeros when there is none."""
    for j in range(thread(), count, threads()):
        st(target, j, ld(ptr_f32(source), offset + j) if source != 0 else np.float32(0))


@helper
def store_state(source, target, offset, count):
    """Copy a state row out, if anybody wants it."""
    if target != 0:
        for j in range(thread(), count, threads()):
            st(ptr_f32(target), offset + j, ld_out(source, j))


@helper
def sequence_length(args, b):
    """How many steps sequence b takes."""
    if arg(args, LENGTHS) == 0:
        return arg(args, T)
    return min(max(np.int64(ld(ptr_i32(arg(args, LENGTHS)), b)), 0), arg(args, T))


def kernel(args):
    h = arg(args, H)
    batch = arg(args, B)
    y = arg(args, Y)
    for unit in range(block(), arg(args, DIRECTIONS) * batch, blocks()):
        d = unit // batch
        b = unit - d * batch
        backwards = (d + arg(args, REVERSE)) % 2
        hidden = off(ptr_f32(arg(args, SCRATCH)), unit * 7 * h)
        cell = off(hidden, h)
        spare = off(cell, h)
        gates = off(spare, h)
        state = d * arg(args, S_D) + b * arg(args, S_B)
        load_state(arg(args, H0), state, hidden, h)
        load_state(arg(args, C0), state, cell, h)
        barrier()
        length = sequence_length(args, b)
        shares = off(ptr_f32(arg(args, GATES)), d * arg(args, G_D) + b * arg(args, G_B))
        for t in range(length):
            s = length - 1 - t if backwards else t
            CELL(args, d, off(shares, s * arg(args, G_T)), gates, hidden, cell, spare)
            if y != 0:
                at = d * arg(args, Y_D) + s * arg(args, Y_T) + b * arg(args, Y_B)
                for j in range(thread(), h, threads()):
                    st(ptr_f32(y), at + j, ld_out(hidden, j))
            barrier()
        if y != 0:
            for t in range(length, arg(args, T)):
                at = d * arg(args, Y_D) + t * arg(args, Y_T) + b * arg(args, Y_B)
                for j in range(thread(), h, threads()):
                    st(ptr_f32(y), at + j, np.float32(0))
        store_state(hidden, arg(args, Y_H), state, h)
        store_state(cell, arg(args, Y_C), state, h)
