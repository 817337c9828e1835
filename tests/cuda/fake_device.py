"""A device for tests: memory is the PTX interpreter's, launches run PTX on it, recordings are lists of launches."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicc.codegen.cuda import compile_ptx
from minicc.errors import ResourceLimitError
from minicc.kernels.cuda_launch import Launch
from minicc.runtime.cuda.driver import Memory, Replay, Stream
from tests.cuda.loop_kernels import TARGET
from tests.cuda.ptx_interpreter import Memory as GlobalMemory
from tests.cuda.ptx_interpreter import run
from tests.cuda.ptx_wait import check_wait

Array = np.ndarray[Any, Any]
TOGETHER = 8192  # threads of several blocks


class FakeDevice:
    """Interprets the kernels of `sources`; `log` names what was called, in order; `held` counts bytes not freed.

    most: bytes after which there is no memory left.
    """

    def __init__(self, sources: Mapping[str, str], size: int = 1 << 22, number: int = 0, most: int = 1 << 40) -> None:
        self.sources, self.memory, self.log, self.number = sources, GlobalMemory(size), list[str](), number
        self.held, self.streams, self.most = 0, 0, most

    def load(self, symbol: str, cubin: bytes) -> str:
        if cubin.startswith(b"//") and cubin.endswith(b"\0"):
            return cubin[:-1].decode()  # PTX
        assert cubin.startswith(b"\x7fELF")
        text = compile_ptx(self.sources[symbol], symbol, TARGET)
        check_wait(text)
        return text

    def stream(self) -> Stream:
        self.streams += 1
        return Stream(self.streams, lambda: setattr(self, "streams", self.streams - 1))

    def existing(self, handle: int) -> Stream:
        return Stream(handle, lambda: None)

    def allocate(self, size: int, stream: Stream | None = None) -> Memory:
        if self.held + size > self.most:
            raise ResourceLimitError(f"the GPU has no {size} bytes left")
        self.held += size
        address = self.memory.place(np.full(max(1, size), 0xFF, np.uint8))
        return Memory(address, size, lambda: setattr(self, "held", self.held - size))

    def staging(self, size: int) -> Memory:
        own = np.full(max(1, size), 0xFF, np.uint8)
        return Memory(own.ctypes.data, size, lambda: own.fill(0xFF))  # which keeps it until then

    def to_device(self, address: int, source: int, size: int, stream: Stream) -> None:
        self.log.append("in")
        self.memory.bytes[address : address + size] = np.frombuffer(ctypes.string_at(source, size), np.uint8)

    def to_host(self, target: int, address: int, size: int, stream: Stream) -> None:
        self.log.append("out")
        ctypes.memmove(target, self.memory.bytes[address : address + size].tobytes(), size)

    def on_device(self, target: int, source: int, size: int, stream: Stream) -> None:
        self.log.append("move")
        self.memory.bytes[target : target + size] = self.memory.bytes[source : source + size]

    def wait(self, stream: Stream) -> None:
        self.log.append("wait")

    def follow(self, stream: Stream | int, leader: Stream) -> None:
        self.log.append("follow")

    def record(self, launches: Sequence[tuple[str, Launch, Sequence[int]]], stream: Stream, overlap: bool = False) -> Replay:
        self.overlaps = overlap
        recorded = [(kernel, launch, list(words)) for kernel, launch, words in launches]

        def replay(where: Stream = stream) -> None:
            self.log.append("replay")
            self.replayed_on = int(where)
            for kernel, launch, words in recorded:
                run(kernel, "", launch.grid, launch.block, launch.shared_bytes, words, self.memory, threads=TOGETHER)

        return replay

    def times(self, launches: Sequence[tuple[str, Launch, Sequence[int]]], stream: Stream) -> list[float]:
        """A microsecond for the first launch, two for the second..."""
        self.record(launches, stream)()
        return [1e-6 * (i + 1) for i in range(len(launches))]
