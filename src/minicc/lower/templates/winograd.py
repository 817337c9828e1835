"""Which 3x3 convolutions go to the template `winograd`, with which tile, and how.

Winograd's algorithm trades multiplications for weights: with tiles of 2 x 2 outputs 16 / 9 times as many bytes of
weights, with 4 x 4 outputs 4 times. On small maps every weight is used a few times only, and reading them from
memory is what costs. The choice is made at compile time by `winograd_tile`; the template is right for any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicc.ir.dims import Dim, ceil_divide
from minicc.ir.graph import Node, Value
from minicc.kernels import packing
from minicc.kernels.domain import WINOGRAD_INPUTS, panel_columns, tile_rows
from minicc.lower.body import Space
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.ops.spatial import Window
from minicc.targets.cpu import CpuTarget

# Operations of a product that a core does in the time of one byte of weights from memory: in Winograd's products, which
# fetch weights ahead while they compute (shared bandwidth of two cores), and in the direct sum, which waits; and in the
# time of one value into or out of Winograd's form.
WORK_PER_BYTE_AHEAD, WORK_PER_BYTE = 9, 5
WORK_PER_VALUE = 16
# Sizes that are not known when compiling: one image, and a map large enough for the weights not to matter.
UNKNOWN_BATCH, UNKNOWN_EXTENT = 1, 56


def winograd_tile(target: CpuTarget, shape: Sequence[int], batch: Dim, pixels: Sequence[Dim]) -> int:
    """Outputs along each axis of the tiles that take the least estimated time, 2 or 4; 0 when the direct sum does.

    shape: of the weights, [M, C, 3, 3].

    The estimate counts operations of the products and transforms, and takes the weights to come from memory, which
    they do in models whose weights exceed the caches.
    """
    filters, channels, *_ = shape
    if channels < target.vector_width:
        return 0
    images = batch if isinstance(batch, int) else UNKNOWN_BATCH
    height, width = (p if isinstance(p, int) else UNKNOWN_EXTENT for p in pixels)
    nr = panel_columns(target, filters)
    weights = channels * -(-filters // nr) * nr
    best, least = 0, 9 * weights * (2 * images * height * width + 4 * WORK_PER_BYTE)  # 4 bytes each
    for out in (2, 4):
        positions = (out + 2) ** 2
        tiles = images * -(-height // out) * -(-width // out)
        products = weights * max(2 * tiles, 4 * WORK_PER_BYTE_AHEAD)
        work = positions * (products + tiles * (channels + filters) * WORK_PER_VALUE)
        fits = positions * channels * min(tiles, tile_rows(target)) <= WINOGRAD_INPUTS
        if fits and work < least:
            best, least = out, work
    return best


def is_winograd(geometry: Window, groups: int) -> bool:
    """Whether the algorithm computes such a convolution at all."""
    return groups == 1 and geometry.kernel == (3, 3) and {*geometry.strides, *geometry.dilations} == {1}


def emit_winograd(low: Lowering, node: Node, space: Space, x: tuple[int, Dim, tuple[Dim, ...]], w: Value, out: int,
                  batch: Dim, spatial: Sequence[Dim], geometry: Window, results: Sequence[Value]) -> None:  # fmt: skip
    """The step of a convolution with constant weights; x is (buffer, offset, strides over [N, H, W, C])."""
    assert w.data is not None
    buffer, offset, strides = x
    filters, channels, *_ = w.data.shape
    nr = panel_columns(low.target, filters)
    key = ("pack_winograd", id(w.data), nr, out)
    if key not in low.constants:
        low.constant(packing.pack_winograd(w.data.astype(np.float32, copy=False), out, nr), f"{w.name}_packed", key)
    weights = low.constants[key]
    height, width = geometry.output
    tiles = batch * ceil_divide(height, out) * ceil_divide(width, out)
    common.emit(
        low, node, "winograd", {"NR": nr, "OUT": out},
        {"X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": batch, "N": filters, "C": channels,
         "X_IMAGE": strides[0], "X_H": strides[1], "X_W": strides[2], "IH": spatial[0], "IW": spatial[1], "OH": height,
         "OW": width, "PH": geometry.begin[0], "PW": geometry.begin[1]},
        space, (buffer, weights), tiles * (2 * (out + 2) ** 2 * channels * filters), results=results,
        name=f"winograd_{out}x{out}",
    )  # fmt: skip
