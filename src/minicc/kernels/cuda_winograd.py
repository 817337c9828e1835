"""Winograd's 3x3 convolutions on CUDA: three launches, what they are expected to take, packed weights.

    V[position] = inputs in Winograd's form       kernels/cuda/winograd_input.py
    P[position] = V[position] * weights           kernels/cuda/gemm.py, positions are its batches
    y           = P out of that form, epilogue    kernels/cuda/winograd_output.py

V and the weights have the elements of the convolution (of "tf32", float32 that products round), P is float32. Knows nothing of
Numba and of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minicc.kernels.cuda_launch import ELEMENT_THREADS, Launch, launch_elements
from minicc.kernels.cuda_tiles import SIZES, choose_tile, estimate, pack_right, round_tf32
from minicc.kernels.domain import Words, ceil_divide
from minicc.kernels.packing import winograd_filter
from minicc.kernels.winograd_axes import side
from minicc.targets.cuda import CudaTarget

Array = np.ndarray[Any, Any]
Constants = Mapping[str, int | float | str]

ELEMENTS = ("f32", "tf32", "f16", "bf16")
# Outputs of a tile along an axis.
OUTPUTS = (2, 4)
# Channels that a thread of the first step takes at most, so that its registers hold their positions.
MOST_LANES = {2: 4, 4: 2}
# Bytes that memory gives and takes per microsecond (an H200's copy), and microseconds that a launch takes beside its work.
BYTES, LAUNCH = 4.15e6, 2.0
# So many times as fast as a direct sum must three steps be expected to be, before the estimate is trusted: none has run on a GPU.
CLEARLY = 1.5


def tiles_of_elements(element: str) -> tuple[int, ...]:
    """The outputs of tiles along an axis that a convolution of these elements may take.

    Sums of inputs are up to 4 times as large as these in F(2x2,3x3), 28 times in F(4x4,3x3), and what rounding them errs grows
    likewise: 16 bits keep F(4x4,3x3) neither in float16's range (from inputs of 2300 on) nor near bfloat16's precision.
    """
    return OUTPUTS if SIZES[element] == 4 else OUTPUTS[:1]


def positions_of(out: int) -> int:
    """Positions of a tile."""
    return side(out) ** 2


def winograd_time(out: int, element: str, images: int, extents: tuple[int, int], channels: int, filters: int,
                  target: CudaTarget) -> float:  # fmt: skip
    """Microseconds that the three steps are expected to take, in the terms of `cuda_tiles.estimate`. extents: of the output.

    All forms go through memory, which takes them as fast as a copy, though smaller ones stay in a cache.
    """
    positions, size = positions_of(out), SIZES[element]
    tiles = images * ceil_divide(extents[0], out) * ceil_divide(extents[1], out)
    tile, splits = choose_tile(element, tiles, filters, channels, positions, target)
    arithmetic = estimate(tile, splits, element, tiles, filters, channels, positions, target)
    pixels = images * extents[0] * extents[1] * size
    given, made = size * positions * tiles * channels, 4 * positions * tiles * filters
    product = max(arithmetic, (given + made + size * positions * channels * filters) / BYTES)
    return product + (pixels * (channels + filters) + given + made) / BYTES + 2 * LAUNCH


def winograd_constants(given: Constants) -> dict[str, object]:
    """Constants in the text of a step, from those of its kernel; LookupError for wrong ones."""
    out = int(given["OUT"])
    if out not in OUTPUTS:
        raise LookupError(f"tiles of {out} outputs")
    if "ELEMENT" not in given:
        return {"OUT": out}
    element, lanes = str(given["ELEMENT"]), int(given["LANES"])
    if element not in ("f32", "f16", "bf16") or lanes not in (1, 2, 4) or lanes > MOST_LANES[out]:
        raise LookupError(f"{lanes} channels of {element}")
    return {"ELEMENT": f'"{element}"', "SIZE": SIZES[element], "OUT": out, "LANES": lanes}


def launch_winograd_input(words: Words, given: Constants, target: CudaTarget) -> Launch:
    """A thread per tile and LANES channels."""
    return launch_elements(_tiles(words, given) * words["C"] // int(given["LANES"]), target)


def launch_winograd_output(words: Words, given: Constants, target: CudaTarget) -> Launch:
    """A thread per tile and channel; each keeps its outputs in shared memory."""
    launch = launch_elements(_tiles(words, given) * words["N"], target)
    return Launch(launch.grid, launch.block, 4 * int(given["OUT"]) ** 2 * ELEMENT_THREADS)


def _tiles(words: Words, given: Constants) -> int:
    out = int(given["OUT"])
    return words["IMAGES"] * ceil_divide(words["OH"], out) * ceil_divide(words["OW"], out)


def pack_winograd_filters(w: Array, out: int, element: str) -> Array:
    """ONNX's weights [N, C, 3, 3] in Winograd's form, [positions, N, C padded with zeros to 16 bytes], of their own type.

    Transformed in float64, rounded once; for "tf32" to what products keep.
    """
    axis = winograd_filter(out)
    taps = w.reshape(*w.shape[:2], 9).transpose(1, 2, 0).astype(np.float64)
    # Small products per input channel: a large one starts the threads of the BLAS, which take seconds on a busy machine.
    form = (np.kron(axis, axis) @ taps).swapaxes(0, 1).astype(np.float32 if element == "tf32" else w.dtype)
    return pack_right(round_tf32(form) if element == "tf32" else form)
