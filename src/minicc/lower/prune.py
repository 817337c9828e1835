"""Removes kernels that no step calls (in-place variants replace some), so that nobody compiles them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from minicc.lower.program import ControlStep, KernelStep, Program, Step


def prune_kernels(program: Program) -> Program:
    """The program with only the kernels it calls, numbered in their old order."""
    used = sorted(set(_calls(program)))
    if len(used) == len(program.kernels):
        return program
    numbers = {old: new for new, old in enumerate(used)}
    return replace(_renumbered(program, numbers), kernels=tuple(program.kernels[k] for k in used))


def _calls(program: Program) -> Iterator[int]:
    for step in program.steps:
        if isinstance(step, KernelStep):
            yield step.kernel
        elif isinstance(step, ControlStep):
            for body in step.bodies:
                yield from _calls(body)


def _renumbered(program: Program, numbers: Mapping[int, int]) -> Program:
    return replace(program, steps=tuple(_step(step, numbers) for step in program.steps))


def _step(step: Step, numbers: Mapping[int, int]) -> Step:
    if isinstance(step, KernelStep):
        return replace(step, kernel=numbers[step.kernel])
    if isinstance(step, ControlStep):
        return replace(step, bodies=tuple(_renumbered(body, numbers) for body in step.bodies))
    return step
