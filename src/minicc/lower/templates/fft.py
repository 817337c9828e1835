"""Which convolutions may go to the template `conv_fft`, with which tiles, and how.

Fourier's form costs more per value than Winograd's and takes as many bytes of weights as tiles have inputs, but hardly more
products for a large kernel than for a small one. The choice is made at compile time, by `fft_work` or by timing
(minicc.tune); the template is right for any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.graph import Node, Value
from minicc.kernels import packing
from minicc.kernels.cpu.fft_sizes import INPUTS, SIDES, frequencies
from minicc.kernels.domain import fft_block
from minicc.lower.body import Space
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.winograd import UNKNOWN_BATCH, UNKNOWN_EXTENT, plane
from minicc.ops.spatial import Window
from minicc.targets.cpu import CpuTarget
from minicc.targets.rates import Rates

# Kernels (dilated, if they are) at least so long along an axis: below, Winograd's form has as few products.
LEAST_SPAN = 5
# The transformed weights of a layer take at most so many bytes, or so many times those of its weights if that is more.
MOST_BYTES, MOST_TIMES = 16 << 20, 6
# Ways that a layer may be timed in.
MOST_WAYS = 2
# The time of an operation of these products beside that of the definition's; of a value into or out of Fourier's form beside
# Winograd's. A product has PER_PIXEL channels' worth of other work.
PER_OPERATION, PER_VALUE, PER_PIXEL = 1.1, 9 / 4, 4
# The estimate must be better than others' by a fifth. With fewer than 32 vector registers everything was measured
# to take up to 7 / 4 of the time.
MARGIN, FEWER_REGISTERS = 1.2, 7 / 4


@dataclass(frozen=True)
class Sides:
    """Height and width of a tile of inputs."""

    height: int
    width: int


def takes_fft(geometry: Window, groups: int) -> bool:
    """Whether the template computes such a convolution at all, and it is a large one: over one or two axes, one group."""
    if groups != 1 or geometry.rank > 2 or set(geometry.strides) != {1}:
        return False
    spans = [geometry.span(axis) for axis in range(geometry.rank)]
    return all(isinstance(span, int) for span in spans) and max(spans) >= LEAST_SPAN


def fft_work(target: CpuTarget, rates: Rates, shape: Sequence[int], geometry: Window, batch: Dim) -> dict[Sides, int]:
    """The estimated time of the best tiles that the template takes, in the units of `winograd.convolution_work`.

    shape: of the weights, [M, C, *kernel].
    """
    filters, channels, *kernel = shape
    lanes = target.vector_width
    images = batch if isinstance(batch, int) else UNKNOWN_BATCH
    extents = [size if isinstance(size, int) else UNKNOWN_EXTENT for size in plane(geometry.output)]
    spans = plane([geometry.span(axis) for axis in range(geometry.rank)])
    filled = -(-filters // lanes) * lanes
    found: dict[Sides, int] = {}
    for side in SIDES:
        sides = Sides(*(side if span != 1 else 1 for span in spans))
        count = 2 * frequencies(sides.height, sides.width)
        out = [size - span + 1 for size, span in zip((sides.height, sides.width), spans)]
        memory = 4 * count * channels * filled
        if min(out) < 1 or count * max(channels, lanes) > INPUTS:
            continue
        if memory > max(MOST_BYTES, MOST_TIMES * 4 * int(np.prod(kernel)) * channels * filters):
            continue
        tiles = images * -(-extents[0] // out[0]) * -(-extents[1] // out[1])
        blocks = -(-tiles // fft_block(sides.height, sides.width, channels, target))
        # A frequency has 4 products of a value and a weight, for 2 numbers of each.
        products = 4 * tiles * PER_OPERATION
        weights = 4 * (rates.memory + (blocks - 1) * rates.cache)
        values = tiles * (max(channels, lanes) + filled) * PER_VALUE * rates.value
        work = count * ((channels + PER_PIXEL) * filled * max(products, weights) + values)
        if target.vector_registers < 32:
            work *= FEWER_REGISTERS
        found[sides] = round(work * MARGIN)
    best = sorted(found, key=found.__getitem__)[:MOST_WAYS]
    return {sides: found[sides] for sides in best}


def emit_fft(low: Lowering, node: Node, space: Space, x: tuple[int, Dim, tuple[Dim, ...]], w: Value, sides: Sides,
             batch: Dim, spatial: Sequence[Dim], geometry: Window, results: Sequence[Value]) -> None:  # fmt: skip
    """The step of a convolution with constant weights; x is (buffer, offset, strides over [N, *spatial, C])."""
    assert w.data is not None
    buffer, offset, strides = x
    filters, channels, *kernel = w.data.shape
    lanes, rank = low.cpu.vector_width, len(kernel)
    spans = plane([geometry.span(axis) for axis in range(rank)])
    out = (sides.height - spans[0] + 1, sides.width - spans[1] + 1)
    dilations = plane(geometry.dilations)
    key = ("pack_fft", id(w.data), lanes, sides, dilations)
    if key not in low.constants:
        data = w.data.reshape(filters, channels, *plane(kernel)).astype(np.float32, copy=False)
        packed = packing.pack_fft(data, (sides.height, sides.width), dilations, lanes)
        low.constant(packed, f"{w.name}_packed", key)
    weights = low.constants[key]
    values: dict[str, Word | Dim] = {
        "X": Word(offset, buffer), "W": Word(0, weights), "IMAGES": batch, "N": filters, "C": channels,
        "X_IMAGE": strides[0],
    }  # fmt: skip
    for name, unused, row in (("X_", 0, strides[1:-1]), ("I", 1, spatial), ("O", 1, geometry.output), ("P", 0, geometry.begin)):
        values |= dict(zip((f"{name}H", f"{name}W"), plane(row, unused)))
    tiles = batch * product(ceil_divide(extent, size) for extent, size in zip(plane(geometry.output), out))
    constants = {"NR": lanes, "SIDE_H": sides.height, "SIDE_W": sides.width, "OUT_H": out[0], "OUT_W": out[1],
                 "FEW": int(channels < lanes)}  # fmt: skip
    common.emit(
        low, node, "conv_fft", constants, values, space, (buffer, weights),
        tiles * (8 * frequencies(sides.height, sides.width) * channels * filters), results=results,
        name=f"fft_{sides.height}x{sides.width}",
    )  # fmt: skip
