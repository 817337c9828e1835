"""A compiled module: arrays in, arrays out.

It owns the code and the weights, checks what the caller gives, and hands work to the runner of its
program. The usual case, a program without host or control steps, takes a short way: one dictionary look-up
by the shapes of the inputs, one native call. Any number of threads may call one module at once. Outputs
are fresh arrays, never internal memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import InputError, TargetError
from minicc.ir.types import TensorType
from minicc.lower.program import ControlStep, HostStep, KernelStep, Program, Step, Update
from minicc.options import Options
from minicc.runtime.bind import KEPT_SHAPES, Machine, Segment, address_of
from minicc.runtime.code import Code
from minicc.runtime.context import Array, Bound, Sizes
from minicc.runtime.engine import ControlRunner, HostRunner, Item, Other, Runner
from minicc.runtime.executor import Executor
from minicc.runtime.outputs import Given, check_memory, check_shape, copied, given_outputs
from minicc.runtime.signature import Port, Signature, ports
from minicc.runtime.slices import Sliced, sliced
from minicc.runtime.store import Store
from minicc.targets.cpu import available_threads
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target

if TYPE_CHECKING:
    from minicc.runtime.cuda.engine import Replay

Shapes = tuple[tuple[int, ...], ...]


class CompiledModule:
    """A callable: `module(x)`, `module(name=x)`, `module.run(None, {"name": x})`.

    pass_runs: how many passes made the program. notes: what compilation has to say (goes into artifacts).
    """

    def __init__(
        self,
        program: Program,
        code: Code,
        target: Target,
        options: Options,
        *,
        pass_runs: int = 0,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.program, self.code, self.target, self.options = program, code, target, options
        self.pass_runs, self.notes = pass_runs, dict(notes or {})
        self.store = Store(options.store_dir)
        names_in = program.input_names or tuple(program.buffers[b].name for b in program.inputs)
        names_out = program.output_names or tuple(program.buffers[b].name for b in program.outputs)
        self.inputs: tuple[Port, ...] = ports(names_in, program.input_types)
        self.outputs: tuple[Port, ...] = ports(names_out, program.output_types)
        self.signature = Signature(program.name, self.inputs)
        self.internal = frozenset(
            id(b.data) for p in programs_of(program) for b in p.buffers if b.data is not None
        )
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._short: _ShortWay | None = None
        self._checked: set[tuple[Any, ...]] = set()  # shapes of inputs that fit

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        """The output, or a tuple of outputs in model order. Raises InputError for inputs that do not fit.

        out: arrays to write results to, which are then returned: an array for the only output, a sequence with one entry for each
        output, or a mapping by name; None where the module makes the array. An output that is an input with rows written over it
        (`explain` names those) may be given that input: then only these rows are written. A model with an input named `out` takes
        that.
        """
        if out is not None and self.signature.has("out"):
            out, named = None, {**named, "out": out}
        outputs = self.run_items(self.signature.order(args, named), out)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], out: Any = None) -> list[Any]:
        """The named outputs (all for None) as a list, as `onnxruntime.InferenceSession.run`. out: as in a call."""
        wanted = None if names is None else [self._output_number(name) for name in names]
        outputs = self.run_items(self.signature.order((), feeds), out)
        return outputs if wanted is None else [outputs[i] for i in wanted]

    def run_items(self, items: Sequence[Any], out: Any = None) -> list[Item]:
        """All outputs for inputs in order. out: as in a call."""
        if out is not None:
            return self._run_into(items, given_outputs(out, self.outputs, self.program.name))
        runner = self.runner
        if isinstance(self.target, CudaTarget):
            from minicc.runtime.cuda import calls

            outputs = calls.run_on_device(self, items)
            if outputs is not None:
                return outputs
        arrays = self._ready(items)
        if self._short is not None:
            return self._short.run(self._entry(arrays), arrays)
        shapes = tuple([getattr(array, "shape", None) for array in arrays])
        if shapes not in self._checked:
            self.signature.check(arrays)
            self._checked = {*self._checked, shapes} if len(self._checked) < KEPT_SHAPES else {shapes}
        return self._own(runner.run(arrays, {}), arrays)

    def _run_into(self, items: Sequence[Any], given: Given) -> list[Item]:
        """As `run_items`, with results in the given arrays: written there by the kernels of a short program, else copied."""
        name, names = self.program.name, [port.name for port in self.inputs]
        _ = self.runner
        if self._short is None:
            check_memory(given, self.outputs, items, names, name)
            return copied(CompiledModule.run_items(self, items), given, self.outputs, name)
        arrays = self._ready(items)
        updates = check_memory(given, self.outputs, arrays, names, name, self.program.updates)
        entry = self._entry(arrays)
        if updates and isinstance(entry, Sliced):
            entry = self._short.segment.bound(self.signature.sizes(arrays))
        for array, shape, port in zip(given, self._short.shapes(entry), self.outputs):
            if array is not None:
                check_shape(array, shape, port, name)
        return self._short.run(entry, arrays, given, tuple([u.copy for u in updates]))

    @property
    def updates(self) -> tuple[Update, ...]:
        """Which outputs may share the memory of an input that they update; for programs that are one native call."""
        can_run = not self.target.missing_features() and not isinstance(self.target, CudaTarget)
        if not can_run or not self.runner or self._short is None:
            return ()
        return tuple([update for update in self.program.updates if not update.reason])

    def replay(self, feeds: Mapping[str, Any], stream: int | None = None) -> Replay:
        """What runs the module again and again for the sizes of these inputs, without copies and without waiting.

        For CUDA targets. feeds: arrays on the GPU or the host; the replay's own inputs hold copies of them. stream: the handle
        of the stream that calls run on, by default the one that other libraries use unless told otherwise. Raises TargetError
        for a program that has steps on the host.
        """
        from minicc.runtime.cuda import calls

        return calls.replay(self, feeds, stream)

    def parts(self, arrays: Sequence[Item]) -> list[list[Item]]:
        """Checked inputs as a call goes through them: rows of a batch in turns where it is cut, else all at once."""
        if not self.runner or self._short is None:
            return [list(arrays)]
        entry = self._entry(arrays)
        return entry.parts(arrays) if isinstance(entry, Sliced) else [list(arrays)]

    def prepare(self) -> None:
        """Load the code now rather than at the first call."""
        _ = self.runner

    @property
    def runner(self) -> Runner:
        """The prepared program, made on first use. Raises TargetError where the target cannot run."""
        if self._runner is None:
            with self._lock:
                if self._runner is None:
                    runner = self._prepare()
                    if _is_short(runner):
                        self._short = _ShortWay(runner)
                    self._runner = runner
        return self._runner

    def _prepare(self) -> Runner:
        missing = self.target.missing_features()
        if missing and self.code.symbols:
            raise TargetError(
                f"this machine cannot run code for {self.target.name!r}",
                why=f"it lacks {', '.join(missing)}",
                hint="compile for target='cpu', or run where these features are",
            )
        if isinstance(self.target, CudaTarget):
            from minicc.runtime.cuda import calls

            self.machine, device_runner = calls.prepare(self, self.target)
            return device_runner
        functions, self._loaded = self.code.load()
        threads = self.options.threads or available_threads()
        executor: Any = None
        if self.code.symbols:
            # An artifact brings the executor's objects; they are for the artifact's target.
            executor = Executor(threads, self.store, self.code.objects)
            threads = executor.threads
        self.executor = executor
        self.machine = Machine(
            self.program.kernels,
            functions,
            self.target,
            threads,
            self.options.max_bytes,
            self.options.max_loop_iterations,
        )
        return Runner(self.program, self.machine, executor, self.make_step)

    def make_step(self, step: Other, program: Program, runner: Runner) -> HostRunner | ControlRunner:
        """A host or control step, ready to run; bodies get runners of the same class."""
        if isinstance(step, HostStep):
            return _LateHostCall(step, program, self.options)
        from minicc.runtime.control import ControlCall

        bodies = [runner.for_body(body) for body in step.bodies]
        return ControlCall(step, bodies, runner.machine)

    def _entry(self, arrays: Sequence[Array]) -> Bound | Sliced:
        """The short program, bound for arrays of these shapes."""
        assert self._short is not None
        shapes = tuple([array.shape for array in arrays])
        entry = self._short.by_shapes.get(shapes)
        if entry is None:
            entry = self._short.bind(shapes, self.signature.sizes(arrays))
        return entry

    def _ready(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items themselves when all are arrays of the right types, as they mostly are."""
        for item, dtype in zip(items, self.signature.dtypes):
            if type(item) is not np.ndarray or item.dtype != dtype:
                return self.signature.arrays(items)
            flags = item.flags
            if not flags.c_contiguous or not flags.aligned:
                return self.signature.arrays(items)
        return items

    def _own(self, outputs: Sequence[Item], inputs: Sequence[Item]) -> list[Item]:
        """Outputs as the caller's own: copies of those that are inputs, constants, views, or given twice."""
        taken = {id(item) for item in inputs}
        owned = []
        for output in outputs:
            if isinstance(output, np.ndarray):
                if id(output) in taken or id(output) in self.internal or output.base is not None:
                    output = output.copy()
                taken.add(id(output))
            elif isinstance(output, list):
                output = [item.copy() if isinstance(item, np.ndarray) else item for item in output]
            owned.append(output)
        return owned

    def _output_number(self, name: str) -> int:
        for i, port in enumerate(self.outputs):
            if port.name == name:
                return i
        known = ", ".join(repr(p.name) for p in self.outputs)
        raise InputError(f"{self.program.name!r} has no output {name!r}", hint=f"the outputs are {known}")

    def stats(self) -> dict[str, Any]:
        """Counts: kernels compiled, cache hits, binds, pass runs, distinct kernels, host nodes, and bytes."""
        steps = list(steps_of(self.program))
        segments = list(segments_of(self._runner)) if self._runner is not None else []
        bounds = [bound for segment in segments for bound in segment.recent.values()[-1:]]
        weights = {
            id(b.data): b.data.nbytes
            for p in programs_of(self.program)
            for b in p.buffers
            if b.data is not None
        }
        return {
            "compiles": self.code.compiled,
            "cache_hits": self.code.from_cache,
            "binds": self.machine.binds if self._runner is not None else 0,
            "pass_runs": self.pass_runs,
            "kernels": len(set(self.code.symbols)),
            "kernel_calls": sum(isinstance(step, KernelStep) for step in steps),
            "host_nodes": [
                (s.op, ", ".join(s.origin), s.reason)
                for s in steps
                if isinstance(s, HostStep) and s.op != "Raise"
            ],
            "arena_bytes": sum(bound.plan.arena_bytes for bound in bounds),
            "arena_lower_bound": sum(bound.plan.lower_bound for bound in bounds),
            "arena_without_reuse": sum(bound.plan.naive_bytes for bound in bounds),
            "weights_bytes": sum(weights.values()),
            "threads": self.machine.threads
            if self._runner is not None
            else self.options.threads or available_threads(),
        }

    def __repr__(self) -> str:
        ins, outs = ", ".join(map(str, self.inputs)), ", ".join(map(str, self.outputs))
        return f"<minicc module {self.program.name!r} for {self.target.name}: ({ins}) -> ({outs})>"


