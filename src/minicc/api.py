"""`compile`: a model to a callable module, by the walk (minicc.walk), or kept from an earlier process (runtime/kept).

The walk is imported when it is needed: a kept module needs neither onnx nor the passes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicc.module import HostNodesWarning, Module, Progress, Stages, check_placement
from minicc.options import Options
from minicc.report import CompileReport
from minicc.runtime import kept
from minicc.runtime.artifact import Saved
from minicc.runtime.store import Store
from minicc.targets.parse import fitting, identity_of, targets_of

if TYPE_CHECKING:
    import onnx

__all__ = ["HostNodesWarning", "Module", "compile"]


def compile(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    target: str = "cpu",
    *,
    options: Options | None = None,
    progress: Progress | None = None,
    **option_overrides: Any,
) -> Module:
    """Compile an ONNX model: a path, its bytes, or a ModelProto.

    target: "cpu", "cuda", a model of either ("cpu:avx2", "cuda:sm_90"), or several ("cuda:compute_80+sm_90"): then the module is
    for the best that this machine can run, and its files hold all of them.
    options: None takes the defaults and the environment; single options may be given as keywords. The module of a path is
    kept for the next process (options.keep_bytes). Whatever is wrong with the model, the options or the target is a MiniccError.
    """
    options = (options or Options.from_env()).override(**option_overrides)
    stage = Stages(progress)
    store, place = Store(options.store_dir), None
    if isinstance(model, str | os.PathLike):
        stage("load")
        place = kept.place_of(Path(model), identity_of(target), store, options)
        saved = kept.find(place, store, options) if place else None
        if saved is not None:
            return _module(saved, stage)
    from minicc import walk
    from minicc.frontend.model import load_model
    from minicc.lower.context import Choices

    machines, variants = targets_of(target), list[Module]()
    for machine in machines:
        stage("import")
        imported, choices = load_model(model, options), Choices()
        variants.append(walk.build(imported, machine, options, stage, choices))
        if options.tune:
            from minicc.tune import tune

            variants[-1] = tune(variants[-1], choices.open, lambda: load_model(model, options), stage)
    module = variants.pop(fitting(machines))
    module.others = tuple(variant.saved() for variant in variants)
    if place:
        kept.keep(place, module.saved(), imported.external, store)
    return module


def _module(saved: Saved, stage: Stages) -> Module:
    """The module that an earlier process made."""
    check_placement(saved.program, saved.options)
    notes = {name: note for name, note in saved.notes.items() if name not in ("report", "key", "external")}
    report = replace(CompileReport.of_notes(saved.notes.get("report")), seconds=stage.seconds)
    module = Module(
        saved.program, saved.code, saved.target, saved.options, pass_runs=saved.pass_runs, notes=notes, report=report,
        others=saved.others,
    )  # fmt: skip
    if not saved.target.missing_features():
        module.prepare()
    stage.finish()
    return module
