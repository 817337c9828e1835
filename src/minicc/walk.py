"""The walk from an ONNX model to a callable module.

    ONNX file -> frontend -> graph -> passes -> graph -> lower -> program -> kernels -> module

Everything it does is in the packages it calls. `minicc.api` calls it; loading a saved module is in `minicc.module`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from minicc.debug.dump import Dump
from minicc.errors import MiniccError
from minicc.frontend.model import ImportedModel
from minicc.ir.graph import Graph
from minicc.ir.text import print_graph
from minicc.lower.context import Choices
from minicc.lower.lower import lower
from minicc.lower.program import Program
from minicc.lower.prune import prune_kernels
from minicc.lower.templates import is_anchor, keeps
from minicc.lower.templates.expand import expansion_refusal
from minicc.module import Module, Stages, check_placement
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import Observer, PassContext, Report, run_passes
from minicc.report import CompileReport
from minicc.runtime.code import build_code
from minicc.runtime.rates import rates_of
from minicc.runtime.store import Store
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target, target_of


def build(
    imported: ImportedModel, machine: Target, options: Options, stage: Stages, choices: Choices | None = None
) -> Module:
    """The walk from an imported model on. choices: which ways to go where lowering has several."""
    store = Store(options.store_dir)
    dump = Dump(options)
    dump.graph("import", imported.graph)

    stage("passes")
    report = optimise(imported.graph, options, [dump.graph], machine)
    if report.stopped_after:
        _stop(imported, report.stopped_after)

    stage("lower")
    choices = replace(choices or Choices(), rates=cache(lambda: rates_of(machine, store)))
    notes = {"graph": print_graph(imported.graph)}
    program = _named(prune_kernels(lower(imported.graph, machine, options, consume=True, choices=choices)), imported)
    dump.program(program)
    check_placement(program, options)

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
    row = 0 if isinstance(target, CudaTarget) else target.vector_width
    context = PassContext(
        options, keeps(target), is_anchor, expansion_refusal(target), zero_points=cpu, resize_by_axis=cpu, row=row, widen=cpu
    )
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


def _stop(imported: ImportedModel, name: str) -> None:
    print(print_graph(imported.graph))
    raise MiniccError(
        f"compilation stopped after pass {name!r}", hint="as options.stop_after asks; unset it to go on"
    )
