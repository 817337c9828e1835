"""How CUDA kernels are launched: blocks, threads of a block, shared memory, maps of what is copied in boxes.

Pure integer arithmetic over the words of one call, as `domain` is for the CPU.
"""

# ruff: noqa: ARG001  (launches of templates have the same parameters)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from minicc.kernels.domain import Words, ceil_divide
from minicc.kernels.sequential import scatter_domain, topk_domain, trees_domain
from minicc.targets.cuda import CudaTarget

# Threads of a block whose threads work alone, the most of one that reduces together, and of one that steps
# through a sequence together.
ELEMENT_THREADS = 256
REDUCTION_THREADS = 512
RECURRENT_THREADS = 768  # with more the registers of a thread do not hold it
# The longest sequence of updates whose places are compared with each other.
COMPARED_UPDATES = 1 << 16
WARP = 32
# Blocks of so many threads are teams of one warp (kernels/cuda/scalar.py).
WARP_TEAMS = 128
# Blocks per multiprocessor beyond which threads take several elements: enough to hide latency and unevenness.
WAVES = 32
# Bytes of an encoded tensor map.
MAP_BYTES = 128
# Of a workspace: blocks that may have a counter, and bytes of these.
MOST_COUNTED = 4096
COUNTER_BYTES = 4 * MOST_COUNTED


@dataclass(frozen=True, slots=True)
class Positions:
    """Where windows begin, along width and height (im2col): from `lower` to the last element + `upper`, every `steps`."""

    lower: tuple[int, int]
    upper: tuple[int, int]
    steps: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorMap:
    """An array in global memory, and the boxes of it that Hopper's copy engine brings (kernels/cuda/tma.py).

    word:    number of the kernel's word that becomes the address of the encoded map.
    address: of the array, a multiple of 16; element: of cuda_tiles.SIZES.
    extents: elements along the axes, the contiguous one first; strides: bytes, of the other axes, multiples of 16.
    box:     elements along the axes, those of the first 128 bytes; with positions channels and positions, which run through
             rows, then columns, then images of axes (channels, width, height, images).
    """

    word: int
    address: int
    element: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    positions: Positions | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """The shape of one launch, and the tensor maps it reads; a grid of no blocks is not launched.

    workspace: bytes of memory for what blocks leave to each other, whose address is one more word of the kernel, the last one.
               All launches of a plan have the same memory. Its first COUNTER_BYTES are zero before a launch, and are left so.
    """

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0
    maps: tuple[TensorMap, ...] = ()
    workspace: int = 0


def launch_elements(elements: int, target: CudaTarget) -> Launch:
    """A thread per element, or per several elements that lie a whole grid apart."""
    most = target.multiprocessors * WAVES
    return Launch((min(ceil_divide(elements, ELEMENT_THREADS), most), 1, 1), ELEMENT_THREADS)


def launch_tiles(matrices: int, rows: int, columns: int, target: CudaTarget) -> Launch:
    """A block per tile of 32 x 32 of some matrices, or per several tiles."""
    tiles = matrices * ceil_divide(rows, 32) * ceil_divide(columns, 32)
    return Launch((min(tiles, target.multiprocessors * WAVES), 1, 1), ELEMENT_THREADS)


def launch_rows(rows: int, columns: int, target: CudaTarget) -> Launch:
    """A team per row of so many columns, or per several rows: a warp for short rows and many of them, else a block."""
    most = target.multiprocessors * WAVES * 8
    if columns <= 8 * WARP or (columns <= 64 * WARP and rows >= 8 * target.multiprocessors):
        return Launch((min(ceil_divide(rows, WARP_TEAMS // WARP), most), 1, 1), WARP_TEAMS)
    return launch_blocks(rows, columns, target)


def launch_blocks(rows: int, columns: int, target: CudaTarget) -> Launch:
    """A block per row of so many columns, or per several rows."""
    threads = REDUCTION_THREADS if columns > 8 * REDUCTION_THREADS else REDUCTION_THREADS // 2
    return Launch((min(rows, target.multiprocessors * WAVES * 8), 1, 1), threads)


# ---------------------------------------------------------------------------------------------- templates

Constants = Mapping[str, int | float | str]


def launch_scan(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A thread per row of the axis."""
    return launch_elements(w["OUTER"] * w["INNER"] if w["COUNT"] else 0, target)


def launch_scatter(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """Fill BLOCK, the positions of the sequence a thread begins at; a thread per lane and such position.

    Raises ShapeError as on the CPU.
    """
    lanes = prod(w[f"E_{axis}"] for axis in range(w["AXES"])) * w["RUN"]
    empty = not scatter_domain(w, {}, None, 1)
    w["BLOCK"] = w["COUNT"] if w["COUNT"] <= COMPARED_UPDATES else 1
    return launch_elements(0 if empty else lanes * w["BLOCK"], target)


def launch_topk(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A thread per element. ShapeError when a row has fewer than K elements."""
    return launch_elements(topk_domain(w, {}, None, 1) * w["N"], target)


def launch_suppress(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A block per class of a batch."""
    return launch_blocks(w["BATCHES"] * w["CLASSES"], w["N"], target)


def launch_trees(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A thread per row and tree. ShapeError when a row has too few features."""
    return launch_elements(trees_domain(w, {}, None, 1) * w["TREES"], target)


def launch_recurrent(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A block per sequence and direction."""
    w["ROWS"] = 1
    threads = min(RECURRENT_THREADS, ceil_divide(int(constants["COUNT"]) * w["H"], WARP) * WARP)
    return Launch((w["DIRECTIONS"] * w["B"] if w["H"] else 0, 1, 1), max(WARP, threads))


def launch_windows(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A thread per channel of four neighbouring output pixels."""
    pieces = w["OD"] * w["OH"] * ceil_divide(w["OW"], 4)
    return launch_elements(w["IMAGES"] * pieces * w["N"], target)


def launch_conv_transpose(w: Words, constants: Constants, target: CudaTarget) -> Launch:
    """A thread per channel of four outputs that lie a stride apart."""
    pieces = w["OD"] * w["OH"] * w["SW"] * ceil_divide(ceil_divide(w["OW"], w["SW"]), 4)
    return launch_elements(w["IMAGES"] * w["GROUPS"] * pieces * w["N"], target)
