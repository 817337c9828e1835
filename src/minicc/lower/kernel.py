"""Kernels as data: what a generated loop nest or a specialised template computes, free of shapes and names.

Two calls share a kernel when their descriptions are equal; extents, strides and addresses are words given at run time.
Nothing here prints or compiles (see codegen) and nothing here knows the graph. The name, for people, is that of the first
call and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from minicc.ir.expr import Expr
from minicc.ir.types import DType


@dataclass(frozen=True, slots=True)
class Operand:
    """One array a kernel touches.

    strides: per loop axis (parallel axes, then reduction axes): 0, 1, another small number that shapes the code, or None for
             a stride given as a word.
    output:  True when the kernel stores to it.
    shared:  True when its memory may be an output's (in-place), so that loads belong to the output's alias scope.
    """

    dtype: DType
    strides: tuple[int | None, ...]
    output: bool = False
    shared: bool = False


class Store(NamedTuple):
    """`operands[operand][affine position] = value`."""

    operand: int
    value: Expr


# Strides and extents up to this may shape the code.
MOST_KNOWN = 64
# A sum of so many terms needs no parts: its vector's lanes keep it accurate.
SHORT = 4096


@dataclass(frozen=True, slots=True)
class Body:
    """Expressions over loop variables and operands, and where their values go.

    Leaves: `iter` k is loop axis k; `load` with arg = operand number reads at the affine position of the operand's strides,
    plus the i64 element offset `args[0]` where there is one; `dim` with arg = number of a size word; `acc` is the
    template's accumulator; `kept` with arg = operand number reads what a `keep` of that memory stored.
    keep: the value of its argument, which is also stored to operand `arg`.
    reduce: arg = (kind, axes, extents); an extent is ("literal", n), ("word", number of a size word), or ("short", such a
    number) where it is known to be at most SHORT.

    Word layout, in order: for each operand its address, then its run-time strides axis by axis; then the size words.
    """

    operands: tuple[Operand, ...]
    stores: tuple[Store, ...]
    sizes: int

    @property
    def n_words(self) -> int:
        return sum(1 + sum(s is None for s in o.strides) for o in self.operands) + self.sizes


@dataclass(frozen=True, slots=True)
class LoopKernel:
    """Generated loops: axes 0..rank-1 are parallel (the last is the vector axis), further axes are reductions.

    Words: the extents of the parallel axes, then those of the body. The domain (begin..end) is elements when rank is
    1 and nothing is reduced, else rows: the product of all parallel extents but the last.

    short: the extent of the last axis where that is part of the code, else 0.
    """

    rank: int
    body: Body
    name: str = field(default="loops", compare=False)
    short: int = 0


@dataclass(frozen=True, slots=True)
class TemplateKernel:
    """A hand-written kernel with its constants, and the generated epilogue over axes (b0, b1, i, j).

    Words: the template's own, then those of the epilogue.
    """

    template: str
    constants: tuple[tuple[str, int | float | str], ...]
    epilogue: Body | None = None
    name: str = field(default="template", compare=False)


Kernel = LoopKernel | TemplateKernel
