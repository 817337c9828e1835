"""MatMulInteger and ConvInteger onto the `conv_integer` template: exact int32 sums, what follows in the epilogue.

Weights and their zero points must be constants, the zero point of the activation one number (which may be computed).
Everything else is refused and becomes generated loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, product
from minicc.ir.expr import const, iteration
from minicc.ir.graph import Node, Value
from minicc.ir.types import i32, i64
from minicc.kernels import packing
from minicc.kernels.domain import INTEGER_RUN, panel_columns
from minicc.lower.affine import row_major
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.conv import channels_last, image_index, spatial_words
from minicc.ops.spatial import spatial_axes, window

Array = np.ndarray[Any, Any]
POINTERS = {"u8": "ptr_u8", "i8": "ptr_i8"}


def lower_conv_integer(low: Lowering, node: Node, lead: Node | None) -> str:
    """Integer convolution of any stride, dilation, padding and group over one to three spatial axes."""
    anchor, inputs = common.anchor_of(node, lead)
    x, w, x_zero, w_zero = (*inputs, None, None)[:4]
    assert x is not None and w is not None
    refusal = _refuse(x, w, x_zero, w_zero)
    if refusal:
        return refusal
    rank = len(x.shape) - 2
    if not 1 <= rank <= 3:
        return f"{rank} spatial axes"
    assert w.data is not None
    groups, layout = anchor.attrs["group"], anchor.attrs["layout"]
    filters, _, *kernel = w.data.shape
    spatial = [x.shape[a] for a in spatial_axes(layout, len(x.shape))]
    geometry = window(anchor.attrs, kernel, spatial)
    out = anchor.output.shape
    pixels = [out[a] for a in spatial_axes(layout, len(out))]
    # Narrow groups are merged into wider ones with block-diagonal weights: fuller columns for the same time.
    merged, groups = packing.merge_groups(_centred(w.data, w_zero, 0), groups, low.cpu.vector_width)
    per_group, channels = filters // groups, merged.shape[1]
    axes = (out[0], groups, *pixels, per_group)
    walk = {2 + a: s for a, s in enumerate(row_major(pixels))}
    space = common.epilogue(low, node, lead, [walk], axes, image_index(layout, rank, per_group), dtype=i32)
    if isinstance(space, str):
        return space
    buffer, offset, strides = channels_last(low, x, layout)
    # Pixels of a line that lie behind each other are gathered at once.
    lines = kernel[-1] > 1 and geometry.dilations[-1] == 1 and strides[-2] == channels
    if lines and kernel[-1] * channels <= INTEGER_RUN:
        merged = packing.merge_taps(merged)
    weights = _words(low, x, w, w_zero, merged, groups)
    values: dict[str, Word | Dim] = {
        "X": Word(offset, buffer), "IMAGES": out[0], "GROUPS": groups, "M": product(pixels),
        "N": per_group, "C": channels, "X_IMAGE": strides[0], "X_ZERO": _zero_word(low, x_zero),
        **spatial_words(spatial, pixels, geometry, 3 - rank, strides[1:-1]),
    }  # fmt: skip
    results = node.outputs if lead is not None else (anchor.output,)
    flops = product(anchor.output.shape) * w.data[0].size * 2
    constants = {**weights.constants, "MERGED": int(merged.shape[1] != channels)}
    common.emit(low, node, "conv_integer", constants, {**values, **weights.words}, space, (buffer, *weights.buffers), flops,
                cost=weights.cost(flops), results=results)  # fmt: skip
    return ""


def lower_matmul_integer(low: Lowering, node: Node, lead: Node | None) -> str:
    """Integer product of rows with one constant matrix: a convolution with one tap over all rows."""
    anchor, inputs = common.anchor_of(node, lead)
    a, b, a_zero, b_zero = (*inputs, None, None)[:4]
    assert a is not None and b is not None
    refusal = _refuse(a, b, a_zero, b_zero)
    if refusal:
        return refusal
    assert b.data is not None
    if len(a.shape) < 2 or b.data.ndim != 2:
        return "the right operand is not a matrix, or the left one is a vector"
    depth, columns = b.data.shape
    buffer, offset, strides = common.operand_view(low, a, a.shape, len(a.shape) - 1)
    # Logical axes: images (the first axis of several), groups, pixels (the others that are not of size 1), column.
    rows = [axis for axis, size in enumerate(a.shape[:-1]) if size != 1] or [len(a.shape) - 2]
    images, pixels = (rows[:1], rows[1:]) if len(rows) > 1 else ([], rows)
    number = {axis: k for k, axis in enumerate(images)} | {axis: 2 + k for k, axis in enumerate(pixels)}
    axes = (a.shape[images[0]] if images else 1, 1, *(a.shape[axis] for axis in pixels), columns)
    index = [iteration(number[axis]) if axis in number else const(0, i64) for axis in range(len(a.shape) - 1)]
    index.append(iteration(len(axes) - 1))
    walk: dict[int, Dim] = {k: strides[axis] for axis, k in number.items() if strides[axis] != 0}
    space = common.epilogue(low, node, lead, [walk], axes, index, dtype=i32)
    if isinstance(space, str):
        return space
    weights = _words(low, a, b, b_zero, np.ascontiguousarray(_centred(b.data, b_zero, 1).T), 1)
    (step, _, row), (e0, _, em, en) = space.strides[0], space.extents
    ones = dict.fromkeys(["ID", "IH", "OD", "OH", "KD", "KH", "KW", "SD", "SH", "SW", "DD", "DH", "DW", "GROUPS"], 1)
    values: dict[str, Word | Dim] = {
        **ones, **weights.words, "X": Word(offset, buffer), "IMAGES": e0, "M": em, "N": en, "C": depth,
        "X_IMAGE": step, "X_W": row, "IW": em, "OW": em, "X_ZERO": _zero_word(low, a_zero),
    }  # fmt: skip
    results = node.outputs if lead is not None else (anchor.output,)
    flops = product(anchor.output.shape) * depth * 2
    common.emit(low, node, "conv_integer", {**weights.constants, "MERGED": 0}, values, space, (buffer, *weights.buffers), flops,
                cost=weights.cost(flops), results=results, name="matmul_integer")  # fmt: skip
    return ""


def _refuse(x: Value, w: Value, x_zero: Value | None, w_zero: Value | None) -> str:
    """Why the operands do not suit the template; empty when they do."""
    if w.data is None or (w_zero is not None and w_zero.data is None):
        return "integer weights or their zero point are computed at run time"
    if w.data.size == 0:
        return "the weights are empty"
    if x.tensor.dtype.name not in POINTERS or w.tensor.dtype.name not in POINTERS:
        return f"no integer kernel for {x.tensor.dtype} and {w.tensor.dtype}"
    if x_zero is not None and (x_zero.tensor.size != 1 or x_zero.tensor.dtype != x.tensor.dtype):
        return "the activation has several zero points"
    if w_zero is not None and (w_zero.tensor.dtype != w.tensor.dtype or w_zero.tensor.rank > 1):
        return "the weights have a zero point for each element"
    return ""


def _centred(w: Array, zero: Value | None, axis: int) -> Array:
    """int16 weights less their zero points, which run along `axis`."""
    wide = w.astype(np.int16)
    if zero is None:
        return wide
    assert zero.data is not None
    shape = [1] * w.ndim
    shape[axis] = -1
    return wide - zero.data.astype(np.int16).reshape(shape)


@dataclass(frozen=True)
class _Words:
    """Packed weights: their buffers, the kernel's words that name them, and its constants but MERGED."""

    buffers: tuple[int, ...]
    words: dict[str, Word | Dim]
    constants: dict[str, int | str]

    def cost(self, flops: Dim) -> Dim:
        """Estimated nanoseconds of so many operations: as many at a time as for floats, times the numbers of a word."""
        return flops // (common.OPERATIONS_PER_NS * int(self.constants["NUMBERS"]))


