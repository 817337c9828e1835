"""Attention's CUDA form: which heads it takes, its constants, its launches.

Two kernels read the same words: kernels/cuda/attention.py, and kernels/cuda/attention_join.py, which joins what the first one's
blocks found where they share out the keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from minicc.kernels.cuda_launch import ELEMENT_THREADS, WARP, Launch
from minicc.kernels.cuda_tiles import ROW, SIZES
from minicc.kernels.domain import Words, ceil_divide
from minicc.targets.cuda import CudaTarget

Constants = Mapping[str, int | float | str]

# How the results of products of an element are stored.
RESULTS = {"f16": "f16", "bf16": "bf16", "tf32": "f32", "f32": "f32"}
MASKS = {"none": 0, "f16": 2, "bf16": 2, "f32": 4}  # bytes of an element
# The largest heads: with more, a thread's registers do not hold its queries and sums.
MOST = 128
QUERIES = 16  # of a warp
MOST_HELD = 256  # bytes of a query up to which a warp keeps its queries in registers
KEYS = 64  # of a tile; half as many where elements have 32 bits and warps do not share them out
WARPS = (4, 8)
# Blocks of a multiprocessor that keep its memory busy, and the fewest keys of a part: estimates, from 30 KB that should be on
# their way and 2 microseconds of a further launch.
AT_ONCE = 2
LEAST = 4 * KEYS
# SHARERS: warps that make the same rows, 1 or all. DEPTH, WIDTH: elements of a key and of a value. *_PIECE: as of a product, see
# `cuda_tiles.piece_of`. MASK_TYPE: of MASKS. PAIRS: 1 where addresses and strides of the result, and WIDTH, are even.
# CUT: the most blocks of the grid where they may share out keys, else 0. JOIN: 1 for the kernel that joins them. FEW: 1 where
# another kernel, whose warps share rows, is launched in place of this one when rows turn out to be few.
CONSTANTS = (
    "ELEMENT", "WARPS", "SHARERS", "DEPTH", "WIDTH", "Q_PIECE", "K_PIECE", "V_PIECE", "MASK_TYPE", "PAIRS", "CUT", "JOIN", "FEW",
)  # fmt: skip


def choose_warps(heads: int, rows: int, target: CudaTarget) -> tuple[int, int]:
    """(warps of a block, of which so many make the same rows), for rows of so many heads of keys.

    The more warps, the more often a tile of keys is used, unless multiprocessors would be idle; few rows are one warp's.
    """
    few, many = WARPS
    if rows <= QUERIES:
        return few, few
    return many if heads * ceil_divide(rows, QUERIES * many) >= target.multiprocessors else few, 1


def rows_of(given: Constants) -> int:
    """Rows of queries that a block makes."""
    return QUERIES * int(given["WARPS"]) // int(given["SHARERS"])


def tile_keys(given: Constants) -> int:
    """Keys of a tile: half as many where elements are long, unless warps share them out."""
    return KEYS if SIZES[str(given["ELEMENT"])] == 2 or int(given["SHARERS"]) > 1 else KEYS // 2


def shared_bytes(given: Constants) -> int:
    """Shared memory of a block: its queries, and two stages of keys and values."""
    size = SIZES[str(given["ELEMENT"])]
    d_panels, v_panels = (ceil_divide(int(given[name]) * size, ROW) for name in ("DEPTH", "WIDTH"))
    return ROW * (d_panels * rows_of(given) + 2 * (d_panels + v_panels) * tile_keys(given))


def part_keys(tiles: int, keys: int, most: int) -> int:
    """Keys of a part, where tiles of rows are to be at most `most` blocks."""
    parts = min(most // max(1, tiles), keys // LEAST)
    return max(1, ceil_divide(ceil_divide(keys, max(1, parts)), KEYS)) * KEYS


def most_blocks(heads: int | None, rows: int | None, keys: int | None, given: Constants, target: CudaTarget) -> int:
    """CUT, for rows of so many heads of keys; sizes that are not known are None. 0 where keys would never be shared out."""
    most = AT_ONCE * target.multiprocessors
    tiles = (heads or 1) * ceil_divide(rows or 1, rows_of(given))
    whole = keys is not None and part_keys(tiles, keys, most) >= keys
    return 0 if whole or 2 * tiles > most else most


def join_constants(given: Constants) -> dict[str, int | float | str]:
    """Constants of the joining kernel; what it does not depend on has one value, so that kernels are shared."""
    fixed: dict[str, int | str] = {"DEPTH": 1, "Q_PIECE": 16, "K_PIECE": 16, "V_PIECE": 16, "MASK_TYPE": "none", "PAIRS": 1}
    return {**given, **fixed, "SHARERS": 1, "FEW": 0, "JOIN": 1}


def partial_size(blocks: int, given: Constants) -> int:
    """Elements of memory for what so many blocks find."""
    return blocks * QUERIES * int(given["WARPS"]) * _pitch(int(given["WIDTH"])) // 4


def _pitch(width: int) -> int:
    """Bytes of a row of partial results: sums, the largest score, the total, and two elements that align the next row."""
    return 4 * (ceil_divide(width, 16) * 16 + 4)


def attention_file(given: Constants) -> str:
    """The kernel file."""
    return "attention_join" if int(given["JOIN"]) else "attention"


def attention_constants(given: Constants) -> dict[str, object]:
    """Constants in the text, from those of a kernel; LookupError for wrong ones."""
    element, mask, warps, sharers = str(given["ELEMENT"]), str(given["MASK_TYPE"]), int(given["WARPS"]), int(given["SHARERS"])
    depth, width = int(given["DEPTH"]), int(given["WIDTH"])
    if element not in RESULTS or warps not in WARPS or not (0 < depth <= MOST and 0 < width <= MOST):
        raise LookupError(f"attention of {element}, {warps} warps, heads of {depth} and {width}")
    if sharers not in (1, warps):
        raise LookupError(f"{sharers} of {warps} warps")
    pieces = {name: int(value) for name, value in given.items() if name.endswith("_PIECE")}
    if not set(pieces.values()) <= {2, 4, 8, 16} or min(pieces.values()) < SIZES[element]:
        raise LookupError(f"pieces {pieces}")
    size, rows, wide = SIZES[element], rows_of(given), ceil_divide(width, 16) * 16
    shared = {"SIZE": size, "WIDTH": wide, "PITCH": _pitch(width), "SLOT": QUERIES * warps}
    if int(given["JOIN"]):
        store = "st" if size == 4 else f"st_{element}"
        return {**shared, "THREADS": ELEMENT_THREADS, "STORE": store, "POINTER": f"ptr_{RESULTS[element]}"}
    d_panels, v_panels = (ceil_divide(elements * size, ROW) for elements in (depth, width))
    keys = tile_keys(given)
    return {
        **shared, "ELEMENT": f'"{element}"', "RESULT": f'"{RESULTS[element]}"', "THREADS": WARP * warps, "SHARERS": sharers,
        "BN": keys, "OWN": keys // sharers, "BM": rows, "PER": ROW // size,
        "HELD": int(element != "f32" and depth * size <= MOST_HELD),
        "STEPS": ceil_divide(depth * size, 32),
        "D_PANELS": d_panels, "V_PANELS": v_panels, "Q_PANEL": ROW * rows, "K_PANEL": ROW * keys,
        "Q_BYTES": d_panels * ROW * rows, "K_BYTES": d_panels * ROW * keys, "STAGE_BYTES": (d_panels + v_panels) * ROW * keys,
        **pieces, "MASK_TYPE": f'"{mask}"', "MASK_SIZE": MASKS[mask], "PAIRS": int(bool(given["PAIRS"])),
        "CUT": int(bool(given["CUT"])), "KEPT": 64 * wide + 512, "SUMS": wide // 2,
    }  # fmt: skip


def launch_attention(words: Words, given: Constants, target: CudaTarget) -> Launch:  # noqa: ARG001
    """Fills PANELS, the tiles of rows of a head of keys, and KEYS, those of a block.

    A block per such tile and part of the keys, none where another kernel has these rows; of the joining kernel one per row,
    none where keys are not shared out.
    """
    heads, rows = words["B"] * words["GROUPS"], words["S"] * words["GROUP"]
    words["PANELS"] = ceil_divide(rows, rows_of(given))
    tiles = heads * words["PANELS"]
    words["KEYS"] = part_keys(tiles, words["T"], int(given["CUT"]))
    parts = max(1, ceil_divide(words["T"], words["KEYS"]))
    if int(given["JOIN"]):
        return Launch((heads * rows if parts > 1 else 0, 1, 1), ELEMENT_THREADS, 640 * ELEMENT_THREADS // WARP)
    other = int(given["FEW"]) if rows <= QUERIES else int(given["SHARERS"]) > 1
    return Launch((0 if other else tiles * parts, 1, 1), WARP * int(given["WARPS"]), shared_bytes(given))
