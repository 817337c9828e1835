"""Products and convolutions onto the CUDA forms of `gemm` and `conv`: operands in their own element type, weights as rows of k.

float32 is multiplied exactly, with precision "tf32" on the tensor cores; integers of 8 bits by int8, with int32 sums
(`passes/zero_points.py` has taken zero points off). Floats by at most eight rows are multiplied on the FMA units, tf32 too.
What these templates do not take (computed filters, floats of two types) becomes generated loops; depthwise convolutions
have a template of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, SymbolicDim, ceil_divide, product
from minicc.ir.expr import const, iteration, minimum, select
from minicc.ir.graph import Node, Value
from minicc.ir.types import DType, bf16, f16, f32, i8, i32, u8
from minicc.kernels import cuda_tiles
from minicc.lower.affine import linearise, row_major
from minicc.lower.body import Space, Write
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.conv import bias_adder, image_index, lower_depthwise, spatial_words
from minicc.lower.templates.cuda_winograd import convolution_ways, emit_cuda_winograd
from minicc.ops.spatial import channel_axis, spatial_axes, window
from minicc.targets.cuda import CudaTarget

Array = np.ndarray[Any, Any]
Ways = Callable[[str, int, int, int, int, CudaTarget], tuple[cuda_tiles.Way, ...]]

ELEMENTS: dict[DType, str] = {f32: "f32", f16: "f16", bf16: "bf16"}
INTEGERS: dict[DType, str] = {i8: "s8", u8: "u8"}
# Sizes that are not known are taken for so many when a tile is chosen.
UNKNOWN_ROWS, UNKNOWN_COLUMNS, UNKNOWN_DEPTH = 256, 128, 512
# Bits of a row of windows say which taps lie inside the input, along all axes together.
MOST_TAPS = 31


def lower_cuda_matmul(low: Lowering, node: Node, lead: Node | None) -> str:
    """MatMul and MatMulInteger of numpy semantics; vectors are refused."""
    anchor, inputs = common.anchor_of(node, lead)
    a, b = inputs[:2]
    assert a is not None and b is not None
    refusal = _refuse_operands(a, b, inputs[2:], anchor)
    if refusal:
        return refusal
    sums = i32 if a.tensor.dtype in INTEGERS else f32
    if len(a.shape) < 2 or len(b.shape) < 2:
        return "an operand is a vector"
    shape = anchor.output.shape
    batch, m, n, k = shape[:-2], shape[-2], shape[-1], a.shape[-1]
    left = common.operand_view(low, a, (*batch, m, k), len(batch) + 1)
    a_walk = common.rows_walk(left[2])
    found = low.view(b, (*batch, k, n)) if b.data is None else None
    if found is not None and (found[2][-2] == 1 or k == 1):
        b_walk = {axis: s for axis, s in enumerate(found[2]) if s != 0 and axis != len(batch)}
        space = common.epilogue(low, node, lead, [a_walk, b_walk], dtype=sums)
        if not isinstance(space, str):
            _emit_gemm(low, node, lead, left, (found[0], found[1], found[2][-1]), k, space, product(shape) * k * 2)
            return ""
    packed, strides, row = _rows_of_k(low, b, (*batch, k, n))
    b_walk = {axis: s for axis, s in enumerate(strides) if s != 0}
    space = common.epilogue(low, node, lead, [a_walk, b_walk], dtype=sums)
    if isinstance(space, str) and low.is_inline(a):  # as for CPUs
        left = common.contiguous_view(low, a, (*batch, m, k))
        space = common.epilogue(low, node, lead, [common.rows_walk(left[2]), b_walk], dtype=sums)
    if isinstance(space, str):
        return space
    _emit_gemm(low, node, lead, left, (packed, 0, row), k, space, product(shape) * k * 2)
    return ""


def _refuse_operands(a: Value, b: Value, zeros: Sequence[Value | None], anchor: Node) -> str:
    """Why no kernel multiplies these; empty when one does."""
    left, right = a.tensor.dtype, b.tensor.dtype
    integer = anchor.op.name.endswith("Integer")
    if (right == i8 and left in INTEGERS) if integer else (right == left and left in ELEMENTS):
        return "zero points" if integer and any(v is not None for v in zeros) else ""
    return f"no product kernel for {left} by {right}"


def _emit_gemm(low: Lowering, node: Node, lead: Node | None, left: tuple[int, Dim, Sequence[Dim]],
               right: tuple[int, Dim, Dim], k: Dim, space: Space, flops: Dim) -> None:  # fmt: skip
    """One product. left: (buffer, offset, strides), right: (buffer, offset, elements from row of k to row of k)."""
    anchor = lead or node
    (a0, a1, a_row), (b0, b1, _) = space.strides
    e0, e1, em, en = space.extents
    element, size = _element(low, anchor), low.buffers[left[0]].dtype.bytes  # type: ignore[union-attr]
    constants: dict[str, int | str] = {
        "ELEMENT": element, "PIECE": piece(size, left[1], a0, a1, 0 if em == 1 else a_row),  # one row has no next one
        "B_PIECE": piece(size, right[1], b0, b1, right[2]),
        "B_ROUNDS": int(element == "tf32" and low.buffers[right[0]].kind != "constant"),
    }  # fmt: skip
    assert isinstance(low.target, CudaTarget)
    maps = cuda_tiles.takes_maps(constants, low.target) and all(map(_forward, (a0, a1, a_row, b0, b1, right[2])))
    ways = partial(cuda_tiles.product_ways, maps=maps)
    constants |= low.choose(node, _tiles(low, ways, element, em, en, k, product((e0, e1))))
    common.emit(
        low, node, "gemm", constants,
        {"A": Word(left[1], left[0]), "B": Word(right[1], right[0]), "M": em, "N": en, "K": k, "A_ROW": a_row, "A_B0": a0,
         "A_B1": a1, "B_ROW": right[2], "B_B0": b0, "B_B1": b1, "B0": e0, "B1": e1},
        space, (left[0], right[0]), flops, results=(node.outputs if lead is not None else (anchor.output,)), name="gemm",
    )  # fmt: skip


def lower_cuda_conv(low: Lowering, node: Node, lead: Node | None) -> str:
    """Convolution with constant weights of any stride, dilation, padding and group over one to three spatial axes."""
    anchor, inputs = common.anchor_of(node, lead)
    x, w = inputs[0], inputs[1]
    assert x is not None and w is not None
    refusal = _refuse_operands(x, w, inputs[2:], anchor)
    if refusal:
        return refusal
    integer = x.tensor.dtype in INTEGERS
    rank, groups = len(x.shape) - 2, anchor.attrs["group"]
    if w.data is None or not 1 <= rank <= 3:
        return f"{rank} spatial axes" if w.data is not None else "weights are computed at run time"
    filters, channels, *kernel = w.data.shape
    if channels == 1 and (groups > 1 or filters == 1):
        return "one channel per group" if integer else lower_depthwise(low, node, lead)
    if sum(kernel) + 3 - rank > MOST_TAPS:
        return "a large kernel"
    layout = anchor.attrs["layout"]
    spatial = [x.shape[a] for a in spatial_axes(layout, len(x.shape))]
    geometry = window(anchor.attrs, kernel, spatial)
    element, size = _element(low, anchor), x.tensor.dtype.bytes
    # Copies into shared memory take at least 4 bytes; more would need few channels of 8 bits to be copied to wider ones.
    padded = channels if groups > 1 else -(-channels // 4) * 4 if integer else _whole_pieces(channels, size)
    buffer, offset, strides = _channels_last(low, x, layout, padded * groups)
    out = anchor.output.shape
    pixels = [out[a] for a in spatial_axes(layout, len(out))]
    finish = bias_adder(low, inputs[2] if len(inputs) > 2 else None, channel_axis(layout, len(out)))
    sums = i32 if integer else f32
    flops = product(out) * channels * product(kernel) * 2
    data = np.pad(w.data, [(0, 0), (0, padded - channels), *[(0, 0)] * rank])
    matrix = groups == 1 and all(k == 1 for k in kernel) and set(geometry.strides) == {1} and not any(
        geometry.padded(a) for a in range(rank))  # fmt: skip
    if matrix and layout == "NHWC":
        walk = {axis: s for axis, s in enumerate(strides[:-1]) if s != 0}
        space = common.epilogue(low, node, lead, [walk, {}], finish=finish, dtype=sums)
        if isinstance(space, str):
            return space
        weights = _packed(low, w, data.reshape(data.shape[:2]), 1, element)
        row = _whole_pieces(padded, size)
        _emit_gemm(low, node, lead, (buffer, offset, strides), (weights, 0, row), padded, space, flops)
        return ""
    per_group = filters // groups
    axes = (out[0], groups, *pixels, per_group)
    pixel = {2 + a: s for a, s in enumerate(row_major(pixels))}
    space = common.epilogue(low, node, lead, [pixel], axes, image_index(layout, rank, per_group), finish, sums)
    if isinstance(space, str):
        return space
    results = node.outputs if lead is not None else (anchor.output,)
    constants: dict[str, int | str] = {"ELEMENT": element, "PIECE": piece(size, offset, *strides[:-1], padded)}
    axes_of = [*zip(kernel, geometry.strides, geometry.dilations, geometry.begin, geometry.end)]
    assert isinstance(low.target, CudaTarget)
    maps = groups == 1 and all(isinstance(pad, int) for axis in axes_of for pad in axis[3:]) and all(map(_forward, strides))
    maps = maps and cuda_tiles.takes_windows(constants, low.target, padded, axes_of)
    rows, depth = out[0] * product(pixels), padded * product(kernel)
    direct = _tiles(low, partial(cuda_tiles.tile_ways, maps=maps), element, rows, per_group, depth, groups)
    way = low.choose(node, convolution_ways(low, direct, element, geometry, groups, out[0], filters, padded))
    if isinstance(way, int):
        aligned, place = piece(size, offset, *strides[:-1]), (buffer, offset, strides)
        tiles_of = partial(_tiles, low, cuda_tiles.tile_ways, element)
        emit_cuda_winograd(low, node, space, place, aligned, w, way, element, out[0], spatial, geometry, results, tiles_of)
        return ""
    weights = _packed(low, w, data, groups, element)
    constants |= way
    values: dict[str, Word | Dim] = {
        "X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": out[0], "GROUPS": groups, "M": product(pixels),
        "N": per_group, "C": padded, "X_IMAGE": strides[0],
        **spatial_words(spatial, pixels, geometry, 3 - rank, strides[1:-1]),
    }  # fmt: skip
    common.emit(low, node, "conv", constants, values, space, (buffer, weights), flops, results=results, name="conv")
    return ""


def _element(low: Lowering, anchor: Node) -> str:
    """What the kernels call the anchor's element type."""
    first = anchor.inputs[0]
    assert first is not None
    name = (ELEMENTS | INTEGERS)[first.tensor.dtype]
    return "tf32" if name == "f32" and low.precision == "tf32" else name


