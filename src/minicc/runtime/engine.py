"""Running a program: its parts in order on one frame of arrays.

A `Runner` is a prepared program, root or body. Each run has a frame: one array (or object) per buffer and
the symbol sizes known so far; kernel segments borrow contexts for the length of the run, host steps go to
numpy through the op's `eval`, control steps run the runners of their bodies (see control). Runners hold no
state of a run, so any number of threads may run one. Nothing here checks the caller's inputs (see
signature) or copies outputs (see module).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from minicc.errors import ResourceLimitError, ShapeError, VerifyError
from minicc.ir.dims import bare_symbol, evaluate
from minicc.ir.types import TensorType, Type
from minicc.lower.program import Buffer, ControlStep, HostStep, KernelStep, Program
from minicc.runtime.bind import KEPT_SHAPES, Machine, Segment, address_of, buffers_of, content_array
from minicc.runtime.context import Array, Bound, Context, Sizes, Words

Item = Any  # an array, or what stands for a sequence, map or optional
Held = list[tuple[Bound, Context]]


class Executes(Protocol):
    """What the engine needs of the executor."""

    def run(self, rows: Words) -> None:
        """Run a table of rows."""
        ...

    def run_at(self, address: int, count: int) -> None:
        """Run a table of rows, given by its address."""
        ...

    def turns_at(self, address: int, most: int) -> None:
        """Run turns of a loop, given by the address of its description."""
        ...


class HostRunner(Protocol):
    """Runs one host step on arrays; made by `host.host_runner`."""

    def __call__(self, arrays: Sequence[Item], sizes: Sizes) -> Sequence[Item]:
        """The step's outputs."""
        ...


class ControlRunner(Protocol):
    """Runs one control step; made by `control.control_runner`."""

    def __call__(self, items: Sequence[Item], sizes: Sizes) -> Sequence[Item]:
        """The step's outputs."""
        ...


Other = HostStep | ControlStep
MakeStep = Callable[[Other, Program, "Runner"], HostRunner | ControlRunner]


class Frame:
    """The arrays of one run, by buffer number, and the sizes known so far."""

    def __init__(self, program: Program, values: list[Item], sizes: dict[str, int], max_bytes: int) -> None:
        self.program, self.values, self.sizes, self.max_bytes = program, values, sizes, max_bytes

    def item(self, buffer: int | None) -> Item:
        """The array of a buffer; contents of known sizes are made on first use."""
        if buffer is None:
            return None
        value = self.values[buffer]
        if value is None and self.program.buffers[buffer].kind == "content":
            value = self.values[buffer] = content_array(
                self.program.buffers[buffer], self.sizes, self.max_bytes
            )
        return value


class Shapes:
    """The sizes that arrays of certain types show, checked once for each set of shapes and sizes known before.

    types: of the items, in order; where: what each item is, for messages.
    """

    def __init__(self, types: Sequence[Type], where: Sequence[str]) -> None:
        self.types, self.where = tuple(types), tuple(where)
        self._known: dict[tuple[Any, ...], dict[str, int]] = {}

    def learn(self, items: Sequence[Item], sizes: dict[str, int]) -> None:
        """Add to `sizes` what the shapes of the items show. Raises ShapeError for a misfit."""
        shapes = [item.shape if isinstance(item, np.ndarray) else None for item in items]
        key = (*shapes, *sizes.items())
        found = self._known.get(key)
        if found is None:
            for type_, item, where in zip(self.types, items, self.where):
                if isinstance(item, np.ndarray) and isinstance(type_, TensorType):
                    bind_sizes(type_, item, sizes, where)
            if len(self._known) >= KEPT_SHAPES:
                self._known = {}
            self._known[key] = dict(sizes)
        else:
            sizes.update(found)


