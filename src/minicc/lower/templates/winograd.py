"""Which convolutions go to the template `winograd`, with which tile, and how.

Winograd's algorithm trades multiplications for weights: with 3x3 taps and tiles of 2 x 2 outputs 16 / 9 times as many
bytes of weights, with 4 x 4 outputs 4 times. On small maps every weight is used a few times only, and reading them
from memory is what costs. The choice is made at compile time, by `convolution_work` or by timing (minicc.tune); the
template is right for any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.graph import Node, Value
from minicc.kernels import packing
from minicc.kernels.domain import WINOGRAD_INPUTS, panel_columns, tile_rows
from minicc.kernels.winograd_axes import side
from minicc.lower.body import Space
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.ops.spatial import Window
from minicc.targets.cpu import CpuTarget
from minicc.targets.rates import Rates

Tile = tuple[int, int]

# Winograd's products fetch weights from memory ahead, while they compute; the direct sum waits for this share of their time.
WAITED = 5 / 9
# Sizes that are not known when compiling: one image and short axes, so that what is chosen pays for longer ones too.
UNKNOWN_BATCH, UNKNOWN_EXTENT = 1, 14


def takes_winograd(geometry: Window, groups: int) -> bool:
    """Whether the template computes such a convolution at all: over one or two axes, with 3 or 5 taps along some, else 1.

    Every output, or with 3x3 taps every second one.
    """
    if groups != 1 or geometry.rank > 2 or set(geometry.dilations) != {1}:
        return False
    if geometry.strides == (2, 2):
        return geometry.kernel == (3, 3)
    return set(geometry.strides) == {1} and set(geometry.kernel) - {1} in ({3}, {5})


def convolution_work(target: CpuTarget, rates: Rates, shape: Sequence[int], stride: int, batch: Dim, pixels: Sequence[Dim],
                     tiled: bool = True) -> dict[Tile | None, int]:  # fmt: skip
    """The estimated time of the direct sum (None) and of each (height, width) of tiles in outputs that the template takes.

    shape: of the weights, [M, C, *kernel]. tiled: whether the template takes it at all.

    The estimate is in times of an operation of a product (`Rates`), and takes the weights to come from memory, which they do
    in models whose weights exceed the caches.
    """
    filters, channels, *kernel = shape
    images = batch if isinstance(batch, int) else UNKNOWN_BATCH
    height, width = (p if isinstance(p, int) else UNKNOWN_EXTENT for p in plane(pixels))
    nr = panel_columns(target, filters)
    weights = channels * -(-filters // nr) * nr
    from_memory = 4 * rates.memory
    direct = int(np.prod(kernel)) * weights * (2 * images * height * width + WAITED * from_memory)
    found: dict[Tile | None, int] = {None: round(direct)}
    if not tiled or channels < target.vector_width:
        return found
    taps = max(kernel)
    for out in (2, 4) if stride == 1 and taps == 3 else (2,):
        down, across = (out if extent != 1 else 1 for extent in plane(kernel))
        positions = side(down, stride, taps) * side(across, stride, taps)
        tiles = images * -(-height // down) * -(-width // across)
        products = weights * max(2 * tiles, from_memory)
        transforms = tiles * (channels + filters) * rates.value
        if positions * channels * min(tiles, tile_rows(target)) <= WINOGRAD_INPUTS:
            found[down, across] = round(positions * (products + transforms))
    return found


def emit_winograd(low: Lowering, node: Node, space: Space, x: tuple[int, Dim, tuple[Dim, ...]], w: Value, tile: Tile,
                  batch: Dim, spatial: Sequence[Dim], geometry: Window, results: Sequence[Value]) -> None:  # fmt: skip
    """The step of a convolution with constant weights; x is (buffer, offset, strides over [N, *spatial, C])."""
    assert w.data is not None
    buffer, offset, strides = x
    filters, channels, *kernel = w.data.shape
    stride, taps = geometry.strides[0], max(kernel)
    nr = panel_columns(low.cpu, filters)
    key = ("pack_winograd", id(w.data), nr, tile, stride)
    if key not in low.constants:
        packed = packing.pack_winograd(w.data.astype(np.float32, copy=False), tile, stride, nr)
        low.constant(packed, f"{w.name}_packed", key)
    weights = low.constants[key]
    values: dict[str, Word | Dim] = {
        "X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": batch, "N": filters, "C": channels,
        "X_IMAGE": strides[0],
    }  # fmt: skip
    for name, unused, row in (("X_", 0, strides[1:-1]), ("I", 1, spatial), ("O", 1, geometry.output), ("P", 0, geometry.begin)):
        values |= dict(zip((f"{name}H", f"{name}W"), plane(row, unused)))
    tiles = batch * product(ceil_divide(extent, out) for extent, out in zip(plane(geometry.output), tile))
    positions = side(tile[0], stride, taps) * side(tile[1], stride, taps)
    common.emit(
        low, node, "winograd", {"NR": nr, "OUT_H": tile[0], "OUT_W": tile[1], "STRIDE": stride, "TAPS": taps}, values, space,
        (buffer, weights), tiles * (2 * positions * channels * filters), results=results, name=f"winograd_{tile[0]}x{tile[1]}",
    )  # fmt: skip


def plane(row: Sequence[Any], unused: int = 1) -> tuple[Any, Any]:
    """Entries of the height and the width; a single axis is the width."""
    first, second = (unused, *row)[-2:]
    return first, second