def _tiles(low: Lowering, ways: Ways, element: str, m: Dim, n: Dim, k: Dim, batches: Dim) -> dict[str, dict[str, int]]:
    """By name the tiles that `ways` gives for these sizes, and into how many parts they cut the depth, as constants."""
    assert isinstance(low.target, CudaTarget)
    sizes = zip((m, n, k, batches), (UNKNOWN_ROWS, UNKNOWN_COLUMNS, UNKNOWN_DEPTH, 1))
    rows, columns, depth, repeats = (d if isinstance(d, int) else unknown for d, unknown in sizes)
    found = ways(element, rows, columns, depth, repeats, low.target)
    number = cuda_tiles.ALL_TILES.index
    return {cuda_tiles.way_name(way): {"TILE": number(way[0]), "SPLITS": way[1]} for way in found}


def piece(size: int, *counts: Dim) -> int:
    """The largest power of two up to 16 that divides these numbers of elements of `size` bytes, whatever symbols are."""
    known = (gcd(*(c for _, c in d.terms)) if isinstance(d, SymbolicDim) else d for d in counts)
    return cuda_tiles.piece_of(*(size * count for count in known))


def _forward(stride: Dim) -> bool:
    """Whether a stride is known not to be negative."""
    return stride >= 0 if isinstance(stride, int) else all(factor > 0 for _, factor in stride.terms)


