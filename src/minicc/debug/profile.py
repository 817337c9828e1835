"""`profile`: where the time of a run goes, step by step.

Every row of the call table is given to the executor alone and timed, with all its threads; host steps are timed whole, control
steps through their bodies, batches that are run some rows at a time turn by turn. The sum is a little above an undisturbed run,
which is measured as well. On a GPU events between the kernels of a replay tell the times, and an undisturbed run also copies
inputs and outputs. The module itself is not disturbed: measuring uses runners of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minicc.debug.inputs import random_inputs
from minicc.errors import InputError, MiniccError
from minicc.ir.dims import evaluate
from minicc.lower.program import ControlStep, KernelStep
from minicc.lower.text import tier_of
from minicc.runtime.bind import Segment
from minicc.runtime.context import Bound, Context
from minicc.runtime.control import ControlCall
from minicc.runtime.cuda.array import on_gpu, to_host
from minicc.runtime.cuda.engine import DeviceRunner, Plan
from minicc.runtime.engine import Frame, HostRunner, Other, Runner, Shapes
from minicc.runtime.module import CompiledModule


@dataclass(frozen=True)
class Timing:
    """One step: median seconds per run (all its calls within a run added up), and what it achieves."""

    name: str
    tier: str
    layers: tuple[str, ...]
    calls: int
    seconds: float
    share: float
    gflops: float
    gbytes: float


@dataclass(frozen=True)
class Event:
    """One measured call of the last run: start and length in seconds from the run's start."""

    name: str
    tier: str
    layers: tuple[str, ...]
    start: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Timings, slowest first. whole: median seconds of an undisturbed run."""

    name: str
    rows: tuple[Timing, ...]
    whole: float
    threads: int
    events: tuple[Event, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": self.whole,
            "threads": self.threads,
            "steps": [asdict(r) for r in self.rows],
        }

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last run for chrome://tracing or ui.perfetto.dev."""
        events = [
            {
                "name": e.name,
                "cat": e.tier,
                "ph": "X",
                "pid": 1,
                "tid": 1,
                "ts": e.start * 1e6,
                "dur": e.seconds * 1e6,
                "args": {"layers": ", ".join(e.layers), "tier": e.tier},
            }
            for e in self.events
        ]
        try:
            Path(path).write_text(
                json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}), encoding="utf-8"
            )
        except OSError as error:
            raise InputError(f"{path} cannot be written", why=str(error)) from error

    def __str__(self) -> str:
        total = sum(r.seconds for r in self.rows)
        lines = [
            f"{self.name}: {self.whole * 1e3:.3f} ms per run on {self.threads} thread(s), "
            f"{total * 1e3:.3f} ms step by step",
            f"{'ms':>10} {'share':>6} {'GFLOP/s':>8} {'GB/s':>7} {'calls':>5}  "
            f"{'tier':<12} {'kernel':<32} layers",
        ]
        for r in self.rows:
            rates = f"{r.gflops:>8.1f} {r.gbytes:>7.1f}"
            layers = ", ".join(r.layers[:3]) + (" ..." if len(r.layers) > 3 else "")
            lines.append(
                f"{r.seconds * 1e3:>10.4f} {r.share:>6.1%} {rates} {r.calls:>5}  "
                f"{r.tier:<12} {r.name[:32]:<32} {layers}"
            )
        return "\n".join(lines)


@dataclass
class _Record:
    """Sums over the runs for one step."""

    name: str
    tier: str
    layers: tuple[str, ...]
    seconds: list[float]
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