class Runner:
    """A program whose segments, host steps and bodies are ready to run.

    make_step turns a host or control step into something callable (it may build further runners).
    native_turns: whether all turns of a loop may be one call of the executor.
    """

    native_turns = True

    def __init__(self, program: Program, machine: Machine, executor: Executes, make_step: MakeStep) -> None:
        self.program, self.machine, self.executor, self.make_step = program, machine, executor, make_step
        self.initial: list[Item] = [b.data if b.kind == "constant" else None for b in program.buffers]
        names = program.input_names or [""] * len(program.inputs)
        self.shapes = Shapes(program.input_types, [f"input {name!r} of {program.name!r}" for name in names])
        self.parts: list[Segment | tuple[Other, HostRunner | ControlRunner, Shapes]] = []
        groups = _groups(program)
        owner = _owners(program, groups)
        for number, group in enumerate(groups):
            if isinstance(group, list):
                own = frozenset(b for b, part in owner.items() if part == number)
                self.parts.append(
                    Segment(program, group, own, own & _seen_outside(program, groups, number), machine)
                )
            else:
                where = f"{group.op} node '{', '.join(group.origin)}'"
                shapes = Shapes(group.types, [where] * len(group.types))
                self.parts.append((group, make_step(group, program, self), shapes))

    def for_body(self, body: Program) -> Runner:
        """A runner of the same kind for the body of a control step."""
        return type(self)(body, self.machine, self.executor, self.make_step)

    @property
    def segments(self) -> list[Segment]:
        return [part for part in self.parts if isinstance(part, Segment)]

    def run(self, items: Sequence[Item], sizes: dict[str, int]) -> list[Item]:
        """The outputs, which may be the very arrays of inputs, constants or (never) of the arenas.

        sizes: symbols known beforehand; those of the inputs' shapes are added, which must fit.
        """
        program = self.program
        self.shapes.learn(items, sizes)
        frame = Frame(program, list(self.initial), sizes, self.machine.max_bytes)
        for buffer, item in zip(program.inputs, items):
            frame.values[buffer] = item
        held: Held = []
        try:
            for part in self.parts:
                if isinstance(part, Segment):
                    self._run_segment(part, frame, held)
                else:
                    self.run_step(*part, frame)
            return [self._output(b, frame, held) for b in program.outputs]
        finally:
            for bound, context in held:
                bound.release(context)

    def _run_segment(self, segment: Segment, frame: Frame, held: Held) -> None:
        bound = segment.bound(frame.sizes)
        context = bound.acquire()
        held.append((bound, context))
        values = frame.values
        for b, shape, dtype in bound.outputs:
            if values[b] is None:
                values[b] = np.empty(shape, dtype)
        bound.patch(context, [_address(values[b], self.program.buffers[b]) for b in segment.externals])
        for b, view in context.views:
            values[b] = view
        self.execute(segment, bound, context)

    def execute(self, segment: Segment, bound: Bound, context: Context) -> None:  # noqa: ARG002
        """Run the rows of a context; who measures (debug/profile) needs to know whose."""
        self.executor.run_at(context.table, len(context.rows))

    def run_step(self, step: Other, run: HostRunner | ControlRunner, shapes: Shapes, frame: Frame) -> None:
        """Run a host or control step and keep its results."""
        results = run([frame.item(b) for b in step.inputs], frame.sizes)
        shapes.learn(results, frame.sizes)
        for b, item in zip(step.outputs, results):
            frame.values[b] = _plain(item)

    def _output(self, buffer: int, frame: Frame, held: Held) -> Item:
        value = _detached(frame.item(buffer), held)
        if value is None and self.program.buffers[buffer].kind == "output":
            value = self._unwritten(self.program.buffers[buffer], frame)
        return value

    def _unwritten(self, buffer: Buffer, frame: Frame) -> Array:
        """An output that no kernel writes can only be one without elements."""
        shape = tuple(evaluate(d, frame.sizes) for d in buffer.shape or ())
        assert buffer.dtype is not None
        if 0 not in shape:
            raise VerifyError("no step of the program computes an output", where=buffer.name)
        return np.empty(shape, buffer.dtype.numpy)


