"""Weights in the order in which kernels read them, made once at compile time with numpy.

Everything here but Winograd's and Fourier's forms is a permutation with zero padding; the template "pack" makes the float layouts
at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from minicc.kernels.cpu.fft_sizes import frequencies
from minicc.kernels.winograd_axes import POINTS, side

Array = np.ndarray[Any, Any]
CACHE_LINE = 64  # bytes


def aligned_empty(shape: Sequence[int], dtype: DTypeLike) -> Array:
    """A new array at the start of a cache line, so that whole vectors may be loaded without crossing lines."""
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    skip = -memory.ctypes.data % CACHE_LINE
    return memory[skip : skip + size].view(dtype).reshape(shape)


def pack_b(weights: Array, columns: int, tail: int = 0) -> Array:
    """Right operands [..., K, N] as panels [..., ceil(N / NR), K, NR], zero-padded in N; `columns` is NR.

    tail: where not 0, the panels come flat and with that many zeros behind them.
    """
    *batch, k, n = weights.shape
    panels = -(-n // columns)
    shape = (*batch, panels, k, columns)
    flat = aligned_empty((prod(shape) + tail,), weights.dtype)
    flat[prod(shape) :] = 0
    packed = flat[: prod(shape)].reshape(shape)
    whole = n // columns
    split = weights[..., : whole * columns].reshape(*batch, k, whole, columns)
    packed[..., :whole, :, :] = np.moveaxis(split, -2, -3)  # one pass over the weights, whatever their strides
    if whole < panels:
        packed[..., whole, :, : n - whole * columns] = weights[..., whole * columns :]
        packed[..., whole, :, n - whole * columns :] = 0
    return flat if tail else packed


def pack_conv(weights: Array, groups: int, columns: int) -> Array:
    """Weights [M, C / group, *kernel] as flat panels [group][ceil(N / NR)][taps][C / group][NR], then zeros.

    N = M / group; `columns` is NR. The zeros, one run of kernel[-1] * C / group, stand for the padding.
    """
    m, c, *kernel = weights.shape
    taps = int(np.prod(kernel, dtype=np.int64))
    matrices = (
        weights.reshape(groups, m // groups, c, taps).transpose(0, 3, 2, 1).reshape(groups, taps * c, -1)
    )
    return pack_b(matrices, columns, (kernel[-1] if kernel else 1) * c)


def winograd_filter(out: int, stride: int = 1, taps: int = 3) -> Array:
    """The matrix [side, taps] of an axis: it evaluates its taps, as a polynomial, at the points and at infinity.

    Each row is divided by the product of the differences of its point from the others. For out = 1: one tap. With
    stride 2 (out = 2) the outer taps meet every other input, at the points 0 and 1, and the one between meets the rest.
    """
    if out == 1:
        return np.ones((1, 1))
    if stride == 2:
        return np.array([[1.0, 0, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]])
    points = POINTS[side(out, stride, taps)]
    divisors = [np.prod([p - q for q in points if q != p]) for p in points]
    rows = [[p**k / divisor for k in range(taps)] for p, divisor in zip(points, divisors)]
    return np.array([*rows, [0.0] * (taps - 1) + [1.0]])


def pack_winograd(weights: Array, tile: tuple[int, int], stride: int, columns: int) -> Array:
    """Weights [M, C, KH, KW] in Winograd's form for tiles of outputs, as [ceil(M / NR)][positions][C][NR], then C zeros.

    Transformed in float64, stored as float32; `columns` is NR. The zeros stand for the padding.
    """
    m, c, *kernel = weights.shape
    both_axes = np.kron(*(winograd_filter(out, stride, max(kernel)) for out in tile))
    positions, taps = both_axes.shape
    panels, panel = -(-m // columns), positions * c * columns
    packed = aligned_empty((panels * panel + c,), np.float32)
    packed[...] = 0
    for number in range(panels):
        part = weights[number * columns : (number + 1) * columns].reshape(-1, c, taps).transpose(1, 2, 0).astype(np.float64)
        place = packed[number * panel : (number + 1) * panel].reshape(positions, c, columns)
        # A small product per input channel: a large one starts the threads of the BLAS, which take seconds on a busy machine.
        place[..., : part.shape[-1]] = (both_axes @ part).swapaxes(0, 1)
    return packed


def fft_order(height: int, width: int) -> tuple[Array, Array]:
    """(rows, columns) of the frequencies of a height x width transform that are kept, in order.

    First the two columns of which one half mirrors the other (one where the width is 1), then what is between them.
    """
    real, half = (0,) if width == 1 else (0, width // 2), height // 2 + 1
    places = [(k, column) for column in real for k in range(half)]
    places += [(k, column) for column in range(1, width // 2) for k in range(height)]
    rows, columns = np.array(places).T
    return rows, columns


def pack_fft(weights: Array, sides: tuple[int, int], dilations: tuple[int, int], columns: int) -> Array:
    """Weights [M, C, KH, KW] transformed for tiles of sides (height, width), as flat panels, then C zeros.

    A panel is [frequencies][C][2][NR], parts real and imaginary; `columns` is NR. Conjugate, because outputs are
    correlations, and divided by height * width. Transformed in float64, stored as float32. The zeros stand for the padding.
    """
    m, c, *kernel = weights.shape
    panels, count = -(-m // columns), frequencies(*sides)
    packed = aligned_empty((panels * count * c * 2 * columns + c,), np.float32)
    packed[...] = 0
    form = packed[: -c or None].reshape(panels, count, c, 2, columns)
    rows, order = fft_order(*sides)
    tile = np.zeros((c, *sides))
    for number in range(m):
        taps = tuple(slice(0, (size - 1) * apart + 1, apart) for size, apart in zip(kernel, dilations))
        tile[(slice(None), *taps)] = weights[number]
        found = np.fft.rfft2(tile).conj()[:, rows, order].T / (sides[0] * sides[1])
        place = form[number // columns, ..., number % columns]
        place[..., 0], place[..., 1] = found.real, found.imag
    return packed


def pack_conv_transpose(
    weights: Array,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    columns: int,
) -> Array:
    """Weights [C, M / group, *kernel] of a transposed convolution, as pack_conv with taps ordered by phase.

    pads: before the first element of each axis. Tap k meets the outputs o with
    (o + pad - k * dilation) % stride == 0: o % stride is its phase.
    """
    c, n, *kernel = weights.shape
    orders = [
        np.argsort([(k * d - p) % s for k in range(size)], kind="stable")
        for size, s, d, p in zip(kernel, strides, dilations, pads)
    ]
    phases = [
        [(int(k) * d - p) % s for k in order] for order, s, d, p in zip(orders, strides, dilations, pads)
    ]
    ordered = weights[np.ix_(np.arange(c), np.arange(n), *orders)].reshape(groups, c // groups, n, -1)
    # Taps of one phase next to each other: stable, so that within a phase the last axis still runs fastest.
    by_phase = sorted(range(ordered.shape[-1]), key=lambda t: _phase(t, phases))
    matrices = ordered[..., by_phase].transpose(0, 3, 1, 2).reshape(groups, -1, n)
    return pack_b(matrices, columns, c // groups)


def _phase(tap: int, phases: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The phase of a tap given by its row-major number."""
    found: list[int] = []
    for axis in reversed(phases):
        tap, k = divmod(tap, len(axis))
        found.insert(0, axis[k])
    return tuple(found)


