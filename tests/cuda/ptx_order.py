"""The PTX interpreter's watch over what blocks of one launch tell each other through global memory.

It is for programs with atomic operations. Blocks run one after another, so that a missing release or acquire would change
nothing; it is an error instead to read or to overwrite what another thread has written in this launch unless that happened
before: the writer came to a barrier of its block behind which a thread released (`.release`, `.acq_rel`) by an atomic
operation, a later operation at the same address acquired, and who reads is that thread or has come to a barrier with it since.
Within a block a barrier is enough. Words of 4 bytes are watched, not those that atomic operations reach, nor stores of less.
Fences are not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.cuda.ptx_values import Array, PtxError


class Launch:
    """What a launch of so many blocks has done to memory: by word who wrote last and when, by address what was released there.

    Times are barriers that a thread had come through.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, words = blocks, -(-size // 4)
        self.writer, self.thread, self.when = (np.full(words, -1, np.int32) for _ in range(3))
        self.atomic = np.zeros(words, bool)
        self.released: dict[int, Array] = {}


class Watch:
    """Of one block: barriers that each thread has come through, and what threads know, [thread][block]: up to which time."""

    def __init__(self, launch: Launch, block: int, threads: int) -> None:
        self.launch, self.block = launch, block
        self.passed = np.zeros(threads, np.int32)
        self.known = np.zeros((threads, launch.blocks), np.int32)

    def met(self) -> None:
        """All threads have come to a barrier."""
        self.passed += 1
        self.known[:] = self.known.max(0)

    def touched(self, places: Array, threads: Array, writes: bool) -> None:
        """Checks bytes [threads][size] of global memory that threads read or write, and notes those that they write."""
        launch, words = self.launch, places[:, ::4] // 4
        mine = np.broadcast_to(threads[:, None], words.shape)
        if writes and places.shape[1] < 4:  # neighbours may belong to others
            return
        who, when = launch.writer[words], launch.when[words]
        own = (launch.thread[words] == mine) | (when < self.passed[mine])
        told = np.where(who == self.block, own, self.known[mine, who] > when)
        if not (told | (who < 0) | launch.atomic[words]).all():
            raise PtxError("a thread reads or overwrites what another one has written, which need not have happened before")
        if writes:
            launch.writer[words], launch.thread[words], launch.when[words] = self.block, mine, self.passed[mine]

    def counts(self, thread: int, address: int, parts: Sequence[str]) -> None:
        """An atomic operation of a thread."""
        launch, known = self.launch, self.known[thread]
        launch.atomic[address // 4] = True
        here = launch.released.setdefault(address, np.zeros(launch.blocks, np.int32))
        if {"release", "acq_rel"} & set(parts):
            known[self.block] = self.passed[thread]
            np.maximum(here, known, out=here)
        if {"acquire", "acq_rel"} & set(parts):
            np.maximum(known, here, out=known)