class _LateHostCall:
    """A host step whose operator is looked up when it first runs; steps in branches that cannot be valid never do."""

    def __init__(self, step: HostStep, program: Program, options: Options) -> None:
        self.step, self.program, self.options = step, program, options
        self._call: HostRunner | None = None

    def __call__(self, arrays: Sequence[Item], sizes: Mapping[str, int]) -> Sequence[Item]:
        """The step's outputs. Raises UnsupportedOpError where there is no such operator."""
        if self._call is None:
            from minicc.runtime.host import HostCall  # all operators

            self._call = HostCall(self.step, self.program, self.options.max_bytes, self.options.max_loop_iterations)
        return self._call(arrays, sizes)


class _ShortWay:
    """A program that is one segment: outputs allocated, addresses written, one native call."""

    def __init__(self, runner: Runner) -> None:
        self.program, self.executor = runner.program, runner.executor
        self.segment = runner.segments[0]
        position = {b: i for i, b in enumerate(self.segment.externals)}
        self.inputs = [(position[b], i) for i, b in enumerate(self.program.inputs) if b in position]
        self.output_order = [self.segment.outputs.index(b) for b in self.program.outputs]
        self.output_positions = [position[b] for b in self.program.outputs]
        self.by_shapes: dict[Shapes, Bound | Sliced] = {}

    def bind(self, shapes: Shapes, sizes: Sizes) -> Bound | Sliced:
        """The segment for inputs of these shapes, which show these sizes."""
        bound = sliced(self.program, self.segment, self.executor, sizes) or self.segment.bound(sizes)
        if len(self.by_shapes) >= KEPT_SHAPES:
            self.by_shapes = {}
        self.by_shapes[shapes] = bound
        return bound

    def shapes(self, bound: Bound | Sliced) -> Shapes:
        """Of the outputs."""
        if isinstance(bound, Sliced):
            return tuple([bound.shapes[b] for b in self.program.outputs])
        return tuple([bound.outputs[i][1] for i in self.output_order])

    def run(self, bound: Bound | Sliced, arrays: Sequence[Array], given: Given = (), dropped: tuple[int, ...] = ()) -> list[Item]:
        """The outputs. given: the caller's arrays for them. dropped: steps that need not run."""
        if isinstance(bound, Sliced):
            return bound.run(arrays, given)
        specs = bound.outputs
        outputs: list[Item] = []
        for number, i in enumerate(self.output_order):
            _, shape, dtype = specs[i]
            array = given[number] if given else None
            outputs.append(np.empty(shape, dtype) if array is None else array)
        context = bound.acquire()
        try:
            addresses = [0] * len(self.segment.externals)
            for position, i in self.inputs:
                addresses[position] = address_of(arrays[i])
            for position, output in zip(self.output_positions, outputs):
                addresses[position] = address_of(output)
            bound.patch(context, addresses)
            if dropped:
                self.executor.run(bound.rows_without(context, dropped))
            else:
                self.executor.run_at(context.table, len(context.rows))
        finally:
            bound.release(context)
        return outputs


