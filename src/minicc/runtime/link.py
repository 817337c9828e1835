"""Objects into memory without LLVM: laid out, relocated and made executable in a few milliseconds.

For Linux on x86-64, and for what kernels consist of: code, read-only data, relocations relative to the program counter, and
calls of the C library. An object with anything else (writable or thread-local data, other relocations, common symbols) is not
for this linker; runtime/objects then asks LLVM's, which takes a shared library of a hundred megabytes. Unwind tables are left
out: a kernel neither throws nor calls what could. Memory is never writable and executable at once.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Mapping

import numpy as np

from minicc.codegen import elf
from minicc.codegen.elf import Elf

# Relocations: a distance of 32 bits to the symbol, or to a word that holds the symbol's address.
_RELATIVE = frozenset({2, 4})  # R_X86_64_PC32, R_X86_64_PLT32
_THROUGH_WORD = frozenset({9, 41, 42})  # R_X86_64_GOTPCREL, R_X86_64_GOTPCRELX, R_X86_64_REX_GOTPCRELX
_PLACED_FLAGS = elf.ALLOCATED | elf.EXECUTABLE | elf.MERGEABLE | elf.STRINGS
_MOST_BYTES = 1 << 30  # all distances within fit 32 bits
_RESERVED = 0xFF00  # section numbers from here on: absolute, common
_STUB, _WORD = 16, 8
_JUMP = b"\xff\x25"  # jmp *distance(%rip)

Place = tuple[int, int]  # of a section: number of the object, number of the section


class _Unusual(Exception):
    """An object that this linker is not for."""


def can_link() -> bool:
    """Whether this system and processor are those the linker knows."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 1 << 32


def link(objects: Mapping[str, Elf]) -> tuple[mmap.mmap, dict[str, int]] | None:
    """(the memory of the code, addresses of its functions) of objects given by the symbol each defines.

    The code lives as long as the memory is referred to. A function that its object does not define has no address. Undefined
    names are looked up in the process: the caller has checked them. None where an object needs a general linker. Raises
    ValueError for an object that is damaged.
    """
    try:
        return _link(objects)
    except _Unusual:
        return None


def _link(objects: Mapping[str, Elf]) -> tuple[mmap.mmap, dict[str, int]]:
    undefined = {s.name for o in objects.values() for s in o.symbols if s.section == elf.UNDEFINED and s.name}
    externals = {name: number for number, name in enumerate(sorted(undefined))}
    library = ctypes.CDLL(None)
    targets = [_address(library, name) for name in externals]
    code, code_end = _layout(objects, elf.EXECUTABLE, _STUB * len(externals))
    data_start = -(-code_end // mmap.PAGESIZE) * mmap.PAGESIZE
    data, end = _layout(objects, 0, data_start + _WORD * len(externals))
    places = code | data
    if end > _MOST_BYTES:
        raise _Unusual
    memory = mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
    for number, target in enumerate(targets):
        word = data_start + _WORD * number
        struct.pack_into("<Q", memory, word, target)
        struct.pack_into("<2si", memory, _STUB * number, _JUMP, word - (_STUB * number + 6))
    entries: dict[str, int] = {}
    for number, (symbol, one) in enumerate(objects.items()):
        for section, content in enumerate(one.sections):
            if (number, section) in places:
                at = places[number, section]
                memory[at : at + content.size] = content.content
        offsets = _symbols(number, one, places, externals)
        _relocate(memory, number, one, places, offsets, externals, data_start)
        for entry, offset in zip(one.symbols, offsets):
            if entry.name == symbol and (number, entry.section) in code and offset is not None:
                entries[symbol] = offset
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    _protect(library, address, data_start, mmap.PROT_READ | mmap.PROT_EXEC)
    _protect(library, address + data_start, end - data_start, mmap.PROT_READ)
    return memory, {symbol: address + offset for symbol, offset in entries.items()}


def _layout(objects: Mapping[str, Elf], executable: int, at: int) -> tuple[dict[Place, int], int]:
    """(offset of each section that is or is not executable, where they end), from an offset on."""
    places: dict[Place, int] = {}
    for number, one in enumerate(objects.values()):
        for index, section in enumerate(one.sections):
            if not section.flags & elf.ALLOCATED or section.kind == elf.UNWIND:
                continue
            if section.kind != elf.PROGRAM_BITS or section.flags & ~_PLACED_FLAGS:
                raise _Unusual
            if section.flags & elf.EXECUTABLE == executable:
                at = -(-at // section.alignment) * section.alignment
                places[number, index] = at
                at += section.size
    return places, at


def _symbols(number: int, one: Elf, places: Mapping[Place, int], externals: Mapping[str, int]) -> list[int | None]:
    """Offset in the image of each symbol, that of a stub for an external function; None for what lies outside."""
    offsets: list[int | None] = []
    for name, kind, index, value in one.symbols:
        if kind > elf.FILE or (index >= _RESERVED and kind != elf.FILE):
            raise _Unusual
        if index == elf.UNDEFINED:
            offsets.append(_STUB * externals[name] if name else None)
        elif (number, index) in places:
            if value > one.sections[index].size:
                raise ValueError("a symbol lies outside its section")
            offsets.append(places[number, index] + value)
        elif index < len(one.sections) or kind == elf.FILE:
            offsets.append(None)
        else:
            raise ValueError("a symbol of an unknown section")
    return offsets


def _relocate(
    memory: mmap.mmap,
    number: int,
    one: Elf,
    places: Mapping[Place, int],
    offsets: list[int | None],
    externals: Mapping[str, int],
    data_start: int,
) -> None:
    for table in one.sections:
        if table.kind == elf.SHORT_RELOCATIONS:
            raise _Unusual
        if table.kind != elf.RELOCATIONS or (number, table.info) not in places:
            continue
        start, size = places[number, table.info], one.sections[table.info].size
        for offset, kind, symbol, addend in elf.relocations(table, one):
            if offset + 4 > size:
                raise ValueError("a relocation lies outside its section")
            name, _, index, _ = one.symbols[symbol]
            found = offsets[symbol]
            if kind in _THROUGH_WORD and index == elf.UNDEFINED and name:
                found = data_start + _WORD * externals[name]
            elif kind not in _RELATIVE:
                raise _Unusual
            if found is None:
                raise ValueError("a relocation leads outside the code")
            distance = found + addend - (start + offset)
            if not -(1 << 31) <= distance < 1 << 31:
                raise ValueError("a relocation leads too far")
            struct.pack_into("<i", memory, start + offset, distance)


def _address(library: ctypes.CDLL, name: str) -> int:
    """Address of a function of the process."""
    try:
        return ctypes.cast(library[name], ctypes.c_void_p).value or 0
    except AttributeError:
        raise _Unusual from None


def _protect(library: ctypes.CDLL, address: int, size: int, protection: int) -> None:
    if size and library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(protection)):
        raise _Unusual  # a system that forbids it; LLVM's error says more
