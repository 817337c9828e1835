"""The PTX interpreter's products of four warps: wgmma, and what must come before, between and after.

A product is computed when it is issued. That it may read its operands and write its sums any time until it is waited for is
modelled by what is an error meanwhile: to write memory that it reads, and to store sums. Before it, operands must have been
published to the asynchronous proxy by the thread that wrote them, and registers by `wgmma.fence`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.cuda import ptx_tma
from tests.cuda.ptx_values import Array, PtxError

if TYPE_CHECKING:
    from tests.cuda.ptx_interpreter import Block

Parts = tuple[str, ...]
GROUP = 128  # threads
TYPES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}


@dataclass
class Products:
    """Products of a block on their way, and memory that the asynchronous proxy may not see yet.

    open:    per group of threads, bytes that products read which are not committed.
    groups:  per group of threads, bytes that committed products read, oldest first.
    fenced:  per group, whether `wgmma.fence` came after the last commit.
    sums:    registers that products add to.
    writer:  per byte of shared memory, the thread that wrote it and has not published it; -1.
    """

    threads: int
    shared: int
    open: dict[int, list[Array]] = field(default_factory=dict)
    groups: dict[int, list[list[Array]]] = field(default_factory=dict)
    fenced: set[int] = field(default_factory=set)
    sums: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.writer = np.full(self.shared, -1, np.int64)

    def pending(self) -> list[Array]:
        """Bytes that products on their way read."""
        committed = [read for groups in self.groups.values() for group in groups for read in group]
        return committed + [read for reads in self.open.values() for read in reads]

    def written(self, places: Array, threads: Array) -> None:
        """Notes bytes [threads][size] of shared memory that threads have written. Raises PtxError if a product reads them."""
        self.writer[places] = threads[:, None]
        for read in self.pending():
            if read[places].any():
                raise PtxError("shared memory is written while a product reads it")

    def stored(self, threads: Array, registers: Sequence[str]) -> None:
        """Raises PtxError when threads store registers whose sums are on their way."""
        if self.sums.isdisjoint(registers):
            return
        for group in np.unique(threads // GROUP):
            if self.groups.get(int(group)) or self.open.get(int(group)):
                raise PtxError("sums are stored before their products were waited for")


def fence(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    """fence.proxy.async publishes what its threads wrote."""
    if ptx_tma.fence(block, parts, operands, mask):
        return
    if parts[1:3] == ("proxy", "async"):
        mine = np.append(mask, False)[block.products.writer]
        block.products.writer[mine] = -1


def _groups(block: Block, mask: Array) -> list[int]:
    whole = mask.reshape(-1, GROUP)
    if mask.size % GROUP or (whole.any(1) != whole.all(1)).any():
        raise PtxError("an instruction of four warps is reached by some of their threads only")
    return [int(g) for g in np.flatnonzero(whole.any(1))]


def wgmma(block: Block, parts: Parts, operands: Parts, mask: Array) -> None:
    products = block.products
    for group in _groups(block, mask):
        match parts[1]:
            case "fence":
                products.fenced.add(group)
            case "commit_group":
                products.groups.setdefault(group, []).append(products.open.pop(group, []))
                products.fenced.discard(group)
            case "wait_group":
                committed = products.groups.get(group, [])
                products.groups[group] = committed[len(committed) - min(int(operands[0]), len(committed)) :]
            case "mma_async":
                if group not in products.fenced:
                    raise PtxError("no wgmma.fence before a product")
                _multiply(block, parts, operands, group)
            case _:
                raise PtxError("unknown instruction of four warps")


def _rows(block: Block, operand: str, group: int, rows: int) -> tuple[Array, Array]:
    """32 bytes of so many rows at a descriptor's address, and which bytes of shared memory those are.

    Rows of 128 bytes, 16-byte chunks of row r at chunk ^ (r & 7), eight rows 1024 bytes apart.
    """
    value = int(block.value(operand)[group * GROUP])
    if value >> 62 != 1 or value >> 32 & 0x3FFF != 64:
        raise PtxError("unknown descriptor of a matrix in shared memory")
    start = (value & 0x3FFF) << 4
    if start & 0x39F:
        raise PtxError("a matrix begins neither at a multiple of 1024 bytes nor at a quarter of a row there")
    base, first = start & ~0x3FF, start >> 4 & 7
    row = np.arange(rows)[:, None, None]
    chunk = (first + np.arange(2))[None, :, None]
    places = base + row * 128 + ((chunk ^ (row & 7)) << 4) + np.arange(16)
    if places.max() >= block.shared.size:
        raise PtxError("a matrix reaches outside shared memory")
    read = np.zeros(block.shared.size, bool)
    read[places] = True
    return np.ascontiguousarray(block.shared[places].reshape(rows, 32)), read


def _numbers(raw: Array, type_: str) -> Array:
    if type_ == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_ == "tf32":
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if type_ == "f16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.int8 if type_ == "s8" else np.uint8).astype(np.int32)


def _multiply(block: Block, parts: Parts, operands: Parts, group: int) -> None:
    """wgmma.mma_async.sync.aligned.m64nNkK.d.a.b {sums}, descriptor, descriptor, 1, ..."""
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
    if shape is None:
        raise PtxError("unknown shape of wgmma")
    width, (_, a_type, b_type) = int(shape[1]), parts[5:8]
    if int(shape[2]) * TYPES[a_type] != 32 or any(o != "1" for o in operands[3:6]) or any(o != "0" for o in operands[6:]):
        raise PtxError("unknown form of wgmma")
    registers = [o.strip() for o in operands[0].strip("{}").split(",")]
    block.products.sums.update(registers)
    left, left_bytes = _rows(block, operands[1], group, 64)
    right, right_bytes = _rows(block, operands[2], group, width)
    reads = left_bytes | right_bytes
    if (block.products.writer[reads] >= 0).any():
        raise PtxError("a product reads what no fence has published")
    block.products.open.setdefault(group, []).append(reads)
    product = _numbers(left, a_type) @ _numbers(right, b_type).T
    thread = np.arange(GROUP)
    mask = np.zeros(block.threads, bool)
    mask[group * GROUP : (group + 1) * GROUP] = True
    for number, register in enumerate(registers):
        tile, q = divmod(number, 4)
        row = thread // 32 * 16 + (thread % 32 >> 2) + 8 * (q // 2)
        column = 8 * tile + 2 * (thread & 3) + q % 2
        before = block.value(register)[mask].astype(np.uint32).view(product.dtype)
        result = np.zeros(block.threads, np.uint64)
        result[mask] = np.ascontiguousarray(before + product[row, column]).view(np.uint32)
        block.write(register, result, mask)


HANDLERS = {"wgmma": wgmma, "fence": fence}
