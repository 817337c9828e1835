"""Tiles of CUDA's products as constants of their kernels, shared by all lowerings that multiply."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from minicc.ir.dims import Dim, SymbolicDim
from minicc.ir.types import DType, bf16, f16, f32
from minicc.kernels import cuda_tiles
from minicc.lower.context import Lowering
from minicc.targets.cuda import CudaTarget

Chooser = Callable[[str, int, int, int, int, CudaTarget], tuple[cuda_tiles.Tile, int]]

ELEMENTS: dict[DType, str] = {f32: "f32", f16: "f16", bf16: "bf16"}
# Sizes that are not known are taken for so many when a tile is chosen.
UNKNOWN_ROWS, UNKNOWN_COLUMNS, UNKNOWN_DEPTH = 256, 128, 512


def cuda_target(low: Lowering) -> CudaTarget:
    """The target, for templates that only GPUs have."""
    assert isinstance(low.target, CudaTarget)
    return low.target


def tile_constants(low: Lowering, choose: Chooser, element: str, m: Dim, n: Dim, k: Dim, batches: Dim) -> dict[str, int]:
    """The tile chosen for these sizes by `choose`, and into how many parts the depth is cut, as constants."""
    sizes = zip((m, n, k, batches), (UNKNOWN_ROWS, UNKNOWN_COLUMNS, UNKNOWN_DEPTH, 1))
    rows, columns, depth, repeats = (d if isinstance(d, int) else unknown for d, unknown in sizes)
    tile, splits = choose(element, rows, columns, depth, repeats, cuda_target(low))
    return {"TILE": cuda_tiles.ALL_TILES.index(tile), "SPLITS": splits}


def piece(size: int, *counts: Dim) -> int:
    """The largest power of two up to 16 that divides these numbers of elements of `size` bytes, whatever symbols are."""
    known = (gcd(*(c for _, c in d.terms)) if isinstance(d, SymbolicDim) else d for d in counts)
    return cuda_tiles.piece_of(*(size * count for count in known))
