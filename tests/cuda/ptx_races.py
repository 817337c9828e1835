"""The PTX interpreter's watch over threads of one warp that exchange numbers through shared memory.

It is for programs with bar.warp.sync. Threads of a warp run in step, so that a missing barrier between them would change
nothing; it is an error instead to read what another thread of the warp has written since the last barrier of both, or to
write what another one has read since. Of several readers of a byte only the last one is remembered. Threads of different
warps are not watched.
"""

from __future__ import annotations

import numpy as np

from tests.cuda.ptx_values import Array, PtxError

WARP = 32


class Races:
    """passed: barriers that each thread has come through. Per byte of shared memory: who wrote and read it last, and when."""

    def __init__(self, threads: int, shared: int) -> None:
        self.passed = np.zeros(threads, np.int64)
        self.writer, self.reader = np.full(shared, -1, np.int64), np.full(shared, -1, np.int64)
        self.written, self.read = np.zeros(shared, np.int64), np.zeros(shared, np.int64)

    def touched(self, places: Array, threads: Array, writes: bool) -> None:
        """Notes bytes [threads][size] that threads touch. Raises PtxError for a race."""
        mine, now = threads[:, None], self.passed[threads][:, None]

        def clashes(other: Array, when: Array) -> bool:
            who = other[places]
            return bool(((who >= 0) & (who != mine) & (who // WARP == mine // WARP) & (when[places] == now)).any())

        if clashes(self.writer, self.written) or (writes and clashes(self.reader, self.read)):
            raise PtxError("threads of a warp exchange numbers without a barrier")
        who, when = (self.writer, self.written) if writes else (self.reader, self.read)
        who[places], when[places] = np.broadcast_to(mine, places.shape), np.broadcast_to(now, places.shape)
