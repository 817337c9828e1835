"""Shapes of the tiles of CUDA's matrix products: their constants, what launches them, packed operands.

Knows nothing of Numba and of devices; the kernels are in kernels/cuda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.kernels.cuda_launch import Launch
from minicc.kernels.domain import Words, ceil_divide
from minicc.targets.cuda import CudaTarget

Array = np.ndarray[Any, Any]
Constants = Mapping[str, int | float | str]

# Bytes of a row of a tile in shared memory, and of an element in memory.
ROW = 128
SIZES = {"f32": 4, "tf32": 4, "f16": 2, "bf16": 2, "s8": 1, "u8": 1}
WARP = 32
# Bytes of the widest load.
CHUNK = 16
# Bytes that a convolution notes for each row of a tile.
WINDOW = 24


@dataclass(frozen=True, slots=True)
class Tile:
    """A block's tile of rows x columns, each warp's part of it, tiles in the ring, and what multiplies.

    pending: tiles before the present one whose products may still be on their way.
    unit "dot" has no ring (kernels/cuda/gemv.py): stages are the chunks of 16 bytes of a column that a lane reads at once.
    """

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int
    unit: str = "mma"
    pending: int = 0

    @property
    def threads(self) -> int:
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * WARP

    @property
    def name(self) -> str:
        """What people call it, no two tiles the same."""
        depth = f"{self.stages} chunks" if self.unit == "dot" else f"{self.stages} stages"
        return f"{self.unit} {self.rows}x{self.columns}, {self.threads // WARP} warps, {depth}"

    @property
    def ahead(self) -> int:
        """Tiles copied before they are needed: all but those that products may still read."""
        return self.stages - 1 - self.pending

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring of tiles, later the sums with four columns of padding."""
        ring = 0 if self.unit == "dot" else ROW * (self.rows + self.columns) * self.stages
        return max(ring, 4 * self.rows * (self.columns + 4))


# From large to small. The largest ones reuse most, the smallest ones keep all multiprocessors busy.
TENSOR_TILES = (
    Tile(128, 256, 64, 64, 3),
    Tile(128, 128, 64, 64, 3),
    Tile(128, 128, 64, 32, 3),
    Tile(128, 64, 64, 32, 4),
    Tile(64, 128, 32, 64, 4),
    Tile(64, 64, 32, 32, 4),
    Tile(16, 128, 16, 32, 4),
)
FMA_TILES = (
    Tile(128, 128, 64, 32, 3, "fma"),
    Tile(64, 64, 32, 32, 4, "fma"),
    Tile(16, 128, 16, 32, 4, "fma"),
)
# Four warps share an instruction of 64 rows.
GROUP_TILES = (
    Tile(128, 256, 16, 256, 4, "wgmma", 1),
    Tile(128, 128, 16, 128, 3, "wgmma"),
    Tile(128, 128, 16, 128, 4, "wgmma", 1),
    Tile(128, 64, 16, 64, 4, "wgmma", 1),
    Tile(64, 128, 16, 128, 4, "wgmma", 1),
    Tile(64, 64, 16, 64, 4, "wgmma", 1),
)
# Of products of at most so many rows, which take the time of reading the right operand.
DOT_TILES = (
    Tile(1, 8, 1, 2, 4, "dot"),
    Tile(2, 8, 2, 2, 4, "dot"),
    Tile(4, 16, 4, 4, 2, "dot"),
    Tile(8, 16, 8, 4, 1, "dot"),
)
# The same with more or fewer columns of a warp, for timing to choose from.
OTHER_DOT_TILES = (
    Tile(1, 4, 1, 1, 8, "dot"),
    Tile(1, 16, 1, 4, 2, "dot"),
    Tile(2, 16, 2, 4, 2, "dot"),
    Tile(4, 8, 4, 2, 2, "dot"),
    Tile(8, 8, 8, 2, 1, "dot"),
)
DOT_ELEMENTS = ("f32", "tf32", "f16", "bf16")
# By number, as kernels name them; only to be added to.
ALL_TILES = (*GROUP_TILES, *TENSOR_TILES, *FMA_TILES, *DOT_TILES, *OTHER_DOT_TILES)
# Constants of a kernel. ELEMENT: of SIZES. TILE: of ALL_TILES. SPLITS: blocks that share out the depth. PIECE, B_PIECE:
# bytes that divide addresses and strides of A and of B, for a convolution also its channels; see `piece_of`.
TILE_CONSTANTS = ("ELEMENT", "TILE", "SPLITS", "PIECE", "B_PIECE", "B_ROUNDS")
CONV_CONSTANTS = ("ELEMENT", "TILE", "SPLITS", "PIECE")
# What one multiprocessor of an H200 was seen to do at most, per microsecond: millions of operations by unit and element,
# and kilobytes copied into shared memory.
OPERATIONS = {
    ("wgmma", "tf32"): 2.9, ("wgmma", "f16"): 5.6, ("wgmma", "bf16"): 5.6, ("wgmma", "s8"): 10.0, ("wgmma", "u8"): 10.0,
    ("mma", "tf32"): 1.5, ("mma", "f16"): 3.0, ("mma", "bf16"): 3.0, ("mma", "s8"): 5.4, ("mma", "u8"): 5.4,
    ("fma", "f32"): 0.41,
}  # fmt: skip
KILOBYTES = 85.0
# Microseconds: a step of k of a block alone, what a block takes beside its steps, per thousand results of it, and what
# a cluster takes to meet.
STEP, BLOCK, RESULTS, MEET = 0.22, 2.0, 0.09, 1.0
# Bytes that loads of one multiprocessor should have on their way: 36 a nanosecond on an H200, for 0.8 microseconds.
ON_THE_WAY = 29_000
# Blocks that may share out the depth of a tile: a cluster of any Hopper GPU has at most 8.
SPLITS = (1, 2, 4, 8)
# Ways of a product that are left for timing to choose from: at most so many that are estimated to take at most so many times
# as long as the first one: estimates are 0.46 to 1.14 of the times in docs/cuda.md.
MOST_WAYS, MOST_WORSE = 8, 2.0

