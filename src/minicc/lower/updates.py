"""Outputs that are inputs with some elements written: caches that a caller may have updated in place.

The first step that writes such an output copies the input, or what is kept of it; others write over that (ScatterND and its
kind). Where both are one array the copy is left out, and what the others do not write stays as it was. Whoever reads the
input has to come before they write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minicc.lower.program import KernelStep, Program, Update


def updates_of(program: Program, updated: Mapping[int, int]) -> tuple[Update, ...]:
    """The outputs that update inputs, each with why it may not be done in place after all.

    updated: the input buffer that an output buffer is a copy of before something is written over it.
    """
    found = []
    for number, buffer in enumerate(program.outputs):
        source = updated.get(buffer)
        writers = writers_of(program, buffer)
        if source in program.inputs and len(writers) > 1:
            reason = obstacle(program, source, writers)
            found.append(Update(program.inputs.index(source), number, writers[0], reason))
    return tuple(found)


def writers_of(program: Program, buffer: int) -> list[int]:
    """The steps that write a buffer, in order."""
    return [at for at, step in enumerate(program.steps) if isinstance(step, KernelStep) and buffer in step.writes]


def obstacle(program: Program, source: int, writers: Sequence[int]) -> str:
    """Why an input buffer cannot lie in the memory that these steps write, the first of them with a copy of it; or ""."""
    for step in program.steps:
        if not isinstance(step, KernelStep):
            return f"{_named(step.op, step.origin)} does not run in a kernel"
        if step.guards:
            return f"{_named('a step', step.origin)} is in a branch"
    for step in program.steps[writers[1] :]:
        assert isinstance(step, KernelStep)
        if source in step.reads or any(word.buffer == source for word in step.words):
            return f"{_named('a kernel', step.origin)} reads the old contents after new ones are written"
    return ""


def _named(what: str, origin: Sequence[str]) -> str:
    return f"{what} of {', '.join(origin)}" if origin else what
