"""A device for tests: memory is the PTX interpreter's, launches run PTX on it, recordings are lists of launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minicc.codegen.cuda import compile_ptx
from minicc.kernels.cuda_launch import Launch
from tests.cuda.loop_kernels import TARGET
from tests.cuda.ptx_interpreter import Memory, run

Array = np.ndarray[Any, Any]


class FakeDevice:
    """Interprets the kernels of `sources`; `log` names what was called, in order."""

    def __init__(self, sources: Mapping[str, str], size: int = 1 << 22) -> None:
        self.sources, self.memory, self.log = sources, Memory(size), list[str]()
        self.recording: list[tuple[str, Launch, list[int]]] | None = None

    def load(self, symbol: str, cubin: bytes) -> str:
        assert cubin.startswith(b"\x7fELF")
        return compile_ptx(self.sources[symbol], symbol, TARGET)

    def allocate(self, size: int) -> int:
        return self.memory.place(np.full(max(1, size), 0xFF, np.uint8))

    def to_device(self, address: int, array: Array) -> None:
        self.log.append("in")
        self.memory.bytes[address : address + array.nbytes] = array.reshape(-1).view(np.uint8)

    def to_host(self, array: Array, address: int) -> None:
        self.log.append("out")
        array[...] = self.memory.read(address, array.shape, array.dtype)

    def launch(self, kernel: str, launch: Launch, words: Sequence[int]) -> None:
        assert self.recording is not None, "kernels are only started by replays"
        self.recording.append((kernel, launch, list(words)))

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        self.recording = recorded = []
        launches()
        self.recording = None

        def replay() -> None:
            self.log.append("replay")
            for kernel, launch, words in recorded:
                run(kernel, "", launch.grid, launch.block, launch.shared_bytes, words, self.memory)

        return replay
