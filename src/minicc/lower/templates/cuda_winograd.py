"""Winograd's 3x3 convolutions for CUDA: which there are, which one is expected to be faster, and the steps of one.

Three launches with both forms in memory between them (kernels/cuda_winograd.py): inputs into Winograd's form, products of all its
positions by the tiles of any product, and outputs with the epilogue. Right for any size, like the direct sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.expr import accumulator, iteration
from minicc.ir.graph import Node, Value
from minicc.ir.types import f32
from minicc.kernels import cuda_tiles, cuda_winograd
from minicc.lower.affine import linearise
from minicc.lower.body import Space, Write, normalise_epilogue
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.ops.spatial import Window
from minicc.targets.cuda import CudaTarget

DIRECT = 0
Direct = TypeVar("Direct")
# By name the tiles of a product of m, n, k and batches as constants, the usual one first.
Tiles = Callable[[Dim, Dim, Dim, Dim], Mapping[str, Mapping[str, int]]]


def convolution_ways(low: Lowering, direct: Mapping[str, Direct], element: str, geometry: Window, groups: int, batch: Dim,
                     filters: int, channels: int) -> dict[str, Direct | int]:  # fmt: skip
    """The ways of a convolution, by name: outputs of Winograd's tiles along an axis, and ways of the direct sum, which are given.

    First what is to be taken unless timed: a direct sum, unless all sizes are known and an estimate is much better than its own.
    The other ways of the direct sum are last, for timing may not come to them.
    """
    if not low.winograd or element not in cuda_winograd.ELEMENTS or not takes_winograd(geometry, groups):
        return {**direct}
    names = {f"winograd {out}x{out}": out for out in cuda_winograd.tiles_of_elements(element)}
    height, width = geometry.output
    if not (isinstance(batch, int) and isinstance(height, int) and isinstance(width, int)):
        return _behind_the_first(direct, names)
    assert isinstance(low.target, CudaTarget)
    times = expected_times(element, batch, (height, width), channels, filters, low.target)
    names = dict(sorted(names.items(), key=lambda way: times[way[1]]))
    large = times[DIRECT] > cuda_winograd.CLEARLY * min(times.values())
    return {**names, **direct} if large else _behind_the_first(direct, names)


def _behind_the_first(direct: Mapping[str, Direct], names: Mapping[str, int]) -> dict[str, Direct | int]:
    (first, usual), *others = direct.items()
    return {first: usual, **names, **dict(others)}


def expected_times(element: str, images: int, extents: tuple[int, int], channels: int, filters: int,
                   target: CudaTarget) -> dict[int, float]:  # fmt: skip
    """Microseconds that a 3x3 convolution is expected to take by outputs of a tile along an axis, and by the direct sum."""
    rows = images * extents[0] * extents[1]
    tile, splits = cuda_tiles.choose_tile(element, rows, filters, 9 * channels, 1, target)
    times = {DIRECT: cuda_tiles.estimate(tile, splits, element, rows, filters, 9 * channels, 1, target)}
    for out in cuda_winograd.tiles_of_elements(element):
        times[out] = cuda_winograd.winograd_time(out, element, images, extents, channels, filters, target)
    return times


def takes_winograd(geometry: Window, groups: int) -> bool:
    """Whether the steps compute such a convolution at all."""
    return groups == 1 and geometry.kernel == (3, 3) and set(geometry.strides) == set(geometry.dilations) == {1}


def emit_cuda_winograd(low: Lowering, node: Node, space: Space, x: tuple[int, Dim, tuple[Dim, ...]], aligned: int, w: Value,
                       out: int, element: str, batch: Dim, spatial: Sequence[Dim], geometry: Window, results: Sequence[Value],
                       tiles_of: Tiles) -> None:  # fmt: skip
    """The steps of a convolution with constant weights.

    x: (buffer, offset, strides over [N, H, W, C]), its channels filled up to whole pieces of 16 bytes; aligned: bytes that divide
    its pixels' addresses. space: of the epilogue.
    """
    assert w.data is not None
    buffer, offset, strides = x
    dtype = low.buffers[buffer].dtype
    assert dtype is not None
    filters, per_piece = w.data.shape[0], 16 // dtype.bytes
    channels = -(-w.data.shape[1] // per_piece) * per_piece
    positions = cuda_winograd.positions_of(out)
    tiles = batch * product(ceil_divide(extent, out) for extent in geometry.output)
    form = low.temporary(f"{w.name}_inputs", dtype, (positions, tiles, channels))
    products = low.temporary(f"{w.name}_products", f32, (positions, tiles, filters))
    outputs: dict[str, Word | Dim] = {"IMAGES": batch, **dict(zip(("OH", "OW"), geometry.output))}
    lanes = min(cuda_winograd.MOST_LANES[out], aligned // dtype.bytes)
    common.emit(
        low, node, "winograd_input", {"ELEMENT": "f32" if element == "tf32" else element, "OUT": out, "LANES": lanes},
        {"X": Word(offset, buffer), "V": Word(0, form), "C": channels, **outputs, **dict(zip(("IH", "IW"), spatial)),
         **dict(zip(("PH", "PW"), geometry.begin)), **dict(zip(("X_IMAGE", "X_H", "X_W"), strides))},
        None, (buffer,), 0, writes=(form,), name=f"winograd_input_{out}x{out}",
    )  # fmt: skip

    weights = _packed(low, w, out, element)
    usual, *_ = tiles_of(tiles, filters, channels, positions).values()
    constants: dict[str, int | str] = {"ELEMENT": element, "PIECE": 16, "B_PIECE": 16, "B_ROUNDS": 0, **usual}
    index = [iteration(axis) for axis in range(3)]
    stored = Write(products, f32, linearise(index, (positions, tiles, filters)), accumulator(f32))
    walks: list[dict[int, Dim]] = [{0: tiles * channels, 1: channels}, {0: filters * channels}]
    multiplied = normalise_epilogue([stored], (positions, tiles, filters), walks)
    assert not isinstance(multiplied, str)
    (a0, a1, a_row), (b0, b1, _) = multiplied.strides
    e0, e1, em, en = multiplied.extents
    common.emit(
        low, node, "gemm", constants,
        {"A": Word(0, form), "B": Word(0, weights), "M": em, "N": en, "K": channels, "A_ROW": a_row, "A_B0": a0, "A_B1": a1,
         "B_ROW": channels, "B_B0": b0, "B_B1": b1, "B0": e0, "B1": e1},
        multiplied, (form, weights), 2 * positions * tiles * channels * filters, writes=(products,),
        name=f"winograd_product_{out}x{out}",
    )  # fmt: skip
    common.emit(
        low, node, "winograd_output", {"OUT": out}, {"P": Word(0, products), "N": filters, **outputs}, space, (products,), 0,
        results=results, name=f"winograd_output_{out}x{out}",
    )  # fmt: skip


def _packed(low: Lowering, w: Value, out: int, element: str) -> int:
    """Constant weights in Winograd's form."""
    assert w.data is not None
    key = ("pack_winograd_filters", id(w.data), out, element)
    if key not in low.constants:
        low.constant(cuda_winograd.pack_winograd_filters(w.data, out, element), f"{w.name}_packed", key)
    return low.constants[key]
