"""`tune`: a model compiled in several ways, its steps timed on this machine, the faster way taken for each layer.

Lowering names the ways it leaves open (`Lowering.choose`): the tile of a Winograd convolution or the direct sum, the width of
packed panels; for CUDA the tile of a product or convolution and into how many parts its depth is cut. Each round compiles the
model with the next way everywhere, so that there are as many rounds as the layer with the most ways has, and times all steps
beside those of the usual module. A way is taken where its steps were clearly faster; the module of all that were taken
replaces the usual one only when whole runs are faster, too.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from minicc.debug.inputs import random_inputs
from minicc.debug.profile import profile
from minicc.errors import MiniccError
from minicc.frontend.model import ImportedModel
from minicc.lower.context import Choices
from minicc.module import Module, Stages
from minicc.runtime.cuda.engine import DeviceRunner
from minicc.walk import build

Layers = tuple[str, ...]
# A way must save so much of the time of its layer, to be sure that it is not noise; runs and seconds of a measurement.
CLEARLY = 0.95
RUNS, SECONDS = 5, 1.0


@dataclass(frozen=True)
class Gain:
    """A way, and the seconds of its steps beside those of the usual way."""

    way: str
    before: float
    after: float

    @property
    def share(self) -> float:
        return self.after / self.before

    def __str__(self) -> str:
        return f"{self.way}, {self.after * 1e6:.0f} us, is faster by {(self.before - self.after) * 1e6:.0f} us"


def tune(
    usual: Module, ways: Mapping[Layers, Sequence[str]], load: Callable[[], ImportedModel], stage: Stages
) -> Module:
    """The fastest module found within options.tune_seconds; the usual one where nothing is faster or nothing can be timed.

    ways: what lowering left open in the usual module, the way it went first. load: imports the model; called for every
    compilation, since compiling consumes a graph. A machine that cannot run the target times nothing and says so, once.
    """
    started, options = time.perf_counter(), usual.options
    quiet = options.override(dump="", debug=0)

    def compiled(picked: Mapping[Layers, str]) -> Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all was said for the usual module
            return build(load(), usual.target, quiet, Stages(None), Choices(picked))

    rounds = max(map(len, ways.values()), default=1) - 1
    missing = usual.target.missing_features()
    if missing:
        text = f"tune=True has timed nothing for {usual.target.name!r}: this machine lacks {', '.join(missing)}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return usual
    stage("tune")
    best: dict[Layers, Gain] = {}
    try:
        inputs = random_inputs(usual.inputs)
        for number in range(1, rounds + 1):
            stage.progress_of("tune", number - 1, rounds)
            if time.perf_counter() - started > options.tune_seconds:
                break
            picked = {layers: names[number] for layers, names in ways.items() if number < len(names)}
            for layers, (before, after) in _times(usual, compiled(picked), inputs, picked).items():
                if after < min(CLEARLY * before, best[layers].share * before if layers in best else before):
                    best[layers] = Gain(picked[layers], before, after)
        tuned = compiled({layers: gain.way for layers, gain in best.items()}) if best else usual
        if tuned is usual or not _faster(usual, tuned, inputs):
            tuned, best = usual, {}
    except MiniccError:  # there are no random values for its inputs, or it does not run with them
        tuned, best = usual, {}
    lines = tuple(f"{', '.join(layers)}: {gain} than {ways[layers][0]}" for layers, gain in best.items())
    module = Module(
        tuned.program, tuned.code, tuned.target, options, pass_runs=usual.pass_runs, notes=tuned.notes,
        report=replace(usual.report, seconds=stage.finish(), tuned=lines),
    )  # fmt: skip
    module.prepare()
    return module


def _times(
    usual: Module, other: Module, inputs: Sequence[Any], wanted: Mapping[Layers, str]
) -> dict[Layers, tuple[float, float]]:
    """Least seconds of the steps of some layers in both modules, measured in turns."""
    found: dict[Layers, tuple[float, float]] = {}
    end = time.perf_counter() + SECONDS
    for turn in range(100 * RUNS):
        sums: tuple[dict[Layers, float], dict[Layers, float]] = ({}, {})
        for module, times in zip((usual, other), sums):
            for row in profile(module, inputs, repeats=1, warm=1).rows:
                if row.layers in wanted:
                    times[row.layers] = times.get(row.layers, 0.0) + row.seconds
        for layers in sums[0].keys() & sums[1].keys():
            before, after = found.get(layers, (float("inf"), float("inf")))
            found[layers] = (min(before, sums[0][layers]), min(after, sums[1][layers]))
        if turn + 1 >= RUNS and time.perf_counter() > end:
            break
    return found


def _faster(usual: Module, tuned: Module, inputs: Sequence[Any]) -> bool:
    """Whether whole runs of the second module take less time, measured in turns."""
    runs, times = (_run_of(usual, inputs), _run_of(tuned, inputs)), (list[float](), list[float]())
    end = time.perf_counter() + SECONDS
    while len(times[0]) < RUNS or time.perf_counter() < end:
        for run, own in zip(runs, times):
            run()  # warm its weights
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return median(times[1]) < median(times[0])


def _run_of(module: Module, inputs: Sequence[Any]) -> Callable[[], object]:
    """What runs a module once; on a GPU, if it can be, without copies of inputs and outputs, which would hide the difference."""
    runner = module.runner
    if not isinstance(runner, DeviceRunner) or not runner.stays:
        return lambda: module.run_items(inputs)
    replay = module.replay({port.name: item for port, item in zip(module.inputs, inputs)})

    def run() -> None:
        replay()
        replay.wait()

    return run
