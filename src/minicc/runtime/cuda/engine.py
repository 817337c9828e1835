"""Running a program's segments on a device: the engine's parts and frames, with memory of the device.

Per segment and bound sizes there are `Plan`s, one for each call that runs at a time: words with device addresses, an arena,
a slot for each array that comes from or goes outside, a stream, and the launches, recorded once. A run copies inputs to
their slots, replays, and copies results out; it waits for the device once, at the end, and not at all when inputs and
results stay there. Host and control steps run as on the CPU, on copies.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from minicc.codegen.cuda_loops import launch_loops
from minicc.errors import ResourceLimitError, VerifyError
from minicc.kernels import cuda_template
from minicc.kernels.cuda_launch import COUNTER_BYTES, MAP_BYTES, Launch
from minicc.lower.kernel import Kernel, LoopKernel
from minicc.lower.program import KernelStep, Program
from minicc.runtime.bind import Machine, Segment, numpy_dtype
from minicc.runtime.context import Array, Bound
from minicc.runtime.cuda.array import DeviceArray, Foreign, foreign, on_gpu
from minicc.runtime.cuda.driver import LEGACY, Device, Memory, Stream
from minicc.runtime.engine import Frame, Held, MakeStep, Runner
from minicc.targets.cuda import CudaTarget

# Sets of sizes, of all segments together, whose plans are kept; idle plans kept for each; bytes of an array up to which
# it is copied through memory that the device reads fast.
KEPT_SHAPES, KEPT_PLANS, STAGED_BYTES = 16, 4, 64 << 20


class Slot:
    """A place on the device for an array from or to the outside, with staging memory on the host."""

    def __init__(self, device: Device, size: int) -> None:
        self.memory, self.size = device.allocate(size), size
        self.staging = device.staging(size) if 0 < size <= STAGED_BYTES else None

    def fill(self, device: Device, array: Array, stream: Stream) -> None:
        """Start the copy of an array of the host; it must stay until the stream is done unless it is staged."""
        source = array.ctypes.data
        if self.staging is not None:
            ctypes.memmove(self.staging.address, source, array.nbytes)
            source = self.staging.address
        device.to_device(self.memory.address, source, array.nbytes, stream)

    def drain(self, device: Device, array: Array, stream: Stream) -> None:
        """Start the copy to the host; `finish` completes it."""
        target = array.ctypes.data if self.staging is None else self.staging.address
        device.to_host(target, self.memory.address, array.nbytes, stream)

    def finish(self, array: Array) -> None:
        if self.staging is not None and array.nbytes:
            ctypes.memmove(array.ctypes.data, self.staging.address, array.nbytes)


class Plan:
    """One bound segment on the device, for one call at a time."""

    def __init__(self, segment: Segment, bound: Bound, sizes: dict[int, int], shared: Shared) -> None:
        device = shared.device
        self.bound, self.sizes, self.stream = bound, sizes, device.stream()
        self.slots = {b: Slot(device, sizes[b]) for b in segment.externals}
        self.arena = device.allocate(bound.plan.arena_bytes)
        self.temporaries = {b: self.arena.address + o for b, o in zip(segment.temporaries, bound.plan.offsets)}
        self.contents: list[Memory] = []

        def place(array: Array) -> int:
            """The address of a constant of the program, uploaded once for all, or of a content of these sizes."""
            if any(array is content for content in bound.contents.values()):
                self.contents.append(shared.copy(array, self.stream))
                return self.contents[-1].address
            return shared.upload(array, self.stream)

        externals = [self.slots[b].memory.address for b in segment.externals]
        moves = segment.moves(bound, place, self.arena.address, externals)
        words = (bound.words + moves).tolist()
        self.calls, self.steps = [], list[KernelStep]()
        for at in bound.steps.tolist():
            own = words[segment.starts[at] : segment.starts[at + 1]]
            step = segment.steps[at]
            launch = launch_of(segment.machine.kernels[step.kernel], own, shared.target)
            if launch.grid[0]:
                self.calls.append((shared.kernels[step.kernel], launch, own))
                self.steps.append(step)
        self._place_maps(shared)
        self._place_workspace(device)
        self.replay = device.record(self.calls, self.stream, shared.overlap)

    def _place_maps(self, shared: Shared) -> None:
        """Gives kernels that read tensor maps the addresses of theirs, which stay as long as the plan."""
        wanted = [(words, map_) for _, launch, words in self.calls for map_ in launch.maps]
        if wanted:
            encoded = b"".join(shared.device.encode(map_) for _, map_ in wanted)
            self.contents.append(shared.copy(np.frombuffer(encoded, np.uint8), self.stream))
            for number, (words, map_) in enumerate(wanted):
                words[map_.word] = self.contents[-1].address + MAP_BYTES * number

    def _place_workspace(self, device: Device) -> None:
        """Memory for what blocks leave to each other: launches run one after another, so that all have the same."""
        wanted = [(words, launch.workspace) for _, launch, words in self.calls if launch.workspace]
        if wanted:
            memory, zeros = device.allocate(max(size for _, size in wanted)), np.zeros(COUNTER_BYTES, np.uint8)
            device.to_device(memory.address, zeros.ctypes.data, zeros.nbytes, self.stream)
            device.wait(self.stream)
            self.contents.append(memory)
            for words, _ in wanted:
                words.append(memory.address)


def launch_of(kernel: Kernel, words: list[int], target: CudaTarget) -> Launch:
    """The shape of a call's launch; a template's blocking words are filled in."""
    if isinstance(kernel, LoopKernel):
        return launch_loops(kernel, words, target)
    return cuda_template.bind(kernel.template, dict(kernel.constants), words, target)


class Shared:
    """What a program and its bodies have in common on a device: loaded kernels, uploaded constants, plans.

    overlap: whether a kernel may be launched while the one before it ends; all of them must wait then.
    """

    def __init__(self, device: Device, kernels: Sequence[Any], target: CudaTarget, number: int = 0,
                 overlap: bool = False) -> None:  # fmt: skip
        self.device, self.kernels, self.target, self.number, self.overlap = device, kernels, target, number, overlap
        self._lock = threading.Lock()
        self._uploaded: dict[int, tuple[Array, Memory]] = {}
        self._plans: OrderedDict[tuple[Any, ...], list[Plan]] = OrderedDict()

    def copy(self, array: Array, stream: Stream) -> Memory:
        """A copy of an array of the host on the device, there when this returns."""
        memory, array = self.device.allocate(array.nbytes), np.ascontiguousarray(array)
        self.device.to_device(memory.address, array.ctypes.data, array.nbytes, stream)
        self.device.wait(stream)
        return memory

    def upload(self, array: Array, stream: Stream) -> int:
        """The device address of a constant."""
        found = self._uploaded.get(id(array))
        if found is None:
            found = self._uploaded[id(array)] = (array, self.copy(array, stream))  # the array lives as long as its key
        return found[1].address

    def acquire(self, segment: Segment, bound: Bound, sizes: dict[int, int]) -> Plan:
        """A plan that nobody else runs; made when there is no idle one."""
        key = (id(bound), *sizes.items())
        with self._lock:
            idle = self._plans.setdefault(key, [])
            self._plans.move_to_end(key)
            while len(self._plans) > KEPT_SHAPES:
                self._plans.popitem(last=False)
            if idle:
                return idle.pop()
            try:
                return Plan(segment, bound, sizes, self)  # it holds `bound`, whose identity is part of the key
            except ResourceLimitError:
                if not any(self._plans.values()):
                    raise
                self._plans.clear()  # idle plans of other sizes may be what fills the memory
                return Plan(segment, bound, sizes, self)

    def release(self, plan: Plan) -> None:
        key = (id(plan.bound), *plan.sizes.items())
        with self._lock:
            idle = self._plans.get(key)
            if idle is not None and len(idle) < KEPT_PLANS:
                idle.append(plan)

    def plans(self) -> list[Plan]:
        """The idle plans, those used last at the end."""
        with self._lock:
            return [plan for idle in self._plans.values() for plan in idle]


class Replay:
    """A program for one set of sizes, to be run again and again: a call starts its recorded launches and does nothing else.

    inputs, outputs: the arrays on the device that the launches read (by name) and write (in model order). Write new numbers
    into the inputs, call, and read the outputs before the next call, all in the order of one stream; a call does not wait.
    """

    def __init__(self, inputs: dict[str, DeviceArray], outputs: list[DeviceArray], start: Callable[[], None],
                 wait: Callable[[], None], kept: Any) -> None:  # fmt: skip
        self.inputs, self.outputs, self._start, self._wait, self._kept = inputs, outputs, start, wait, kept

    def __call__(self) -> None:
        self._start()

    def wait(self) -> None:
        """Return when what was started is done."""
        self._wait()


class DeviceRunner(Runner):
    """A program whose segments run on a device."""

    def __init__(self, program: Program, machine: Machine, shared: Shared, make_step: MakeStep) -> None:
        self.shared, self._streams = shared, list[Stream]()
        super().__init__(program, machine, None, make_step)  # type: ignore[arg-type]

    def for_body(self, body: Program) -> Runner:
        return type(self)(body, self.machine, self.shared, self.make_step)

    def start(self, plan: Plan) -> None:
        """Start the launches of a plan; who measures (debug/profile) wants to know which."""
        plan.replay()

    def _run_segment(self, segment: Segment, frame: Frame, held: Held) -> None:  # noqa: ARG002
        bound, values, device = segment.bound(frame.sizes), frame.values, self.shared.device
        outputs = {b: np.empty(shape, dtype) for b, shape, dtype in bound.outputs}
        given = {b: values[b] for b in segment.externals if values[b] is not None}
        plan = self._plan(segment, bound, given, outputs)
        try:
            for b, array in given.items():
                plan.slots[b].fill(device, array, plan.stream)
            self.start(plan)
            for b, array in outputs.items():
                plan.slots[b].drain(device, array, plan.stream)
            for b in segment.exports:
                values[b] = np.empty(bound.shapes[b], numpy_dtype(self.program.buffers[b]))
                device.to_host(values[b].ctypes.data, plan.temporaries[b], values[b].nbytes, plan.stream)
            device.wait(plan.stream)
            for b, array in outputs.items():
                plan.slots[b].finish(array)
                values[b] = array
        finally:
            self.shared.release(plan)

    def _plan(self, segment: Segment, bound: Bound, given: dict[int, Any], outputs: dict[int, Array]) -> Plan:
        for b in segment.externals:
            if b not in given and b not in outputs:
                raise VerifyError("a kernel reads a buffer that nothing has computed", where=self.program.buffers[b].name)
        sizes = {b: (given[b] if b in given else outputs[b]).nbytes for b in segment.externals}
        return self.shared.acquire(segment, bound, sizes)

    # -- arrays that stay on the device

    @property
    def stays(self) -> bool:
        """Whether a run is one replay, so that inputs and results need never come to the host."""
        return len(self.parts) == 1 and bool(self.segments) and set(self.program.outputs) <= set(self.segments[0].outputs)

    def run_on_device(self, items: Sequence[Any], names: Sequence[str], dtypes: Sequence[Any],
                      check: Callable[[Sequence[Any]], object]) -> list[DeviceArray]:  # fmt: skip
        """As `run`, for a program that `stays`, without waiting for the device; items may also be arrays of the host."""
        device, program = self.shared.device, self.program
        try:
            stream = self._streams.pop()
        except IndexError:
            stream = device.stream()
        try:
            arrays = [foreign(i, d, n, stream) if on_gpu(i) else i for i, n, d in zip(items, names, dtypes)]
            plan, specs = self._plan_of(arrays, check)
            try:
                device.follow(plan.stream, stream)
                for b, array in zip(program.inputs, arrays):
                    if b not in plan.slots:
                        continue
                    if isinstance(array, Foreign):
                        device.on_device(plan.slots[b].memory.address, array.address, plan.sizes[b], plan.stream)
                    else:
                        plan.slots[b].fill(device, array, plan.stream)
                        device.wait(plan.stream)  # the next call may use the same staging memory
                # Owners of inputs may overwrite or free them in their own order, which mostly is this stream's.
                device.follow(LEGACY, plan.stream)
                plan.replay()
                results = []
                for b in program.outputs:
                    memory = device.allocate(plan.sizes[b], plan.stream)
                    device.on_device(memory.address, plan.slots[b].memory.address, plan.sizes[b], plan.stream)
                    results.append(DeviceArray(memory, specs[b].shape, specs[b].dtype, device, plan.stream, self.shared.number))
                return results
            finally:
                self.shared.release(plan)
        finally:
            self._streams.append(stream)

    def hold(self, items: Sequence[Any], names: Sequence[str], dtypes: Sequence[Any], check: Callable[[Sequence[Any]], object],
             handle: int) -> Replay:  # fmt: skip
        """A replay for the sizes of these items, which its inputs hold at first. handle: of the stream it runs on."""
        device, program, number = self.shared.device, self.program, self.shared.number
        stream = device.existing(handle)
        arrays = [foreign(i, d, n, stream) if on_gpu(i) else i for i, n, d in zip(items, names, dtypes)]
        plan, specs = self._plan_of(arrays, check)
        inputs = {}
        for b, name, array in zip(program.inputs, names, arrays):
            if b not in plan.slots:
                continue  # nothing reads it
            slot = plan.slots[b]
            if isinstance(array, Foreign):
                device.on_device(slot.memory.address, array.address, plan.sizes[b], stream)
            else:
                slot.fill(device, array, stream)
            inputs[name] = DeviceArray(slot.memory, array.shape, array.dtype, device, stream, number)
        device.wait(stream)  # the caller may free or change what was copied
        outputs = [DeviceArray(plan.slots[b].memory, specs[b].shape, specs[b].dtype, device, stream, number)
                   for b in program.outputs]  # fmt: skip
        return Replay(inputs, outputs, partial(plan.replay, stream), partial(device.wait, stream), (plan, self.shared))

    def _plan_of(self, arrays: Sequence[Any], check: Callable[[Sequence[Any]], object]) -> tuple[Plan, dict[int, Array]]:
        """The plan for the sizes of arrays, wherever they are, and what its outputs look like."""
        # Checks look at shapes and types only: arrays of the host that have them and no memory stand for the others.
        shown = [np.broadcast_to(np.empty((), a.dtype), a.shape) if isinstance(a, Foreign) else a for a in arrays]
        check(shown)
        sizes: dict[str, int] = {}
        self.shapes.learn(shown, sizes)
        segment = self.segments[0]
        bound = segment.bound(sizes)
        outside = {b: a for b, a in zip(self.program.inputs, shown) if b in segment.externals}
        specs = {b: np.broadcast_to(np.empty((), dtype), shape) for b, shape, dtype in bound.outputs}
        return self._plan(segment, bound, outside, specs), specs
