"""Which symbols an object file may ask the process for, and which it does ask for.

A kernel's object is position-independent machine code with one defined symbol. Anything undefined beyond the
names below means that the kernel could raise, call Python or call an unknown library, and is refused. Only
ELF is read; for other formats the module-level check in `objects` is the only one.
"""

from __future__ import annotations

import struct

_MEMORY = ("memset", "memcpy", "memmove")
# Called once per element, so only ever used by operators that have no vector polynomial.
_MATH = (
    *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh"),
    *("cos", "cosh", "sin", "sincos", "sinh", "tan", "tanh"),  # LLVM makes sincos of sin and cos
    *("erf", "erfc", "exp", "exp2", "expm1", "fmod", "log", "log10", "log1p", "log2", "pow"),
)
# The executor's own: futex, clock, preemption counter.
_SYSTEM = ("syscall", "clock_gettime", "getrusage")

ALLOWED = frozenset([*_MEMORY, *_MATH, *(name + "f" for name in _MATH), *_SYSTEM])

_SYMBOL_TABLE, _NO_BITS, _UNDEFINED = 2, 8, 0


def undefined_symbols(data: bytes) -> frozenset[str] | None:
    """Names an ELF64 little-endian object refers to but does not define; None for any other format.

    Raises ValueError when the file is cut short or inconsistent.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    try:
        return frozenset(_undefined(data))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged ELF object: {error}") from None


def _undefined(data: bytes) -> list[str]:
    section_table = struct.unpack_from("<Q", data, 40)[0]
    entry_size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_table + entry_size * i) for i in range(count)]
    names = []
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind != _NO_BITS and offset + size > len(data):
            raise IndexError("a section lies outside the file")
        if kind != _SYMBOL_TABLE:
            continue
        strings_at, strings_size = sections[link][4:6]
        strings = data[strings_at : strings_at + strings_size]
        for at in range(offset, offset + size, 24):
            name_at, _, _, section = struct.unpack_from("<IBBH", data, at)
            if section == _UNDEFINED and name_at:
                names.append(strings[name_at : strings.index(b"\0", name_at)].decode())
    return names