class _Recorder:
    """Where the measuring runners leave their times; `run` numbers the current run."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = symbols
        self.records: dict[int, _Record] = {}
        self.events: list[Event] = []
        self.started = 0.0

    def start(self) -> None:
        self.events = []
        self.started = time.perf_counter()
        for record in self.records.values():
            record.seconds.append(0.0)
            record.calls, record.flops, record.bytes = 0, 0.0, 0.0

    def add(
        self,
        step: KernelStep | Other,
        name: str,
        tier: str,
        start: float,
        seconds: float,
        sizes: Mapping[str, int],
    ) -> None:
        record = self.records.setdefault(id(step), _Record(name, tier, step.origin, [0.0]))
        record.seconds[-1] += seconds
        record.calls += 1
        if isinstance(step, KernelStep):
            record.flops += _number(step.flops, sizes)
            record.bytes += _number(step.bytes, sizes)
        self.events.append(Event(name, tier, step.origin, start - self.started, seconds))


def profile(
    module: CompiledModule,
    items: Sequence[Any] | None = None,
    *,
    repeats: int = 10,
    warm: int = 2,
    sizes: Mapping[str, int] | None = None,
) -> Profile:
    """Time every step of a module over some runs.

    items: inputs in order; None takes random ones for the given sizes of symbols. Raises InputError as a call
    does.
    """
    given = random_inputs(module.inputs, sizes) if items is None else [to_host(i) if on_gpu(i) else i for i in items]
    arrays = module.signature.arrays(given)
    module.signature.check(arrays)
    recorder = _Recorder(module.code.symbols)
    measuring = _measuring(module.runner, recorder, module)
    parts = module.parts(arrays)
    for _ in range(warm):
        CompiledModule.run_items(module, arrays)
    for _ in range(repeats):
        recorder.start()
        for part in parts:
            measuring.run(part, {})
    whole = []
    for _ in range(repeats):
        start = time.perf_counter()
        CompiledModule.run_items(module, arrays)
        whole.append(time.perf_counter() - start)
    return Profile(
        module.program.name, _timings(recorder), median(whole), module.machine.threads, tuple(recorder.events)
    )


def _measuring(usual: Runner, recorder: _Recorder, module: CompiledModule) -> Runner:
    """A runner of the same program that leaves its times with the recorder; those of its bodies are of the same class."""
    if isinstance(usual, DeviceRunner):

        class OnDevice(_MeasuringDevice):
            record = recorder

        return OnDevice(module.program, usual.machine, usual.shared, module.make_step)

    class Measuring(_MeasuringRunner):
        record = recorder

    return Measuring(module.program, usual.machine, usual.executor, module.make_step)


class _MeasuringSteps(Runner):
    """A runner that measures its host steps; loops come turn by turn."""

    native_turns = False
    record: _Recorder

    def run_step(self, step: Other, run: HostRunner | ControlCall, shapes: Shapes, frame: Frame) -> None:  # type: ignore[override]
        start = time.perf_counter()
        super().run_step(step, run, shapes, frame)
        if not isinstance(step, ControlStep):  # what happens in bodies is measured there
            self.record.add(step, step.op, "host", start, time.perf_counter() - start, frame.sizes)

    def note(self, step: KernelStep, start: float, seconds: float, sizes: Mapping[str, int]) -> None:
        """One call of a kernel."""
        self.record.add(step, self.record.symbols[step.kernel], tier_of(step, self.machine.kernels), start, seconds, sizes)


class _MeasuringRunner(_MeasuringSteps):
    """One that gives the executor one step at a time."""

    def execute(self, segment: Segment, bound: Bound, context: Context) -> None:
        last = 0
        for at, rows in itertools.groupby(bound.steps.tolist()):
            first, last = last, last + len(list(rows))
            start = time.perf_counter()
            self.executor.run(context.rows[first:last])
            self.note(segment.steps[at], start, time.perf_counter() - start, bound.sizes)


class _MeasuringDevice(_MeasuringSteps, DeviceRunner):
    """One that asks the device how long each kernel of a replay takes."""

    def start(self, plan: Plan) -> None:
        begin = time.perf_counter()
        for step, spent in zip(plan.steps, self.shared.device.times(plan.calls, plan.stream)):
            self.note(step, begin, spent, plan.bound.sizes)
            begin += spent


def _timings(recorder: _Recorder) -> tuple[Timing, ...]:
    medians = {key: median(record.seconds) for key, record in recorder.records.items()}
    total = sum(medians.values()) or 1.0
    rows = []
    for key, r in recorder.records.items():
        seconds = medians[key]
        rate = 1e-9 / seconds if seconds else 0.0
        rows.append(
            Timing(
                r.name, r.tier, r.layers, r.calls, seconds, seconds / total, r.flops * rate, r.bytes * rate
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _number(amount: Any, sizes: Mapping[str, int]) -> float:
    try:
        return float(evaluate(amount, sizes))
    except (KeyError, MiniccError):
        return 0.0
