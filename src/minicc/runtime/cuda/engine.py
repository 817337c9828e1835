"""Running a program's segments on a device: the engine's parts and frames, with memory of the device.

Per segment and bound sizes there is one `Plan`: words with device addresses, an arena, a slot for each array that comes
from or goes outside, and the launches, recorded once. A run copies inputs to their slots, replays, and copies
results out. Host and control steps run as on the CPU, on the copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from minicc.codegen.cuda_loops import frame as frame_of
from minicc.errors import VerifyError
from minicc.kernels import cuda_template
from minicc.kernels.cuda_launch import Launch, launch_elements, launch_rows
from minicc.lower.kernel import Kernel, LoopKernel
from minicc.lower.program import Program
from minicc.runtime.bind import Array, Bound, Machine, Segment, numpy_dtype
from minicc.runtime.cuda.driver import Device
from minicc.runtime.engine import Frame, Held, MakeStep, Runner
from minicc.targets.cuda import CudaTarget


class Plan:
    """One bound segment on the device; runs of it take turns."""

    def __init__(self, segment: Segment, bound: Bound, sizes: dict[int, int], upload: Callable[[Array], int],
                 device: Device, kernels: list[Any], target: CudaTarget) -> None:  # fmt: skip
        self.lock = threading.Lock()
        self.sizes = sizes
        self.slots = {b: device.allocate(sizes[b]) for b in segment.externals}
        arena = device.allocate(bound.plan.arena_bytes)
        self.temporaries = {b: arena + o for b, o in zip(segment.temporaries, bound.plan.offsets)}
        moves = segment.moves(bound, upload, arena, [self.slots[b] for b in segment.externals])
        words = (bound.words + moves).tolist()
        calls = []
        for at in bound.steps.tolist():
            own = words[segment.starts[at] : segment.starts[at + 1]]
            number = segment.steps[at].kernel
            launch = launch_of(segment.machine.kernels[number], own, target)
            if launch.grid[0]:
                calls.append((kernels[number], launch, own))

        def start() -> None:
            for kernel, launch, own in calls:
                device.launch(kernel, launch, own)

        self.replay = device.record(start) if calls else start


def launch_of(kernel: Kernel, words: list[int], target: CudaTarget) -> Launch:
    """The shape of a call's launch; a template's blocking words are filled in."""
    if not isinstance(kernel, LoopKernel):
        return cuda_template.bind(kernel.template, dict(kernel.constants), words, target)
    chosen = frame_of(kernel)
    extents = words[: kernel.rank]
    count = int(np.prod(extents, dtype=np.int64))
    if chosen == "elements":
        return launch_elements(count, target)
    if chosen == "rows":
        return launch_rows(count // extents[-1] if count else 0, extents[-1], target)
    return launch_rows(count, target.multiprocessors, target)


class DeviceRunner(Runner):
    """A program whose segments run on a device."""

    def __init__(self, program: Program, machine: Machine, device: Device, kernels: list[Any], make_step: MakeStep) -> None:
        self.device, self.kernels = device, kernels
        super().__init__(program, machine, None, make_step)  # type: ignore[arg-type]
        self.plans: dict[int, Plan] = {}
        self.uploaded: dict[int, tuple[Array, int]] = {}

    def for_body(self, body: Program) -> Runner:
        return DeviceRunner(body, self.machine, self.device, self.kernels, self.make_step)

    def upload(self, array: Array) -> int:
        """The device address of a constant; uploaded once."""
        found = self.uploaded.get(id(array))
        if found is None:
            address = self.device.allocate(array.nbytes)
            self.device.to_device(address, np.ascontiguousarray(array))
            found = self.uploaded[id(array)] = (array, address)  # the array lives as long as its key
        return found[1]

    def _run_segment(self, segment: Segment, frame: Frame, held: Held) -> None:  # noqa: ARG002
        bound, values = segment.bound(frame.sizes), frame.values
        outputs = {b: np.empty(shape, dtype) for b, shape, dtype in bound.outputs}
        given = {b: values[b] for b in segment.externals if values[b] is not None}
        for b in segment.externals:
            if b not in given and b not in outputs:
                raise VerifyError("a kernel reads a buffer that nothing has computed", where=self.program.buffers[b].name)
        sizes = {b: (given[b] if b in given else outputs[b]).nbytes for b in segment.externals}
        plan = self.plans.get(id(bound))
        if plan is None or plan.sizes != sizes:
            assert isinstance(self.machine.target, CudaTarget)
            plan = Plan(segment, bound, sizes, self.upload, self.device, self.kernels, self.machine.target)
            self.plans[id(bound)] = plan
        with plan.lock:
            for b, array in given.items():
                self.device.to_device(plan.slots[b], array)
            plan.replay()
            for b, array in outputs.items():
                self.device.to_host(array, plan.slots[b])
                values[b] = array
            for b in segment.exports:
                array = np.empty(bound.shapes[b], numpy_dtype(self.program.buffers[b]))
                self.device.to_host(array, plan.temporaries[b])
                values[b] = array
