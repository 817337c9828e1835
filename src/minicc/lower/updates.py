"""Outputs that are inputs with some elements written: caches that a caller may have updated in place.

Such an output is copied from its input whole and then written to in parts (ScatterND and its kind). Where the input is read
nowhere behind the copy, both may be one memory, and the copy is left out. That is found in the finished program.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicc.lower.inplace import operand_places
from minicc.lower.kernel import Kernel, LoopKernel
from minicc.lower.program import KernelStep, Program


@dataclass(frozen=True)
class Update:
    """Numbers of an output and of the input that it may share memory with, and of the step that copies."""

    output: int
    input: int
    copy: int


def updates_of(program: Program) -> tuple[Update, ...]:
    """What may be updated in place, in a program of kernel steps only; empty for others."""
    steps = [step for step in program.steps if isinstance(step, KernelStep)]
    if len(steps) < len(program.steps):
        return ()
    found: list[Update] = []
    for number, output in enumerate(program.outputs):
        touching = [at for at, step in enumerate(steps) if output in step.writes or output in step.reads]
        if not touching or program.outputs.count(output) > 1:
            continue
        at = touching[0]
        source = _copied(program, steps[at], program.kernels[steps[at].kernel], output)
        if source is None or source in program.outputs or any(source in step.reads for step in steps[at + 1 :]):
            continue
        if program.inputs.count(source) == 1 and source not in [program.inputs[u.input] for u in found]:
            found.append(Update(number, program.inputs.index(source), at))
    return tuple(found)


def _copied(program: Program, step: KernelStep, kernel: Kernel, output: int) -> int | None:
    """The input that a step copies to `output` from its first element to its last, and nothing else; None if it does not."""
    if not isinstance(kernel, LoopKernel) or step.guards or step.writes != (output,) or len(step.reads) != 1:
        return None
    source, body = step.reads[0], kernel.body
    if source not in program.inputs or len(body.stores) != 1 or body.stores[0].value.op != "load":
        return None
    mine, theirs = program.buffers[output], program.buffers[source]
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape or len(body.operands) != 2:
        return None
    (_, *first), (_, *second) = operand_places(body, step.words, kernel.rank)
    return source if first == second else None