def bind_sizes(type_: TensorType, array: Array, sizes: dict[str, int], where: str) -> None:
    """Give a type's bare symbols the sizes of an array; every other dimension must agree.

    Raises ShapeError when they do not: kernels trust these sizes.
    """
    if type_.shape is None:
        return
    shape = array.shape
    if len(shape) != len(type_.shape):
        raise ShapeError(
            "an array has the wrong rank", where=where, why=f"shape {list(shape)}, expected {type_}"
        )
    later = False
    for dim, size in zip(type_.shape, shape):
        if isinstance(dim, int):
            if dim != size:
                raise _misfit(type_, shape, sizes, where)
        else:
            name = bare_symbol(dim)
            if name is None:
                later = True
            elif sizes.setdefault(name, size) != size:
                raise _misfit(type_, shape, sizes, where)
    if later:
        for dim, size in zip(type_.shape, shape):
            try:
                fits = evaluate(dim, sizes) == size
            except KeyError:
                continue  # it names a size that nothing has shown yet
            if not fits:
                raise _misfit(type_, shape, sizes, where)


def _misfit(type_: TensorType, shape: Sequence[int], sizes: Mapping[str, int], where: str) -> ShapeError:
    known = ", ".join(f"{name}={size}" for name, size in sorted(sizes.items()))
    return ShapeError(
        "an array does not have the expected shape",
        where=where,
        why=f"shape {list(shape)}, expected {type_}" + (f" with {known}" if known else ""),
    )


def _plain(item: Item) -> Item:
    """The item, or an aligned C-contiguous copy of an array that is not."""
    if isinstance(item, np.ndarray) and not (item.flags.c_contiguous and item.flags.aligned):
        return np.array(item, order="C", ndmin=item.ndim)
    return item


def _detached(value: Item, held: Held) -> Item:
    """The value itself, or a copy where its memory is in an arena that goes back when the run ends.

    Temporaries are, and so may be what a host step made of one (a reshaped view).
    """
    if isinstance(value, list):
        return [_detached(item, held) for item in value]
    if not isinstance(value, np.ndarray) or value.base is None:
        return value
    return value.copy() if any(np.may_share_memory(value, c.arena.memory) for _, c in held) else value


def _address(value: Item, buffer: Buffer) -> int:
    if not isinstance(value, np.ndarray):
        raise VerifyError("a kernel reads a buffer that nothing has computed", where=buffer.name)
    return address_of(value)


def _groups(program: Program) -> list[list[KernelStep] | Other]:
    """Runs of kernel steps, and the other steps between them."""
    groups: list[list[KernelStep] | Other] = []
    for step in program.steps:
        if not isinstance(step, KernelStep):
            groups.append(step)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _touched(group: list[KernelStep] | Other) -> set[int]:
    if isinstance(group, list):
        return {b for step in group for b in buffers_of(step)}
    return {b for b in (*group.inputs, *group.outputs) if b is not None}


def _owners(program: Program, groups: Sequence[list[KernelStep] | Other]) -> dict[int, int]:
    """For each temporary, the group that touches it first; its memory lies in that segment's arena."""
    owner: dict[int, int] = {}
    for number, group in enumerate(groups):
        for b in _touched(group):
            if program.buffers[b].kind == "temporary":
                owner.setdefault(b, number)
    return owner


def _seen_outside(program: Program, groups: Sequence[list[KernelStep] | Other], number: int) -> set[int]:
    """Buffers that later groups touch or that the program returns."""
    seen = set(program.outputs)
    for group in groups[number + 1 :]:
        seen |= _touched(group)
    return seen


def check_items(count: int, limit: int, what: str, where: str) -> None:
    """Raise ResourceLimitError when a count is above its limit."""
    if count > limit:
        raise ResourceLimitError(f"{what}: {count} is above the limit of {limit}", where=where)