def _words(low: Lowering, x: Value, w: Value, zero: Value | None, centred: Array, groups: int) -> _Words:
    """The weights [M, C / group, *kernel], whose values less their zero points are given, as words for products with x.

    Bytes where the target multiplies them: the values less their zero points if they fit, else the weights as they are beside
    their zero points, or for merged groups, which have zeros between them, int16.
    """
    per_group = len(centred) // groups
    nr = panel_columns(low.cpu, per_group)
    least, largest = int(centred.min()), int(centred.max())
    zeros: Array | None = None
    if low.cpu.multiplies_bytes and least >= -128 and largest <= 127:
        centred = centred.astype(np.int8)
    elif low.cpu.multiplies_bytes and zero is not None and zero.data is not None and centred.size == w.tensor.size:
        shift = 128 if w.tensor.dtype.name == "u8" else 0
        zeros = np.broadcast_to(zero.data.astype(np.int32).reshape(-1) - shift, (len(centred),))
        centred = (centred + zeros.reshape(-1, *[1] * (centred.ndim - 1))).astype(np.int8)
    wide = centred.dtype == np.int16
    key = ("pack_integer", id(w.data), None if zero is None else id(zero.data), groups, centred.shape, nr)
    if key not in low.constants:
        low.constant(packing.pack_conv_integer(centred, groups, nr), f"{w.name}_packed", key)
    buffers = [low.constants[key]]
    words: dict[str, Word | Dim] = {"W": Word(0, low.constants[key])}
    if not wide:
        key = ("integer_totals", *key[1:])
        if key not in low.constants:
            low.constant(packing.integer_totals(centred, zeros, groups, nr), f"{w.name}_totals", key)
        buffers.append(low.constants[key])
        words["TOTALS"] = Word(0, low.constants[key])
    pointer = POINTERS[x.tensor.dtype.name]
    constants: dict[str, int | str] = {
        "NR": nr, "POINTER": pointer, "NUMBERS": 2 if wide else 4, "OFFSET": 128 if pointer == "ptr_i8" and not wide else 0,
        "SUMMED": int(zeros is not None),
    }  # fmt: skip
    return _Words(tuple(buffers), words, constants)


def _zero_word(low: Lowering, zero: Value | None) -> Word | Dim:
    """The address of the activation's zero point; 0 when it is known to be zero."""
    if zero is None or (zero.data is not None and not zero.data.any()):
        return 0
    return Word(0, low.buffer(zero))