def _whole_pieces(count: int, size: int) -> int:
    """`count` elements rounded up to 16 bytes."""
    each = 16 // size
    return -(-count // each) * each


def _packed(low: Lowering, w: Value, data: Array, groups: int, element: str) -> int:
    """Constant filters as rows of k."""
    key = ("pack_filters", id(w.data), data.shape, groups, element)
    if key not in low.constants:
        rounded = cuda_tiles.round_tf32(data) if element == "tf32" else data
        low.constant(cuda_tiles.pack_filters(rounded, groups), f"{w.name}_packed", key)
    return low.constants[key]


def _rows_of_k(low: Lowering, b: Value, shape: Sequence[Dim]) -> tuple[int, list[Dim], Dim]:
    """(buffer, strides of the output's axes, elements from row to row) of a right operand turned into rows of k."""
    *batch, k, n = shape
    own = b.shape[:-2]
    size = b.tensor.dtype.bytes
    row: Dim = ceil_divide(k, 16 // size) * (16 // size)
    strides: list[Dim] = [0] * (len(batch) + 2)
    step: Dim = n * row
    for axis in reversed(range(len(own))):
        strides[len(batch) - len(own) + axis] = 0 if own[axis] == 1 else step
        step = step * own[axis]
    if b.data is not None:
        element = "tf32" if b.tensor.dtype == f32 and low.precision == "tf32" else ""
        key = ("pack_right", id(b.data), element)
        if key not in low.constants:
            data = cuda_tiles.round_tf32(b.data) if element else b.data
            low.constant(cuda_tiles.pack_right(data), f"{b.name}_packed", key)
        return low.constants[key], strides, row
    target_shape = (*own, n, row)
    target = low.temporary(f"{b.name}_packed", b.tensor.dtype, target_shape)
    index = [iteration(axis) for axis in range(len(target_shape))]
    # Both sides of a selection are loaded, so the position stays inside.
    column = index[-1] if row == k else minimum(index[-1], k - 1)
    value = low.composer().element(b, [*index[:-2], column, index[-2]])
    if row != k:
        value = select(index[-1] < k, value, const(0, b.tensor.dtype))
    write = Write(target, b.tensor.dtype, linearise(index, target_shape), value)
    low.emit_writes([write], target_shape, (), "pack_right")
    return target, strides, row


def _channels_last(low: Lowering, x: Value, layout: str, padded: int) -> tuple[int, Dim, tuple[Dim, ...]]:
    """(buffer, offset, strides over [N, *spatial, C]) of an activation with `padded` contiguous channels; a copy if need be."""
    rank = len(x.shape)
    order = tuple(range(rank)) if layout == "NHWC" else (0, *range(2, rank), 1)
    channels = x.shape[order[-1]]
    found = low.view(x, x.shape) if channels == padded else None
    if found is not None and (found[2][order[-1]] == 1 or padded == 1):
        return found[0], found[1], (*(found[2][a] for a in order[:-1]), 1)
    if layout == "NHWC" and channels == padded:
        return low.buffer(x), 0, row_major(x.shape)
    shape = (*(x.shape[a] for a in order[:-1]), padded)
    number = low.temporary(f"{x.name}_nhwc", x.tensor.dtype, shape)
    index = [iteration(axis) for axis in range(rank)]
    source = [index[0]] * rank
    for position, axis in zip(index, order):
        source[axis] = position
    if channels != padded:
        source[order[-1]] = minimum(index[-1], channels - 1)
    value = low.composer().element(x, source)
    if channels != padded:
        value = select(index[-1] < channels, value, const(0, x.tensor.dtype))
    low.emit_writes([Write(number, x.tensor.dtype, linearise(index, shape), value)], shape, (), "to_channels_last")
    return number, 0, row_major(shape)
