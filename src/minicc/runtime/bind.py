"""Giving a program its sizes: from kernel steps and symbol values to word tables, rows and memory.

A program is cut into segments, runs of kernel steps between host and control steps. What does not depend
on sizes is prepared once (`Segment`); `Segment.bind` evaluates every distinct dimension once and computes
all words with a few array operations. The result is a `Bound` (runtime/context), of which any number of threads
can run contexts. Nothing is compiled here and no pass runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicc.errors import ResourceLimitError, ShapeError, VerifyError
from minicc.ir.dims import SymbolicDim, evaluate
from minicc.ir.types import DType
from minicc.kernels import template as templates
from minicc.lower.kernel import Kernel, TemplateKernel
from minicc.lower.program import Buffer, KernelStep, Program
from minicc.runtime.ahead import Ahead, Steps
from minicc.runtime.context import FEW_WORDS, Arenas, Array, Bound, Recent, Sizes, Words
from minicc.runtime.executor import GUARD, MAX_ROWS, MIN_STAGE_NS, ROW_WORDS, chunking
from minicc.runtime.memory import Interval, Layout, MemoryPlan, layout, place
from minicc.runtime.sizes import DimTable
from minicc.targets.cpu import CpuTarget
from minicc.targets.parse import Target

# Bound shapes kept per segment.
KEPT_SHAPES = 16
# How many calls to come are bound at a time: waking the thread that does it is most of what it costs the present call.
STEPS_AHEAD = 4
# Chosen blocks of template calls kept per segment.
KEPT_BLOCKINGS = 1024

# Of a template call: its sizes with blocks chosen, the number of units, and (first unit, units, ns) of each stage.
Blocking = tuple[list[int], int, Sequence[tuple[int, int, float]]]

@dataclass
class Machine:
    """What every segment of a module shares.

    functions: address of each kernel, by kernel number. binds counts `Segment.bind` calls.
    """

    kernels: tuple[Kernel, ...]
    functions: Words
    target: Target
    threads: int
    max_bytes: int
    max_loop_iterations: int
    binds: int = 0
    ahead: Ahead = field(default_factory=Ahead)


class Segment:
    """A run of kernel steps, prepared. Buffers are told apart by where their memory comes from.

    temporaries: first touched here, they live in this segment's arena.
    exports:     those of them that later parts read.
    externals:   inputs, outputs, host results, earlier segments' temporaries; addresses come with each run.
    outputs:     output buffers that this segment writes.
    """

    def __init__(
        self,
        program: Program,
        steps: Sequence[KernelStep],
        temporaries: frozenset[int],
        exports: frozenset[int],
        machine: Machine,
    ) -> None:
        self.program, self.steps, self.machine = program, tuple(steps), machine
        buffers = program.buffers
        touched = list(dict.fromkeys(b for step in steps for b in buffers_of(step)))
        self.temporaries = tuple(b for b in touched if b in temporaries)
        self.exports = tuple(b for b in touched if b in exports)
        self.contents = tuple(b for b in touched if buffers[b].kind == "content")
        constants = [b for b in touched if buffers[b].kind == "constant"]
        self.constant_bytes = sum(data.nbytes for b in constants if (data := buffers[b].data) is not None)
        inside = {*self.temporaries, *self.contents, *constants}
        self.externals = tuple(b for b in touched if b not in inside)
        written = {b for step in steps for b in step.writes}
        self.outputs = tuple(b for b in touched if buffers[b].kind == "output" and b in written)
        self._dims = DimTable()
        self._index_words(constants)
        self._index_shapes()
        self.layout = self._layout()
        self.symbols = self._dims.symbols({v for b in self.contents for v in buffers[b].content})
        self.arenas = Arenas()
        self._calls = Steps()
        self.recent: Recent[tuple[int, ...], Bound] = Recent(KEPT_SHAPES)
        self.plans: Recent[tuple[int, ...], MemoryPlan] = Recent(KEPT_SHAPES)

    def _index_words(self, constants: Sequence[int]) -> None:
        """Number every word's dimension and base, and find the words to patch."""
        self._constants = tuple(constants)
        buffers = self.program.buffers
        order = [*constants, *self.contents, *self.temporaries, *self.externals]
        base_of = {b: i + 1 for i, b in enumerate(order)}  # base 0 is no buffer
        value, scale, base, starts = [], [], [], [0]
        alike: dict[tuple[int, ...], int] = {}  # the first step of each template with these sizes
        templates_at: list[int] = []
        copies: list[tuple[int, int]] = []
        for at, step in enumerate(self.steps):
            for word in step.words:
                value.append(self._dims.number(word.value))
                scale.append(1 if word.buffer is None else itemsize(buffers[word.buffer]))
                base.append(0 if word.buffer is None else base_of[word.buffer])
            if isinstance(self.machine.kernels[step.kernel], TemplateKernel):
                own = zip(value[starts[-1] :], base[starts[-1] :])
                first = alike.setdefault((step.kernel, *(-1 if b else v for v, b in own)), at)
                if first == at:
                    templates_at.append(at)
                else:
                    copies.append((first, at))
            for b, _ in step.guards:
                value.append(self._dims.number(0))
                scale.append(1)
                base.append(base_of[b])
            starts.append(len(value))
            for required in step.requires:
                self._dims.number(required)
        self._word_value = np.array(value, np.int64)
        self._word_scale = np.array(scale, np.int64)
        self._word_base = np.array(base, np.int64)
        self.starts = np.array(starts, np.int64)
        self._index_templates(templates_at, copies)
        self._units = np.array([self._dims.number(s.units) for s in self.steps], np.int64)
        self._costs = np.array([self._dims.number(s.cost) for s in self.steps], np.int64)
        self._functions = self.machine.functions[[s.kernel for s in self.steps]]
        self._bases = np.zeros(len(order) + 1, np.int64)
        self._bases[1 : len(constants) + 1] = [_constant(buffers[b]).ctypes.data for b in constants]
        first_content = len(constants) + 1
        first_temporary = first_content + len(self.contents)
        first_external = first_temporary + len(self.temporaries)
        self._content_bases = slice(first_content, first_temporary)
        self._temporary_bases = slice(first_temporary, first_external)
        is_temporary = (self._word_base >= first_temporary) & (self._word_base < first_external)
        self.temporary_at = np.flatnonzero(is_temporary)
        self.external_at = np.flatnonzero(self._word_base >= first_external)
        self.external_base = self._word_base[self.external_at] - first_external
        few = len(self.external_at) <= FEW_WORDS
        self.few_words = tuple(zip(self.external_at.tolist(), self.external_base.tolist())) if few else ()

    def _index_templates(self, templates_at: Sequence[int], copies: Sequence[tuple[int, int]]) -> None:
        """Where the sizes of template calls lie, and of which (earlier, later) steps the later has the same."""
        places: list[int] = []
        self._templates: list[tuple[int, int, int]] = []  # step, the range of its sizes among all templates' sizes
        for at in templates_at:
            first = len(places)
            places += self._sizes_of(at)
            self._templates.append((at, first, len(places)))
        self._template_words = np.array(places, np.intp)
        pairs = [pair for first, later in copies for pair in zip(self._sizes_of(first), self._sizes_of(later))]
        self._copied = np.array(copies, np.intp).reshape(-1, 2)
        self._copied_words = np.array(pairs, np.intp).reshape(-1, 2)
        self._blockings: dict[tuple[int, ...], Blocking] = {}

    def _sizes_of(self, at: int) -> list[int]:
        """The numbers of a step's words that are no addresses."""
        return [int(self.starts[at]) + i for i, word in enumerate(self.steps[at].words) if word.buffer is None]

    def _index_shapes(self) -> None:
        """Dimensions of the buffers made here, flat, each shape led by a 1 so that none is empty."""
        self._shaped = (*self.temporaries, *self.outputs)
        numbers: list[int] = []
        starts = []
        for b in self._shaped:
            shape = self.program.buffers[b].shape
            if shape is None:
                raise VerifyError(
                    "a kernel writes a buffer of unknown rank", where=self.program.buffers[b].name
                )
            starts.append(len(numbers))
            numbers += [self._dims.number(d) for d in (1, *shape)]
        self._shape_values = np.array(numbers, np.int64)
        self._shape_starts = np.array(starts, np.int64)
        wanted = {*self.exports, *self.outputs}
        self._types = {b: numpy_dtype(self.program.buffers[b]) for b in self._shaped if b in wanted}
        self._itemsizes = np.array([itemsize(self.program.buffers[b]) for b in self._shaped], np.int64)

    def _layout(self) -> Layout:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, step in enumerate(self.steps):
            for b in buffers_of(step):
                first.setdefault(b, at)
                last[b] = at
        for b in self.exports:
            last[b] = len(self.steps)
        return layout([Interval(first[b], last[b]) for b in self.temporaries])

    def bound(self, sizes: Sizes) -> Bound:
        """The segment for these sizes, from the recent ones or bound now."""
        try:
            key = tuple(sizes[name] for name in self.symbols)
        except KeyError as error:
            raise ShapeError(
                f"the size {error.args[0]!r} is not known where a kernel needs it",
                where=", ".join(self.steps[0].origin),
            ) from None
        found = self.recent.get(key, lambda: self.bind(sizes))
        coming = self._calls.next(key, STEPS_AHEAD)
        if coming and self.recent.find(coming[0]) is None:
            self.machine.ahead.submit([partial(self._bind_ahead, later) for later in coming])
        return found

    def _bind_ahead(self, key: tuple[int, ...]) -> None:
        self.recent.get(key, lambda: self.bind(dict(zip(self.symbols, key)))).prepare()

    def bind(self, sizes: Sizes) -> Bound:
        """Evaluate words, place memory, cut into chunks.

        Raises ShapeError (a negative size, sizes that clash) and ResourceLimitError (a buffer or the arena
        above `max_bytes`), naming the buffer.
        """
        machine = self.machine
        machine.binds += 1
        try:
            values = self._dims.evaluate(sizes)
            nbytes, shapes = self._check_shapes(values)
        except ShapeError as error:
            given = ", ".join(f"{name}={sizes[name]}" for name in self.symbols)
            raise ShapeError(
                error.what,
                where=self.program.name,
                why=f"{error.why}, with {given}",
                hint="the inputs may be too small, or not fit each other",
            ) from error
        plan = self._plan(nbytes[: len(self.temporaries)])
        if plan.arena_bytes > machine.max_bytes:
            raise ResourceLimitError(
                f"intermediate results need {plan.arena_bytes} bytes",
                where=self.program.name,
                why=f"the limit is max_bytes={machine.max_bytes}",
                hint="give smaller inputs or raise max_bytes",
            )
        contents = {
            b: content_array(self.program.buffers[b], sizes, machine.max_bytes) for b in self.contents
        }
        bases = self._bases.copy()
        bases[self._content_bases] = [a.ctypes.data for a in contents.values()]
        bases[self._temporary_bases] = plan.offsets
        words = values[self._word_value] * self._word_scale + bases[self._word_base]
        units = values[self._units]
        stages = self._bind_templates(words, units)
        rows, kept = self._rows(units, values[self._costs], stages)
        own = {s: sizes[s] for s in self.symbols}
        return Bound(self, words, rows, kept, plan, contents, shapes, self._types, own)

    def _plan(self, nbytes: Sequence[int]) -> MemoryPlan:
        """Places of the temporaries: exact ones for the first sizes; later sizes share those of similar sizes.

        So a cache that grows by one token at a time is not laid out anew at each token.
        """
        if not self.plans.values():
            return self.plans.get(tuple(nbytes), lambda: place(self.layout, nbytes))
        rounded = [_rounded(size) for size in nbytes]
        plan = self.plans.get(tuple(rounded), lambda: place(self.layout, rounded))
        return plan if plan.arena_bytes <= self.machine.max_bytes else place(self.layout, nbytes)

    def moves(self, bound: Bound, place: Callable[[Array], int], arena: int, externals: Sequence[int]) -> Words:
        """What to add to `bound.words` where constants, contents, the arena and the externals lie elsewhere.

        place: the new address of a constant. externals: addresses in the order of `self.externals`.
        """
        count = self._content_bases.start - 1
        bases = np.zeros_like(self._bases)
        bases[1 : count + 1] = [place(_constant(self.program.buffers[b])) for b in self._constants]
        bases[1 : count + 1] -= self._bases[1 : count + 1]
        bases[self._content_bases] = [place(a) - a.ctypes.data for a in bound.contents.values()]
        bases[self._temporary_bases] = arena
        bases[self._temporary_bases.stop :] = externals
        return bases[self._word_base]

    def _check_shapes(self, values: Words) -> tuple[list[int], dict[int, tuple[int, ...]]]:
        """Bytes of the buffers made here, and shapes of those seen outside."""
        if not self._shaped:
            return [], {}
        dims = values[self._shape_values]
        if dims.min() < 0:
            at = int(np.searchsorted(self._shape_starts, int(dims.argmin()), side="right")) - 1
            buffer = self.program.buffers[self._shaped[at]]
            raise ShapeError(
                f"buffer {buffer.name!r} would have a negative size", why=f"its shape is {shape_text(buffer)}"
            )
        # In floating point first: a product beyond 64 bits must not wrap.
        too_large = np.multiply.reduceat(dims.astype(np.float64), self._shape_starts) * self._itemsizes
        if too_large.max() > self.machine.max_bytes:
            buffer = self.program.buffers[self._shaped[int(too_large.argmax())]]
            raise ResourceLimitError(
                f"buffer {buffer.name!r} would take {too_large.max():.0f} bytes",
                why=f"its shape is {shape_text(buffer)}; the limit is max_bytes={self.machine.max_bytes}",
                hint="give smaller inputs or raise max_bytes",
            )
        nbytes = (np.multiply.reduceat(dims, self._shape_starts) * self._itemsizes).tolist()
        ends = np.append(self._shape_starts[1:], len(dims))
        wanted = {*self.exports, *self.outputs}
        shapes = {
            b: tuple(dims[start + 1 : end].tolist())
            for b, start, end in zip(self._shaped, self._shape_starts, ends)
            if b in wanted
        }
        return nbytes, shapes

    def _bind_templates(self, words: Words, units: Words) -> dict[int, Sequence[tuple[int, int, float]]]:
        """Fill the blocking words of template calls; of those with the same sizes (the layers of a model) once.

        Returns the stages of the steps that have some.
        """
        sizes = words[self._template_words].tolist()
        blocked: list[int] = []
        stages: dict[int, Sequence[tuple[int, int, float]]] = {}
        if len(self._blockings) > KEPT_BLOCKINGS:
            self._blockings = {}
        known = self._blockings
        for at, first, last in self._templates:
            key = (at, *sizes[first:last])
            if key not in known:
                known[key] = self._blocking(at, words)
            filled, units[at], own = known[key]
            blocked += filled
            if own:
                stages[at] = own
        words[self._template_words] = blocked
        words[self._copied_words[:, 1]] = words[self._copied_words[:, 0]]
        units[self._copied[:, 1]] = units[self._copied[:, 0]]
        if stages:
            stages |= {later: stages[first] for first, later in self._copied.tolist() if first in stages}
        return stages

    def _blocking(self, at: int, words: Words) -> Blocking:
        """The words of a template call, without its addresses, with blocks chosen; its units and stages."""
        machine, step = self.machine, self.steps[at]
        kernel = machine.kernels[step.kernel]
        assert isinstance(kernel, TemplateKernel)
        own, constants = words[self.starts[at] : self.starts[at + 1]].tolist(), dict(kernel.constants)
        stages: Sequence[tuple[int, int, float]] = ()
        if isinstance(machine.target, CpuTarget):
            units = templates.bind(kernel.template, constants, own, machine.target, machine.threads)
            stages = templates.stages(kernel.template, constants, own)
        else:
            from minicc.kernels import cuda_template

            units = prod(cuda_template.bind(kernel.template, constants, own, machine.target).grid)
        return [value for value, word in zip(own, step.words) if word.buffer is None], units, stages

    def _rows(
        self, units: Words, costs: Words, stages: Mapping[int, Sequence[tuple[int, int, float]]]
    ) -> tuple[Words, NDArray[np.intp]]:
        """Rows of the steps with work to do, with addresses relative to the words; and which steps.

        A step with stages has a row for each.
        """
        kept = np.flatnonzero(units > 0)
        if stages:
            kept = np.repeat(kept, [len(stages[at]) if at in stages else 1 for at in kept.tolist()])
        rows = np.zeros((len(kept), ROW_WORDS), np.int64)
        rows[:, 0] = self._functions[kept]
        rows[:, 1] = self.starts[kept] * 8
        rows[:, 2] = units[kept]
        threads = self.machine.threads
        if threads == 1:
            rows[:, 3], rows[:, 4] = rows[:, 2], 1  # alone, every row stays whole
        elif len(kept):
            pairs = zip(units[kept].tolist(), costs[kept].tolist())
            rows[:, 3:5] = [chunking(n, cost, threads) for n, cost in pairs]
        for at, own in stages.items():
            place = int(np.searchsorted(kept, at))
            for row, (first, n, cost) in zip(rows[place : place + len(own)], own):
                row[2:] = n, *chunking(n, cost, threads, MIN_STAGE_NS), first
        return self._guarded(rows, kept) if any(step.guards for step in self.steps) else (rows, kept)

    def _guarded(self, rows: Words, kept: NDArray[np.intp]) -> tuple[Words, NDArray[np.intp]]:
        """The rows with the guards of each step before its own."""
        out: list[Any] = []
        steps: list[int] = []
        last = 0
        for at, same in groupby(kept.tolist()):
            first, last = last, last + len(list(same))
            step = self.steps[at]
            place = int(self.starts[at]) + len(step.words)
            for number, (_, wanted) in enumerate(step.guards):
                behind = len(step.guards) - 1 - number + last - first
                out.append((0, 8 * (place + number), wanted, behind, GUARD, 0))
            out += rows[first:last].tolist()
            steps += [at] * (len(step.guards) + last - first)
        if len(out) > MAX_ROWS:  # the executor gets longer tables in pieces
            raise ResourceLimitError("too many kernel calls in the branches of an If", where=self.program.name)
        return np.array(out, np.int64).reshape(-1, ROW_WORDS), np.array(steps, np.intp)