def _is_short(runner: Runner) -> bool:
    """One segment, tensors only, and every output written by kernels into memory of its own."""
    program = runner.program
    if runner.executor is None or len(runner.parts) != 1 or not runner.segments:
        return False
    segment = runner.segments[0]
    tensors = all(isinstance(t, TensorType) and t.shape is not None for t in program.input_types)
    outside = {*program.inputs, *program.outputs}
    return (
        tensors
        and len(set(program.outputs)) == len(program.outputs)
        and all(b in segment.outputs for b in program.outputs)
        and all(b in outside for b in segment.externals)
    )


def programs_of(program: Program) -> Iterator[Program]:
    """The program and the bodies of its control steps, at any depth."""
    yield program
    for step in program.steps:
        if isinstance(step, ControlStep):
            for body in step.bodies:
                yield from programs_of(body)


def steps_of(program: Program) -> Iterator[Step]:
    """Every step, those of bodies included."""
    for part in programs_of(program):
        yield from part.steps


def segments_of(runner: Runner) -> Iterator[Segment]:
    """Every segment, those of bodies included."""
    for part in runner.parts:
        if isinstance(part, Segment):
            yield part
        elif isinstance(part[0], ControlStep):
            from minicc.runtime.control import ControlCall

            assert isinstance(part[1], ControlCall)
            for body in part[1].bodies:
                yield from segments_of(body)
