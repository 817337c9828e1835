"""A compiled model as its user sees it: call it, save it, load it, look inside.

Needs neither onnx nor Numba: loading a saved module brings everything along. Compiling is in `minicc.api`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from minicc.debug import levels
from minicc.errors import PlacementError
from minicc.lower.program import HostStep, Program
from minicc.options import Options
from minicc.report import CompileReport
from minicc.runtime import artifact
from minicc.runtime.artifact import Saved
from minicc.runtime.code import Code
from minicc.runtime.module import CompiledModule, steps_of
from minicc.runtime.store import Store
from minicc.targets.parse import Target

if TYPE_CHECKING:
    from minicc.debug.explain import Explanation
    from minicc.debug.profile import Profile

# progress(stage, done, of): what is being done; `of` is 0 where the amount of work is not known.
Progress = Callable[[str, int, int], None]


class Module(CompiledModule):
    """A compiled model: call it, save it, look inside."""

    def __init__(
        self,
        program: Program,
        code: Code,
        target: Target,
        options: Options,
        *,
        pass_runs: int = 0,
        notes: Mapping[str, Any] | None = None,
        report: CompileReport | None = None,
        others: tuple[Saved, ...] = (),
    ) -> None:
        super().__init__(program, code, target, options, pass_runs=pass_runs, notes=notes)
        self.report, self.others = report or CompileReport(), others  # `others`: of the same model for other targets

    def run_items(self, items: Any, out: Any = None) -> list[Any]:
        """All outputs for inputs in order. out: as in a call."""
        if self.options.debug >= levels.RUNS:
            from minicc.debug.profile import profile

            levels.show(levels.RUNS, self.options, str(profile(self, items, repeats=1, warm=0)))
        return super().run_items(items, out)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to a file that `minicc.load` reads. Raises ArtifactError."""
        artifact.save(path, self.saved(), self.store)

    def saved(self) -> Saved:
        """What a file of this module holds."""
        notes = {"report": asdict(self.report), **self.notes}
        return Saved(self.program, self.code, self.target, self.options, self.pass_runs, notes, self.others)

    def explain(self) -> Explanation:
        """Per kernel: which layers, which tier, why not a faster one, work and traffic."""
        from minicc.debug.explain import explain

        return explain(self)

    def profile(self, *args: Any, repeats: int = 10, **named: Any) -> Profile:
        """Per kernel call: time, share, GFLOP/s, GB/s, for the given inputs (random ones by default)."""
        from minicc.debug.profile import profile

        items = self.signature.order(args, named) if args or named else None
        return profile(self, items, repeats=repeats)

    def source(self, layer: str = "") -> str:
        """The generated texts of a layer's kernels, by ONNX node name; of all kernels for the empty name."""
        return self.explain().source(layer)


class HostNodesWarning(UserWarning):
    """Some nodes of a model run on the host, in numpy."""


def check_placement(program: Program, options: Options) -> None:
    """Say which nodes have no kernel: an error in strict mode, else one warning."""
    found = [step for step in steps_of(program) if isinstance(step, HostStep) and step.op != "Raise"]
    if not found:
        return
    shown = [f"{s.op} {', '.join(s.origin)}: {s.reason or 'no kernel'}" for s in found[:10]]
    more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
    what = f"{len(found)} node(s) of {program.name!r} run on the host, in numpy"
    if options.strict:
        raise PlacementError(
            what, why="; ".join([*shown, *more]), hint="compile without strict=True to accept this"
        )
    warnings.warn("\n  ".join([what + ":", *shown, *more]), HostNodesWarning, stacklevel=4)


def load(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    options: Options | None = None,
    progress: Progress | None = None,
    **option_overrides: Any,
) -> Module:
    """Load a module written by `Module.save`; kernels are compiled only where the file's do not fit.

    Of several variants it is the best that this machine can run.

    trust: use the machine code in the file although it is not signed by this user. Only for files from a
    source that may run code on this machine. Raises ArtifactError for a file that is damaged or not valid.
    """
    options = (options or Options.from_env()).override(**option_overrides)
    store = Store(options.store_dir)
    stage = Stages(progress)
    stage("load")
    saved = artifact.read(path, store, options, trust=trust, progress=stage.kernels)
    report = CompileReport(seconds=stage.finish())
    return Module(
        saved.program,
        saved.code,
        saved.target,
        saved.options,
        pass_runs=saved.pass_runs,
        notes=saved.notes,
        report=report,
        others=saved.others,
    )


class Stages:
    """Times the stages of a compilation and tells who wants to know."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.seconds = progress, dict[str, float]()
        self.current, self.started = "", 0.0

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.started
        self.current, self.started = name, now
        if self.progress is not None and name:
            self.progress(name, 0, 0)

    def kernels(self, done: int, of: int) -> None:
        """One more kernel is compiled."""
        self.progress_of("kernels", done, of)

    def progress_of(self, stage: str, done: int, of: int) -> None:
        """So much of the stage is done."""
        if self.progress is not None:
            self.progress(stage, done, of)

    def finish(self) -> dict[str, float]:
        self("")
        return self.seconds