def address_of(array: Array) -> int:
    """Address of an array's data, by the quickest way there is (a third of a microsecond)."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):  # read-only, empty, or of a type Python does not know
        address: int = array.__array_interface__["data"][0]
        return address


def buffers_of(step: KernelStep) -> tuple[int, ...]:
    """Every buffer a kernel step touches, written ones included."""
    words = (w.buffer for w in step.words if w.buffer is not None)
    return tuple(dict.fromkeys((*step.reads, *step.writes, *words)))


def itemsize(buffer: Buffer) -> int:
    """Bytes per element. Raises VerifyError for an opaque buffer, which no kernel may touch."""
    if buffer.dtype is None:
        raise VerifyError("a kernel touches an opaque buffer", where=buffer.name)
    return buffer.dtype.bytes


def numpy_dtype(buffer: Buffer) -> np.dtype[Any]:
    assert isinstance(buffer.dtype, DType)
    return buffer.dtype.numpy


def content_array(buffer: Buffer, sizes: Sizes, max_bytes: int) -> Array:
    """The numbers of a content buffer for given sizes. Raises ShapeError for a size not yet known."""
    try:
        numbers = [evaluate(v, sizes) if isinstance(v, SymbolicDim) else v for v in buffer.content]
    except KeyError as error:
        raise ShapeError(f"the size {error.args[0]!r} is not known when {buffer.name!r} is needed") from None
    shape = [evaluate(d, sizes) for d in buffer.shape or ()]
    if len(numbers) * itemsize(buffer) > max_bytes:
        raise ResourceLimitError(f"constant {buffer.name!r} has {len(numbers)} elements")
    try:
        return np.array(numbers, dtype=numpy_dtype(buffer)).reshape(shape)
    except (OverflowError, ValueError) as error:
        raise ShapeError(f"the content of {buffer.name!r} does not fit its type", why=str(error)) from None


def shape_text(buffer: Buffer) -> str:
    """For messages: element type and symbolic shape."""
    dims = "?" if buffer.shape is None else ",".join(map(str, buffer.shape))
    return f"{buffer.dtype or 'object'}[{dims}]"


def _constant(buffer: Buffer) -> Array:
    data = buffer.data
    if data is None or not data.flags.c_contiguous or not data.flags.aligned:
        raise VerifyError("a constant buffer needs a contiguous array", where=buffer.name)
    return data


def _rounded(size: int) -> int:
    """The size, rounded up to one of 16 steps between powers of two: at most 12.5 % more."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step

