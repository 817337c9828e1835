"""How CUDA kernels are launched: blocks, threads of a block, shared memory.

Pure integer arithmetic over the words of one call, as `domain` is for the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicc.kernels.domain import ceil_divide
from minicc.targets.cuda import CudaTarget

# Threads of a block whose threads work alone, and the most of one that reduces together.
ELEMENT_THREADS = 256
REDUCTION_THREADS = 512
WARP = 32
# Blocks per multiprocessor beyond which threads take several elements: enough to hide latency and unevenness.
WAVES = 32


@dataclass(frozen=True, slots=True)
class Launch:
    """The shape of one launch; a grid of no blocks is not launched."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0


def launch_elements(elements: int, target: CudaTarget) -> Launch:
    """A thread per element, or per several elements that lie a whole grid apart."""
    most = target.multiprocessors * WAVES
    return Launch((min(ceil_divide(elements, ELEMENT_THREADS), most), 1, 1), ELEMENT_THREADS)


def launch_rows(rows: int, columns: int, target: CudaTarget) -> Launch:
    """A block per row of so many columns, or per several rows."""
    threads = min(REDUCTION_THREADS, max(1, ceil_divide(columns, WARP)) * WARP)
    return Launch((min(rows, target.multiprocessors * WAVES * 8), 1, 1), threads)
