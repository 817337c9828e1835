"""The PTX interpreter's clusters: blocks that wait for each other and read each other's shared memory.

An address in the shared memory of a cluster has the block's rank above the 24 bits of the address there. The blocks
run one after another from barrier to barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tests.cuda.ptx_values import WIDTH, Array, PtxError

if TYPE_CHECKING:
    from tests.cuda.ptx_interpreter import Block

Parts = tuple[str, ...]
RANK = 24  # bits below it


def mapa(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """mapa.shared::cluster.u32 d, address, rank."""
    if parts[1:] != ("shared::cluster", "u32"):
        raise PtxError("unknown form of mapa")
    block.write(operands[0], block.value(operands[1]) | block.value(operands[2]) << np.uint64(RANK), mask)


def member(block: Block, rank: int) -> Block:
    """A block of the cluster, which must not have ended."""
    if rank >= len(block.cluster):
        raise PtxError("a block outside the cluster")
    if block.cluster[rank].ended:
        raise PtxError("the shared memory of a block that has ended")
    return block.cluster[rank]


def load(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """ld.shared::cluster.type d, [address]."""
    address, size = block.address(operands[1]), WIDTH[parts[-1]]
    result = np.zeros((block.threads, size), np.uint8)
    for rank in np.unique(address[mask] >> RANK):
        other, mine = member(block, int(rank)), mask & (address >> RANK == rank)
        places = (address[mine] & ((1 << RANK) - 1))[:, None] + np.arange(size)
        if places.max() >= other.shared.size or (places[:, 0] % size).any():
            raise PtxError("a wrong address in a cluster's shared memory")
        result[mine] = other.shared[places]
    raw = np.zeros((block.threads, 8), np.uint8)
    raw[:, :size] = result
    block.write(operands[0], raw.view(np.uint64)[:, 0], mask)


def run_together(blocks: Sequence[Block], schedule: str) -> None:
    """Runs the blocks of a cluster to their end, each as far as it can.

    Raises PtxError when they do not all come to a barrier, and when none can go on.
    """
    for block in blocks:
        block.cluster = blocks
    running = [block.run(schedule) for block in blocks]
    states = [""] * len(blocks)  # "" at first; what a block waits for: "cluster" or a "phase"; "end"
    while set(states) != {"end"}:
        before = sum(block.boxes.events for block in blocks)
        for number, block in enumerate(blocks):
            if states[number] in ("", "phase"):
                states[number] = next(running[number], "end")
                block.ended = states[number] == "end"
        if set(states) == {"cluster"}:
            states = [""] * len(blocks)
        elif "cluster" in states and "end" in states:
            raise PtxError("some blocks of a cluster end while others wait for them")
        elif "phase" in states and sum(block.boxes.events for block in blocks) == before:
            raise PtxError("a deadlock: threads wait for a phase that does not end")
