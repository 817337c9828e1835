"""Shapes of the tiles of CUDA's matrix products: their constants, what launches them, packed operands.

Knows nothing of Numba and of devices; the kernels are in kernels/cuda.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.kernels.cuda_launch import COUNTER_BYTES, MOST_COUNTED, Launch, Positions, TensorMap
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
# Unit "tma": threads that bring tiles; bytes of the two barriers of a place in the ring; columns of sums that a warp gives to
# the epilogue at a time, and elements of a row of them in shared memory; registers of a thread that brings and of one that
# multiplies, by groups of four warps that multiply, where they share out the block's.
BRINGING, BARRIERS, PART, PART_PITCH = 128, 16, 32, 36
REGISTERS = {2: (40, 232)}


@dataclass(frozen=True, slots=True)
class Tile:
    """A block's tile of rows x columns, each warp's part of it, tiles in the ring, and what multiplies.

    pending: tiles before the present one whose products may still be on their way.
    unit "dot" has no ring (kernels/cuda/gemv.py): stages are the chunks of 16 bytes of a column that a lane reads at once.
    unit "tma" multiplies as "wgmma"; the copy engine fills the ring, other warps tell it when (kernels/cuda/gemm_tma.py).
    cluster: of unit "tma", blocks with tiles one below the other, which bring columns to each other.
    """

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int
    unit: str = "mma"
    pending: int = 0
    cluster: int = 1

    @property
    def workers(self) -> int:
        """Threads that multiply."""
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * WARP

    @property
    def threads(self) -> int:
        return self.workers + (BRINGING if self.unit == "tma" else 0)

    @property
    def name(self) -> str:
        """What people call it, no two tiles the same."""
        depth = f"{self.stages} chunks" if self.unit == "dot" else f"{self.stages} stages"
        cluster = f", {self.cluster} blocks" if self.cluster > 1 else ""
        return f"{self.unit} {self.rows}x{self.columns}, {self.threads // WARP} warps, {depth}{cluster}"

    @property
    def ahead(self) -> int:
        """Tiles copied before they are needed: all but those that products may still read."""
        return self.stages - 1 - self.pending

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring of tiles, later the sums with four columns of padding."""
        ring = 0 if self.unit == "dot" else ROW * (self.rows + self.columns) * self.stages
        if self.unit == "tma":  # warps have memory of their own for sums
            return ring + BARRIERS * self.stages + self.workers // WARP * 4 * 16 * PART_PITCH
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
# Of products whose operands the copy engine can bring, see `takes_maps`.
TMA_TILES = (
    Tile(128, 256, 16, 256, 4, "tma", 1),
    Tile(128, 192, 16, 192, 5, "tma", 1),
    Tile(128, 128, 16, 128, 6, "tma", 1),
    Tile(128, 64, 16, 64, 8, "tma", 1),
    Tile(64, 128, 16, 128, 8, "tma", 1),
    Tile(128, 256, 16, 256, 4, "tma", 1, 2),
    Tile(128, 128, 16, 128, 6, "tma", 1, 2),
)
# Whether a product takes such a tile, or shares out the steps of all tiles (STREAM), by itself where that is expected to be
# faster: not before a GPU has shown that it is right.
PREFER_TMA = PREFER_STREAM = False
# By number, as kernels name them; only to be added to.
ALL_TILES = (*GROUP_TILES, *TENSOR_TILES, *FMA_TILES, *DOT_TILES, *OTHER_DOT_TILES, *TMA_TILES)
# Constants of a kernel. ELEMENT: of SIZES. TILE: of ALL_TILES. SPLITS: blocks that share out the depth, or STREAM. PIECE,
# B_PIECE: bytes that divide addresses and strides of A and of B, for a convolution also its channels; see `piece_of`.
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
# In place of that number: all blocks share out the steps of all tiles (kernels/cuda/stream.py). The fewest steps of a block, and
# by how many a share may be larger so that no block has pieces of two tiles, each of which takes as long to begin: estimates.
STREAM, LEAST_STEPS, MORE_STEPS = 0, 4, 6
# Registers of a thread there beside twice its sums, as those of another part come while they are added: read from the machine
# code of products.
STREAM_REGISTERS = {"wgmma": 64, "mma": 92, "fma": 156}
# Ways of a product that are left for timing to choose from: at most so many that are estimated to take at most so many times
# as long as the first one: estimates are 0.46 to 1.14 of the times in docs/cuda.md. Of STREAM, which has not been timed, so many.
MOST_WAYS, MOST_WORSE, MOST_STREAMS = 8, 2.0, 2

