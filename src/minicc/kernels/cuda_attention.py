"""Attention's CUDA form: which heads it takes, its constants, its launches. The kernel is kernels/cuda/attention.py."""

from __future__ import annotations

from collections.abc import Mapping

from minicc.kernels.cuda_launch import WARP, Launch
from minicc.kernels.cuda_tiles import ROW
from minicc.kernels.domain import Words, ceil_divide
from minicc.targets.cuda import CudaTarget

Constants = Mapping[str, int | float | str]

ELEMENTS = ("f16", "bf16")
MASKS = {"": 0, "f16": 2, "bf16": 2, "f32": 4}  # bytes of an element
# The largest heads: with more, a thread's registers do not hold its queries and sums.
MOST = 128
QUERIES = 16  # of a warp
KEYS = 64  # of a tile
WARPS = (4, 8)
PANEL = 64  # elements of a row in shared memory
# DEPTH, WIDTH: elements of a key and of a value. *_PIECE: as of a product, see `cuda_tiles.piece_of`. MASK_TYPE: of MASKS.
# PAIRS: 1 where addresses and strides of the result, and WIDTH, are even.
CONSTANTS = ("ELEMENT", "WARPS", "DEPTH", "WIDTH", "Q_PIECE", "K_PIECE", "V_PIECE", "MASK_TYPE", "PAIRS")


def choose_warps(heads: int, queries: int, target: CudaTarget) -> int:
    """Warps of a block: the more, the more often a tile of keys is used, unless multiprocessors would be idle."""
    few, many = WARPS
    return many if heads * ceil_divide(queries, QUERIES * many) >= target.multiprocessors else few


def attention_constants(given: Constants) -> dict[str, object]:
    """Constants in the text, from those of a kernel; LookupError for wrong ones."""
    element, mask, warps = str(given["ELEMENT"]), str(given["MASK_TYPE"]), int(given["WARPS"])
    depth, width = int(given["DEPTH"]), int(given["WIDTH"])
    if element not in ELEMENTS or warps not in WARPS or not (0 < depth <= MOST and 0 < width <= MOST):
        raise LookupError(f"attention of {element}, {warps} warps, heads of {depth} and {width}")
    pieces = {name: int(value) for name, value in given.items() if name.endswith("_PIECE")}
    if not set(pieces.values()) <= {2, 4, 8, 16}:
        raise LookupError(f"pieces {pieces}")
    rows, d_panels, v_panels = QUERIES * warps, ceil_divide(depth, PANEL), ceil_divide(width, PANEL)
    return {
        "ELEMENT": f'"{element}"', "THREADS": WARP * warps, "BM": rows, "BN": KEYS, "DEPTH": ceil_divide(depth, 16) * 16,
        "WIDTH": ceil_divide(width, 16) * 16, "D_PANELS": d_panels, "V_PANELS": v_panels, "Q_PANEL": ROW * rows,
        "K_PANEL": ROW * KEYS, "Q_BYTES": d_panels * ROW * rows, "K_BYTES": d_panels * ROW * KEYS,
        "STAGE_BYTES": (d_panels + v_panels) * ROW * KEYS, **pieces, "MASK_TYPE": f'"{mask or "f32"}"',
        "MASK_SIZE": MASKS[mask], "PAIRS": int(bool(given["PAIRS"])),
    }  # fmt: skip


def launch_attention(words: Words, given: Constants, target: CudaTarget) -> Launch:  # noqa: ARG001
    """Fills PANELS, the tiles of queries of a head, and KEYS, those of a tile; a block per tile of queries."""
    warps = int(given["WARPS"])
    d_panels, v_panels = (ceil_divide(int(given[name]), PANEL) for name in ("DEPTH", "WIDTH"))
    words["PANELS"], words["KEYS"] = ceil_divide(words["S"], QUERIES * warps), KEYS
    shared = ROW * (d_panels * QUERIES * warps + 2 * (d_panels + v_panels) * KEYS)
    blocks = words["B"] * words["GROUPS"] * words["GROUP"] * words["PANELS"]
    return Launch((blocks, 1, 1), WARP * warps, shared)
