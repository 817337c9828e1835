"""Which symbols an object file may ask the process for, and which it does ask for.

A kernel's object is position-independent machine code with one defined symbol. Anything undefined beyond the
names below means that the kernel could raise, call Python or call an unknown library, and is refused. Only
ELF is read (codegen/elf); for other formats the module-level check in `objects` is the only one.
"""

from __future__ import annotations

from minicc.codegen.elf import UNDEFINED, Elf, is_elf, read_elf

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


def undefined_symbols(data: bytes) -> frozenset[str] | None:
    """Names an ELF64 little-endian object refers to but does not define; None for any other format.

    Raises ValueError when the file is cut short or inconsistent.
    """
    return undefined_in(read_elf(data)) if is_elf(data) else None


def undefined_in(elf: Elf) -> frozenset[str]:
    """The same of an object that has been read."""
    return frozenset(symbol.name for symbol in elf.symbols if symbol.section == UNDEFINED and symbol.name)