Way = tuple[Tile, int]  # the tile, and the number of blocks that share out its depth


def tiles_of(element: str, target: CudaTarget) -> tuple[Tile, ...]:
    """The shapes that are built for an element type, from large to small."""
    warps = FMA_TILES if element == "f32" else TENSOR_TILES
    return (*GROUP_TILES, *warps) if target.arch == "sm_90a" and element != "f32" else warps


def estimate(tile: Tile, splits: int, element: str, m: int, n: int, k: int, batches: int, target: CudaTarget) -> float:
    """Microseconds that a product of batches of m x n x k is expected to take with a tile, its depth shared by `splits` blocks.

    Blocks of one multiprocessor share its arithmetic and its copies, and hide each other's latency.
    """
    blocks = -(-m // tile.rows) * -(-n // tile.columns) * batches * splits
    here = -(-blocks // target.multiprocessors)
    sums = tile.rows * tile.columns // tile.threads
    at_once = min(target.shared_bytes // tile.shared_bytes, target.registers // ((sums + 72) * tile.threads), here) or 1
    work = 2e-6 * tile.rows * tile.columns * (ROW // SIZES[element]) / OPERATIONS[tile.unit, element]
    if tile.unit != "wgmma":  # warps read operands into registers, the smaller their tiles the more often
        work *= 0.6 + 0.4 * 32 * (1 / tile.warp_rows + 1 / tile.warp_columns)
    copies = 1e-3 * ROW * (tile.rows + tile.columns) / KILOBYTES
    results = RESULTS * 1e-3 * tile.rows * tile.columns / splits
    steps = -(-k * SIZES[element] // ROW // splits)
    alone = max(STEP, work) if tile.pending else STEP + work
    meet = MEET if splits > 1 else 0.0
    return -(-here // at_once) * (BLOCK + steps * max(alone, at_once * max(work, copies)) + at_once * results + meet)


def tile_ways(element: str, m: int, n: int, k: int, batches: int, target: CudaTarget) -> tuple[Way, ...]:
    """Tiles with a ring, the one that is expected to finish first leading; of every unit there is one."""
    tiles = [tile for tile in tiles_of(element, target) if conv_shared_bytes(tile) <= target.shared_bytes]
    choices = [(tile, split) for tile in tiles for split in _splits(target)]
    times = {way: estimate(way[0], way[1], element, m, n, k, batches, target) for way in choices}
    ranked = sorted(choices, key=lambda way: times[way])
    near = [way for way in ranked if times[way] <= MOST_WORSE * times[ranked[0]]][:MOST_WAYS]
    units = {way[0].unit: way for way in reversed(ranked)}  # the first of each
    return tuple(dict.fromkeys([*near, *units.values()]))


def product_ways(element: str, m: int, n: int, k: int, batches: int, target: CudaTarget) -> tuple[Way, ...]:
    """As `tile_ways`; for few rows tiles without a ring lead, the depth cut until enough of the right operand is on its way."""
    usual = next((tile for tile in DOT_TILES if m <= tile.rows), None)
    rings = tile_ways(element, m, n, k, batches, target)
    if usual is None or element not in DOT_ELEMENTS:
        return rings
    others = [tile for tile in OTHER_DOT_TILES if tile.rows == usual.rows]
    parts = {tile: _dot_splits(tile, element, n, k, batches, target) for tile in (usual, *others)}
    around = [s for s in _splits(target) if s in (2 * parts[usual], parts[usual] // 2)]
    return (*parts.items(), *((usual, split) for split in around), rings[0])


def _splits(target: CudaTarget) -> tuple[int, ...]:
    return SPLITS if target.arch == "sm_90a" else (1,)


def _dot_splits(tile: Tile, element: str, n: int, k: int, batches: int, target: CudaTarget) -> int:
    """How many blocks share out the depth, so that enough of the right operand is on its way."""
    step = CHUNK * WARP * tile.stages
    read = -(-n // tile.columns) * tile.columns * batches * step  # at once
    splits = _splits(target)
    enough = (s for s in splits if s * read >= ON_THE_WAY * target.multiprocessors or k * SIZES[element] <= s * step)
    return next(enough, splits[-1])


def choose_tile(element: str, m: int, n: int, k: int, batches: int, target: CudaTarget) -> Way:
    """The first of `tile_ways`."""
    return tile_ways(element, m, n, k, batches, target)[0]


def choose_product(element: str, m: int, n: int, k: int, batches: int, target: CudaTarget) -> Way:
    """The first of `product_ways`."""
    return product_ways(element, m, n, k, batches, target)[0]


def way_name(way: Way) -> str:
    """What people call a way."""
    tile, splits = way
    return f"{tile.name}, depth in {splits}" if splits > 1 else tile.name


def product_file(given: Constants) -> str:
    """The kernel file of a product of this tile."""
    return "gemv" if ALL_TILES[int(given["TILE"])].unit == "dot" else "gemm"


def product_constants(given: Constants) -> dict[str, object]:
    """Constants in the text of a product, from those of its kernel; see TILE_CONSTANTS. KeyError, IndexError for others."""
    element, tile, splits = str(given["ELEMENT"]), ALL_TILES[int(given["TILE"])], int(given["SPLITS"])
    if tile.unit != "dot":
        return gemm_constants(given)
    if element not in DOT_ELEMENTS or splits not in SPLITS:
        raise KeyError(element)
    return {
        "ELEMENT": f'"{element}"', "SIZE": SIZES[element], "BM": tile.rows, "BN": tile.columns, "WN": tile.warp_columns,
        "THREADS": tile.threads, "DEEP": tile.stages, "PER": CHUNK // SIZES[element], "PITCH": tile.columns + 4,
        "SPLITS": splits, **_pieces(given, element),
    }  # fmt: skip


def _pieces(given: Constants, element: str) -> dict[str, int]:
    """The constants PIECE and B_PIECE, as far as there are any; KeyError for wrong ones."""
    pieces = {name: int(value) for name, value in given.items() if name.endswith("PIECE")}
    if not set(pieces.values()) <= {SIZES[element] << shift for shift in range(5)} & {1, 2, 4, 8, 16}:
        raise KeyError("PIECE")
    return pieces


def gemm_constants(given: Constants) -> dict[str, object]:
    """As `product_constants`, for tiles with a ring."""
    element, tile, splits = str(given["ELEMENT"]), ALL_TILES[int(given["TILE"])], int(given["SPLITS"])
    if (tile.unit, element) not in OPERATIONS or splits not in SPLITS:
        raise KeyError(element)
    return {
        "UNIT": f'"{tile.unit}"', "ELEMENT": f'"{element}"', "SIZE": SIZES[element], "BM": tile.rows, "BN": tile.columns,
        "WM": tile.warp_rows, "WN": tile.warp_columns, "THREADS": tile.threads, "STAGES": tile.stages,
        "PENDING": tile.pending, "AHEAD": tile.ahead, "IN_FLIGHT": tile.ahead - 1, "BK": ROW // SIZES[element],
        "A_BYTES": ROW * tile.rows, "STAGE_BYTES": ROW * (tile.rows + tile.columns), "PITCH": tile.columns + 4,
        "SPLITS": splits, "STEP": tile.threads // tile.columns, "HOP": tile.threads // tile.columns * splits,
        **_pieces(given, element),
        **({"B_ROUNDS": int(bool(given["B_ROUNDS"]))} if "B_ROUNDS" in given else {}),
    }  # fmt: skip


def conv_constants(given: Constants) -> dict[str, object]:
    """Constants of a convolution: those of a product, and where its table begins."""
    return {**gemm_constants(given), "TABLE": ALL_TILES[int(given["TILE"])].shared_bytes}


def conv_shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a convolution: a product's, then the table."""
    return tile.shared_bytes + WINDOW * tile.rows


def launch_gemm(words: Words, given: Constants, target: CudaTarget) -> Launch:  # noqa: ARG001
    """Fills ROW_TILES and PANELS of a product's words (by name) and returns its launch."""
    tile = ALL_TILES[int(given["TILE"])]
    words["ROW_TILES"], words["PANELS"] = ceil_divide(words["M"], tile.rows), ceil_divide(words["N"], tile.columns)
    blocks = words["ROW_TILES"] * words["PANELS"] * words["B0"] * words["B1"]
    return Launch((blocks * int(given["SPLITS"]), 1, 1), tile.threads, tile.shared_bytes)


def launch_conv(words: Words, given: Constants, target: CudaTarget) -> Launch:  # noqa: ARG001
    """As `launch_gemm`, of a convolution: its rows run through all images."""
    tile = ALL_TILES[int(given["TILE"])]
    rows = words["IMAGES"] * words["M"]
    words["ROW_TILES"], words["PANELS"] = ceil_divide(rows, tile.rows), ceil_divide(words["N"], tile.columns)
    blocks = words["ROW_TILES"] * words["PANELS"] * words["GROUPS"]
    return Launch((blocks * int(given["SPLITS"]), 1, 1), tile.threads, conv_shared_bytes(tile))


def piece_of(*byte_counts: int) -> int:
    """The largest power of two up to 16 that divides all of these numbers of bytes."""
    piece = 16
    while any(count % piece for count in byte_counts):
        piece //= 2
    return piece


def pack_right(b: Array) -> Array:
    """A right operand [..., K, N] as rows of k [..., N, K padded with zeros to 16 bytes], contiguous."""
    depth = -(-b.shape[-2] * b.itemsize // 16) * 16 // b.itemsize
    packed = np.zeros((*b.shape[:-2], b.shape[-1], depth), b.dtype)
    packed[..., : b.shape[-2]] = np.swapaxes(b, -1, -2)
    return packed


def pack_filters(w: Array, groups: int) -> Array:
    """ONNX's weights [groups * N, C, *kernel] as [groups, N, taps * C padded with zeros to 16 bytes], channels last."""
    last = np.moveaxis(w, 1, -1).reshape(groups, w.shape[0] // groups, -1)
    return pack_right(np.swapaxes(last, -1, -2))


def round_tf32(array: Array) -> Array:
    """float32 rounded to the 11 significant bits of tf32, to nearest even; infinities and NaN stay."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(array), rounded.view(np.float32), array)
