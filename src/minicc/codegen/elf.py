"""Relocatable ELF objects as LLVM writes them: sections, symbols and relocations, read with every offset checked.

64 bits and little-endian only. An object is machine code that somebody vouched for but that may be damaged: whatever does
not fit is a ValueError, never an access outside the data. Nothing is laid out or run here (runtime/link does).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

RELOCATABLE = 1
X86_64, AARCH64 = 62, 183
PROGRAM_BITS, SYMBOL_TABLE, RELOCATIONS, NO_BITS, SHORT_RELOCATIONS, UNWIND = 1, 2, 4, 8, 9, 0x70000001  # kinds of sections
WRITABLE, ALLOCATED, EXECUTABLE, MERGEABLE, STRINGS = 1, 2, 4, 0x10, 0x20  # their flags
FUNCTION, FILE = 2, 4  # kinds of symbols: those below are data and places without a kind, sections are 3
UNDEFINED = 0  # the section of a symbol that another object defines

_HEADER = struct.Struct("<6s10xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBxHQQ")
_RELOCATION = struct.Struct("<QIIq")
_LARGEST_ALIGNMENT = 4096


class Section(NamedTuple):
    """One section; `content` is empty where the file holds nothing for it. link, info: other sections, by number."""

    kind: int
    flags: int
    content: bytes
    size: int
    link: int
    info: int
    alignment: int


class Symbol(NamedTuple):
    """One symbol: `value` bytes into a section. Numbers of sections from 0xff00 on mean something else."""

    name: str
    kind: int
    section: int
    value: int


class Relocation(NamedTuple):
    """To be written at an offset: a combination, named by its kind, of a symbol's address and the addend."""

    offset: int
    kind: int
    symbol: int
    addend: int


class Elf(NamedTuple):
    """An object: the processor it is for, its sections, and the symbols of its one symbol table."""

    machine: int
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]


def is_elf(data: bytes) -> bool:
    """Whether the data begins like an object that `read_elf` reads."""
    return data[:6] == b"\x7fELF\x02\x01"


def read_elf(data: bytes) -> Elf:
    """The parts of an object. Raises ValueError when the file is cut short or inconsistent."""
    if len(data) < _HEADER.size or not is_elf(data):
        raise ValueError("not a whole ELF header")
    _, kind, machine, _, _, _, table, _, _, _, _, size, count, _ = _HEADER.unpack_from(data)
    if kind != RELOCATABLE or size != _SECTION.size:
        raise ValueError("not a relocatable object")
    if table + size * count > len(data):
        raise ValueError("the table of sections lies outside the file")
    sections = tuple(_section(data, table + size * number) for number in range(count))
    tables = [section for section in sections if section.kind == SYMBOL_TABLE]
    if len(tables) > 1:
        raise ValueError("two symbol tables")
    return Elf(machine, sections, tuple(_symbols(tables[0], sections)) if tables else ())


def relocations(section: Section, elf: Elf) -> Iterator[Relocation]:
    """The entries of a section of relocations, all for existing symbols. Raises ValueError."""
    if len(section.content) % _RELOCATION.size:
        raise ValueError("a cut table of relocations")
    for offset, kind, symbol, addend in _RELOCATION.iter_unpack(section.content):
        if symbol >= len(elf.symbols):
            raise ValueError("a relocation of an unknown symbol")
        yield Relocation(offset, kind, symbol, addend)


def _section(data: bytes, at: int) -> Section:
    _, kind, flags, _, offset, size, link, info, alignment, _ = _SECTION.unpack_from(data, at)
    held = 0 if kind in (0, NO_BITS) else size
    if held and offset + held > len(data):
        raise ValueError("a section lies outside the file")
    if alignment > _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"a section wants to be aligned to {alignment} bytes")
    return Section(kind, flags, data[offset : offset + held], size, link, info, max(alignment, 1))


def _symbols(table: Section, sections: tuple[Section, ...]) -> Iterator[Symbol]:
    if table.link >= len(sections) or len(table.content) % _SYMBOL.size:
        raise ValueError("the symbol table is damaged")
    names = sections[table.link].content
    for name_at, information, section, value, _ in _SYMBOL.iter_unpack(table.content):
        end = names.find(b"\0", name_at)
        if end < 0:
            raise ValueError("a symbol's name lies outside its table")
        yield Symbol(names[name_at:end].decode(), information & 15, section, value)  # UnicodeDecodeError is a ValueError
