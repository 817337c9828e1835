"""The program: what runs, in order, on which memory.

Lowering makes it from the fused graph; the runtime binds it to concrete sizes and runs it. Everything is plain data:
sizes are `Dim` expressions over the program's symbols, kernels are descriptions, control flow holds programs. A
program can be saved and validated without the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minicc.ir.dims import Dim, product
from minicc.ir.types import DType, Type
from minicc.lower.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Buffer:
    """One contiguous row-major array, or an opaque object (dtype None) that only host steps touch.

    kind: "input" (the caller's array), "output" (returned to the caller), "constant" (`data`), "content" (a symbolic
    constant: `content` holds one Dim per element, written when sizes are bound), "temporary" (in the arena; a step may
    overwrite one it reads, when lowering found that nobody reads it later), "host"
    (made by a host or control step, its memory belongs to that step's result).
    scratch: temporaries only: not a value of the graph but working memory of the one step that uses it.
    """

    name: str
    dtype: DType | None
    shape: tuple[Dim, ...] | None
    kind: str
    data: np.ndarray[Any, Any] | None = field(default=None, compare=False)
    content: tuple[Any, ...] = ()

    @property
    def elements(self) -> Dim:
        assert self.shape is not None
        return product(self.shape)


class Word(NamedTuple):
    """One int64 argument of a kernel: a size, or the address of element `value` of a buffer."""

    value: Dim
    buffer: int | None = None


@dataclass(frozen=True, slots=True)
class KernelStep:
    """One call of a kernel.

    kernel:  index into the root program's kernels.
    words:   its arguments, in the kernel's word order.
    units:   size of its parallel domain; ignored when the kernel is a template with a bind function (kernels/template.py),
             which computes the domain from the words and fills its blocking words.
    cost:    estimated nanoseconds of the whole call on one core, as a Dim (for chunking).
    flops, bytes: work and traffic, for the profile.
    requires: evaluated when sizes are bound, only to raise ShapeError for sizes that do not fit (lower/requirements.py).
    guards:  (buffer of one bool, what it must hold), of the branches of an If that the step is in; it runs only where all
             do. The buffers are among `reads`. On the CPU.
    """

    kernel: int
    words: tuple[Word, ...]
    units: Dim
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    origin: tuple[str, ...] = ()
    cost: Dim = 0
    flops: Dim = 0
    bytes: Dim = 0
    note: str = ""  # why not a faster tier
    requires: tuple[Dim, ...] = ()
    guards: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class HostStep:
    """One node run by numpy; new sizes among its outputs' dims become known from the results' shapes.

    node: the op with its attributes as (domain, name, attrs); `eval` is looked up in the registry, or made by
    ops.host for operators that only ONNX's evaluator knows.
    types: declared output types; a dim that is a bare symbol not yet known is bound from the result.
    """

    domain: str
    op: str
    attrs: Mapping[str, Any]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    types: tuple[Type, ...]
    origin: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ControlStep:
    """If, Loop or Scan over sub-programs; inputs and outputs in the op's order, captures last.

    attrs: the op's integer attributes (n_carried, scan axes...); bodies: (then, else) or (body,).
    """

    op: str
    attrs: Mapping[str, Any]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    types: tuple[Type, ...]
    bodies: tuple[Program, ...]
    origin: tuple[str, ...] = ()


Step = KernelStep | HostStep | ControlStep


class Update(NamedTuple):
    """An output that is an input with something written over it, so that both may be one array (lower/updates).

    input, output: positions in the signature. copy: the step that is left out then. reason: why they may not, "" where they may.
    """

    input: int
    output: int
    copy: int
    reason: str = ""


@dataclass(frozen=True)
class Program:
    """Buffers and steps; `inputs` and `outputs` are buffer numbers in signature order.

    input_types: declared types; their bare symbols are bound from the arrays given.
    kernels: of the root program; bodies refer to the same table and leave their own empty.
    sliced: the symbol of the first axis along which the work falls apart, if it does (lower/slices).
    updates: outputs that may be inputs updated in place.
    """

    name: str
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_types: tuple[Type, ...]
    output_types: tuple[Type, ...]
    kernels: tuple[Kernel, ...] = ()
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    sliced: str = ""
    updates: tuple[Update, ...] = ()