Way = tuple[Tile, int]  # the tile, and the number of blocks that share out its depth, or STREAM


def tiles_of(element: str, target: CudaTarget) -> tuple[Tile, ...]:
    """The shapes that are built for an element type, from large to small."""
    warps = FMA_TILES if element == "f32" else TENSOR_TILES
    return (*GROUP_TILES, *warps) if target.arch == "sm_90a" and element != "f32" else warps


def estimate(tile: Tile, splits: int, element: str, m: int, n: int, k: int, batches: int, target: CudaTarget) -> float:
    """Microseconds that a product of batches of m x n x k is expected to take with a tile, its depth shared by `splits` blocks.

    Blocks of one multiprocessor share its arithmetic and its copies, and hide each other's latency.
    """
    tiles = -(-m // tile.rows // tile.cluster) * tile.cluster * -(-n // tile.columns) * batches
    depth = max(1, -(-k * SIZES[element] // ROW))
    blocks = stream_blocks(tile, tiles, depth, target) if splits == STREAM else tiles * splits
    here = -(-blocks // target.multiprocessors)
    at_once = min(at_once_of(tile, splits, target), here) or 1
    unit = "wgmma" if tile.unit == "tma" else tile.unit
    work = 2e-6 * tile.rows * tile.columns * (ROW // SIZES[element]) / OPERATIONS[unit, element]
    if unit != "wgmma":  # warps read operands into registers, the smaller their tiles the more often
        work *= 0.6 + 0.4 * 32 * (1 / tile.warp_rows + 1 / tile.warp_columns)
    copies = 1e-3 * ROW * (tile.rows + tile.columns / tile.cluster) / KILOBYTES
    results = RESULTS * 1e-3 * tile.rows * tile.columns / max(1, splits)
    steps = -(-depth // max(1, splits))
    if tile.unit == "tma":  # one block makes several tiles, and brings the next one while it stores sums
        return BLOCK + here * (STEP + steps * max(work, copies) + results)
    alone = max(STEP, work) if tile.pending else STEP + work
    if splits == STREAM:
        share, step = -(-tiles * depth // max(1, blocks)), max(alone, at_once * max(work, copies))
        return share * step + at_once * results * -(-tiles // max(1, blocks)) + _pieces_time(tile, depth, max(1, share))
    meet = MEET if splits > 1 else 0.0
    return -(-here // at_once) * (BLOCK + steps * max(alone, at_once * max(work, copies)) + at_once * results + meet)


def at_once_of(tile: Tile, splits: int, target: CudaTarget) -> int:
    """Blocks that a multiprocessor is expected to run at once, 0 where it has not the registers of one by this estimate."""
    sums = tile.rows * tile.columns // tile.threads
    registers = min(256, 2 * sums + STREAM_REGISTERS[tile.unit]) if splits == STREAM else sums + 72
    return min(target.shared_bytes // tile.shared_bytes, target.registers // (registers * tile.threads))


def stream_blocks(tile: Tile, tiles: int, depth: int, target: CudaTarget) -> int:
    """Blocks that share out the steps of so many tiles, `depth` each: as many as run at once, with not too few steps."""
    most = min(MOST_COUNTED, target.multiprocessors * at_once_of(tile, STREAM, target))
    least = max(LEAST_STEPS, ceil_divide(tiles * depth, most))
    even = (share for share in range(least, least + MORE_STEPS + 1) if depth % share == 0 or share % depth == 0)
    return ceil_divide(tiles * depth, next(even, least))


def _pieces_time(tile: Tile, depth: int, share: int) -> float:
    """Microseconds for a block's pieces of tiles beside their steps: to begin each, to store and to read parts of cut tiles."""
    odd = int(share % depth != 0 and depth % share != 0)  # blocks end and begin within tiles
    pieces, makers = -(-share // depth) + odd, -(-depth // share) + odd
    if makers == 1:
        return BLOCK * pieces
    return BLOCK * pieces + MEET + (min(2, pieces) + makers) * 4e-3 * tile.rows * tile.columns / KILOBYTES


def takes_maps(given: Constants, target: CudaTarget) -> bool:
    """Whether the copy engine can bring both operands of a product of these constants (all but TILE and SPLITS).

    None of their strides may be negative.
    """
    return target.arch == "sm_90a" and given["ELEMENT"] != "f32" and given["PIECE"] == given["B_PIECE"] == CHUNK


def takes_windows(given: Constants, target: CudaTarget, channels: int, axes: Sequence[tuple[int, int, int, int, int]]) -> bool:
    """As `takes_maps`, of a convolution in one group of so many channels.

    axes: taps, stride, dilation, padding before and behind of each spatial axis.
    """
    if not takes_maps({**given, "B_PIECE": CHUNK}, target) or channels * SIZES[str(given["ELEMENT"])] % ROW or len(axes) > 2:
        return False
    # What fits into a map: 8 bits with a sign for both corners of the positions, of which 3 bits of a step.
    return all(
        stride <= 8 and 0 <= before <= 127 and 0 <= behind <= 127 and (taps - 1) * dilation + stride <= 128
        for taps, stride, dilation, before, behind in axes
    )


def tile_ways(
    element: str, m: int, n: int, k: int, batches: int, target: CudaTarget, maps: bool = False
) -> tuple[Way, ...]:
    """Tiles with a ring, the one that is expected to finish first leading; of every unit there is one, of STREAM some.

    maps: whether the copy engine can bring the operands. Its tiles lead only with PREFER_TMA, STREAM only with PREFER_STREAM.
    """
    tiles = [tile for tile in tiles_of(element, target) if conv_shared_bytes(tile) <= target.shared_bytes]
    choices = [(tile, split) for tile in tiles for split in (*_splits(target), STREAM)]
    choices += [(tile, 1) for tile in TMA_TILES if maps]
    times = {way: estimate(way[0], way[1], element, m, n, k, batches, target) for way in choices}
    ranked = sorted(choices, key=lambda way: times[way])
    usual = next(way for way in ranked if _leads(way))
    ranked = [usual, *(way for way in ranked if way != usual)]
    streams, others = ([way for way in ranked if (way[1] == STREAM) == wanted] for wanted in (True, False))
    near = [way for way in others if times[way] <= MOST_WORSE * times[usual]][:MOST_WAYS]
    units = {way[0].unit: way for way in reversed(others)}  # the first of each
    left = {*near, *streams[:MOST_STREAMS], *units.values()}
    return tuple(way for way in ranked if way in left)


def _leads(way: Way) -> bool:
    """Whether a product may go this way without timing."""
    return (PREFER_TMA or way[0].unit != "tma") and (PREFER_STREAM or way[1] != STREAM)


def product_ways(
    element: str, m: int, n: int, k: int, batches: int, target: CudaTarget, maps: bool = False
) -> tuple[Way, ...]:
    """As `tile_ways`; for few rows tiles without a ring lead, the depth cut until enough of the right operand is on its way."""
    usual = next((tile for tile in DOT_TILES if m <= tile.rows), None)
    rings = tile_ways(element, m, n, k, batches, target, maps)
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


def choose_tile(element: str, m: int, n: int, k: int, batches: int, target: CudaTarget, maps: bool = False) -> Way:
    """The first of `tile_ways`."""
    return tile_ways(element, m, n, k, batches, target, maps)[0]


def choose_product(element: str, m: int, n: int, k: int, batches: int, target: CudaTarget, maps: bool = False) -> Way:
    """The first of `product_ways`."""
    return product_ways(element, m, n, k, batches, target, maps)[0]


def way_name(way: Way) -> str:
    """What people call a way."""
    tile, splits = way
    return tile.name + {STREAM: ", stream-K", 1: ""}.get(splits, f", depth in {splits}")


def product_file(given: Constants) -> str:
    """The kernel file of a product of this tile."""
    return {"dot": "gemv", "tma": "gemm_tma"}.get(ALL_TILES[int(given["TILE"])].unit, "gemm")


def product_constants(given: Constants) -> dict[str, object]:
    """Constants in the text of a product, from those of its kernel; see TILE_CONSTANTS. KeyError, IndexError for others."""
    element, tile, splits = str(given["ELEMENT"]), ALL_TILES[int(given["TILE"])], int(given["SPLITS"])
    if tile.unit == "tma":
        return _tma_constants(given)
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
    if (tile.unit, element) not in OPERATIONS or splits not in (*SPLITS, STREAM):
        raise KeyError(element)
    stream, splits = int(splits == STREAM), max(1, splits)
    return {
        "UNIT": f'"{tile.unit}"', "ELEMENT": f'"{element}"', "SIZE": SIZES[element], "BM": tile.rows, "BN": tile.columns,
        "WM": tile.warp_rows, "WN": tile.warp_columns, "THREADS": tile.threads, "STAGES": tile.stages,
        "PENDING": tile.pending, "AHEAD": tile.ahead, "IN_FLIGHT": tile.ahead - 1, "BK": ROW // SIZES[element],
        "A_BYTES": ROW * tile.rows, "STAGE_BYTES": ROW * (tile.rows + tile.columns), "PITCH": tile.columns + 4,
        "SPLITS": splits, "STEP": tile.threads // tile.columns, "HOP": tile.threads // tile.columns * splits,
        "STREAM": stream, "PART_BYTES": 4 * tile.rows * tile.columns, "COUNTER_BYTES": COUNTER_BYTES,
        **_pieces(given, element),
        **({"B_ROUNDS": int(bool(given["B_ROUNDS"]))} if "B_ROUNDS" in given else {}),
    }  # fmt: skip


def _tma_constants(given: Constants) -> dict[str, object]:
    """As `product_constants`, for tiles that the copy engine brings."""
    element, tile = str(given["ELEMENT"]), ALL_TILES[int(given["TILE"])]
    if ("wgmma", element) not in OPERATIONS or int(given["SPLITS"]) != 1 or not given["PIECE"] == given["B_PIECE"] == CHUNK:
        raise KeyError(element)
    full = ROW * (tile.rows + tile.columns) * tile.stages
    few, many = REGISTERS.get(tile.workers // BRINGING, (0, 0))
    return {
        "ELEMENT": f'"{element}"', "BM": tile.rows, "BN": tile.columns, "THREADS": tile.threads, "WORKERS": tile.workers,
        "STAGES": tile.stages, "BK": ROW // SIZES[element], "A_BYTES": ROW * tile.rows,
        "STAGE_BYTES": ROW * (tile.rows + tile.columns), "FULL": full, "EMPTY": full + BARRIERS // 2 * tile.stages,
        "SUMS": full + BARRIERS * tile.stages, "SUMS_BYTES": 4 * 16 * PART_PITCH, "PART": PART, "PITCH": PART_PITCH,
        "CLUSTER": tile.cluster, "PART_ROWS": tile.columns // tile.cluster, "PART_BYTES": ROW * tile.columns // tile.cluster,
        "FEW": few, "MANY": many,
    }  # fmt: skip


def conv_file(given: Constants) -> str:
    """The kernel file of a convolution of this tile."""
    return "conv_tma" if ALL_TILES[int(given["TILE"])].unit == "tma" else "conv"


def conv_constants(given: Constants) -> dict[str, object]:
    """Constants of a convolution: those of a product, and where its table begins."""
    if ALL_TILES[int(given["TILE"])].unit == "tma":
        return _tma_constants({**given, "B_PIECE": CHUNK})
    return {**gemm_constants(given), "TABLE": ALL_TILES[int(given["TILE"])].shared_bytes}


def conv_shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a convolution: a product's, then the table, which the copy engine does without."""
    return tile.shared_bytes + (0 if tile.unit == "tma" else WINDOW * tile.rows)


def launch_gemm(words: Words, given: Constants, target: CudaTarget) -> Launch:
    """Fills ROW_TILES and PANELS of a product's words (by name) and returns its launch."""
    tile = ALL_TILES[int(given["TILE"])]
    rows = tile.rows * tile.cluster
    words["ROW_TILES"], words["PANELS"] = ceil_divide(words["M"], rows), ceil_divide(words["N"], tile.columns)
    blocks = words["ROW_TILES"] * words["PANELS"] * words["B0"] * words["B1"]
    if tile.unit == "tma":
        part = tile.columns // tile.cluster
        maps = (_tensor_map(words, given, "A", "M", tile.rows), _tensor_map(words, given, "B", "N", part))
        clusters = min(blocks, target.multiprocessors // tile.cluster)
        return Launch((clusters * tile.cluster, 1, 1), tile.threads, tile.shared_bytes, maps)
    return _launch_tiles(blocks, words["K"], given, tile.shared_bytes, target)


def _launch_tiles(tiles: int, depth: int, given: Constants, shared_bytes: int, target: CudaTarget) -> Launch:
    """The launch that makes so many tiles of so many elements of k."""
    tile, splits = ALL_TILES[int(given["TILE"])], int(given["SPLITS"])
    if splits != STREAM:
        return Launch((tiles * splits, 1, 1), tile.threads, shared_bytes)
    steps = max(1, ceil_divide(depth * SIZES[str(given["ELEMENT"])], ROW))
    blocks = stream_blocks(tile, tiles, steps, target)
    workspace = COUNTER_BYTES + 2 * blocks * 4 * tile.rows * tile.columns
    return Launch((blocks, 1, 1), tile.threads, shared_bytes, workspace=workspace)


def _tensor_map(words: Words, given: Constants, name: str, rows: str, box_rows: int) -> TensorMap:
    """The map of an operand in boxes of a tile; axes are k, rows, b1 and b0, batch axes of stride 0 with one element."""
    size = SIZES[str(given["ELEMENT"])]
    batches = [words[axis] if words[f"{name}_{axis}"] else 1 for axis in ("B1", "B0")]
    extents = [max(1, extent) for extent in (words["K"], words[rows], *batches)]
    strides = [size * words[f"{name}_{axis}"] for axis in ("ROW", "B1", "B0")]
    # Strides along axes of one element, and where there are no elements, are of no account, but must be valid ones.
    valid = [stride if extent > 1 and stride else CHUNK for stride, extent in zip(strides, extents[1:])]
    return TensorMap(
        list(words).index(name), words[name], str(given["ELEMENT"]), tuple(extents), tuple(valid), (ROW // size, box_rows, 1, 1)
    )


def launch_conv(words: Words, given: Constants, target: CudaTarget) -> Launch:
    """As `launch_gemm`, of a convolution: its rows run through all images."""
    tile = ALL_TILES[int(given["TILE"])]
    rows = words["IMAGES"] * words["M"]
    words["ROW_TILES"] = ceil_divide(rows, tile.rows * tile.cluster)
    words["PANELS"] = ceil_divide(words["N"], tile.columns)
    blocks = words["ROW_TILES"] * words["PANELS"] * words["GROUPS"]
    if tile.unit == "tma":
        clusters = min(blocks, target.multiprocessors // tile.cluster)
        maps = (_windows_map(words, given, tile), _filters_map(words, given, tile))
        return Launch((clusters * tile.cluster, 1, 1), tile.threads, tile.shared_bytes, maps)
    depth = words["KD"] * words["KH"] * words["KW"] * words["C"]
    return _launch_tiles(blocks, depth, given, conv_shared_bytes(tile), target)


def _windows_map(words: Words, given: Constants, tile: Tile) -> TensorMap:
    """The map of a convolution's input, in boxes of a tile's rows."""
    size = SIZES[str(given["ELEMENT"])]
    extents = [max(1, words[name]) for name in ("C", "IW", "IH", "IMAGES")]
    strides = [size * words[name] for name in ("X_W", "X_H", "X_IMAGE")]
    valid = [stride if extent > 1 and stride else CHUNK for stride, extent in zip(strides, extents[1:])]
    upper = [(words[f"O{a}"] - 1) * words[f"S{a}"] - words[f"P{a}"] - (words[f"I{a}"] - 1) for a in "WH"]
    positions = Positions((-words["PW"], -words["PH"]), (upper[0], upper[1]), (words["SW"], words["SH"]))
    box = (ROW // size, tile.rows)
    return TensorMap(list(words).index("X"), words["X"], str(given["ELEMENT"]), tuple(extents), tuple(valid), box, positions)


def _filters_map(words: Words, given: Constants, tile: Tile) -> TensorMap:
    """The map of a convolution's filters, rows of k."""
    depth = words["KH"] * words["KW"] * words["C"]
    size = SIZES[str(given["ELEMENT"])]
    box = (ROW // size, tile.columns // tile.cluster, 1, 1)
    extents = (max(1, depth), max(1, words["N"]), 1, 1)
    strides = (max(CHUNK, size * depth), CHUNK, CHUNK)
    return TensorMap(list(words).index("W"), words["W"], str(given["ELEMENT"]), extents, strides, box)


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
