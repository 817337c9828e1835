"""`compile`: the walk from an ONNX model to a callable module.

    ONNX file -> frontend -> graph -> passes -> graph -> lower -> program -> kernels -> module

Everything it does is in the packages it calls; loading a saved module is in `minicc.module`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicc.debug.dump import Dump
from minicc.errors import MiniccError, PlacementError
from minicc.frontend.model import ImportedModel, load_model
from minicc.ir.graph import Graph
from minicc.ir.text import print_graph
from minicc.lower.lower import lower
from minicc.lower.program import HostStep, Program
from minicc.lower.prune import prune_kernels
from minicc.lower.templates import is_anchor, keeps
from minicc.lower.templates.expand import expansion_refusal
from minicc.module import CompileReport, Module, Progress, Stages
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import Observer, PassContext, Report, run_passes
from minicc.runtime.code import build_code
from minicc.runtime.module import steps_of
from minicc.runtime.store import Store
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target, target_of

if TYPE_CHECKING:
    import onnx

__all__ = ["HostNodesWarning", "Module", "compile"]


class HostNodesWarning(UserWarning):
    """Some nodes of a model run on the host, in numpy."""


def compile(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    target: str = "cpu",
    *,
    options: Options | None = None,
    progress: Progress | None = None,
    **option_overrides: Any,
) -> Module:
    """Compile an ONNX model: a path, its bytes, or a ModelProto.

    options: None takes the defaults and the environment; single options may be given as keywords. Whatever is
    wrong with the model, the options or the target is a MiniccError.
    """
    options = (options or Options.from_env()).override(**option_overrides)
    stage = Stages(progress)
    stage("import")
    return build(load_model(model, options), target, options, stage)


def build(imported: ImportedModel, target: str, options: Options, stage: Stages) -> Module:
    """The walk from an imported model on."""
    machine = target_of(target)
    store = Store(options.store_dir)
    dump = Dump(options)
    dump.graph("import", imported.graph)

    stage("passes")
    report = optimise(imported.graph, options, [dump.graph], machine)
    if report.stopped_after:
        _stop(imported, report.stopped_after)

    stage("lower")
    notes = {"graph": print_graph(imported.graph)}
    program = _named(prune_kernels(lower(imported.graph, machine, options, consume=True)), imported)
    dump.program(program)
    _check_placement(program, options)

    stage("kernels")
    code = build_code(program.kernels, machine, store, stage.kernels)
    dump.kernels(code, machine)

    stage("load")
    runs = sum(row.runs for row in report.rows)
    full = CompileReport(report.rows, stage.seconds, imported.warnings)
    module = Module(program, code, machine, options, pass_runs=runs, notes=notes, report=full)
    if not machine.missing_features():
        module.prepare()
    stage.finish()
    dump.report(asdict(full), module)
    return module


def optimise(graph: Graph, options: Options, observers: Sequence[Observer] = (), target: Target | None = None) -> Report:
    """Run the default passes on a graph, in place; no target is this machine's CPU."""
    target = target or target_of("cpu")
    cpu = not isinstance(target, CudaTarget)
    context = PassContext(options, keeps(target), is_anchor, expansion_refusal(target), zero_points=cpu, resize_by_axis=cpu)
    return run_passes(graph, default_pipeline(options), options, observers, context)


def _named(program: Program, imported: ImportedModel) -> Program:
    """The program under the model's own names."""
    name = imported.graph.name if imported.name in ("bytes", "ModelProto") else Path(imported.name).stem
    return replace(
        program,
        name=name,
        input_names=tuple(a.name for a in imported.inputs),
        output_names=tuple(a.name for a in imported.outputs),
    )


def _check_placement(program: Program, options: Options) -> None:
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
    warnings.warn("\n  ".join([what + ":", *shown, *more]), HostNodesWarning, stacklevel=3)


def _stop(imported: ImportedModel, name: str) -> None:
    print(print_graph(imported.graph))
    raise MiniccError(
        f"compilation stopped after pass {name!r}", hint="as options.stop_after asks; unset it to go on"
    )