def merge_groups(weights: Array, groups: int, lanes: int) -> tuple[Array, int]:
    """Weights and number of groups of the same convolution with fewer, wider groups (block-diagonal weights).

    Groups are merged while the output channels of one stay within `lanes` (a vector): the product tiles then
    do the same work in fewer, fuller columns. Weights [M, C / group, *kernel].
    """
    m, c, *kernel = weights.shape
    outputs = m // groups
    factor = max((f for f in range(1, groups + 1) if groups % f == 0 and f * outputs <= lanes), default=1)
    if factor == 1:
        return weights, groups
    merged = np.zeros((groups // factor, factor, outputs, factor, c, *kernel), weights.dtype)
    split = weights.reshape(groups // factor, factor, outputs, c, *kernel)
    for f in range(factor):
        merged[:, f, :, f] = split[:, f]
    return merged.reshape(m, factor * c, *kernel), groups // factor


def pack_narrow(weights: Array, columns: int) -> Array:
    """Weights [C, GROUP, *kernel] of narrow groups as flat panels [ceil(C / NR)][lines][GROUP][taps][NR], then C zeros.

    lines, taps: the product of all kernel axes but the last, and the last. GROUP is 1 for depthwise convolutions.
    """
    c, group, *kernel = weights.shape
    ordered = weights.reshape(c, group, -1, kernel[-1]).transpose(2, 1, 3, 0)
    return pack_b(ordered.reshape(-1, c), columns, c)


def merge_taps(weights: Array) -> Array:
    """Weights [M, C, *kernel] with the taps of a line as channels of one, as they lie in memory: [M, KW * C, *kernel[:-1], 1]."""
    m, c, *kernel = weights.shape
    return np.moveaxis(weights, -1, 1).reshape(m, kernel[-1] * c, *kernel[:-1], 1)


def pack_conv_integer(weights: Array, groups: int, columns: int) -> Array:
    """Weights [M, C / group, *kernel] as panels of 32 bits: [group][ceil(N / NR)][taps * ceil(C / numbers)][NR][numbers].

    numbers: of a word, two of int16 or four of int8. N = M / group; `columns` is NR. Words are filled up with zeros. A
    right operand [K, N] of a matrix product is the case weights = its transpose, one group, no kernel axes.
    """
    m, c, *kernel = weights.shape
    numbers = 4 // weights.itemsize
    taps = int(np.prod(kernel, dtype=np.int64))
    padded = np.zeros((groups, taps, -(-c // numbers) * numbers, m // groups), weights.dtype)
    padded[:, :, :c] = weights.reshape(groups, m // groups, c, taps).transpose(0, 3, 2, 1)
    panels = pack_b(padded.reshape(groups, -1, m // groups), columns)
    words = panels.reshape(*panels.shape[:2], -1, numbers, columns)
    packed = aligned_empty((words.size,), weights.dtype)
    packed.reshape(*words.shape[:3], columns, numbers)[...] = words.swapaxes(-1, -2)
    return packed


def integer_totals(weights: Array, zero_points: Array | None, groups: int, columns: int) -> Array:
    """int32 sums of all weights [M, C / group, *kernel] of a column, then zero points [M], [group][ceil(N / NR)][1 or 2][NR]."""
    totals = weights.reshape(len(weights), -1).sum(axis=1, dtype=np.int32)
    planes = [totals] if zero_points is None else [totals, zero_points.astype(np.int32)]
    padded = pack_b(np.stack([plane.reshape(groups, -1) for plane in planes], axis=1), columns)
    return np.ascontiguousarray(padded.reshape(groups, -1, len(planes), columns)).reshape(-1)


def pack_gates(matrix: Array, gates: int, nr: int) -> Array:
    """Recurrent weights [D, gates * H, K], a row for each unit of a gate, as panels [D, NR units][gate][K][NR], zero-padded."""
    directions, rows, depth = matrix.shape
    units = rows // gates
    pieces = -(-units // nr)
    padded = np.zeros((directions, gates, pieces * nr, depth), np.float32)
    padded[:, :, :units] = matrix.reshape(directions, gates, units, depth)
    packed = aligned_empty((directions, pieces, gates, depth, nr), np.float32)
    packed[...] = padded.reshape(directions, gates, pieces, nr, depth).transpose(0, 2, 1, 4, 3)
    return packed
