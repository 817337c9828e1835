"""What a cubin says of its kernel: registers, stack, static shared memory; read from the file, without any tool.

A cubin is an ELF file; its section .nv.info is a list of attributes (their numbers are those that cuobjdump prints).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_SECTION = struct.Struct("<IIQQQQIIQQ")
_REGISTERS, _FRAME = 0x2F, 0x11
_WAIT, _OPCODE = 0x82E, 0xFFF  # ACQBULK, in the low bits of an instruction's 16 bytes (capability 9.0)
_SIZED = 4  # the form of attributes that have a length; the others are two bytes


@dataclass(frozen=True)
class KernelFacts:
    """registers: per thread. stack_bytes: per thread, zero unless registers are spilled. shared_bytes: static, per block."""

    registers: int
    stack_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        spilled = f", {self.stack_bytes} bytes of stack" if self.stack_bytes else ""
        return f"{self.registers} registers{spilled}"


def kernel_facts(cubin: bytes) -> KernelFacts | None:
    """The facts of a cubin with one kernel; None for a file that is none."""
    try:
        sections = list(_sections(cubin))
        info = next((body for name, body in sections if name == ".nv.info"), b"")
        found = {_REGISTERS: 0, _FRAME: 0}
        for attribute, value in _attributes(info):
            if attribute in found:
                found[attribute] = max(found[attribute], struct.unpack_from("<II", value)[1])
    except (struct.error, IndexError, UnicodeDecodeError):
        return None
    shared = sum(len(body) for name, body in sections if name.startswith(".nv.shared.") and "reserved" not in name)
    return KernelFacts(found[_REGISTERS], found[_FRAME], shared) if found[_REGISTERS] else None


def waits(code: bytes) -> bool:
    """Whether the kernel of a cubin waits for the one before it (codegen/cuda_wait); PTX and other files do not."""
    try:
        texts = [body for name, body in _sections(code) if name.startswith(".text.")]
        return any(np.any(np.frombuffer(body[: len(body) // 16 * 16], "<u8")[::2] & _OPCODE == _WAIT) for body in texts)
    except (struct.error, IndexError, ValueError):
        return False


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of an ELF file's sections; a section without content in the file is so many zeros."""
    if data[:4] != b"\x7fELF":
        return
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [_SECTION.unpack_from(data, start + i * size) for i in range(count)]
    text = headers[names]
    table = data[text[4] : text[4] + text[5]]
    for header in headers:
        end = table.index(b"\0", header[0])
        body = bytes(min(header[5], 1 << 20)) if header[1] == 8 else data[header[4] : header[4] + header[5]]
        yield table[header[0] : end].decode(), body


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            yield attribute, info[at : at + size]
            at += size
